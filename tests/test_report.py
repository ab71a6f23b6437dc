"""What goes back to an archive: SEG, structured report and RTSTRUCT, held against pydicom, highdicom and dciodvfy."""

import shutil
import subprocess
from dataclasses import replace

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_phantoms import phantom, scan, write_series

from common import MedFLError
from radiology.contours import fill, make_structure_set, read_structure_set
from radiology.prediction import Proposal, grid_of
from radiology.preparation import prepare
from radiology.report import NOTICE, Author, make_objects
from radiology.rules import load_rules
from radiology.segmentation import make_segmentation, read_segmentation
from radiology.series import find_series
from radiology.studies import plan_studies

AUTHOR = Author("model_best.pth (TransUNet tiny)", "ab" * 32)
SAGITTAL = [[0, 0, -1], [1, 0, 0], [0, -1, 0]]


@pytest.fixture(scope="module", params=["axial", "sagittal"])
def proposal(request, tmp_path_factory) -> Proposal:
    """A phantom's true outline as a proposal, on an axial series and a sagittal one."""
    folder = tmp_path_factory.mktemp(request.param)
    images, truth = phantom(0, slices=12, size=64)
    image, mask = images[1], truth
    if request.param == "sagittal":
        image, mask = scan(image, 60, 20, SAGITTAL), scan(truth, 60, 20, SAGITTAL, nearest=True)
    patient = {"PatientID": "X1", "PatientName": "Zzyzxova^Ludmila", "PatientSex": "F", "StudyID": "7"}
    patient |= {
        "PatientBirthDate": "19431117",
        "AccessionNumber": "5",
        "ReferringPhysicianName": "Nightjar^Otto",
    }
    paths = write_series(
        folder, image, patient, study="1.2.840.1", frame="1.2.840.9", StudyDate="20260102", StudyTime="101112",
        SeriesDescription="FLAIR", SeriesNumber=3,
    )  # fmt: skip
    (series,), _ = find_series(paths)
    marked = sitk.GetArrayFromImage(mask) > 0
    if series.positions and np.sign(series.normal @ sitk_axis(mask)) < 0:
        marked = marked[::-1]
    return Proposal((marked * 255).astype(np.uint8), series, (series,), ())


def sitk_axis(image: sitk.Image) -> np.ndarray:
    return np.array(image.GetDirection()).reshape(3, 3)[:, 2]


@pytest.fixture(scope="module")
def objects(proposal) -> list[pydicom.Dataset]:
    return make_objects(proposal, AUTHOR, structure_set=True)


def test_the_standards_checker_finds_no_error(objects, tmp_path):
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("no dciodvfy (Debian's dicom3tools): the objects' form is not checked")
    for made in objects:
        path = tmp_path / f"{made.Modality}.dcm"
        made.save_as(path, enforce_file_format=True)
        told = subprocess.run([program, "-new", str(path)], capture_output=True, text=True)
        errors = [line for line in (told.stdout + told.stderr).splitlines() if line.startswith("Error")]
        assert not errors, f"{made.Modality}: {errors}"


def test_masks_come_back_pixel_for_pixel(objects, proposal, tmp_path):
    truth = proposal.mask > 0
    for made, read in ((objects[0], read_segmentation), (objects[2], read_structure_set)):
        path = tmp_path / "object.dcm"
        made.save_as(path, enforce_file_format=True)
        assert np.array_equal(sitk.GetArrayFromImage(read(path, grid_of(proposal.series))) > 0, truth)
        (series,), _ = find_series([path])
        assert series.references == (proposal.series.uid,)


