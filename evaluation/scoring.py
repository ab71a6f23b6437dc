"""A model's figures on the patients of a dataset."""

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from dataset import Dataset
from evaluation import metrics
from evaluation.calibration import TemperatureFit, reliability
from evaluation.failures import confidence, lesions
from inference import predict_classes, predict_volume, to_mask
from transunet import TransUNet


def score_patients(
    model: TransUNet,
    dataset: Dataset,
    patients: Iterable[str],
    threshold: float,
    progress: bool = False,
    closely: bool = False,
    with_loss: bool = False,
    classes: Sequence[str] = (),
) -> list[dict]:
    """A row of `metrics.score_patient` for each patient, for the whole volume at its own size.

    with_loss: add `metrics.loss_of_volume`.
    closely: add reliability, lesions and confidence (evaluation/failures.py), `metrics.score_in_mm` where the
    patient's spacing is known; only the evaluation asks for them, and no hospital sends them.
    classes: names of the classes that model and masks have in common, to add `metrics.score_classes`.
    """
    rows, patients = [], list(patients)
    spacings = {patient: dataset.spacing(patient) for patient in patients} if closely else {}
    for patient in tqdm(
        patients, desc="scoring", unit="patient", disable=None if progress else True, leave=False
    ):
        volume, truth = dataset.volume(patient)
        probabilities, numbers = predict_classes(model, volume)
        prediction = to_mask(probabilities, threshold)
        rows.append(metrics.score_patient(patient, dataset.site(patient), prediction, truth))
        if with_loss:
            rows[-1]["loss"] = metrics.loss_of_volume(probabilities, truth)
        if closely:
            rows[-1] |= lesions(prediction, truth)
            rows[-1]["reliability"] = reliability(probabilities, truth)
            rows[-1]["confidence"] = confidence(probabilities, prediction)
        if classes:
            rows[-1]["classes"] = metrics.score_classes(prediction, numbers, truth, classes)
        if spacing := spacings.get(patient):
            rows[-1] |= metrics.score_in_mm(prediction, truth, spacing)
    return rows


def classes_to_score(labels: Iterable[str], dataset: Dataset) -> tuple[str, ...]:
    """The names of a model's classes (`Checkpoint.labels`) if the dataset's masks have the same, else nothing."""
    names = tuple(labels)
    return names if names == dataset.classes else ()


def fit_temperature(model: TransUNet, dataset: Dataset, patients: Iterable[str]) -> float:
    """The temperature that best fits the model's probabilities on these validation patients
    (`calibration.TemperatureFit`). The model's own temperature stays as it is."""
    fit, before = TemperatureFit(), model.temperature
    model.temperature = 1.0
    try:
        for patient in patients:
            volume, truth = dataset.volume(patient)
            fit.add(predict_volume(model, volume), truth)
    finally:
        model.temperature = before
    return fit.temperature()
