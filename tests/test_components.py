"""Components, diameters and intervals against shapes whose figures are known."""

import numpy as np
import pytest

from evaluation.components import COLUMNS, LISTED, find_components, volume_interval
from evaluation.diameters import largest_diameter, perpendicular_diameters


def ellipse(a: float, b: float, angle: float, spacing=(1.0, 1.0), side: int = 140) -> np.ndarray:
    """Half axes in mm, the first at this angle to the columns."""
    y, x = ((np.indices((side, side)) - side / 2).T * np.array(spacing)).T
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (along / a) ** 2 + (across / b) ** 2 <= 1


@pytest.mark.parametrize("angle", [0, 0.3, np.pi / 4, 1.2])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.5, 0.9)])
def test_an_ellipse_has_its_axes_for_diameters(angle, spacing):
    longest, across = perpendicular_diameters(ellipse(30, 14, angle, spacing), spacing)
    assert longest == pytest.approx(60, abs=1.5) and across == pytest.approx(28, abs=1.5)


def test_of_a_rectangle_the_diagonal_and_what_crosses_it_at_a_right_angle():
    mask = np.zeros((80, 80), np.uint8)
    mask[10:31, 10:71] = 1  # 20 by 60 between centres
    longest, across = perpendicular_diameters(mask)
    assert longest == pytest.approx(np.hypot(20, 60)) == largest_diameter(mask)
    assert across == pytest.approx(20 * np.hypot(20, 60) / 60, abs=1)


def test_the_part_with_the_largest_product_counts_and_a_thin_line_has_no_width():
    mask = np.zeros((80, 80), np.uint8)
    mask[2, 2:70] = 1
    assert perpendicular_diameters(mask) == (67.0, 0.0)
    mask[20:40, 20:40] = 1
    assert perpendicular_diameters(mask)[0] == pytest.approx(np.hypot(19, 19))
    assert perpendicular_diameters(np.zeros((9, 9))) == (0.0, 0.0)


def test_two_balls_are_two_components_with_their_volumes_and_the_largest_slice():
    z, y, x = np.indices((30, 70, 70)).astype(float)
    spacing = (1.0, 1.0, 2.0)
    small = ((z - 6) * 2) ** 2 + (y - 15) ** 2 + (x - 15) ** 2 <= 8**2
    large = ((z - 15) * 2) ** 2 + (y - 45) ** 2 + (x - 45) ** 2 <= 18**2
    found = find_components((small | large) * np.uint8(255), spacing)
    one, two = found.parts
    for part, radius, ball in ((one, 18, large), (two, 8, small)):
        assert np.array_equal(found.labels == part.number, ball)
        assert part.cm3(part.voxels) == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.04)
        assert part.diameters == pytest.approx((2 * radius, 2 * radius), abs=1.5)
        assert (part.low, part.high) == (None, None)
    assert one.diameter_slice == 16 and one.slices == (7, 25) and two.diameter_slice == 7
    assert list(one.row()) == list(COLUMNS) and one.row()["diameter_px"] is None
    assert find_components(large).parts[0].row()["diameter_mm"] is None
    assert found.unmarked is None and volume_interval(found, {1, 2}) is None


def test_the_interval_is_the_volume_at_nine_tenths_and_at_one_tenth():
    """Balls whose probability falls evenly from 1 within to 0: radii at 0.9, 0.5 and 0.1 are known."""
    z, y, x = np.indices((60, 60, 60)).astype(float) - 30
    probability = ((24 - np.sqrt(z**2 + y**2 + x**2)) / 20).clip(0, 1).astype(np.float32)
    found = find_components(probability >= 0.5, (1.0, 1.0, 1.0), probability)
    (part,) = found.parts
    for voxels, radius in ((part.low, 6), (part.voxels, 14), (part.high, 22)):
        assert part.cm3(voxels) == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.03)
    assert volume_interval(found, {1}) == (part.low, part.high) and volume_interval(found, set()) == (0, 0)


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)])
def test_what_is_likely_between_two_goes_to_the_nearer_and_what_is_alone_to_none(spacing):
    probability = np.zeros((1, 20, 40), np.float32)
    probability[0, 5, 2:30] = 0.2  # 28 in a row; at its ends what is marked
    probability[0, 5, 2:6] = 0.95
    probability[0, 5, 26:30] = 0.6
    probability[0, 15, 2:9] = 0.3  # of nobody
    found = find_components(probability >= 0.5, spacing, probability)
    assert [(part.voxels, part.low, part.high) for part in found.parts] == [(4, 4, 14), (4, 0, 14)]
    assert found.unmarked == 7 and volume_interval(found, {1}) == (4, 21)
    nothing = find_components(probability >= 0.99, spacing, probability)
    assert not nothing.parts and volume_interval(nothing, set()) == (0, 35)


def test_the_interval_holds_the_figure_at_every_threshold():
    probability = np.random.default_rng(0).random((4, 16, 16)).astype(np.float32)
    for threshold in (0.05, 0.5, 0.95):
        found = find_components(probability >= np.float32(threshold), None, probability)
        assert all(part.low <= part.voxels <= part.high for part in found.parts)
        voxels = sum(part.voxels for part in found.parts)
        low, high = volume_interval(found, set(range(99)))
        assert low <= voxels <= high and voxels == (probability >= np.float32(threshold)).sum()


def test_many_specks_are_taken_together():
    mask = np.zeros((2, 60, 60), np.uint8)
    mask[0, ::3, ::3] = 1
    mask[1, 10:13, 10:13] = 1  # touches four of them at their corners
    found = find_components(mask)
    assert len(found.parts) == LISTED + 1 and found.parts[-1].pieces == 400 - 4 + 1 - LISTED
    assert sum(part.voxels for part in found.parts) == mask.sum()
    assert found.parts[-1].diameters is None and found.parts[0].slices == (1, 2)
