"""Whether two models of one table were made alike: the same weights, choice, passes and encoder."""

from dataclasses import dataclass

from checkpoint import Checkpoint


@dataclass(frozen=True)
class Made:
    """What two models must have in common to be compared; None where a file of before doesn't say.

    weights: averaged or raw; chosen: how; passes: over the training slices, of the whole run; encoder: what
    it started with.
    """

    weights: str | None = None
    chosen: str | None = None
    passes: float | None = None
    encoder: str | None = None

    def unlike(self, first: "Made") -> list[str]:
        """In words, each way in which this model was made unlike the first row's."""
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
    before = None  # files of before don't say it: a central run's average is known by its setting
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
    """Passes over the training slices of the whole run, as its settings ask; those done, of a run by minutes."""
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
    """What the encoder began with; two other settings told it before --encoder."""
    if "encoder" in training or "pretrained" not in training:
        return training.get("encoder")
    return training.get("encoder_weights") or ("pretrained" if training["pretrained"] else "random")
