"""DICOM in the app: series to slices, masks back over the source series, privacy, and one sentence for what
can't be used."""

import gzip
import io
import re
import sys

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_phantoms import image_of, write_series
from highdicom.seg import segread
from pydicom.uid import generate_uid
from running import ROOT
from streamlit.testing.v1 import AppTest

from checkpoint import load_checkpoint
from common import MedFLError
from dataset import load_dataset
from deployment.app.cases import add_truth, read_case
from deployment.app.dicom import on_series, write_segmentation, write_series_nifti
from deployment.app.readout import csv_text, predict_case, slice_rows, zip_masks
from deployment.app.viewer import dicom_offers
from evaluation import metrics
from inference import to_mask
from radiology.preparation import prepare
from radiology.rules import load_rules
from radiology.series import find_series
from radiology.studies import plan_studies

BEST = "transunet_centralized_best.pth"
PATIENT = {
    "PatientName": "Grieg^Edvard",
    "PatientID": "HG-1843-0615",
    "PatientBirthDate": "18430615",
    "AccessionNumber": "ACC77401",
    "InstitutionName": "Troldhaugen Hospital",
    "StudyDate": "19070904",
    "ReferringPhysicianName": "Sinding^Christian",
}
# the directions of an image's columns, rows and slices, (left, back, up) each
ACQUIRED = {
    "axial": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "from head to feet": ((-1, 0, 0), (0, 1, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
}


@pytest.fixture(scope="module")
def volume(phantoms) -> np.ndarray:
    """A phantom's slices, (S, 64, 64, 3) uint8."""
    dataset = load_dataset(phantoms, progress=False)
    return np.array(dataset.volume(dataset.patients[0].name)[0])


@pytest.fixture
def series(tmp_path):
    """A function that makes (name, content) of a series' files of values (S, H, W); tags by keyword go into
    every file."""

    def make(
        values,
        description="ax FLAIR",
        spacing=(4.0, 0.5, 0.5),
        acquired="axial",
        origin=(-12.0, -20.0, 30.0),
        **tags,
    ) -> list[tuple[str, bytes]]:
        image = image_of(values, spacing, origin, np.transpose(ACQUIRED[acquired]))
        tags = {"SeriesInstanceUID": generate_uid(), "SeriesDescription": description, **tags}
        files = write_series(tmp_path / tags["SeriesInstanceUID"], image, PATIENT, **tags)
        return [(f"{description}_{file.name}.dcm", file.read_bytes()) for file in files]

    return make


@pytest.fixture
def study(volume, series):
    """The files of a phantom's three series, and of a localizer."""
    return (
        series(7.0 * volume[..., 0], "ax T1")
        + series(7.0 * volume[..., 1], "ax T2 FLAIR")
        + series(7.0 * volume[..., 2], "ax T1 post GD", ContrastBolusAgent="Gadovist")
        + series(volume[:1, ..., 0], "scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    )


def random_mask(case) -> np.ndarray:
    """A mask that no turn or mirroring keeps as it is, 0 in the margins."""
    mask = np.zeros(case.volume.shape[:3], np.uint8)
    inside = case.dicom.within(mask)
    inside[:] = np.where(np.random.default_rng(0).random(inside.shape) < 0.1, 255, 0)
    return mask


def told_of_the_patient(text: str) -> list[str]:
    """Which of the patient's values a text holds."""
    return [
        value for value in PATIENT.values() if any(part.lower() in text.lower() for part in value.split("^"))
    ]


def test_one_series_is_flair_in_all_channels_in_order_and_in_mm(volume, series):
    files = series(7.0 * volume[..., 1], "whatever")
    case = read_case(files[::-1])
    assert (
        case.volume.shape == volume.shape
        and case.spacing == (0.5, 0.5, 4.0)
        and case.measured
        and case.is_volume
    )
    assert (case.volume == case.volume[..., :1]).all()
    assert "FLAIR stands in for pre-contrast and post-contrast" in " ".join(case.notes)
    assert "does not say that it is FLAIR" in " ".join(case.notes)
    assert "of itself" not in " ".join(read_case(series(VALUES, "ax FLAIR")).notes)
    for other in ("AX T1 POST GD", "t1 mprage", "DWI b1000"):
        with pytest.raises(MedFLError, match="not FLAIR according to its header"):
            read_case(series(VALUES, other))
    for shown, wanted in zip(case.volume[..., 0], volume[..., 1]):
        assert (
            np.corrcoef(shown.ravel(), wanted.ravel())[0, 1] > 0.98
        )  # less than 1: the brightest are cut off
    alone = read_case(files[4:5])
    assert (
        len(alone.slices) == 1
        and alone.spacing == (0.5, 0.5, 4.0)
        and "less reliable" in " ".join(alone.notes)
    )


def test_slices_are_those_that_the_preparation_makes(series, tmp_path):
    """Turned, framed and scaled alike: the network meets on the page what it learned from."""
    rows, columns = np.indices((200, 256))
    values = np.stack(
        [5.0 * ((rows - 90) ** 2 + (columns - 140) ** 2 < 100**2) * (columns + 20 * k) for k in range(5)]
    )
    case = read_case(series(values, spacing=(4.0, 0.9, 0.9), acquired="from head to feet"))
    (study,) = plan_studies(find_series(sorted(tmp_path.rglob("IM*")))[0], load_rules())
    prepared = prepare(study, load_rules())
    assert np.array_equal(case.dicom.fed, prepared.volume)
    assert np.array_equal(case.volume, prepared.volume) and case.volume.shape == (5, 256, 256, 3)
    assert [prepared.about["spacing_mm"][k] for k in (1, 2, 0)] == pytest.approx(case.spacing)


def test_a_zip_of_a_study_gives_each_channel_its_series(volume, study, zipped):
    case = read_case(
        [
            (
                "study.zip",
                zipped([(f"DICOM/{name[:-4]}", content) for name, content in study] + [("readme", b"hi")]),
            )
        ]
    )
    assert case.volume.shape == volume.shape
    for channel in range(3):
        agreed = [
            np.corrcoef(case.volume[..., channel].ravel(), volume[..., other].ravel())[0, 1]
            for other in range(3)
        ]
        assert int(np.argmax(agreed)) == channel and agreed[channel] > 0.97, agreed
    notes = " ".join(case.notes)
    assert "it is a localizer" in notes and "readme: not a DICOM file" in notes
    assert "stands in" not in notes and "poorly" not in notes


@pytest.mark.parametrize(
    ("values", "origin"), [(0.0, (0, 0, 0)), (1.0, (4000, 0, 0))], ids=["blank", "elsewhere"]
)
def test_what_can_not_be_laid_over_flair_is_passed_over(series, values, origin):
    post = series(values * VALUES, "ax T1 post", origin=origin)
    case = read_case(series(VALUES, "ax FLAIR") + post)
    assert "post-contrast was ignored: it can't be aligned with FLAIR" in " ".join(case.notes)
    assert np.array_equal(case.volume[..., 2], case.volume[..., 1])


def test_of_two_that_claim_to_be_flair_one_is_taken_and_that_is_told(series):
    values = np.random.default_rng(5).integers(0, 900, (20, 32, 32)).astype(float)
    case = read_case(
        series(values, "sag FLAIR of Grieg", acquired="sagittal") + series(values[:8], "ax FLAIR of Grieg")
    )
    notes = " ".join(case.notes)
    assert (
        "2 series claim to be FLAIR, taken because it is axial" in notes and "1 series were ignored" in notes
    )
    assert len(case.slices) == 8 and not told_of_the_patient(notes)


@pytest.mark.parametrize("acquired", ACQUIRED)
def test_pixels_and_masks_are_on_the_page_as_they_are_on_the_series(series, acquired):
    values = np.random.default_rng(1).integers(0, 900, (20, 40, 48)).astype(float)
    files = series(values, acquired=acquired, spacing=(2.0, 0.9, 1.1))
    case = read_case(files)
    assert ("acquired" in " ".join(case.notes)) == (acquired in ("sagittal", "coronal"))
    rows, columns = (size * step for size, step in zip(case.volume.shape[1:3], case.spacing))
    assert abs(rows - columns) <= max(case.spacing)  # square, as the network's input is
    order = [[content for _, content in files].index(file.getvalue()) for file in case.dicom.series.files]
    bright = on_series(case.dicom, np.where(case.volume[..., 1] > 100, np.uint8(255), np.uint8(0))) > 0
    assert bright.shape == values.shape and values[order][bright].min() > values[order][~bright].max()
    mask = random_mask(case)
    seg = write_segmentation(case.dicom, mask)
    assert np.array_equal(add_truth(case, [("seg.dcm", seg)]), mask)
    again = read_case([*files, ("seg.dcm", seg)])
    assert np.array_equal(again.truth, mask) and not any("SEG were" in note for note in again.notes)


def test_the_nifti_mask_lies_where_the_series_lies(series):
    values = np.random.default_rng(2).integers(0, 900, (20, 40, 48)).astype(float)
    case = read_case(series(values, acquired="sagittal", spacing=(1.5, 0.9, 1.1)))
    mask = random_mask(case)
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(write_series_nifti(case.dicom, mask)))
    onto = on_series(case.dicom, mask)
    assert np.array_equal(np.asarray(image.dataobj), onto.transpose(2, 1, 0))
    for voxel in ((0, 0, 0), (47, 39, 19), (5, 30, 11)):
        place = case.dicom.grid.TransformIndexToPhysicalPoint(voxel)
        assert np.allclose(image.affine @ [*voxel, 1], [-place[0], -place[1], place[2], 1])


def test_the_margins_hold_no_tumour(series, trained):
    case = read_case(series(VALUES[:, :20]))
    assert case.dicom.margins == (6, 0, 6, 0) and case.volume.shape[1:3] == (32, 32)
    probability = predict_case(load_checkpoint(trained / BEST).model, case).probability
    assert (
        not probability[:, :6].any()
        and not probability[:, -6:].any()
        and (case.dicom.within(probability) > 0).all()
    )


def test_a_series_whose_tags_were_deleted_gets_its_segmentation(series):
    def without(*names):
        kept = []
        for name, content in series(VALUES):
            file = pydicom.dcmread(io.BytesIO(content))
            for tag in names:
                delattr(file, tag)
            stripped = io.BytesIO()
            file.save_as(stripped)
            kept.append((name, stripped.getvalue()))
        return read_case(kept)

    case = without(*PATIENT, "PatientSex", "StudyID", "StudyTime", "SliceThickness")
    mask = random_mask(case)
    assert np.array_equal(add_truth(case, [("seg.dcm", write_segmentation(case.dicom, mask))]), mask)
    lacking = without("FrameOfReferenceUID")
    assert "names no frame of reference" in " ".join(lacking.notes)
    assert [label for label, *_ in dicom_offers(lacking.dicom, lacking.name, mask)] == ["Mask (NIfTI)"]
    with pytest.raises(MedFLError, match="lacks what a DICOM SEG needs"):
        write_segmentation(lacking.dicom, mask)


def test_a_truth_must_be_a_mask_of_this_series(series, picture):
    files = series(np.random.default_rng(3).integers(0, 900, (6, 32, 32)).astype(float))
    case, other = (
        read_case(files),
        read_case(series(np.ones((6, 32, 32)) * np.arange(32), spacing=(4.0, 0.7, 0.7))),
    )
    seg = write_segmentation(other.dicom, random_mask(other))
    unreadable = "can't be read as a DICOM SEG"
    for name, content, sentence in (
        ("seg.dcm", seg, "lies on another grid"),
        ("seg.dcm", files[0][1], unreadable),
        ("mask.nii", b"x", unreadable),
    ):
        with pytest.raises(MedFLError, match=sentence) as error:
            add_truth(case, [(name, content)])
        assert name in str(error.value) and "Upload" not in str(error.value)
    same_places = read_case(series(np.ones((6, 32, 32)) * np.arange(32), FrameOfReferenceUID=generate_uid()))
    with pytest.raises(MedFLError, match="seg.dcm belongs to another scan"):
        add_truth(case, [("seg.dcm", write_segmentation(same_places.dicom, random_mask(same_places)))])
    assert "1 DICOM SEG were ignored" in " ".join(read_case([*files, ("seg.dcm", seg)]).notes)
    masks = [
        (f"slice_{k}_mask.png", picture(np.full((32, 32), 255 * (k == 2), np.uint8))) for k in range(1, 7)
    ]
    assert add_truth(case, masks).any(axis=(1, 2)).tolist() == [k == 2 for k in range(1, 7)]
    with pytest.raises(MedFLError, match="the mask is empty"):
        write_segmentation(case.dicom, np.zeros((6, 32, 32), np.uint8))


VALUES = np.random.default_rng(4).integers(0, 900, (6, 32, 32)).astype(float)
BAD = {
    "CT": (lambda s: s(VALUES, Modality="CT"), "it is of modality CT, not MR"),
    "localizer": (lambda s: s(VALUES, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "it is a localizer"),
    "truncated": (lambda s: [(name, content[:-1900]) for name, content in s(VALUES)], "is truncated"),
    "cut in its header": (
        lambda s: [(name, content[:400]) for name, content in s(VALUES)[:1]],
        "cut off within its header",
    ),
    "no DICOM": (lambda s: [("a.dcm", b"Dear Dr Smith")], "a.dcm: not a DICOM file"),
    "empty": (lambda s: [("a.dcm", b"")], "no series that can be used"),
    "a slice is missing": (
        lambda s: [file for k, file in enumerate(s(VALUES)) if k != 1],
        "1 of its slices are missing",
    ),
    "two studies": (lambda s: s(VALUES) + s(VALUES, study="1.2.4"), "several studies"),
    "T1 beside a truncated FLAIR": (
        lambda s: s(VALUES, "ax T1") + [(name, content[:-1900]) for name, content in s(VALUES, "ax FLAIR")],
        "is truncated",
    ),
    "no FLAIR of two": (lambda s: s(VALUES, "ax T1") + s(VALUES, "cor T1"), "upload only the FLAIR series"),
    "thick sagittal slices": (
        lambda s: s(VALUES, acquired="sagittal"),
        "cut axially, the series has pixels of 4.0 × 0.5 mm",
    ),
    "too small": (lambda s: s(VALUES[:, :8, :8]), "8×8 pixels, which this page can't hold"),
    "too large": (
        lambda s: s(np.zeros((193, 256, 260))),
        "193 slices of 260×256 pixels, which this page can't hold",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_used_gets_one_sentence_without_the_patient(series, case):
    make, sentence = BAD[case]
    with pytest.raises(MedFLError) as error:
        read_case(make(series))
    assert (
        sentence in str(error.value)
        and "\n" not in str(error.value)
        and not told_of_the_patient(str(error.value))
    )


@pytest.fixture
def page(trained, monkeypatch):
    monkeypatch.setenv("MEDFL_CHECKPOINT", str(trained / BEST))
    return AppTest.from_file(ROOT / "deployment" / "app" / "app.py", default_timeout=120).run()


def everything_shown(page: AppTest) -> str:
    """All that a page sent to the browser, and its tables."""
    return " ".join(
        [str(element.proto) for element in page.main] + [str(table.value) for table in page.table]
    )


@pytest.mark.slow
def test_a_series_on_the_page_and_its_mask_over_the_source(page, trained, series):
    """512×512 in, and out again on the same grid, read by highdicom over the source files."""
    rows, columns = np.indices((512, 512)) - 255.5
    head = (np.hypot(rows, columns) < 190) * 300.0
    values = np.stack([head + (np.hypot(rows - 40, columns + 60) < 30 + 4 * k) * 500.0 for k in range(3)])
    files = series(values)
    uploader = next(u for u in page.file_uploader if u.label.startswith("Slices"))
    uploader.set_value([(name, content, "application/dicom") for name, content in files]).run()
    assert not page.exception and not page.error, page.error
    figures = page.table[0].value["value"].to_dict()
    assert figures["Volume"].endswith("cm³") and figures["Largest diameter in mm"].endswith("mm")
    assert not [n for n in page.number_input if n.key == "pixel_size"]
    shown = everything_shown(page)
    assert (
        not told_of_the_patient(shown)
        and "name and number from the series" in shown
        and re.search(r"Slice \d \(slice_", shown)
    )
    case, prediction = page.session_state.case, page.session_state.prediction
    threshold = float(np.quantile(prediction.probability, 0.98))  # two epochs of training reach no 0.5
    mask = to_mask(prediction.probability, threshold)
    assert mask.shape == (3, 512, 512) and mask.any()
    stored = segread(io.BytesIO(write_segmentation(case.dicom, mask)))
    sources = [pydicom.dcmread(io.BytesIO(content)).SOPInstanceUID for _, content in files]
    back = stored.get_pixels_by_source_instance(
        sources, combine_segments=True, assert_missing_frames_are_empty=True
    )
    assert metrics.dice(*metrics.counts(back, mask)) == 1.0
    assert stored.PatientID == PATIENT["PatientID"] and stored.FrameOfReferenceUID == "1.2.3.9"
    rows = slice_rows(case, prediction, threshold)
    for given in (
        zip_masks(case, mask, rows),
        csv_text(rows).encode(),
        gzip.decompress(write_series_nifti(case.dicom, mask)),
    ):
        assert not told_of_the_patient(given.decode("latin-1"))
    page.session_state["threshold"] = 0.95
    page.run()
    labels = [button.proto.label for button in page.get("download_button")]
    assert "Mask (NIfTI)" in labels and ("Mask (DICOM SEG)" in labels) == bool(
        (prediction.probability >= 0.95).any()
    )
    next(b for b in page.button if b.label == "Close this case").click().run()
    assert not page.exception and "case" not in page.session_state


@pytest.mark.slow
def test_the_page_starts_without_simpleitk_and_says_what_to_install(page, series, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("deployment.app.dicom", "radiology"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("deployment.app.dicom", raising=False)  # the package remembers it as well
    monkeypatch.setitem(sys.modules, "SimpleITK", None)  # as Python marks a module that can't be imported
    page.run()
    page.file_uploader[0].set_value(
        [(name, content, "application/dicom") for name, content in series(VALUES)]
    ).run()
    assert not page.exception and len(page.error) == 1
    assert (
        "DICOM files need SimpleITK; install it (`pip install -r requirements-dicom.txt`)"
        in page.error[0].value
    )
    page.button(key="phantom_1").click().run()
    assert not page.exception and len(page.table) == 1
