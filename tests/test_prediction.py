"""A proposal lies where the model saw it: on the source series' own voxels, whatever their directions."""

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_phantoms import phantom, scan, turn, write_series

import radiology.prediction as prediction
from checkpoint import describe, load_checkpoint, save_checkpoint
from common import MedFLError
from radiology.preparation import prepare
from radiology.rules import load_rules
from radiology.series import find_series, load_series
from radiology.studies import plan_studies
from transunet import TransUNet

DIRECTIONS = {
    "axial": np.eye(3),
    "from above, mirrored rows": np.diag([-1.0, 1.0, -1.0]),
    "sagittal": np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]], float),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float),
    "tilted": np.array(turn(sitk.Image(8, 8, 8, sitk.sitkUInt8), (12, 0, 0), (0, 0, 0)).GetMatrix()).reshape(
        3, 3
    ),
}


def save_untrained(path) -> None:
    """A small network that learned nothing: what it marks is of no interest, where it lies is."""
    import torch

    torch.manual_seed(0)
    model = TransUNet("tiny", 32)
    save_checkpoint(path, model.state_dict(), describe(model))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "untrained_best.pth"
    save_untrained(path)
    return load_checkpoint(path)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_bright_voxels_that_are_marked_are_marked_in_the_series(name, checkpoint, tmp_path, monkeypatch):
    ball = np.zeros((20, 64, 64), np.float32)
    s, r, c = np.ogrid[:20, :64, :64]
    ball[(s - 12) ** 2 * 4 + (r - 24) ** 2 + (c - 44) ** 2 < 150] = 1000  # off the middle in every direction
    ball[(s - 6) ** 2 * 4 + (r - 40) ** 2 + (c - 20) ** 2 < 60] = 1000
    image = sitk.GetImageFromArray(ball + 10)
    image.SetSpacing((3.0, 3.0, 6.0))
    seen = (
        image
        if name == "axial"
        else scan(image, 64, 40 if name in ("sagittal", "coronal") else 20, DIRECTIONS[name])
    )
    paths = write_series(tmp_path, seen, {"PatientID": "X"}, SeriesDescription="FLAIR")
    (study,) = plan_studies(find_series(paths)[0], load_rules())
    monkeypatch.setattr(
        prediction, "predict_volume", lambda _, volume: (volume[..., 1] / 170).astype(np.float32)
    )
    proposal = prediction.propose(study, checkpoint, load_rules())
    truth = sitk.GetArrayFromImage(load_series(study.channels["FLAIR"])) > 505
    marked = proposal.mask > 0
    assert marked.shape == truth.shape
    assert 2 * (marked & truth).sum() / (marked.sum() + truth.sum()) > 0.9
    assert proposal.volume_ml == pytest.approx(truth.sum() * np.prod(proposal.series.spacing) / 1000, rel=0.1)


def test_the_model_sees_what_training_saw(checkpoint, tmp_path, monkeypatch):
    images, _ = phantom(0, slices=8, size=64)
    paths = write_series(tmp_path, images[1], {"PatientID": "X"}, SeriesDescription="FLAIR")
    (study,) = plan_studies(find_series(paths)[0], load_rules())
    seen = []
    monkeypatch.setattr(
        prediction, "predict_volume", lambda _, volume: seen.append(volume) or volume[..., 1] * 0.0
    )
    assert not prediction.propose(study, checkpoint, load_rules()).mask.any()
    assert np.array_equal(seen[0], prepare(study, load_rules()).volume)


def test_a_study_without_flair_is_refused_with_the_reasons(checkpoint, tmp_path):
    images, _ = phantom(0, slices=8, size=64)
    paths = write_series(tmp_path, images[1], {"PatientID": "X"}, SeriesDescription="AX T2")
    (study,) = plan_studies(find_series(paths)[0], load_rules())
    with pytest.raises(MedFLError, match="no FLAIR that can be used .neither its description"):
        prediction.propose(study, checkpoint, load_rules())
