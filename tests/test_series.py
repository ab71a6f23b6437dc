"""radiology/series.py: files sorted into series, everything wrong with them told, and pixels as the scanner
meant them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_phantoms import image_of, turn, write_series
from pydicom.dataset import Dataset
from pydicom.uid import (
    MPEG2MPML,
    EnhancedMRImageStorage,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)
from running import ROOT

from common import MedFLError
from radiology.bounds import read_with_pixels
from radiology.series import find_series, load_series

SPACING = (5.0, 1.25, 0.75)
OBLIQUE = np.array(
    turn(image_of(np.zeros((2, 2, 2)), SPACING), (20, -10, 35), (0, 0, 0)).GetMatrix()
).reshape(3, 3)


def values(slices: int = 6, low: int = 0, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    """Whole numbers that differ everywhere."""
    return np.random.default_rng(slices).integers(low, 3000, (slices, *size)).astype(float)


def change(path: Path, **tags) -> None:
    """Set tags of a file, or delete those that are None."""
    file = pydicom.dcmread(path)
    for name, value in tags.items():
        if value is None:
            delattr(file, name)
        else:
            setattr(file, name, value)
    file.save_as(path)


def only(paths):
    """The one series that these files are."""
    (series,), refused = find_series(paths)
    assert not refused
    return series


@pytest.mark.parametrize(
    "signed, slope, intercept", [(False, 1, 0), (True, 1, 0), (True, 0.5, -20), (False, 2, 1000)]
)
def test_a_series_comes_back_as_it_was(tmp_path, signed, slope, intercept):
    volume = values(low=-3000 if signed else 0) * slope + intercept
    image = image_of(volume, SPACING, (-30, 12, 7), OBLIQUE)
    paths = write_series(
        tmp_path, image, signed=signed, slope=slope, intercept=intercept, SeriesDescription="AX FLAIR"
    )
    series = only(np.random.default_rng(0).permutation(paths))
    assert (
        series.files == tuple(paths)
        and series.problems == ()
        and series.slices == 6
        and series.description == "AX FLAIR"
    )
    assert series.spacing == pytest.approx(SPACING) and (series.rows, series.columns) == (20, 24)
    assert np.diff(series.positions) == pytest.approx([5.0] * 5, abs=1e-4)
    found = load_series(series)
    assert np.array_equal(sitk.GetArrayFromImage(found), volume) and found.GetPixelID() == sitk.sitkFloat32
    assert found.GetOrigin() == pytest.approx((-30, 12, 7)) and found.GetSpacing() == pytest.approx(
        SPACING[::-1]
    )
    assert found.GetDirection() == pytest.approx(OBLIQUE.ravel(), abs=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_an_inverted_series_is_turned_so_that_bright_is_bright(tmp_path, signed):
    stored = values(low=-3000 if signed else 0)
    paths = write_series(
        tmp_path, image_of(stored, SPACING), signed=signed, PhotometricInterpretation="MONOCHROME1"
    )
    found = sitk.GetArrayFromImage(load_series(only(paths)))
    assert np.array_equal(found, (-1 if signed else 65535) - stored)


def test_signed_numbers_of_12_bits_keep_their_sign(tmp_path):
    stored = values(low=-2000) / 2 // 1
    paths = write_series(tmp_path, image_of(stored, SPACING), signed=True, BitsStored=12, HighBit=11)
    for path in paths:  # the four bits above those in use hold something else, as old scanners left them
        file = pydicom.dcmread(path)
        file.PixelData = (np.frombuffer(file.PixelData, "<u2") & 0x0FFF).tobytes()
        file.save_as(path)
    assert np.array_equal(sitk.GetArrayFromImage(load_series(only(paths))), stored)


def as_lossless_jpeg(path: Path) -> None:
    """Store a file's pixels as JPEG lossless; GDCM, inside SimpleITK, can write that."""
    file, beside = pydicom.dcmread(path), path.with_suffix(".dcm")
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(beside))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.Execute(sitk.GetImageFromArray(file.pixel_array[None]))
    written = pydicom.dcmread(beside)
    file.PixelData, file.file_meta.TransferSyntaxUID = written.PixelData, written.file_meta.TransferSyntaxUID
    file["PixelData"].is_undefined_length, file["PixelData"].VR = True, "OB"
    file.save_as(path)
    beside.unlink()


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_compressed_files_hold_the_same_pixels(tmp_path, syntax):
    volume = values(4, size=(64, 64))
    paths = write_series(tmp_path, image_of(volume, SPACING))
    for path in paths:
        if syntax == JPEGLosslessSV1:
            as_lossless_jpeg(path)
        else:
            file = pydicom.dcmread(path)
            file.compress(syntax, generate_instance_uid=False)
            file.save_as(path)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(sitk.GetArrayFromImage(load_series(only(paths))), volume)


