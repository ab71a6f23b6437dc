"""Kinds of objects that hospitals' exports hold: enhanced series in any number of files, mosaics, objects without
pictures, unknown transfer syntaxes; and a DICOM SEG for all that is read."""

import os
import shutil
import subprocess

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_phantoms import image_of, item, write_enhanced_mr, write_series
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from pydicom.data import get_testdata_file
from pydicom.sr.codedict import codes
from pydicom.uid import UID, MRImageStorage, generate_uid

from common import MedFLError
from radiology.bounds import InMemory
from radiology.contours import make_structure_set
from radiology.rules import FLAIR, POST, PRE, load_rules, role_of
from radiology.segmentation import read_segmentation, refusal, write_segmentation
from radiology.series import find_series, load_series

VALUES = np.random.default_rng(0).integers(0, 900, (6, 32, 32))
RULES = load_rules()


def only(paths):
    found, refused = find_series(paths)
    assert len(found) == 1 and not refused, (found, refused)
    return found[0]


def mask_of(series) -> np.ndarray:
    mask = np.zeros((series.slices, series.rows, series.columns), np.uint8)
    mask[1:3, 4:9, 5:17] = 1
    mask[3, 20, 2] = 1
    return mask


def comes_back(series, path) -> bool:
    mask = mask_of(series)
    write_segmentation(mask, series, path)
    return np.array_equal(sitk.GetArrayFromImage(read_segmentation(path, load_series(series))), mask)


@pytest.mark.parametrize("measures", ["shared", "frame"])
def test_an_enhanced_series_gets_its_mask_wherever_its_geometry_stands(tmp_path, measures):
    series = only([write_enhanced_mr(tmp_path / "a", VALUES, measures=measures)])
    assert refusal(series) is None and comes_back(series, tmp_path / "seg")
    named = pydicom.dcmread(tmp_path / "seg").PerFrameFunctionalGroupsSequence[0]
    height = named.PlanePositionSequence[0].ImagePositionPatient[2]
    reference = named.DerivationImageSequence[0].SourceImageSequence[0]
    source = pydicom.dcmread(tmp_path / "a")
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert reference.ReferencedSOPClassUID == source.SOPClassUID
    assert reference.ReferencedFrameNumber == 1 + height / 4  # frames lie 4 mm apart, from 0


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_one_series_in_several_enhanced_files_is_one(tmp_path, parts):
    uid, each = generate_uid(), len(VALUES) // parts
    paths = [
        write_enhanced_mr(
            tmp_path / f"{k}", VALUES[k * each : (k + 1) * each], first=k * each, SeriesInstanceUID=uid
        )
        for k in range(parts)
    ]
    series = only(paths[::-1])
    assert series.problems == () and np.array_equal(sitk.GetArrayFromImage(load_series(series)), VALUES)
    assert comes_back(series, tmp_path / "seg")
    seg = pydicom.dcmread(tmp_path / "seg")
    listed = [i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence]
    assert sorted(listed) == sorted(pydicom.dcmread(path).SOPInstanceUID for path in paths)


def change(paths, what) -> None:
    for number, path in enumerate(paths):
        file = pydicom.dcmread(path)
        what(file, number)
        file.save_as(path)


def jitter(file, number):
    file.ImageOrientationPatient = ["1", f"{number % 3}e-10", "0", "0", "1", "0"]


def old_forms(file, _):
    file.StudyDate, file.StudyTime, file.PatientBirthDate = "1997.03.04", "10:20:30", "unknown"
    file.PatientSex = "Male"


def uneven(file, number):
    file.ImagePositionPatient = [-64, -64, 5.0 * number + 0.04 * (-1) ** number]


@pytest.mark.parametrize("cosmetic", [jitter, old_forms, uneven])
def test_cosmetic_faults_of_a_series_do_not_cost_its_mask(tmp_path, cosmetic):
    paths = write_series(tmp_path / "s", image_of(VALUES, (5, 2, 2)), {"PatientID": "X"})
    before = [path.read_bytes() for path in paths]
    change(paths, cosmetic)
    assert [path.read_bytes() for path in paths] != before
    series = only(paths)
    assert refusal(series) is None and comes_back(series, tmp_path / "seg")
    if cosmetic is old_forms:
        seg = pydicom.dcmread(tmp_path / "seg")
        outlined = make_structure_set(mask_of(series), series, "1.2.5", "1.2.6", 1)
        for made in (seg, outlined):
            told = (made.StudyDate, made.StudyTime, made.PatientBirthDate or "")
            assert tuple(map(str, told)) == ("19970304", "102030", "")


