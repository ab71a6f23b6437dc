"""Whether the probabilities can be taken literally: reliability, expected calibration error, and the temperature that
corrects them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.special import log_expit, logit

from borders import escaping
from evaluation.curves import BLUE, ORANGE, new_figure
from storage.files import atomic_write

EDGES = np.array([0.0, 0.01, *np.arange(1, 10) / 10, 1.0])  # of the bins; the first holds the sure background
COLUMNS = 3  # of a bin: pixels, sum of the probability, tumour pixels
REACH, STEPS = 16.0, 3_200  # range and bins of the fitted logits; float32 has none beyond
TEMPERATURES = (0.25, 4.0)  # bounds; a value beyond them means a broken model, not a calibration


def reliability(probabilities: np.ndarray, truth: np.ndarray) -> list[list[float]]:
    """For each bin of the probability: its pixels, the sum of their probabilities and the number of tumour pixels.

    probabilities: float32, 0 to 1; truth: the same shape, any dtype, non-zero is tumour.
    """
    values: np.ndarray = probabilities.ravel().astype(np.float64)
    tumour = truth.ravel() != 0
    bins = np.digitize(values, EDGES[1:-1])
    sums = [np.bincount(bins, weights, len(EDGES) - 1) for weights in (None, values, tumour.astype(float))]
    return np.stack(sums, axis=1).tolist()


def calibration(tables: Iterable[list[list[float]]]) -> dict:
    """The calibration over the pixels of some patients, from their `reliability`.

    Returns ece: the expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599) over
    the pixels to which the model gives 1 % or more, None without any; ece_all_pixels: the same over all pixels,
    made small by the sure background; unseen_tumour: the share of the tumour's pixels that got under 1 %, None
    without a tumour; bins: from, to, pixels, probability (mean) and tumour (share).
    """
    pixels, summed, tumour = np.sum([np.asarray(table) for table in tables], axis=0).T
    shown = np.maximum(pixels, 1)
    gaps = np.abs(summed - tumour)  # pixels times |mean probability - share of tumour|
    return {
        "ece": float(gaps[1:].sum() / pixels[1:].sum()) if pixels[1:].any() else None,
        "ece_all_pixels": float(gaps.sum() / pixels.sum()),
        "unseen_tumour": float(tumour[0] / tumour.sum()) if tumour.any() else None,
        "bins": [
            {"from": low, "to": high, "pixels": int(n), "probability": p, "tumour": share}
            for low, high, n, p, share in zip(
                EDGES[:-1].tolist(), EDGES[1:].tolist(), pixels, summed / shown, tumour / shown
            )
        ],
    }


class TemperatureFit:
    """The temperature by which a model's logits are divided, fitted by the likelihood of validation pixels
    (Guo et al. 2017). Logits are counted in fine bins, so that memory does not grow with the patients."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, STEPS))  # of the logits in background and in tumour

    def add(self, probabilities: np.ndarray, truth: np.ndarray) -> None:
        """Count a patient: probabilities float32 at temperature 1, truth of the same shape."""
        bound = 1 / (1 + np.exp(REACH))
        logits = logit(np.clip(probabilities.astype(np.float64), bound, 1 - bound))
        for of_kind, mask in zip(self.counts, (truth == 0, truth != 0)):
            of_kind += np.histogram(logits[mask], STEPS, (-REACH, REACH))[0]

    def temperature(self) -> float:
        """The best temperature in `TEMPERATURES`; 1 unless both kinds of pixels were seen."""
        from scipy.optimize import minimize_scalar  # takes long to load, and is needed once per training

        background, tumour = self.counts
        if not (background.any() and tumour.any()):
            return 1.0
        middles = (np.arange(STEPS) + 0.5) * 2 * REACH / STEPS - REACH

        def loss(exponent: float) -> float:
            scaled = middles / np.exp(exponent)
            return float(-(tumour * log_expit(scaled) + background * log_expit(-scaled)).sum())

        bounds = np.log(TEMPERATURES)
        return float(np.exp(minimize_scalar(loss, bounds=tuple(bounds), method="bounded").x))


def draw_reliability(figures: dict, path: Path, title: str) -> None:
    """Write a PNG of `calibration`: the share of tumour over the probability, and the number of pixels."""
    bins = [b for b in figures["bins"] if b["pixels"]]
    figure = new_figure((5, 5.6), dpi=130)
    share, count = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    share.plot([0, 1], [0, 1], color="grey", linewidth=1, label="calibrated")
    share.plot(
        [b["probability"] for b in bins],
        [b["tumour"] for b in bins],
        color=BLUE,
        marker="o",
        markersize=4,
        label="this model",
    )
    share.set(ylabel="share of tumour", xlim=(0, 1), ylim=(0, 1))
    share.legend(frameon=False, loc="upper left")
    count.bar(
        [(b["from"] + b["to"]) / 2 for b in bins],
        [b["pixels"] for b in bins],
        width=[b["to"] - b["from"] for b in bins],
        color=ORANGE,
    )
    count.set(yscale="log", xlabel="probability", ylabel="pixels")
    for axes in (share, count):
        axes.spines[["top", "right"]].set_visible(False)
    ece = figures["ece"]
    figure.suptitle(
        escaping.drawn(title) + ("" if ece is None else f"\nECE {ece:.3f} over pixels of 1 % or more")
    )
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