def test_a_missing_decoder_is_named(tmp_path):
    (path,) = write_series(tmp_path, image_of(values(1, size=(64, 64)), SPACING))
    file = pydicom.dcmread(path)
    file.compress(JPEG2000Lossless, generate_instance_uid=False)
    file.save_as(path)
    code = (
        "import sys; sys.modules.update(pylibjpeg=None, PIL=None, gdcm=None); sys.path.insert(0, "
        "sys.argv[1])\n"
        "from pathlib import Path; from radiology.series import find_series, load_series\n"
        "load_series(find_series([Path(sys.argv[2])])[0][0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)], capture_output=True, text=True)
    assert (
        "is compressed (JPEG 2000 Image Compression (Lossless Only)), and no installed decoder can read it; "
        "`pip install -r requirements-dicom.txt`" in done.stderr.splitlines()[-1]
    )
    file.file_meta.TransferSyntaxUID = MPEG2MPML
    file.save_as(path)
    with pytest.raises(MedFLError, match="no installed decoder can read it"):
        load_series(only([path]))


def write_enhanced(path: Path, image: sitk.Image, frames: list[int], slope: float = 1.0) -> None:
    """An enhanced multi-frame MR: the image's slices in the order
    of `frames`, geometry in functional groups."""
    (first,) = write_series(path.parent, image[:, :, :1])
    file = pydicom.dcmread(first)
    first.unlink()
    for name in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "SliceThickness",
        "SpacingBetweenSlices",
    ):
        delattr(file, name)
    matrix, (columns, rows, between) = np.array(image.GetDirection()).reshape(3, 3), image.GetSpacing()
    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [Dataset()], [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = matrix[:, :2].T.ravel().round(9).tolist()
    shared.PixelMeasuresSequence[0].PixelSpacing = [rows, columns]
    shared.PixelMeasuresSequence[0].SliceThickness = between
    file.SharedFunctionalGroupsSequence, file.PerFrameFunctionalGroupsSequence = [shared], []
    for index in frames:
        group = Dataset()
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [Dataset()], [Dataset()]
        group.PlanePositionSequence[0].ImagePositionPatient = [
            round(v, 5) for v in image.TransformIndexToPhysicalPoint((0, 0, index))
        ]
        transformation = group.PixelValueTransformationSequence[0]
        transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = (
            slope * (index + 1),
            0,
            "US",
        )
        group.FrameContentSequence = [Dataset()]
        group.FrameContentSequence[0].DimensionIndexValues = [index + 1]
        file.PerFrameFunctionalGroupsSequence.append(group)
    file.NumberOfFrames, file.SOPClassUID = len(frames), EnhancedMRImageStorage
    file.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    file.PixelData = sitk.GetArrayFromImage(image)[frames].astype("<u2").tobytes()
    file.save_as(path)


def test_an_enhanced_multi_frame_series_is_read_frame_by_frame(tmp_path):
    volume = values(5)
    write_enhanced(
        tmp_path / "enhanced", image_of(volume, SPACING, (3, 4, 5), OBLIQUE), [3, 0, 4, 1, 2], slope=0.25
    )
    series = only([tmp_path / "enhanced"])
    assert series.problems == () and series.frames == (1, 3, 4, 0, 2) and series.slices == 5
    found = load_series(series)
    assert np.array_equal(sitk.GetArrayFromImage(found), volume * 0.25 * np.arange(1, 6)[:, None, None])
    assert found.GetOrigin() == pytest.approx((3, 4, 5)) and found.GetSpacing() == pytest.approx(
        SPACING[::-1]
    )


def test_enhanced_frames_of_two_times_are_told(tmp_path):
    write_enhanced(tmp_path / "enhanced", image_of(values(3), SPACING), [0, 1, 2, 0, 1, 2])
    assert "3 of its slices lie at the same place as another" in only([tmp_path / "enhanced"]).problems[0]


def turned(paths):
    change(paths[2], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])


