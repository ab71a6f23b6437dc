"""radiology/segmentation.py: a mask there and back as DICOM SEG, what a viewer needs of it, and what is
refused."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_phantoms import image_of, turn, write_series
from pydicom.pixels import pack_bits
from test_series import write_enhanced

from common import MedFLError
from radiology.segmentation import read_segmentation, valid_header, write_segmentation
from radiology.series import find_series, load_series

SHAPE = (7, 20, 24)
OBLIQUE = np.array(
    turn(image_of(np.zeros((2, 2, 2)), (5, 1, 1)), (20, -10, 35), (0, 0, 0)).GetMatrix()
).reshape(3, 3)


def mask() -> np.ndarray:
    """Two pieces without any symmetry, not in every slice."""
    found = np.zeros(SHAPE, np.uint8)
    found[1:4, 3:9, 5:17] = 1
    found[5, 12, 2] = 255
    return found


@pytest.fixture
def source(tmp_path):
    """An oblique series and its pixels."""
    image = image_of(np.arange(np.prod(SHAPE)).reshape(SHAPE), (5, 1.25, 0.75), (-30, 12, 7), OBLIQUE)
    paths = write_series(
        tmp_path / "source",
        image,
        {"PatientName": "Schmidt^Eva", "PatientID": "4711"},
        SeriesDescription="FLAIR",
    )
    (series,), _ = find_series(paths)
    return series, load_series(series)


def labels(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def test_a_mask_comes_back_as_it_was(source, tmp_path):
    series, image = source
    write_segmentation(mask(), series, tmp_path / "seg.dcm")
    found = read_segmentation(tmp_path / "seg.dcm", image)
    assert np.array_equal(labels(found), mask() > 0) and found.GetPixelID() == sitk.sitkUInt8
    assert found.GetOrigin() == image.GetOrigin() and found.GetDirection() == image.GetDirection()
    write_segmentation(mask().astype(bool), series, tmp_path / "seg.dcm")
    assert np.array_equal(labels(read_segmentation(tmp_path / "seg.dcm", image)), mask() > 0)


def test_a_viewer_can_lay_it_over_the_source(source, tmp_path):
    series, _ = source
    write_segmentation(mask(), series, tmp_path / "seg.dcm")
    file, first = pydicom.dcmread(tmp_path / "seg.dcm"), pydicom.dcmread(series.files[0])
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName", "Rows", "Columns"):
        assert file[name].value == first[name].value, name
    assert file.SOPClassUID.name == "Segmentation Storage" and file.SegmentationType == "BINARY"
    assert (
        file.SeriesInstanceUID != series.uid
        and file.ReferencedSeriesSequence[0].SeriesInstanceUID == series.uid
    )
    (segment,) = file.SegmentSequence
    assert (
        segment.SegmentLabel == "tumour"
        and segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    )
    frames = {
        tuple(g.PlanePositionSequence[0].ImagePositionPatient) for g in file.PerFrameFunctionalGroupsSequence
    }
    sources = [pydicom.dcmread(path) for path in series.files]
    assert frames == {
        tuple(sources[k].ImagePositionPatient) for k in (1, 2, 3, 5)
    }  # each on the plane of its slice
    named = {
        g.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        for g in file.PerFrameFunctionalGroupsSequence
    }
    assert named == {sources[k].SOPInstanceUID for k in (1, 2, 3, 5)}


def test_an_enhanced_source_works_as_well(tmp_path):
    image = image_of(np.arange(np.prod(SHAPE)).reshape(SHAPE), (5, 1.25, 0.75), (3, 4, 5), OBLIQUE)
    write_enhanced(tmp_path / "enhanced", image, [3, 0, 6, 4, 1, 2, 5])
    (series,), _ = find_series([tmp_path / "enhanced"])
    write_segmentation(mask(), series, tmp_path / "seg.dcm")
    assert np.array_equal(labels(read_segmentation(tmp_path / "seg.dcm", load_series(series))), mask() > 0)


@pytest.mark.parametrize(
    "wrong, sentence",
    [(mask() * 0, "the mask is empty"), (mask()[1:], "is 6×20×24, but the series “FLAIR” 7×20×24")],
)
def test_masks_that_can_not_be_written(source, tmp_path, wrong, sentence):
    with pytest.raises(MedFLError, match=sentence):
        write_segmentation(wrong, source[0], tmp_path / "seg.dcm")
    assert not (tmp_path / "seg.dcm").exists()


def shifted(image):
    moved = sitk.Image(image)
    moved.SetOrigin([v + 0.2 for v in image.GetOrigin()])
    return moved


@pytest.mark.parametrize(
    "reference",
    [
        shifted,
        lambda image: image[:, :, 2:],
        lambda image: image[:-1],
        lambda image: sitk.DICOMOrient(image, "PIR"),
    ],
)
def test_a_mask_of_another_geometry_is_refused(source, tmp_path, reference):
    write_segmentation(mask(), source[0], tmp_path / "seg.dcm")
    with pytest.raises(MedFLError, match="another grid than its series"):
        read_segmentation(tmp_path / "seg.dcm", reference(source[1]))


def test_a_mask_whose_rows_are_the_columns_of_its_series_is_refused(tmp_path):
    """On square slices its corners lie where the series' do."""
    square = image_of(np.arange(3 * 20 * 20).reshape(3, 20, 20), (5, 1, 1))
    write_enhanced(tmp_path / "square", square, [0, 1, 2])
    (series,), _ = find_series([tmp_path / "square"])
    marked = np.zeros((3, 20, 20), np.uint8)
    marked[:, 2:5, 7:15] = 1
    write_segmentation(marked, series, tmp_path / "seg.dcm")

    def exchanged(file):
        for group in [*file.SharedFunctionalGroupsSequence, *file.PerFrameFunctionalGroupsSequence]:
            if plane := group.get("PlaneOrientationSequence"):
                plane[0].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
        file.PixelData = pack_bits(marked.transpose(0, 2, 1).ravel())

    change(tmp_path / "seg.dcm", exchanged)
    with pytest.raises(MedFLError, match="another grid than its series"):
        read_segmentation(tmp_path / "seg.dcm", load_series(series))


