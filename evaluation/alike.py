"""Whether two models of one table were made in the same way: the same weights, choice, passes and encoder."""

from dataclasses import dataclass

from checkpoint import Checkpoint


@dataclass(frozen=True)
class Made:
    """How a model was made, as far as models must agree to be compared; None where an older file doesn't say.

    weights: averaged or raw; chosen: how the model was chosen; passes: over the training slices, in the whole run;
    encoder: what it started with.
    """

    weights: str | None = None
    chosen: str | None = None
    passes: float | None = None
    encoder: str | None = None

    def unlike(self, first: "Made") -> list[str]:
        """Each way in which this model was made differently from the first row's, in words."""
        told = []
        if self.weights != first.weights:
            told.append(f"{self.weights or 'unknown'} weights, not {first.weights or 'unknown'} ones")
        if self.chosen != first.chosen:
            told.append(f"chosen by {self.chosen or 'nobody knows what'}, not {first.chosen or 'that'}")
        if self._passes() != first._passes():
            told.append(f"{self._passes()} passes, not {first._passes()}")
        if self.encoder != first.encoder:
            told.append(f"{self.encoder or 'unknown'} encoder, not {first.encoder or 'unknown'}")
        return told

    def _passes(self) -> str:
        return "unknown" if self.passes is None else f"{self.passes:.3g}"


def made(checkpoint: Checkpoint) -> Made:
    """How a model was made, from its metadata."""
    training = checkpoint.metadata.get("training", {})
    before = None  # older files don't say it: a central run's average is known from its setting
    if "ema_decay" in training and "rounds" not in training:
        before = "averaged" if training["ema_decay"] else "raw"
    selected = training.get("selected_by")
    return Made(
        weights=training.get("weights", before),
        chosen=selected and ("validation" if "validation" in selected else "being the last"),
        passes=_passes(checkpoint),
        encoder=_encoder(training),
    )


def _passes(checkpoint: Checkpoint) -> float | None:
    """Passes over the training slices in the whole run, by its settings; for a run by minutes, the passes done."""
    training = checkpoint.metadata.get("training", {})
    if training.get("minutes"):
        return training.get("epochs_done")
    slices = checkpoint.metadata.get("data", {}).get("train", {}).get("slices")
    steps = training.get("steps")
    if training.get("rounds"):
        if not training.get("local_steps"):
            return training["rounds"] * training.get("local_epochs", 1)
        steps = training["rounds"] * training["local_steps"]
    if steps and slices:
        return steps * training["batch_size"] / slices
    return None if steps else training.get("epochs")


def _encoder(training: dict) -> str | None:
    """What the encoder began with; before --encoder, two other settings recorded it."""
    if "encoder" in training or "pretrained" not in training:
        return training.get("encoder")
    return training.get("encoder_weights") or ("pretrained" if training["pretrained"] else "random")
