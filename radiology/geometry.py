"""Volumes resampled to the dataset's grid: axial slices of 256×256 in the orientation of the Kaggle slices, with
aligned channels.

That orientation was determined from 40 patients: the nose is up, slices are numbered from the neck to the crown,
and the patient's left is on the picture's right. All 18 patients whose record says left have their tumour there,
and all 21 with the other code on the other side. These are the directions of DICOM's own axes (left, back, up),
so the axes only have to be sorted.
"""

import numpy as np
import SimpleITK as sitk

from common import MedFLError
from scans.field_of_view import DISTANCE, find_head
from scans.orientation import OFF_GRID, closest_axes

SIDE = 256  # pixels of the dataset's slices
AS_ACQUIRED = 20.0  # degrees; slices tilted less than this, usually along the skull base, stay as they are
LOW, HIGH, BRIGHT = (
    0.5,
    99.9,
    170,
)  # percentiles that become 0 and 170: the median of the dataset's 99.9th percentiles is 162 to 176

FACTORS = (8, 4, 2)  # pixels binned in the plane, coarse to fine, for the registration
BINS, SAMPLES, SEED = 48, 60_000, 1
STEPS = 150  # of the optimiser, at most
LONGEST, SHORTEST = (4.0, 2.0, 0.5), 0.005  # mm, the optimiser's first step for each factor, and its last
EDGE = 2.0  # mm, the scale at which edges are measured
POOR = 0.75  # agreement of edges; docs/archive.md says how often real pairs are below this


def as_shown(image: sitk.Image) -> sitk.Image:
    """An image whose axes are sorted and flipped so that they point as nearly as possible to the left, the back and
    the head; no value changes."""
    stored, against = closest_axes(np.array(image.GetDirection()).reshape(3, 3))
    return sitk.Flip(sitk.PermuteAxes(image, stored), against)


def to_axial(image: sitk.Image) -> tuple[sitk.Image, str | None]:
    """A volume as axial slices of SIDE×SIDE square pixels, float32, and a sentence if it was acquired differently.

    The longer side of the field of view fills the picture, and the shorter side gets a black margin. A field of
    view that is much larger than the head is cropped to the head, as in the training set: in the plane, and, unless
    the acquisition is axial, at the neck. Slices of axial acquisitions tilted by up to 20 degrees stay where they
    are; others are resampled, at least 3 mm apart.
    """
    oriented = as_shown(image)
    turn = np.array(oriented.GetDirection()).reshape(3, 3)
    tilt = float(np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))))
    across = int(
        np.abs(np.array(image.GetDirection()).reshape(3, 3)[:, 2]).argmax()
    )  # the axis that the slices follow
    if across == 2 and tilt <= AS_ACQUIRED:
        head, cropped = _head(oriented, is_axial=True)
        told = [f"acquired {tilt:.0f} degrees off the scanner's axes, and kept so"] if tilt >= 1 else []
        return resample(oriented, _square_grid(head)), ", ".join([*told, *cropped]) or None
    name = ("sagittal", "coronal", "axial")[across]
    head, cropped = _head(oriented, is_axial=False)
    told = [f"acquired {name}", *([f"{tilt:.0f} degrees off the scanner's axes"] if tilt >= 1 else [])]
    told += ["and resampled to axial", *cropped]
    return resample(oriented, _axial_grid(head)), ", ".join(told)


def _head(oriented: sitk.Image, is_axial: bool) -> tuple[sitk.Image, tuple[str, ...]]:
    """The region of the head, as an empty image, and sentences about the cropping. oriented: an image whose axes
    point to the left, the back and the head."""
    across, down, between = oriented.GetSpacing()
    box = find_head(sitk.GetArrayViewFromImage(oriented), (between, down, across), is_axial)
    grid = sitk.Image(
        oriented.GetSize(), sitk.sitkUInt8
    )  # a quarter of the memory; only the geometry is needed
    grid.CopyInformation(oriented)
    size = [end - start for start, end in zip(box.start, box.end)]
    return sitk.RegionOfInterest(grid, size[::-1], box.start[::-1]), box.told


def _grid(
    size: tuple[int, ...], spacing: np.ndarray, origin: np.ndarray, direction: np.ndarray
) -> sitk.Image:
    """A grid, as an empty image."""
    grid = sitk.Image([int(n) for n in size], sitk.sitkUInt8)
    grid.SetSpacing([float(v) for v in spacing])
    grid.SetOrigin([float(v) for v in origin])
    grid.SetDirection(direction.ravel().tolist())
    return grid


def _square_grid(image: sitk.Image) -> sitk.Image:
    """SIDE×SIDE square pixels over the field of view of an image's own slices."""
    size, spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
    pixel = (size * spacing)[:2].max() / SIDE
    direction = np.array(image.GetDirection()).reshape(3, 3)
    middle = np.array(
        image.TransformContinuousIndexToPhysicalPoint([(size[0] - 1) / 2, (size[1] - 1) / 2, 0.0])
    )
    origin = middle - direction @ (np.array([SIDE - 1, SIDE - 1, 0]) / 2 * pixel)
    return _grid((SIDE, SIDE, size[2]), np.array([pixel, pixel, spacing[2]]), origin, direction)


def _axial_grid(image: sitk.Image) -> sitk.Image:
    """SIDE×SIDE square pixels in slices along the patient's axis, over everything that an image shows."""
    size, spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
    corners = np.array(
        [
            image.TransformContinuousIndexToPhysicalPoint((np.array(corner) * size - 0.5).tolist())
            for corner in np.ndindex(2, 2, 2)
        ]
    )
    lowest, highest = corners.min(axis=0), corners.max(axis=0)
    pixel = (highest - lowest)[:2].max() / SIDE
    distance = max(DISTANCE, spacing[2])
    count = max(1, round((highest - lowest)[2] / distance))
    middle = (lowest + highest) / 2
    origin = middle - np.array([(SIDE - 1) * pixel, (SIDE - 1) * pixel, (count - 1) * distance]) / 2
    return _grid((SIDE, SIDE, count), np.array([pixel, pixel, distance]), origin, np.eye(3))


