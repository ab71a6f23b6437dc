"""How often the 95 % interval of a mean contains the true mean, by simulation.

    python benchmarks/interval_coverage.py

Draws patients' Dice from distributions between 0 and 1 whose mean is known, and counts. It takes seconds on one core.
"""

import numpy as np

from evaluation.metrics import mean_interval

COUNTS = (5, 8, 15, 23, 40)
DRAWS, RESAMPLES = 20_000, 1_000
BETAS = ((4, 1.5), (8, 2), (6, 1), (2, 0.5), (1, 6))
FAILURES: tuple[tuple[float, tuple[float, float], tuple[float, float]], ...] = (
    (0.05, (2, 6), (20, 4)),
    (0.1, (2, 6), (14, 2.5)),
    (0.2, (1, 4), (20, 3)),
)  # share of failures, their distribution, that of the others


def covered(draws: np.ndarray, true: float) -> float:
    """The share of rows (draws, patients) whose interval contains the true mean."""
    intervals = [interval for row in draws.tolist() if (interval := mean_interval(row))]
    return float(np.mean([low <= true <= high for low, high in intervals]))


def bootstrapped(draws: np.ndarray, true: float, random: np.random.Generator) -> float:
    """The same share for a plain percentile bootstrap."""
    held = []
    for row in draws[:1_000]:
        means = row[random.integers(len(row), size=(RESAMPLES, len(row)))].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        held.append(low <= true <= high)
    return float(np.mean(held))


def main() -> None:
    random = np.random.default_rng(0)
    print(f"{'values':34}{'patients':>9}{'interval':>10}{'percentile bootstrap':>22}")
    for count in COUNTS:
        cases = [(f"Beta({a:g}, {b:g})", random.beta(a, b, (DRAWS, count)), a / (a + b)) for a, b in BETAS]
        for share, failed, others in FAILURES:
            values = random.beta(*others, (DRAWS, count))
            values = np.where(
                random.random((DRAWS, count)) < share, random.beta(*failed, (DRAWS, count)), values
            )
            means = [a / (a + b) for a, b in (failed, others)]
            name = f"{100 * share:.0f} % Beta{failed}, else Beta{others}"
            cases.append((name, values, share * means[0] + (1 - share) * means[1]))
        for name, draws, true in cases:
            simple = bootstrapped(draws, true, random)
            print(f"{name:34}{count:>9}{covered(draws, true):>10.3f}{simple:>22.3f}", flush=True)


if __name__ == "__main__":
    main()