def test_a_header_with_a_damaged_value_gets_no_mask_and_a_sentence(tmp_path):
    paths = write_series(tmp_path / "s", image_of(VALUES, (5, 2, 2)), {"StudyID": "1"})
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"\x20\x00\x10\x00SH", b"\x20\x00\x10\x00\x55\x00"))
    series = only(paths)
    assert "export it without" in str(refusal(series))
    with pytest.raises(MedFLError, match="lacks what an RTSTRUCT needs"):
        make_structure_set(mask_of(series), series, "1.2.5", "1.2.6", 1)


@pytest.mark.parametrize("enhanced", [False, True])
def test_dciodvfy_finds_no_error_in_a_mask_of_a_clean_series(tmp_path, enhanced):
    if not (tool := shutil.which("dciodvfy")):
        pytest.skip("no dciodvfy: install dicom3tools")
    about = {
        "PatientID": "X",
        "PatientName": "A^B",
        "StudyDate": "20200102",
        "StudyTime": "101112",
        "StudyID": "1",
    }
    if enhanced:
        paths = [write_enhanced_mr(tmp_path / "a", VALUES, **about)]
    else:
        paths = write_series(tmp_path / "s", image_of(VALUES, (5, 2, 2)), about, SeriesNumber=3)
    series = only(paths)
    write_segmentation(mask_of(series), series, tmp_path / "seg")
    told = subprocess.run([tool, tmp_path / "seg"], capture_output=True, text=True).stderr
    assert not [line for line in told.splitlines() if line.startswith("Error")], told


def timed(te, tr, ti=None, agent=None):
    groups = {
        "MRTimingAndRelatedParametersSequence": [item(RepetitionTime=tr)],
        "MREchoSequence": [item(EffectiveEchoTime=te)],
    }
    if ti:
        groups["MRModifierSequence"] = [item(InversionTimes=[ti])]
    tags = {"ContrastBolusAgentSequence": [item(CodeMeaning=agent, CodeValue="1")]} if agent else {}
    return {"groups": groups, **tags}


@pytest.mark.parametrize(
    "description, told, role",
    [
        ("t1_mprage", timed(2.3, 1900, 900), PRE),
        ("t1_mprage", timed(2.3, 1900, 900, "Gadolinium"), POST),
        ("ax 3", timed(120, 9000, 2500), FLAIR),
        ("ax 4", timed(9, 500), PRE),
    ],
)
def test_enhanced_objects_tell_agent_and_times_in_their_groups(tmp_path, description, told, role):
    series = only([write_enhanced_mr(tmp_path / "a", VALUES, SeriesDescription=description, **told)])
    assert role_of(series, RULES)[0] == role


def test_a_mosaic_is_no_slice(tmp_path):
    image = image_of(np.ones((1, 64, 64)), (3, 3, 3))
    named = write_series(tmp_path / "a", image, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])
    counted = write_series(tmp_path / "b", image)

    def of_siemens(file, _):
        block = file.private_block(0x0019, "SIEMENS MR HEADER", create=True)
        block.add_new(0x0A, "US", 36)

    change(counted, of_siemens)
    for paths in (named, counted):
        assert any("mosaic, many slices in one picture" in problem for problem in only(paths).problems)


