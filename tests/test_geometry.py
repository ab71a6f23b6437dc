"""radiology/geometry.py: every way of scanning ends on the dataset's grid,
and channels lie over each other."""

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_phantoms import image_of, phantom, scan, turn

from common import MedFLError
from radiology.geometry import POOR, SIDE, agreement, register, resample, resample_mask, to_axial, to_uint8

PLACES = [
    (x, y, z) for x in (-60, 60) for y in (-70, 70) for z in (-30, 40)
]  # mm, about the corners of a brain


@pytest.fixture(scope="module")
def head():
    """Pre-contrast, FLAIR, post-contrast and mask of a phantom."""
    channels, mask = phantom(seed=3, slices=20)
    return *channels, mask


def marked(size=(12, 40, 32), spacing=(5.0, 2.0, 3.0)) -> sitk.Image:
    """A block that is brighter to the left, the back and the top, each in its own measure."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    return image_of(100 + 10 * x + 20 * y + 40 * z, spacing, (-10, 20, -30))


@pytest.mark.parametrize("axes", ["LPS", "RAI", "RPS", "LAS", "PLS"])
def test_slices_lie_as_the_datasets_do_whatever_the_order_on_disk(axes):
    fixed, told = to_axial(sitk.DICOMOrient(marked(), axes))
    volume = sitk.GetArrayFromImage(fixed)
    assert (
        told is None
        and volume.shape == (12, SIDE, SIDE)
        and fixed.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    )
    inside = volume[:, 8:-8, 8:-8]  # all but the black margin
    middle = volume[6, SIDE // 2]
    assert (np.diff(inside[:, SIDE // 2 - 8, SIDE // 2]) > 0).all(), "slices go from the neck to the crown"
    assert middle[SIDE // 2 + 40] > middle[SIDE // 2 - 40], "the patient's left is on the right"
    assert volume[6, SIDE // 2 + 40, SIDE // 2] > volume[6, SIDE // 2 - 40, SIDE // 2], "the nose is up"
    assert np.array_equal(volume, sitk.GetArrayFromImage(to_axial(marked())[0]))


def test_pixels_become_square_and_the_aspect_is_kept():
    fixed, _ = to_axial(marked(size=(5, 60, 20), spacing=(4.0, 2.0, 3.0)))  # 120 × 60 mm
    assert fixed.GetSpacing() == pytest.approx((120 / SIDE, 120 / SIDE, 4.0))
    shown = sitk.GetArrayFromImage(fixed)[2] > sitk.GetArrayViewFromImage(fixed).min()
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    assert np.ptp(rows) + 1 == pytest.approx(SIDE, abs=4) and np.ptp(columns) + 1 == pytest.approx(
        SIDE / 2, abs=4
    )
    assert columns.mean() == pytest.approx((SIDE - 1) / 2, abs=1)


def ellipsoid(shape, middle, radii) -> np.ndarray:
    places = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    return sum(((p - m) / r) ** 2 for p, m, r in zip(places, middle, radii)) < 1


def test_a_wide_field_of_view_is_cropped_to_the_head_and_a_usual_one_is_not():
    head = ellipsoid((8, 512, 512), (4, 300, 200), (40, 110, 90)) * 500.0
    fixed, told = to_axial(image_of(head, (5, 1, 1)))
    assert told == "cropped to the head, 240 of 512 mm" and fixed.GetSpacing()[:2] == pytest.approx(
        (240 / SIDE, 240 / SIDE)
    )
    shown = sitk.GetArrayFromImage(fixed)[4] > 250
    rows, columns = (np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0))
    assert (rows[0] + rows[-1]) / 2 == pytest.approx((SIDE - 1) / 2, abs=4)
    assert np.ptp(rows) * 240 / SIDE == pytest.approx(220, abs=4) and np.ptp(
        columns
    ) * 240 / SIDE == pytest.approx(180, abs=4)
    usual, told = to_axial(image_of(head[:, 170:430, 70:330], (5, 1, 1)))
    assert told is None and usual.GetSpacing()[0] == pytest.approx(260 / SIDE)
    assert to_axial(image_of(np.zeros((8, 512, 512)), (5, 1, 1)))[1] is None
    tumour = (
        ellipsoid((8, 240, 240), (4, 140, 90), (8, 40, 40)) * 500.0
    )  # far brighter than the head around it
    assert to_axial(image_of(tumour, (5, 1, 1)))[1] is None, "80 mm are no head"


def test_the_neck_of_a_sagittal_scan_is_left_out_and_the_crown_is_not():
    sagittal = np.transpose(((0, 1, 0), (0, 0, -1), (-1, 0, 0)))
    shape = (88, 128, 128)  # slices to the right, rows down, columns back; 2 mm
    body = ellipsoid(shape, (44, 46, 64), (38, 42, 48)) | ellipsoid(shape, (44, 110, 64), (20, 50, 24))
    fixed, told = to_axial(image_of(body * 500.0, (2, 2, 2), direction=sagittal))
    assert "cropped to 170 mm from the crown down" in told and fixed.GetSize() == (SIDE, SIDE, 59)
    filled = (sitk.GetArrayFromImage(fixed) > 250).mean(axis=(1, 2))
    assert filled[-1] < 0.01 < filled[-6] and filled[0] > 0.01, "from the neck to above the crown"


def test_finer_pixels_are_averaged_not_skipped():
    fine = np.zeros((4, 1024, 1024), np.float32)
    fine[:, ::4, ::4] = 16.0
    assert np.allclose(sitk.GetArrayFromImage(to_axial(image_of(fine, (5, 0.25, 0.25)))[0]), 1.0)


@pytest.mark.parametrize(
    "name, direction",
    [("sagittal", [[0, 0, 1], [1, 0, 0], [0, -1, 0]]), ("coronal", [[1, 0, 0], [0, 0, 1], [0, -1, 0]])],
)
def test_other_planes_are_resampled_to_axial(head, name, direction):
    flair = head[1]
    fixed, told = to_axial(scan(flair, 200, 160, direction, spread=1.2))
    told_of = f"acquired {name}, and resampled to axial, cropped to 170 mm from the crown down"
    assert told == told_of and fixed.GetDirection() == (
        1,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        1,
    )
    assert fixed.GetSpacing()[2] == 3.0
    wanted = resample(flair, fixed)
    assert np.corrcoef(*(sitk.GetArrayViewFromImage(i)[5:-5].ravel() for i in (fixed, wanted)))[0, 1] > 0.97


@pytest.mark.parametrize(
    "degrees, told",
    [
        (0, None),
        (12, "12 degrees off the scanner's axes, and kept so"),
        (30, "acquired axial, 30 degrees off the scanner's axes, and resampled to axial"),
    ],
)
def test_a_tilt_is_told_and_a_large_one_is_taken_out(head, degrees, told):
    tilt = np.array(turn(head[1], (degrees, 0, 0), (0, 0, 0)).GetMatrix()).reshape(3, 3)
    image = scan(head[1], 128, 24, tilt)
    fixed, said = to_axial(image)
    assert said is None if told is None else told in said
    assert np.allclose(np.array(fixed.GetDirection()).reshape(3, 3), tilt if degrees < 20 else np.eye(3))


@pytest.mark.parametrize("channel", [0, 2])
def test_a_moved_head_is_laid_back(head, channel):
    """A movement of some degrees and millimetres is found to a voxel, and on every run the same."""
    fixed = head[1]
    movement = turn(fixed, (4, -3, 6), (5, -4, 6))
    moving = scan(head[channel], 200, 24, moved=movement)  # the scanner sees at p what lies at movement(p)
    found = register(moving, fixed, same_frame=True)
    errors = [
        np.linalg.norm(np.subtract(movement.TransformPoint(found.TransformPoint(p)), p)) for p in PLACES
    ]
    assert max(errors) < 3.0, errors  # mm; the slices are 6 mm apart
    assert agreement(resample(moving, fixed, found), fixed) > agreement(resample(moving, fixed), fixed)
    if channel == 0:
        assert register(moving, fixed, same_frame=True).GetParameters() == found.GetParameters()


def test_coordinates_of_another_visit_start_at_the_centres_of_mass(head):
    pre, flair, _, _ = head
    far = scan(pre, 200, 24)
    far.SetOrigin(np.add(far.GetOrigin(), (300, -200, 500)).tolist())
    found = register(far, flair, same_frame=False)
    errors = [
        np.linalg.norm(np.subtract(found.TransformPoint(p), np.add(p, (300, -200, 500)))) for p in PLACES
    ]
    assert max(errors) < 3.0, errors


def test_volumes_of_different_places_are_told(head):
    far = sitk.Image(head[0])
    far.SetOrigin((900, 900, 900))
    for moving in (far, head[0] * 0):
        with pytest.raises(MedFLError, match="can't be aligned with FLAIR"):
            register(moving, head[1], same_frame=moving is far)


def test_poor_alignment_can_be_told_from_good(head):
    pre, flair, post, _ = head
    for channel in (pre, post):
        far = sitk.Resample(channel, turn(channel, (0, 0, 10), (12, 0, 0)))
        assert agreement(channel, flair) > POOR > agreement(far, flair)
    assert agreement(flair * 0, flair) == 0.0


def test_masks_go_through_the_same_transform(head):
    mask = head[3]
    movement = turn(mask, (3, 2, -5), (4, 3, -2))
    moved = scan(mask, 512, 40, moved=movement, nearest=True, spread=1.2)
    back = resample_mask(moved, mask, movement.GetInverse()) > 0
    truth = sitk.GetArrayFromImage(mask) > 0
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.85  # twice nearest neighbour over 6 mm
    same = resample_mask(mask, mask, sitk.Transform())
    assert same.dtype == np.uint8 and np.array_equal(same, truth * np.uint8(255))


def test_brightness_follows_the_documented_percentiles():
    values = np.linspace(-500, 1500, 20001).astype(np.float32).reshape(1, 20001, 1)
    found = to_uint8(values)
    assert (
        found[0, 100, 0] == 0 and found[0, 19980, 0] == 170 and found.max() == 170 and found.dtype == np.uint8
    )
    assert found[0, 10040, 0] == pytest.approx(85, abs=1)
    spike = np.append(values.ravel(), [1e6]).astype(np.float32)
    assert to_uint8(spike)[-1] == 255 and to_uint8(spike)[19980] == pytest.approx(170, abs=1)
    assert not to_uint8(np.full((2, 3, 4), 7.0, np.float32)).any()
