"""Means of images at joining: none betrays one patient, however often a hospital joins with a patient more or
less."""

import numpy as np
import pytest

from appearance.features import MEASURES
from common import MedFLError
from dataset import load_dataset
from federation.hospital.statistics import ENOUGH, ToldStatistics


@pytest.fixture
def told(tmp_path):
    return ToldStatistics(tmp_path / "mercy_images.json")


def images(value: float) -> dict:
    return {name: {"mean": [value] * w, "deviation": [0.1] * w} for name, w in MEASURES.items()}


def names(first: int, count: int) -> tuple[str, ...]:
    return tuple(f"patient-{k}" for k in range(first, first + count))


def test_the_ninth_patient_is_not_the_difference_of_two_means(told, phantoms):
    """Before, nine times the second mean less eight times the first was the ninth patient's own value."""
    data = load_dataset(phantoms)
    patients = tuple(patient.name for patient in data.patients)[:9]
    first, second = (told.tell(patients[:count], data.image_statistics(patients[:count])) for count in (8, 9))
    own = data._entries[patients[8]]["measured"]
    assert first == second and first is not None
    for name in MEASURES:
        by_subtraction = 9 * np.array(second[name]["mean"]) - 8 * np.array(first[name]["mean"])
        assert not np.allclose(by_subtraction, np.atleast_1d(own[name]), rtol=1e-3, atol=1e-3)


def test_too_few_patients_tell_nothing(told):
    assert told.tell(names(0, ENOUGH - 1), images(0.5)) is None
    assert told.tell(names(0, ENOUGH), None) is None and not told.file.exists()


def test_means_are_told_anew_only_of_patients_unlike_those_of_every_telling(told):
    assert told.tell(names(0, 8), images(0.1)) == images(0.1)
    assert told.tell(names(0, 15), images(0.2)) == images(0.1)
    assert told.tell(names(0, 16), images(0.3)) == images(0.3)
    assert told.tell(names(1, 8), images(0.4)) == images(
        0.3
    )  # unlike the last, and like the first but for one
    assert told.file.stat().st_mode & 0o077 == 0


def test_three_means_are_not_told_that_give_a_patient_together(told):
    """Each is unlike both others by nine patients or more: 17 times the third less 8 times the first and the second
    was the seventeenth's own, to 0.05 deviations among patients."""
    for first, count, value in ((0, 8, 0.1), (8, 8, 0.2)):
        assert told.tell(names(first, count), images(value)) == images(value)
    assert told.tell(names(0, 17), images(0.3)) == images(0.2)
    assert told.tell(names(0, 24), images(0.4)) == images(0.4)
    assert told.tell(names(0, 24), images(0.5)) == images(0.4)  # one of them was scanned again


def test_few_digits_are_told_and_a_damaged_file_is_refused(told):
    assert told.tell(names(0, 8), images(0.123456)) == images(0.123)
    told.file.write_text("{", encoding="utf-8")
    with pytest.raises(MedFLError, match="is damaged"):
        told.tell(names(0, 8), images(0.1))
