"""A model's figures on the patients of a dataset."""

from collections.abc import Iterable

from tqdm import tqdm

from dataset import Dataset
from evaluation import metrics
from inference import predict_volume, to_mask
from transunet import TransUNet


def score_patients(
    model: TransUNet,
    dataset: Dataset,
    patients: Iterable[str],
    threshold: float,
    progress: bool = False,
    in_mm: bool = False,
) -> list[dict]:
    """A row of `metrics.score_patient` for each patient, the whole volume at its own size.

    in_mm: add `metrics.score_in_mm` where the patient's spacing is known; evaluate.py alone asks, and no
    hospital sends them.
    """
    rows, patients = [], list(patients)
    spacings = {patient: dataset.spacing(patient) for patient in patients} if in_mm else {}
    for patient in tqdm(
        patients, desc="scoring", unit="patient", disable=None if progress else True, leave=False
    ):
        volume, truth = dataset.volume(patient)
        prediction = to_mask(predict_volume(model, volume), threshold)
        rows.append(metrics.score_patient(patient, dataset.site(patient), prediction, truth))
        if spacing := spacings.get(patient):
            rows[-1] |= metrics.score_in_mm(prediction, truth, spacing)
    return rows
