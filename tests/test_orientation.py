"""Left and right: one volume with a marker at the patient's left, in every order of storage and every format,
is shown and prepared alike, and its masks lie where nibabel finds them."""

import gzip
import itertools

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_phantoms import image_of, write_series
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from common import MedFLError
from deployment.app.cases import read_case
from deployment.app.dicom import on_series
from deployment.app.dicom import write_series_nifti as write_dicom_mask
from deployment.app.nifti import mirror, write_nifti
from deployment.app.pictures import marked
from radiology.geometry import as_shown, to_axial
from radiology.nifti import find_volumes, load_volume
from radiology.series import find_series
from scans.nifti_file import doubt
from scans.orientation import closest_axes, mirrored

RAS = np.array([[2.0, 0, 0, -40], [0, 2.0, 0, -44], [0, 0, 5.0, -30], [0, 0, 0, 1]])
SHAPE = (40, 44, 18)
CODES = [
    "".join(letters)
    for order in itertools.permutations(("LR", "PA", "IS"))
    for letters in itertools.product(*order)
]
MARK = np.array([-34.0, 30.0, 40.0])  # mm to the right, front and head: the patient's left, front, upper part


def head() -> nibabel.Nifti1Image:
    """A block with a bright spot around MARK, stored from left to right, back to front, feet to head."""
    values = np.zeros(SHAPE, np.int16)
    values[4:-4, 4:-4, 2:-2] = 300
    i, j, k = np.linalg.solve(RAS, [*MARK, 1])[:3].round().astype(int)
    values[i - 1 : i + 2, j - 1 : j + 2, k - 1 : k + 2] = 900
    return nibabel.Nifti1Image(values, RAS)


def stored_as(code: str) -> nibabel.Nifti1Image:
    """The head, its voxels stored in another order; nibabel's own code does it."""
    image = head()
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(code)))
    values = nibabel.orientations.apply_orientation(np.asarray(image.dataobj), turn)
    return nibabel.Nifti1Image(values, image.affine @ inv_ornt_aff(turn, image.shape))


def spot(slices: np.ndarray) -> tuple[float, float, float]:
    """Where the bright spot lies in slices (S, H, W): from the feet, from the top, from the left, 0 to 1."""
    return tuple(np.argwhere(slices > 0.9 * slices.max()).mean(axis=0) / np.array(slices.shape))


WANTED = spot(np.asarray(head().dataobj).transpose(2, 1, 0)[:, ::-1, ::-1])


def middle_mm(content: bytes) -> np.ndarray:
    """The middle of a mask file's voxels in mm, by nibabel."""
    mask = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
    return nibabel.affines.apply_affine(mask.affine, np.argwhere(np.asarray(mask.dataobj)).mean(axis=0))


def test_the_marker_is_where_it_has_to_be():
    feet, top, left = WANTED
    assert feet > 0.7 and top < 0.2 and left > 0.85  # the upper part, the front, the picture's right


@pytest.mark.parametrize("code", CODES)
def test_every_order_of_storage_is_prepared_shown_and_written_alike(code, tmp_path):
    image = stored_as(code)
    assert "".join(aff2axcodes(image.affine)) == code
    (tmp_path / "anna").mkdir()
    nibabel.save(image, tmp_path / "anna" / "flair.nii.gz")
    (series,), refused = find_volumes(tmp_path, [tmp_path / "anna" / "flair.nii.gz"])
    fixed, told = to_axial(load_volume(series))
    if closest_axes(mirrored(image.affine)[:3, :3])[0][2] == 2:
        assert not told
    assert spot(sitk.GetArrayFromImage(fixed)) == pytest.approx((*WANTED,), abs=0.08)
    case = read_case([("flair.nii", image.to_bytes())])
    assert spot(case.volume[..., 1]) == pytest.approx(WANTED) and case.oriented
    mask = np.where(case.volume[..., 1] > 200, np.uint8(255), np.uint8(0))
    assert middle_mm(write_nifti(case.nifti, mask)) == pytest.approx(MARK, abs=2.5)


