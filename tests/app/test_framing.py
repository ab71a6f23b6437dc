"""NIfTI volumes whose slices are no squares around a head, on the Streamlit page: what the network is given of them."""

import numpy as np
import pytest
import SimpleITK as sitk
from heads import head_in, nifti

from data.prepare_task import write_patient
from dataset import load_dataset
from deployment.app.case import as_trained
from deployment.app.cases import read_case
from deployment.app.framing import Frame
from deployment.app.nifti import mirror
from preprocessing import CHANNELS
from radiology.geometry import to_axial
from radiology.nifti import _placed
from scans.field_of_view import square_margins
from tasks import named_task


def opened(image):
    return read_case([("flair.nii", image.to_bytes())])


def test_a_wide_volume_is_cropped_to_the_head_as_the_preparation_does_it():
    spacing = (1.0, 1.0, 6.0)
    image = nifti(head_in((512, 512, 12), (200, 300, 40), (80, 100, 40), spacing), spacing)
    case = opened(image)
    prepared, told = to_axial(_placed(image, np.asarray(image.dataobj)))
    assert "cropped to the head, 220 of 512 mm" in told and any(told in note for note in case.notes)
    assert case.volume.shape == (12, 512, 512, 3) and case.fed.shape == (12, 220, 220, 3)
    shown = sitk.GetArrayFromImage(
        sitk.Resample(
            sitk.GetImageFromArray(case.fed[..., 1].astype(np.float32)),
            (256, 256, 12),
            sitk.ScaleTransform(3, (220 / 256, 220 / 256, 1)),
        )
    )
    same = sitk.GetArrayFromImage(prepared)
    assert np.corrcoef(shown[6].ravel(), same[6].ravel())[0, 1] > 0.99


def test_what_the_network_says_lies_where_it_was_given_it():
    spacing = (1.0, 1.0, 6.0)
    case = opened(nifti(head_in((512, 400, 12), (200, 200, 40), (80, 100, 40), spacing), spacing))
    probability = case.feed.onto_page(case.fed[..., 1] / np.float32(255))
    inside = case.feed.box.inside
    assert np.allclose(probability[inside], case.volume[inside][..., 1] / 255) and probability.sum() > 1000
    probability[inside] = 0
    assert not probability.any(), "beyond the head nothing is found"


def test_oblong_slices_become_squares_in_mm():
    spacing = (0.8, 1.0, 5.0)
    case = opened(nifti(head_in((208, 256, 10), (80, 128, 25), (70, 100, 25), spacing), spacing))
    assert case.feed.margins == square_margins(256, 208, 1.0, 0.8) == (0, 56, 0, 56)
    assert case.fed.shape == (10, 256, 320, 3) and not case.fed[:, :, :56].any()
    assert np.array_equal(case.fed[:, :, 56:264], case.volume)
    square = nifti(head_in((230, 230, 10), (115, 115, 25), (80, 100, 25), (1, 1, 5)), (1, 1, 5))
    assert opened(square).feed is None


def test_the_model_of_another_task_is_given_whole_slices_as_in_its_training(tmp_path):
    spacing = (1.0, 1.0, 1.0)
    head = head_in((34, 49, 36), (17, 24, 18), (15, 20, 15), spacing)
    image = nifti(head, spacing)
    case = opened(image)
    assert as_trained(case, CHANNELS) is case and case.fed.shape == (36, 49, 49, 3)
    taken = as_trained(case, ("T1",))
    files = [tmp_path / f"{kind}.nii.gz" for kind in ("image", "label")]
    for file, content in zip(files, (image, nifti((head > 400).astype(np.uint8), spacing))):
        content.to_filename(file)
    write_patient("one", *files, named_task("hippocampus"), tmp_path / "data")
    prepared, _ = load_dataset(tmp_path / "data", progress=False).volume("one")
    assert taken.fed.shape == prepared.shape
    assert np.corrcoef(taken.fed.ravel(), prepared.ravel())[0, 1] > 0.99
    wide = opened(nifti(head_in((512, 400, 12), (200, 200, 40), (80, 100, 40), (1, 1, 6)), (1, 1, 6)))
    framed = [note for note in wide.notes if "framed like" in note]
    assert framed and set(as_trained(wide, ("T1",)).notes) == set(wide.notes) - set(framed)


def test_thin_slices_of_a_sagittal_scan_are_averaged_and_the_neck_goes():
    spacing = (1.5, 1.5, 1.5)
    volume = head_in((100, 160, 160), (75, 120, 150), (70, 90, 80), spacing)
    volume[40:60, 65:95, :70] = 400  # the neck
    case = opened(nifti(volume, spacing, order=(1, 2, 0)))
    assert case.volume.shape == (160, 160, 100, 3) and len(case.fed) == 60 and case.feed.thick == 2
    (first, last) = case.feed.box.start[0], case.feed.box.end[0]
    assert last * 1.5 == pytest.approx(230 + 10, abs=6) and (last - first) * 1.5 == pytest.approx(180, abs=6)
    said = np.arange(len(case.fed), dtype=np.float32)[:, None, None] * np.ones((1, 160, 160), np.float32)
    back = case.feed.onto_page(said)
    assert back[first : first + 4, 80, 50].tolist() == [0, 0, 1, 1] and not back[:first].any()


def test_a_volume_that_is_mirrored_takes_its_frame_along():
    spacing = (1.0, 1.0, 6.0)
    volume = head_in((512, 400, 12), (200, 200, 40), (80, 100, 40), spacing)
    case = opened(nifti(volume, spacing, code=0))
    assert isinstance(case.feed, Frame) and not case.oriented
    before = case.fed
    mirror(case)
    assert np.array_equal(case.fed, before[:, :, ::-1]) and not np.array_equal(case.fed, before)
    assert np.array_equal(case.fed, case.volume[case.feed.box.inside])
