"""The content of the model card."""

from checkpoint import Checkpoint, validation_dice
from common import MedFLError
from runs.energy import in_words

UNTRAINED = 0.1  # validation Dice; a model below it hardly learnt anything
LABELS = 8  # number of hospitals that are named
NOTICE = "Research use only, not a medical device. No output may guide a diagnosis or a treatment."


def warning(metadata: dict) -> str | None:
    """A warning about a model that hardly learnt anything; None for others."""
    dice = validation_dice(metadata)
    if dice is None or dice >= UNTRAINED:
        return None
    return f"This model is as good as untrained (validation Dice {dice:.3f}): its outlines mean nothing."


def card_rows(checkpoint: Checkpoint, sha256: str, device: str | None = None) -> list[tuple[str, str]]:
    """The model card as (subject, text), from the checkpoint's metadata; missing entries are left out.

    device: the model's device, if it is loaded already. Raises MedFLError for metadata of other types.
    """
    try:
        return _rows(checkpoint, sha256, device)
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
        raise MedFLError(
            f"{checkpoint.path.name} has damaged metadata, so its card can't be shown; copy it again"
        ) from error


def _rows(checkpoint: Checkpoint, sha256: str, device: str | None) -> list[tuple[str, str]]:
    about = checkpoint.metadata
    architecture, origin, training = about["architecture"], about.get("origin", {}), about.get("training", {})
    rows = [
        ("Warning", warning(about)),
        ("Task", _task(about.get("task"))),
        ("Classes", " and ".join(checkpoint.labels)),
        ("Trained", _origin(origin)),
        ("Data", _data(about.get("data", {}))),
        (
            "Test",
            score_text(about.get("scores", {}).get("test"), "not scored yet: run evaluate.py --write-back"),
        ),
        ("Validation", score_text(about.get("scores", {}).get("val"), "no validation patients")),
        ("Selected by", training.get("selected_by")),
        (
            "Network",
            f"TransUNet {architecture['name']}, {architecture['parameters'] / 1e6:.1f} million parameters, "
            f"input {architecture['image_side']}×{architecture['image_side']} pixels" + _encoder(training),
        ),
        ("Calibration", _calibration(about)),
        ("Lesions", _lesions(about.get("scores", {}).get("test") or {})),
        ("Energy", in_words(about["energy"]) if about.get("energy") else None),
        ("Threshold", f"{checkpoint.threshold:g}"),
        (
            "Slices",
            "shrunk without antialiasing when it was trained, before 0.3.0: its figures differ a little here"
            if checkpoint.shrunk_otherwise
            else None,
        ),
        ("Device", device),
        ("File", f"{checkpoint.path.name}, {checkpoint.path.stat().st_size / 1e6:.1f} MB"),
        ("Made", about.get("created")),
        ("SHA-256", sha256),
    ]
    return [(subject, text) for subject, text in rows if text]


def _task(task: dict | None) -> str | None:
    """What the model outlines, if its task is not the default."""
    return f"{task['title']}: {task['region']}, of {', '.join(task['channels'])}" if task else None


def _origin(origin: dict) -> str:
    """How the model was trained."""
    kind = origin.get("kind")
    if kind == "federated" and origin.get("hospital"):
        return (
            f"federated, {origin['rounds']} rounds, {origin['strategy']}, data held by "
            f"{origin['partition']}; "
            f"{origin['hospital']}'s own model, with the normalisation layers that stayed there"
        )
    if kind == "federated":
        privacy = origin.get("privacy", {})
        kept = (
            "secure aggregation"
            if privacy.get("secure_aggregation")
            else "the server saw each hospital's weights"
        )
        epsilon = privacy.get("epsilon")
        bounds = [f"ε = {epsilon:g} at δ = {privacy['delta']:g}"] if epsilon else []
        bounds += [
            f"ε = {spent['epsilon']:.3g} at δ = {spent['delta']:g} for the patients of {label}"
            for label, spent in sorted(privacy.get("patients", {}).items())
        ]
        noise, labels = ", ".join(bounds) or "no differential privacy", origin["labels"]
        names = ", ".join(labels[:LABELS]) + (
            f" and {len(labels) - LABELS} more" if len(labels) > LABELS else ""
        )
        whom = f" ({names})" if names else ""  # with the privacy of hospitals there are no names
        return (
            f"federated, {origin['hospitals']} hospitals{whom}, {origin['rounds']} rounds, "
            f"{origin['strategy']}, data held by {origin['partition']}; {kept}, {noise}"
        )
    place = {"centralised": "in one place", "local": f"at {origin.get('hospital')} alone"}.get(
        str(kind), "not told"
    )
    return place + (f", from a model of {origin['started_from']}" if origin.get("started_from") else "")


def _encoder(training: dict) -> str:
    """The encoder's initial weights, if the file names them."""
    encoder = training.get("encoder")
    known = {"pretrained": "ImageNet weights", "random": "random weights"}
    return f"; the encoder started from {known.get(encoder, encoder)}" if encoder else ""


def _data(data: dict) -> str | None:
    if not data:
        return None
    counts = ", ".join(
        f"{data[part]['patients']} {word}"
        for part, word in (("train", "to train on"), ("val", "for validation"), ("test", "kept for the test"))
        if data.get(part)
    )
    phantoms = data.get("name") == "phantoms"
    patients = f": {counts} patients" if counts else ""
    warning = (
        ". Phantoms are painted, not measured: the model knows nothing of real scans" if phantoms else ""
    )
    return f"{data.get('name')}{patients}{warning}"


def _calibration(about: dict) -> str | None:
    """How far the probabilities of the test patients can be trusted."""
    measured = (about.get("scores", {}).get("test") or {}).get("calibration")
    if not measured or measured["ece"] is None:
        return None
    fitted = f", temperature {about['temperature']:.2f}" if about.get("temperature", 1.0) != 1.0 else ""
    return (
        f"a probability of 1 % or more is off by {100 * measured['ece']:.0f} % on average "
        f"(expected calibration error{fitted})"
    )


def _lesions(test: dict) -> str | None:
    """The number of the test patients' lesions that were found."""
    found = test.get("lesions")
    if not found:
        return None
    return f"{found['found']} of {found['found'] + found['missed']} found, {found['false']} false ones"


def score_text(score: dict | None, absent: str) -> str:
    """A score of the metadata in words: mean volume Dice, interval, median, patients."""
    if not score or not score.get("volume_dice"):
        return absent
    dice = score["volume_dice"]
    interval = f" (95 % interval {dice['ci95'][0]:.3f} to {dice['ci95'][1]:.3f})" if dice.get("ci95") else ""
    median = f", median {dice['median']:.3f}" if dice.get("median") is not None else ""
    patients = score.get("patients")
    return f"mean volume Dice {dice['mean']:.3f}{interval}{median}" + (
        f", {patients} patients" if patients else ""
    )