def cut(paths):
    paths[1].write_bytes(paths[1].read_bytes()[:-100])


def of_another_size(paths):
    change(paths[3], Rows=10, PixelData=bytes(10 * 24 * 2))


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda paths: [change(p, Modality="CT") for p in paths], "it is of modality CT, not MR"),
        (
            lambda paths: [change(p, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]) for p in paths],
            "it is a localizer",
        ),
        (turned, "have different directions, as in a localizer"),
        (
            lambda paths: [
                change(
                    p,
                    SamplesPerPixel=3,
                    PhotometricInterpretation="RGB",
                    PlanarConfiguration=0,
                    PixelData=bytes(20 * 24 * 6),
                )
                for p in paths
            ],
            "it is in colour",
        ),
        (lambda paths: paths.pop(2), "1 of its slices are missing (a gap of 10.0 mm where 5.0 is usual)"),
        (
            lambda paths: change(paths[2], ImagePositionPatient=[0, 0, 5]),
            "1 of its slices lie at the same place as another",
        ),
        (
            lambda paths: change(paths[2], ImagePositionPatient=[0, 0, 12]),
            "unevenly spaced, 3.00 to 7.00 mm apart",
        ),
        (
            lambda paths: change(paths[2], ImagePositionPatient=[3, 0, 10]),
            "are shifted against each other",
        ),
        (of_another_size, "different sizes, 24×20 and 24×10"),
        (lambda paths: change(paths[2], PixelSpacing=[1, 1]), "pixels of different sizes"),
        (cut, "IM0001 is truncated"),
        (
            lambda paths: [change(p, ImagePositionPatient=None) for p in paths],
            "does not say where its slices lie",
        ),
        (
            lambda paths: [change(p, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]) for p in paths],
            "not at right angles",
        ),
        (lambda paths: [change(p, PixelSpacing=[0, 0]) for p in paths], "pixels have no size"),
        (
            lambda paths: [change(p, PixelSpacing=[1e5, 1e5]) for p in paths],
            "voxels measure 100000 × 100000 × 5 mm",
        ),
        (lambda paths: change(paths[2], PatientID="another"), "name different patients under one"),
        (lambda paths: change(paths[2], StudyInstanceUID="1.2.4"), "name different studies under one"),
        (lambda paths: change(paths[2], FrameOfReferenceUID="1.2.4"), "name different frames of reference"),
        (lambda paths: change(paths[2], PhotometricInterpretation="PALETTE COLOR"), "it is in colour"),
        (lambda paths: change(paths[2], BitsStored=12), "of 12 bits end at bit 15"),
    ],
)
def test_what_is_wrong_with_a_series_is_told(tmp_path, spoil, sentence):
    paths = write_series(tmp_path, image_of(values(), SPACING))
    spoil(paths)
    series = only(paths)
    assert any(sentence in problem for problem in series.problems), series.problems
    with pytest.raises(MedFLError, match="can't be used"):
        load_series(series)