def test_dicom_in_any_right_handed_order_and_nrrd_are_shown_like_nifti(tmp_path):
    for code in CODES:
        image = stored_as(code)
        affine, values = mirrored(image.affine), np.asarray(image.dataobj)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        space, options = tmp_path / f"{code}.nrrd", {"space": "left-posterior-superior"}
        options |= {"space directions": affine[:3, :3].T, "space origin": affine[:3, 3]}
        nrrd.write(str(space), values, options)
        assert spot(read_case([(space.name, space.read_bytes())]).volume[..., 1]) == pytest.approx(WANTED)
        if np.linalg.det(affine[:3, :3]) < 0:
            continue  # a DICOM series has no such order: its slices are sorted along their normal
        scan = image_of(
            values.transpose(2, 1, 0), tuple(spacing[::-1]), affine[:3, 3], affine[:3, :3] / spacing
        )
        files = write_series(tmp_path / code, scan, SeriesDescription="FLAIR")
        (series,), _ = find_series(files)
        case = read_case([(path.name, path.read_bytes()) for path in files])
        feet, top, left = spot(case.volume[..., 1])
        assert (feet > 0.7, top < 0.3, left > 0.8, case.oriented) == (True,) * 4, code
        mask = np.where(case.volume[..., 1] > 200, np.uint8(255), np.uint8(0))
        assert middle_mm(write_dicom_mask(case.dicom, mask)) == pytest.approx(MARK, abs=2.5), code
        assert on_series(case.dicom, mask).any() and series.problems == ()


def test_axes_are_chosen_as_nibabel_chooses_them():
    random = np.random.default_rng(0)
    for _ in range(300):
        turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
        affine = np.eye(4)
        affine[:3, :3] = turn * random.uniform(0.5, 6, 3)
        stored, against = closest_axes(mirrored(affine)[:3, :3])
        wanted = io_orientation(affine)
        for body, (axis, backwards) in enumerate(zip(stored, against)):
            assert wanted[axis, 0] == body
            assert backwards == (wanted[axis, 1] > 0 if body < 2 else wanted[axis, 1] < 0)
        image = image_of(random.random((3, 4, 5)), (1, 2, 3), (7, 8, 9), turn)
        assert (np.diag(np.array(as_shown(image).GetDirection()).reshape(3, 3)) > -0.6).all()


def without_codes(image: nibabel.Nifti1Image) -> bytes:
    content = bytearray(image.to_bytes())
    content[252:256] = bytes(4)
    return bytes(content)


def contradicting() -> bytes:
    image = head()
    image.set_qform(RAS + np.eye(4, k=3) * 33, 1)
    image.set_sform(RAS, 1)
    return image.to_bytes()


def sheared() -> bytes:
    affine = RAS.copy()
    affine[0, 2] = 0.6
    image = nibabel.Nifti1Image(np.asarray(head().dataobj), affine)
    image.set_qform(None, 0)
    return image.to_bytes()


DOUBTFUL = {
    "no codes": (without_codes(head()), "does not give the patient's orientation"),
    "contradiction": (contradicting(), "qform and sform place a voxel 33 mm apart"),
    "sheared": (sheared(), "not at right angles (its sform is sheared)"),
}


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_what_does_not_say_is_refused_for_training_and_asked_about(kind, tmp_path):
    content, sentence = DOUBTFUL[kind]
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "flair.nii").write_bytes(content)
    (series,), _ = find_volumes(tmp_path, [tmp_path / "anna" / "flair.nii"])
    assert sentence in series.problems[0]
    with pytest.raises(MedFLError, match="left and right can't be told"):
        load_volume(series)
    case = read_case([("flair.nii", content)])
    assert "Orientation unknown" in " ".join(case.notes) and sentence in " ".join(case.notes)
    assert not case.oriented and doubt(nibabel.Nifti1Image.from_bytes(content).header)


def test_a_reader_who_knows_the_side_turns_the_case_and_its_masks():
    case = read_case([("flair.nii", without_codes(head()))])
    before = case.volume[..., 1].copy()
    voxels = np.asarray(case.nifti.dataobj) > 600
    mirror(case)
    assert np.array_equal(case.volume[..., 1], before[:, :, ::-1])
    mask = np.where(case.volume[..., 1] > 200, np.uint8(255), np.uint8(0))
    written = nibabel.Nifti1Image.from_bytes(gzip.decompress(write_nifti(case.nifti, mask)))
    assert np.array_equal(
        np.asarray(written.dataobj) > 0, voxels
    )  # voxel for voxel on the file, as it is stored


def test_pictures_carry_letters_or_say_that_they_cannot():
    black = np.zeros((200, 200, 3), np.uint8)
    known, unknown = marked(black, True), marked(black, False)
    for picture, edges in ((known, (True, True, True)), (unknown, (False, False, False))):
        shown = picture.max(axis=2) > 0
        assert (shown[80:120, :20].any(), shown[80:120, -20:].any(), shown[:20, 90:110].any()) == edges
    assert (unknown > 0).sum() > 2 * (known > 0).sum()