def test_the_report_says_what_was_measured_by_whom_and_that_nobody_verified_it(objects, proposal, tmp_path):
    segmentation, report, structures = objects
    report.save_as(tmp_path / "sr.dcm", enforce_file_format=True)
    read = highdicom.sr.srread(tmp_path / "sr.dcm")
    assert (read.VerificationFlag, read.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    (group,) = read.content.get_volumetric_roi_measurement_groups()
    assert group.referenced_segment.referenced_sop_instance_uid == segmentation.SOPInstanceUID
    volume, area = group.get_measurements()
    spacing = proposal.series.spacing
    assert volume.value == pytest.approx((proposal.mask > 0).sum() * np.prod(spacing) / 1000, abs=1e-3)
    assert area.value == pytest.approx(
        (proposal.mask > 0).sum(axis=(1, 2)).max() * spacing[1] * spacing[2], abs=0.1
    )
    assert group.get_qualitative_evaluations()[0].value.meaning == NOTICE
    parts = read.content.get_image_measurement_groups()
    assert len(parts) == len(proposal.components) > 0
    for said, part in zip(parts, proposal.components):
        assert said.tracking_identifier == f"component {part.number}"
        assert [m.name.meaning for m in said.get_measurements()] == ["Volume", "Long axis", "Short axis"]
        values = [m.value for m in said.get_measurements()]
        assert values == pytest.approx([part.cm3(part.voxels), *part.diameters], abs=0.1)
    for made in objects:
        made.save_as(tmp_path / "object.dcm", enforce_file_format=True)
        content = (tmp_path / "object.dcm").read_bytes()
        assert AUTHOR.sha256.encode() in content and AUTHOR.model.encode() in content
        assert b"unverified" in content.lower()
        assert (made.PatientID, made.StudyInstanceUID) == ("X1", "1.2.840.1")
    assert structures.ApprovalStatus == "UNAPPROVED"


def test_a_volume_has_its_interval_where_the_probabilities_are_known(proposal, tmp_path):
    sure = (proposal.mask > 0).astype(np.float32) * 0.95
    report = make_objects(replace(proposal, probability=sure), AUTHOR)[-1]
    report.save_as(tmp_path / "sr.dcm", enforce_file_format=True)
    (group,) = highdicom.sr.srread(tmp_path / "sr.dcm").content.get_image_measurement_groups()
    volume, low, high, *_ = group.get_measurements()
    assert (low.derivation.meaning, high.derivation.meaning) == ("Minimum", "Maximum")
    assert volume.value == low.value == high.value > 0


def test_the_same_proposal_is_the_same_object_and_another_models_is_not(objects, proposal):
    again = make_objects(proposal, AUTHOR, structure_set=True)
    other = make_objects(proposal, replace(AUTHOR, sha256="cd" * 32), structure_set=True)
    assert [o.SOPInstanceUID for o in again] == [o.SOPInstanceUID for o in objects]
    assert [o.SeriesInstanceUID for o in again] == [o.SeriesInstanceUID for o in objects]
    uids = [o.SOPInstanceUID for o in [*objects, *other]]
    assert len(set(uids)) == 6


def test_no_tumour_gives_a_report_that_says_so(proposal, tmp_path):
    (report,) = make_objects(replace(proposal, mask=np.zeros_like(proposal.mask)), AUTHOR, structure_set=True)
    report.save_as(tmp_path / "sr.dcm", enforce_file_format=True)
    (group,) = highdicom.sr.srread(tmp_path / "sr.dcm").content.get_image_measurement_groups()
    assert [m.value for m in group.get_measurements()] == [0, 0]


def test_an_outline_has_the_area_of_its_circle_and_holes():
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ring = fill([circle * 20 + 32, circle * 8 + 32], (64, 64))
    assert ring.sum() == pytest.approx(np.pi * (20**2 - 8**2), rel=0.01)
    assert not fill([circle * 20 + 200], (64, 64)).any()


def test_an_outline_that_is_there_twice_counts_once_and_those_that_overlap_are_refused():
    """By the lines that cross a row alone, what lies within both would be left out."""
    square = np.array([[0, 0], [6, 0], [6, 6], [0, 6]], float)
    hole, island = square / 2 + 2, square / 6 + 3
    once = fill([square + 9, hole + 9, island + 9, square], (64, 64))
    assert once.sum() == 36 - 9 + 1 + 36
    again = [island, square, hole, square, hole, island]
    assert np.array_equal(fill([ring + 9 for ring in again] + [square] * 3, (64, 64)), once)
    with pytest.raises(MedFLError, match="overlap on one slice"):
        fill([square, square + 3], (64, 64))


def test_of_several_outlines_the_one_called_tumour_is_meant(proposal, tmp_path):
    made = make_structure_set(proposal.mask, proposal.series, "1.2.5", "1.2.6", 1)
    other = pydicom.Dataset()
    other.ROINumber, other.ROIName = 2, "Brainstem"
    made.StructureSetROISequence[0].ROIName = "GTV_1"
    made.StructureSetROISequence.append(other)
    made.save_as(tmp_path / "rt.dcm", enforce_file_format=True)
    read = read_structure_set(tmp_path / "rt.dcm", grid_of(proposal.series))
    assert np.array_equal(sitk.GetArrayFromImage(read) > 0, proposal.mask > 0)
    other.ROIName = "GTV_2"
    made.save_as(tmp_path / "rt.dcm", enforce_file_format=True)
    with pytest.raises(MedFLError, match="of which 2 are called GTV"):
        read_structure_set(tmp_path / "rt.dcm", grid_of(proposal.series))


def test_outlines_off_the_slices_are_refused(proposal, tmp_path):
    made = make_structure_set(proposal.mask, proposal.series, "1.2.5", "1.2.6", 1)
    shift = proposal.series.normal * 0.4 * proposal.series.spacing[0]
    for contour in made.ROIContourSequence[0].ContourSequence:
        moved = np.array(contour.ContourData, float).reshape(-1, 3) + shift
        contour.ContourData = [f"{value:.4f}" for value in moved.ravel()]
    made.save_as(tmp_path / "rt.dcm", enforce_file_format=True)
    with pytest.raises(MedFLError, match="do not lie on the slices"):
        read_structure_set(tmp_path / "rt.dcm", grid_of(proposal.series))
    contour.ContourData = ["NaN"] * 9
    made.save_as(tmp_path / "rt.dcm", enforce_file_format=True)
    with pytest.raises(MedFLError, match="can't be read as an RTSTRUCT"):
        read_structure_set(tmp_path / "rt.dcm", grid_of(proposal.series))


def test_an_rtstruct_is_the_truth_in_the_preparation_as_a_seg_is(proposal, tmp_path):
    outline = make_structure_set(proposal.mask, proposal.series, "1.2.5", "1.2.6", 1)
    segmentation = make_segmentation(proposal.mask, proposal.series)
    prepared = []
    for made in (outline, segmentation):
        path = tmp_path / f"{made.Modality}.dcm"
        made.save_as(path, enforce_file_format=True)
        found, refused = find_series([*proposal.series.files, path])
        assert not refused
        (study,) = plan_studies(found, load_rules())
        prepared.append(prepare(study, load_rules()))
    assert prepared[0].mask is not None and not prepared[0].failures
    assert np.array_equal(prepared[0].mask, prepared[1].mask)
    assert [line.used_as for line in study.lines] == ["FLAIR", "mask"]