@pytest.mark.parametrize("padding, signed", [(-2000, True), (63536, True), (40_000, False)])
def test_padding_is_as_dark_as_the_darkest_pixel(tmp_path, padding, signed):
    """Far below everything it would make all tissue white, far above it all tissue black."""
    stored = values()
    stored[:, :5] = -2000 if signed else padding
    paths = write_series(tmp_path, image_of(stored, SPACING), signed=signed, slope=2.0, intercept=0.0)
    for path in paths:
        file = pydicom.dcmread(path)
        file.PixelData = stored.astype("<i2" if signed else "<u2")[paths.index(path)].tobytes()
        file.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
        file.save_as(path)
    found = sitk.GetArrayFromImage(load_series(only(paths)))
    assert np.array_equal(found[:, 5:], 2 * stored[:, 5:]) and (found[:, :5] == 2 * stored[:, 5:].min()).all()


@pytest.mark.parametrize("slope", [b"NaN ", b"9e99", b"0.00"])
def test_a_slope_that_is_none_is_told(tmp_path, slope):
    paths = write_series(tmp_path, image_of(values(), SPACING), slope=1.75)
    paths[2].write_bytes(paths[2].read_bytes().replace(b"1.75", slope))
    with pytest.raises(MedFLError, match="not numbers|can't be decoded"):
        load_series(only(paths))


def test_what_lies_behind_the_pixels_is_not_read(tmp_path):
    """Nobody has looked through it, and a megabyte of items there becomes a gigabyte of objects."""
    path = write_series(tmp_path / "s", image_of(values(), (5, 1, 1)), {"PatientID": "X"})[0]
    items = b"\xfe\xff\x00\xe0\0\0\0\0" * 3 + b"\xfe\xff\xdd\xe0\0\0\0\0"
    path.write_bytes(path.read_bytes() + b"\xe1\x7f\x01\x10SQ\0\0\xff\xff\xff\xff" + items)
    assert (0x7FE1, 0x1001) in pydicom.dcmread(path)
    read = read_with_pixels(path)
    assert (0x7FE1, 0x1001) not in read and np.array_equal(
        read.pixel_array, pydicom.dcmread(path).pixel_array
    )


def test_one_bad_series_does_not_spoil_another(tmp_path):
    good = write_series(tmp_path / "a", image_of(values(), SPACING))
    bad = write_series(tmp_path / "b", image_of(values(), SPACING))
    found, _ = find_series([*bad[:2], *bad[3:], *good])
    assert sorted(len(series.problems) for series in found) == [0, 1]