@pytest.mark.parametrize(
    "kind",
    [
        "1.2.840.10008.5.1.4.1.1.66",  # raw data
        "1.2.840.10008.5.1.4.1.1.11.1",  # a presentation state
        "1.2.840.10008.5.1.4.1.1.88.22",  # a report
        "1.2.840.10008.5.1.4.1.1.4.2",  # spectroscopy, which has rows and columns
        "1.2.840.10008.5.1.4.1.1.104.1",  # a PDF
    ],
)
def test_objects_that_are_no_pictures_leave_their_series_whole(tmp_path, kind):
    paths = write_series(tmp_path / "s", image_of(VALUES, (5, 2, 2)))
    other = pydicom.dcmread(paths[0])
    other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = kind
    other.SOPInstanceUID = generate_uid()
    del other.PixelData
    other.save_as(tmp_path / "other")
    (series,), (refused,) = find_series([*paths, tmp_path / "other"])
    assert series.problems == () and series.slices == len(VALUES)
    assert UID(kind).name.removesuffix(" Storage") in refused.why and "not a picture" in refused.why


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.8.1", "1.2.840.113619.5.2"])
def test_an_unknown_transfer_syntax_is_called_so(tmp_path, syntax):
    paths = write_series(tmp_path, image_of(VALUES[:1], (5, 2, 2)))
    raw = paths[0].read_bytes()
    old = b"1.2.840.10008.1.2.1\0"
    start = raw.index(b"\x02\x00\x10\x00UI")
    new = syntax.encode() + b"\0" * (len(syntax) % 2)
    length = int.from_bytes(raw[140:144], "little") + len(new) - len(old)
    changed = raw[:start] + b"\x02\x00\x10\x00UI" + len(new).to_bytes(2, "little") + new
    changed = raw[:140] + length.to_bytes(4, "little") + changed[144:] + raw[start + 8 + len(old) :]
    paths[0].write_bytes(changed)
    (problem, *_) = only(paths).problems
    assert (
        syntax in problem and "damage" not in problem and "export it as Explicit VR Little Endian" in problem
    )


def segments(numbers, kind=SegmentationTypeValues.BINARY):
    return [
        SegmentDescription(
            n,
            f"part {n}",
            codes.SCT.MorphologicallyAbnormalStructure,
            codes.SCT.Neoplasm,
            SegmentAlgorithmTypeValues.MANUAL,
        )
        for n in numbers
    ]


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_label_maps_and_several_segments_are_read_by_the_labels_of_the_rules(tmp_path, kind):
    paths = write_series(tmp_path / "s", image_of(VALUES, (5, 2, 2)), {"PatientID": "X"})
    image = load_series(only(paths))
    sources = [pydicom.dcmread(path) for path in paths]
    for numbers in ((1,), (1, 2)):
        mask = np.zeros(VALUES.shape, np.uint8)
        for n in numbers:
            mask[n, 3:9, 3 * n : 3 * n + 3] = n
        highdicom.seg.Segmentation(
            sources, mask, kind, segments(numbers), generate_uid(), 9, generate_uid(), 1, "M", "M", "1", "1"
        ).save_as(tmp_path / "seg")
        if len(numbers) > 1:
            with pytest.raises(MedFLError, match="holds 2 segments .*tumour is 1; list all that mean tumour"):
                read_segmentation(tmp_path / "seg", image)
        found = read_segmentation(tmp_path / "seg", image, (1, 2))
        assert np.array_equal(sitk.GetArrayFromImage(found), mask > 0)


def test_jpeg_extended_that_pydicom_can_not_decode_is_read_by_gdcm_and_a_cut_one_by_none(tmp_path):
    file = pydicom.dcmread(get_testdata_file("JPEG-lossy.dcm", download=False))
    with pytest.raises(RuntimeError):
        file.pixel_array  # noqa: B018  pydicom's decoders don't take it
    file.Modality, file.SOPClassUID = "MR", MRImageStorage
    file.PixelSpacing, file.SliceThickness = [1, 1], 2
    file.ImagePositionPatient, file.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    for name in ("NumberOfFrames", "DetectorInformationSequence"):
        file.pop(name, None)
    file.save_as(tmp_path / "whole")
    found = sitk.GetArrayFromImage(load_series(only([tmp_path / "whole"])))
    assert found.shape == (1, file.Rows, file.Columns) and found.max() > found.min()
    if hasattr(os, "memfd_create"):  # Linux: an upload is decoded where it lies, in memory
        uploaded = InMemory("whole", (tmp_path / "whole").read_bytes())
        assert np.array_equal(sitk.GetArrayFromImage(load_series(only([uploaded]))), found)
    (frame,) = pydicom.encaps.generate_frames(file.PixelData, number_of_frames=1)
    file.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2]])
    file.SOPInstanceUID = generate_uid()
    file.save_as(tmp_path / "cut")
    with pytest.raises(MedFLError, match="can't be decoded"):
        load_series(only([tmp_path / "cut"]))
