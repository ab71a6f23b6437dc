"""DICOM in the page that runs in the browser: voxels, sizes and orientation against pydicom, and what is
refused."""

import tomllib

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_phantoms import image_of, phantom, write_series
from pydicom.uid import JPEGLSLossless, RLELossless

from deployment.app.cases import read_case
from deployment.staging import SERIES_RULES

DIRECTIONS = {
    "axial": np.eye(3),
    "sagittal": np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0.0]]),
    "coronal from the back": np.array([[1, 0, 0], [0, 0, -1], [0, -1, 0.0]]),
    "tilted": np.array([[1, 0, 0], [0, 0.96, -0.28], [0, 0.28, 0.96]]),
    "feet up": np.diag([-1, 1, -1.0]),
}
VOXELS = np.random.default_rng(0).integers(0, 900, (18, 20, 24))


def files_of(paths) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in paths]


@pytest.fixture
def series(tmp_path):
    """A function that writes a series and gives its files."""

    def write(name="a", image=None, **tags) -> list[tuple[str, bytes]]:
        image = image_of(VOXELS, (5, 0.8, 0.9), (1, 2, 3)) if image is None else image
        return files_of(write_series(tmp_path / name, image, **{"SeriesDescription": "ax FLAIR", **tags}))

    return write


@pytest.fixture(scope="module")
def opened(ask):
    rules = tomllib.loads(SERIES_RULES.read_text(encoding="utf-8"))
    return lambda *cases: ask(*[(files, {"seriesRules": rules}) for files in cases])


def as_nifti(files: list[tuple[str, bytes]]) -> bytes:
    """The series as pydicom reads it, as a NIfTI file: voxels (x, y, z) and an affine to the right, front and
    top."""
    slices = [pydicom.dcmread(pydicom.filebase.DicomBytesIO(content)) for _, content in files]
    across, down = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    slices.sort(key=lambda one: np.dot(np.cross(across, down), one.ImagePositionPatient))
    first, second = (np.array(one.ImagePositionPatient, float) for one in slices[:2])
    rows, columns = slices[0].PixelSpacing
    affine = np.eye(4)
    affine[:3] = np.stack([across * columns, down * rows, second - first, first], axis=1)
    affine[:2] *= -1  # DICOM counts to the left and back
    values = [
        one.pixel_array * float(one.get("RescaleSlope", 1)) + float(one.get("RescaleIntercept", 0))
        for one in slices
    ]
    return nibabel.Nifti1Image(np.stack(values).transpose(2, 1, 0).astype(np.float32), affine).to_bytes()


def test_every_direction_and_scale_is_as_pydicom_reads_it(opened, series):
    given = [
        series(name, image_of(VOXELS, (5, 0.8, 0.9), (1, 2, 3), matrix))
        for name, matrix in DIRECTIONS.items()
    ]
    given.append(series("scaled", slope=2.0, intercept=-10.0))
    given.append(series("signed", signed=True)[::-1])
    given.append([("DICOMDIR", given[0][0][1]), ("readme.txt", b"x"), *given[0]])
    for files, answer in zip(given, opened(*given)):
        assert "error" not in answer, answer
        case = read_case([("scan.nii", as_nifti([one for one in files if one[0].startswith("IM")]))])
        pixels = np.fromfile(answer["out"], np.uint8).reshape(*answer["shape"], 3)
        assert pixels.shape == case.volume.shape
        assert np.abs(pixels.astype(int) - case.volume).max() <= 1
        assert answer["spacing"] == pytest.approx(case.spacing, rel=1e-4)
        assert not any("Orientation unknown" in note for note in answer["notes"])
    assert any("2 files ignored" in note for note in answer["notes"])


def test_compressed_files_are_read_as_well(opened, series):
    plain = series(image=phantom(0, slices=4, size=64)[0][1])
    packed = []
    for syntax in (JPEGLSLossless, RLELossless):
        packed.append([])
        for name, content in plain:
            file = pydicom.dcmread(pydicom.filebase.DicomBytesIO(content))
            file.compress(syntax)
            target = pydicom.filebase.DicomBytesIO()
            file.save_as(target)
            packed[-1].append((name, target.getvalue()))
    first, *others = opened(plain, *packed)
    for answer in others:
        assert np.array_equal(np.fromfile(answer["out"], np.uint8), np.fromfile(first["out"], np.uint8))


def test_what_is_no_flair_series_is_told(opened, series):
    whole, other = series(), series("b")
    other = [(f"other_{name}", content) for name, content in other]
    cases = {
        "several series": [*whole, *other],
        "is incomplete": whole[:3] + whole[4:],
        "is a T1": series("t1", SeriesDescription="AX T1 POST"),
        "left out": series("adc", SeriesDescription="ADC map"),
        "modality CT": series("ct", Modality="CT"),
        "can't be read": [("IM0", whole[0][1][:400])],
        "a DICOMDIR is only a list": [("DICOMDIR", whole[0][1])],
    }
    for sentence, answer in zip(cases, opened(*cases.values())):
        assert answer.get("kind") == "UserError" and sentence in answer["error"], (sentence, answer)
        assert ";" in answer["error"] and "\n" not in answer["error"]
    (unnamed,) = opened(series("c", SeriesDescription="brain"))
    assert any("does not say that it is FLAIR" in note for note in unnamed["notes"])