def test_a_slope_without_an_intercept_counts(tmp_path):
    paths = write_series(tmp_path, image_of(np.ones((3, 8, 8)), (5, 1, 1)))
    for index, path in enumerate(paths):
        change(path, RescaleSlope=index + 1)
    assert sitk.GetArrayFromImage(load_series(only(paths)))[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("shared", [2, 6])
def test_slices_under_one_number_are_no_copies(tmp_path, shared):
    """A faulty anonymisation gave slices the same number: without every second one the rest would be even."""
    paths = write_series(tmp_path, image_of(np.zeros((6, 8, 8)), (5, 1, 1)))
    for index, path in enumerate(paths):
        change(path, SOPInstanceUID=f"1.2.3.{index // shared + 1}")
    (series,), refused = find_series(paths)
    assert not refused and series.spacing[0] == 5 and "share one number" in series.problems[0]


def test_files_that_belong_to_no_series_are_named_with_the_reason(tmp_path):
    paths = write_series(tmp_path / "a", image_of(values(2), SPACING))
    twice, text, header, empty = (tmp_path / name for name in ("twice", "text", "header", "empty"))
    twice.write_bytes(paths[0].read_bytes())
    text.write_text("no picture")
    header.write_bytes(paths[1].read_bytes()[:400])
    empty.write_bytes(b"")
    found, refused = find_series([*paths, twice, text, header, empty, tmp_path / "gone"])
    assert len(found) == 1 and found[0].problems == ()
    why = {r.path.name: r.why for r in refused}
    assert why.keys() == {"twice", "text", "header", "empty", "gone"}
    assert (
        "the same image as IM0000" in why["twice"]
        and "not a DICOM" in why["text"]
        and "not a DICOM" in why["empty"]
    )
    assert "cut off" in why["header"] and "can't be read" in why["gone"]


def test_a_cut_off_compressed_file_is_told_when_its_pixels_are_read(tmp_path):
    (path,) = write_series(tmp_path, image_of(values(1), SPACING))
    file = pydicom.dcmread(path)
    file.compress(RLELossless, generate_instance_uid=False)
    file.save_as(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(MedFLError, match="IM0000 can't be decoded"):
        load_series(only([path]))


def test_a_lone_slice_takes_its_distance_from_the_header(tmp_path):
    (path,) = write_series(tmp_path, image_of(values(1), SPACING))
    assert only([path]).spacing == pytest.approx(SPACING)
    change(path, SpacingBetweenSlices=None, SliceThickness=None)
    assert "single slice that does not state its thickness" in only([path]).problems[0]


def test_pydicoms_own_files_go_through():
    """Real files of many makers, kinds and faults: each is in a series or refused, nothing else is raised."""
    files = sorted(p for p in (Path(pydicom.__file__).parent / "data").rglob("*") if p.is_file())
    found, refused = find_series(files)
    assert (
        len(files) > 150 and sorted([p for s in found for p in s.files] + [r.path for r in refused]) == files
    )
    assert all(s.problems or s.modality == "MR" for s in found) and all(r.why for r in refused)
    fine = [series for series in found if not series.problems]
    sizes = {series.files[0].name: load_series(series).GetSize() for series in fine}
    assert sizes["MR_small.dcm"] == (64, 64, 1) and len(sizes) >= 5


def test_copies_of_pydicoms_mr_in_other_syntaxes_have_its_pixels(tmp_path):
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    wanted = pydicom.dcmread(folder / "MR_small.dcm").pixel_array
    for name in (
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_padded.dcm",
    ):
        assert np.array_equal(sitk.GetArrayFromImage(load_series(only([folder / name])))[0], wanted), name
    assert "MR_truncated.dcm is truncated" in only([folder / "MR_truncated.dcm"]).problems[0]


def test_uids_do_not_depend_on_the_order_of_files(tmp_path):
    first = write_series(
        tmp_path / "a", image_of(values(3), SPACING), SeriesNumber=9, SeriesInstanceUID=generate_uid()
    )
    second = write_series(tmp_path / "b", image_of(values(4), SPACING), SeriesNumber=2)
    assert [s.number for s in find_series([*first, *second])[0]] == [2, 9]
    assert find_series([*first, *second])[0] == find_series([*second[::-1], *first[::-1]])[0]


def test_damaged_headers_never_end_a_run(tmp_path):
    """Single bytes of headers changed at random: the file is refused or told, read, or refused when its
    pixels are read."""
    paths = write_series(tmp_path, image_of(values(3), SPACING), SeriesDescription="AX FLAIR", slope=0.5)
    write_enhanced(tmp_path / "enhanced", image_of(values(3), SPACING), [0, 1, 2])
    random, outcomes = np.random.default_rng(0), set()
    for source, others in ((paths[1], [paths[0], paths[2]]), (tmp_path / "enhanced", [])):
        whole = source.read_bytes()
        for _ in range(250):
            damaged = bytearray(whole)
            for place in random.integers(132, len(whole) - 3 * 20 * 24 * 2 // len([source, *others]), 3):
                damaged[place] = random.integers(256)
            (tmp_path / "damaged").write_bytes(damaged)
            found, refused = find_series([tmp_path / "damaged", *others])
            outcomes |= {bool(refused), *(bool(series.problems) for series in found)}
            for series in found:
                if not series.problems:
                    try:
                        load_series(series)
                    except MedFLError as error:
                        outcomes.add(str(error).partition(" can't be ")[2])
    assert {True, False, "decoded (truncated or damaged); export it again"} <= outcomes