def change(path, what) -> None:
    file = pydicom.dcmread(path)
    what(file)
    file.save_as(path)


def blank(file):
    file.PixelData = bytes(len(file.PixelData))


def with_another_segment(file):
    file.SegmentSequence.append(pydicom.Dataset())
    file.SegmentSequence[1].update(file.SegmentSequence[0])
    file.SegmentSequence[1].SegmentNumber, file.SegmentSequence[1].SegmentLabel = 2, "oedema"


def fractional(file):
    file.SegmentationType, file.SegmentationFractionalType, file.MaximumFractionalValue = (
        "FRACTIONAL",
        "PROBABILITY",
        255,
    )
    file.BitsAllocated = file.BitsStored = 8
    file.HighBit = 7
    file.PixelData = bytes(file.Rows * file.Columns * file.NumberOfFrames)


@pytest.mark.parametrize(
    "what, sentence",
    [
        (blank, "is empty: no pixel is marked"),
        (with_another_segment, r"holds 2 segments \(tumour, oedema\)"),
        (fractional, "holds fractions, not a mask"),
        (lambda file: file.__delattr__("SegmentSequence"), "can't be read as a DICOM SEG"),
        (lambda file: file.__delattr__("PerFrameFunctionalGroupsSequence"), "can't be read as a DICOM SEG"),
        (lambda file: file.PerFrameFunctionalGroupsSequence.pop(), "can't be read as a DICOM SEG"),
    ],
)
def test_segmentations_that_are_no_mask_of_a_tumour(source, tmp_path, what, sentence):
    write_segmentation(mask(), source[0], tmp_path / "seg.dcm")
    change(tmp_path / "seg.dcm", what)
    with pytest.raises(MedFLError, match=sentence):
        read_segmentation(tmp_path / "seg.dcm", source[1])


def test_another_kind_of_file_is_no_segmentation(source, tmp_path):
    (tmp_path / "text").write_text("no picture")
    for path in (source[0].files[0], tmp_path / "text", tmp_path / "gone"):
        with pytest.raises(MedFLError, match="can't be read as a DICOM SEG"):
            read_segmentation(path, source[1])


def without(series, *names):
    """The series with these tags taken away."""
    for path in series.files:
        change(path, lambda file: [file.__delattr__(name) for name in names if name in file])
    return find_series(series.files)[0][0]


def test_an_anonymised_source_is_enough(source, tmp_path):
    bare = without(
        source[0],
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyTime",
        "StudyID",
        "AccessionNumber",
        "ReferringPhysicianName",
        "PositionReferenceIndicator",
        "SeriesDescription",
        "SliceThickness",
        "Manufacturer",
        "InstanceNumber",
        "Laterality",
        "SeriesNumber",
    )
    write_segmentation(mask(), bare, tmp_path / "seg.dcm")
    assert np.array_equal(labels(read_segmentation(tmp_path / "seg.dcm", source[1])), mask() > 0)
    with pytest.raises(MedFLError, match="lacks what a DICOM SEG needs .*Frame Of Reference"):
        write_segmentation(mask(), without(bare, "FrameOfReferenceUID"), tmp_path / "seg.dcm")


def test_what_is_long_or_private_in_a_source_is_not_unpacked(source):
    """Each slice of a small upload took a quarter of a minute, because its private sequence held 900,000 elements."""
    path = source[0].files[0]
    file = pydicom.dcmread(path)
    for tag, items in ((0x54011001, 3), (0x00081110, 9_000)):
        file.add_new(tag, "SQ", [pydicom.Dataset() for _ in range(items)])
    file.save_as(path)
    header = valid_header(path)
    assert not any(tag.is_private for tag in list(header.keys())) and "ReferencedStudySequence" not in header
    assert header.PatientName == file.PatientName and header.SOPInstanceUID == file.SOPInstanceUID