def resample(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform | None = None) -> sitk.Image:
    """An image resampled linearly to a grid, float32, with its own minimum where it has no values. transform: from
    `register`.

    If several pixels of the image fit into one of the grid, they are averaged, not skipped.
    """
    image = as_shown(image)
    factors = [
        max(1, int(coarse / fine + 1e-6)) for coarse, fine in zip(grid.GetSpacing(), image.GetSpacing())
    ]
    lowest = float(sitk.GetArrayViewFromImage(image).min())
    if max(factors) > 1:
        image = sitk.BinShrink(image, factors)
    return sitk.Resample(
        image, grid, transform or sitk.Transform(), sitk.sitkLinear, lowest, sitk.sitkFloat32
    )


def on_grid(image: sitk.Image, reference: sitk.Image) -> bool:
    """Whether the corners of an image lie on voxels of the reference, to within a tenth of a voxel. A mask may have
    fewer slices than the reference."""
    for corner in np.ndindex(2, 2, 2):
        place = image.TransformIndexToPhysicalPoint(
            [int(c) * (n - 1) for c, n in zip(corner, image.GetSize())]
        )
        index = np.array(reference.TransformPhysicalPointToContinuousIndex(place))
        nearest = index.round()
        if (
            np.abs(index - nearest).max() > OFF_GRID
            or (nearest < 0).any()
            or (nearest >= reference.GetSize()).any()
        ):
            return False
    return True


def resample_mask(mask: sitk.Image, fixed: sitk.Image, transform: sitk.Transform) -> np.ndarray:
    """A mask on the grid of `fixed`, nearest neighbour, (S, H, W) uint8 0 or 255."""
    moved = sitk.Resample(mask, fixed, transform, sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    return (sitk.GetArrayFromImage(moved) > 0).astype(np.uint8) * 255


def register(moving: sitk.Image, fixed: sitk.Image, same_frame: bool) -> sitk.Transform:
    """The rigid transform from points of `fixed` to points of `moving` with the most mutual information
    (Mattes et al. 2003).

    same_frame: whether both use the same scanner coordinates; otherwise the search starts with aligned centres of
    mass. The search goes from coarse to fine with a fixed seed and one thread, so every run gives the same result.
    If it does not improve the agreement of edges, the scanner's coordinates are kept. Raises MedFLError for volumes
    that don't overlap.
    """
    transform = sitk.Euler3DTransform()
    try:
        if same_frame:
            transform.SetCenter(
                fixed.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in fixed.GetSize()])
            )
        else:
            transform = sitk.Euler3DTransform(
                sitk.CenteredTransformInitializer(
                    fixed, moving, transform, sitk.CenteredTransformInitializerFilter.MOMENTS
                )
            )
        for factor, longest in zip(FACTORS, LONGEST):
            _improve(transform, moving, fixed, factor, longest)
    except RuntimeError as error:  # ITK's: no sample of one lies in the other, or one is blank
        raise MedFLError("it can't be aligned with FLAIR: they show different regions, or nothing") from error
    if same_frame and agreement(resample(moving, fixed), fixed) >= agreement(
        resample(moving, fixed, transform), fixed
    ):
        return sitk.Euler3DTransform()
    return transform


def _improve(
    transform: sitk.Transform, moving: sitk.Image, fixed: sitk.Image, factor: int, longest: float
) -> None:
    """Change a transform in place to increase the mutual information of both images, binned to `factor` pixels of
    `fixed`."""
    target, source = (_binned(image, factor * fixed.GetSpacing()[0]) for image in (fixed, moving))
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetNumberOfWorkUnits(1)
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, SAMPLES / float(np.prod(target.GetSize()))), SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(longest, SHORTEST, STEPS, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(target, source)


def agreement(moved: sitk.Image, fixed: sitk.Image) -> float:
    """How well the edges of two volumes on one grid agree: the correlation of the square roots of their gradient
    magnitudes.

    1 is best. The measure also works for sequences of different contrast, where brightness itself says little.
    """
    edges = [
        np.sqrt(
            sitk.GetArrayFromImage(
                sitk.GradientMagnitudeRecursiveGaussian(sitk.BinShrink(image, [2, 2, 1]), EDGE)
            )
        )
        for image in (moved, fixed)
    ]
    shown = sitk.GetArrayFromImage(sitk.BinShrink(moved, [2, 2, 1])) > sitk.GetArrayViewFromImage(moved).min()
    if not shown.any() or min(edge[shown].std() for edge in edges) == 0:
        return 0.0
    return float(np.corrcoef(edges[0][shown], edges[1][shown])[0, 1])


def to_uint8(volume: np.ndarray) -> np.ndarray:
    """A volume's values, (S, H, W) float32, scaled linearly to uint8: its percentile LOW becomes 0, its percentile
    HIGH becomes BRIGHT.

    Values above continue linearly and are cut at 255. A blank volume becomes 0.
    """
    low, high = np.percentile(volume, (LOW, HIGH))
    if high <= low:
        return np.zeros(volume.shape, np.uint8)
    return np.clip(np.rint((volume - low) * (BRIGHT / (high - low))), 0, 255).astype(np.uint8)


def _binned(image: sitk.Image, pixel: float) -> sitk.Image:
    """An image whose pixels are averaged in every direction, to a size of at most `pixel` mm."""
    return sitk.BinShrink(image, [max(1, int(pixel / step + 1e-6)) for step in image.GetSpacing()])
