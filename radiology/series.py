"""From DICOM files to series: the files that belong together, their order, their problems, and their pixels.

Headers are read first, and pixels only when needed, one slice at a time. So an archive of any size can be searched.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import SimpleITK as sitk

from borders.limits import fits, is_size_mm
from common import MedFLError
from radiology.bounds import File, Readings, read_with_pixels
from radiology.decoding import decode_slice
from radiology.headers import OUTLINES, Place, Slice, read_header

SAME_PLACE = 0.01  # mm; slices that are closer than this count as being at the same place
UNEVEN = 0.05  # share of the distance between slices; scanners round positions
OF_ONE = {  # fields that must be equal in all files of a series
    "patients": ("patient_id", "person"),
    "studies": ("study_uid",),
    "frames of reference": ("frame_of_reference",),
}
ONE_NUMBER = (
    "different images in it share one number (SOPInstanceUID), after a faulty anonymisation: export it again"
)
TURNED = 1e-3  # tolerance of direction cosines, which are written with about six digits


@dataclass(frozen=True)
class Series:
    """One series of an archive.

    files: along the normal of the slices, one per slice; or the single file of a multi-frame series, whose slices
    are its `frames`, in order; or, for several multi-frame files, the file of each frame. spacing: mm between
    slices, rows and columns. positions: mm along the normal, one per slice. problems: why it can't be used, a
    sentence each; empty if it can. references: the series that a segmentation belongs to. when: the study's date and
    time in DICOM's form, to sort studies. person: name, birth date and sex, to detect a number that several people
    share, and the number that stands beside a NIfTI file. volume: the number of the volume in a NIfTI file that holds
    several, or None.
    """

    uid: str
    study_uid: str
    patient_id: str
    modality: str
    description: str
    files: tuple[File, ...] = field(repr=False)
    frames: tuple[int, ...] = field(default=(), repr=False)
    rows: int = 0
    columns: int = 0
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    orientation: tuple[float, ...] = ()
    positions: tuple[float, ...] = field(default=(), repr=False)
    problems: tuple[str, ...] = ()
    number: int | None = None
    protocol: str = ""
    sequence: str = ""
    image_type: tuple[str, ...] = ()
    contrast_agent: str = ""
    repetition_time: float | None = None
    echo_time: float | None = None
    inversion_time: float | None = None
    field_strength: float | None = None
    manufacturer: str = ""
    model: str = ""
    frame_of_reference: str = ""
    burnt_in: bool = False
    references: tuple[str, ...] = ()
    when: str = ""
    person: tuple[str, ...] = field(default=(), repr=False)
    volume: int | None = None

    @property
    def slices(self) -> int:
        """The number of slices."""
        return len(self.frames) or len(self.files)

    def place_of(self, index: int) -> tuple[File, int | None]:
        """The file of a slice, and its frame in that file, or None if the file holds one slice."""
        frame = self.frames[index] if self.frames else None
        return self.files[index if len(self.files) > 1 else 0], frame

    @property
    def normal(self) -> np.ndarray:
        """The direction from each slice to the next, (3,), in the patient's coordinates (left, back, up)."""
        return np.cross(self.orientation[:3], self.orientation[3:])


@dataclass(frozen=True)
class Refused:
    """A file that belongs to no series, and why."""

    path: File
    why: str


def find_series(
    paths: Iterable[File], readings: Readings | None = None
) -> tuple[list[Series], list[Refused]]:
    """The series that these files form, sorted by patient, study and number, and the files that belong to none.

    Only headers are read. A file that is there twice counts once; its copy is among the refused files. Other images
    under the number of an earlier one are a problem of their series. readings: what all headers together may cost;
    each may cost as much as one study's, if nothing is given.
    """
    slices: defaultdict[str, list[Slice]] = defaultdict(list)
    notes: defaultdict[str, list[str]] = defaultdict(list)
    heads: dict[str, dict] = {}
    seen: dict[str, tuple[File, tuple]] = {}
    refused = []
    for path in paths:
        try:
            header = read_header(path, readings)
        except MedFLError as error:
            refused.append(Refused(path, str(error)))
            continue
        where = header.series, [s.place for s in header.slices]
        first, there = seen.get(header.instance, (path, None))
        if there == where:
            refused.append(Refused(path, f"the same image as {first.name}; it counts once"))
            continue
        seen.setdefault(header.instance, (path, where))
        notes[header.series] += [ONE_NUMBER] * (there is not None)
        head = heads.setdefault(header.series, header.about)
        notes[header.series] += header.problems + [
            f"its files name different {what} under one series number: export each separately"
            for what, names in OF_ONE.items()
            if any(head[name] != header.about[name] for name in names)
        ]
        slices[header.series] += header.slices
    found = [_assemble(head, slices[uid], notes[uid]) for uid, head in heads.items()]
    return sorted(
        found, key=lambda s: (s.patient_id, s.study_uid, s.number is None, s.number or 0, s.uid)
    ), refused


def _assemble(head: dict, slices: list[Slice], notes: list[str]) -> Series:
    """The series of slices in any order, with all its problems."""
    first, problems = slices[0], list(dict.fromkeys(notes))
    files = tuple(dict.fromkeys(s.path for s in slices))
    rows, columns = first.matrix
    if head["modality"] in OUTLINES:  # their frames belong to several segments, and other modules read them
        return Series(**head, files=files, rows=rows, columns=columns, problems=tuple(problems))
    if sizes := sorted({s.matrix for s in slices} - {first.matrix}):
        problems.append(f"its slices have different sizes, {columns}×{rows} and {sizes[0][1]}×{sizes[0][0]}")
    geometry = problem = None
    if len({s.frame is None for s in slices}) > 1:
        problem = "it mixes multi-frame files with others; export it as one kind"
    elif len(places := [s.place for s in slices if s.place is not None]) < len(slices):
        problem = "it does not say where its slices lie (position, orientation or pixel spacing is missing)"
    else:
        geometry, problem = _geometry(places, first.thickness)
    if problem:
        problems.append(problem)
    if not fits((len(slices), rows, columns)):
        problems.append(
            f"it has {len(slices)} slices of {columns}×{rows}, more than can be read at once; export it in "
            "smaller series"
        )
    if geometry is None:
        return Series(**head, files=files, rows=rows, columns=columns, problems=tuple(problems))
    order = geometry.pop("order")
    frames: tuple[int, ...] = tuple(f for i in order if (f := slices[i].frame) is not None)
    if not frames or len(files) > 1:
        files = tuple(slices[i].path for i in order)
    return Series(
        **head, **geometry, files=files, frames=frames, rows=rows, columns=columns, problems=tuple(problems)
    )


def _geometry(slices: list[Place], thickness: float) -> tuple[dict | None, str | None]:
    """Order, spacing, origin, orientation and positions of slices, and the problem with them, or None. thickness: of
    the first slice, in mm."""
    first = slices[0]
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    if (
        abs(across @ down) > 10 * TURNED
        or abs(across @ across - 1) > 10 * TURNED
        or abs(down @ down - 1) > 10 * TURNED
        or min(first.pixel_spacing) <= 0
    ):
        return None, "its directions are not at right angles, or its pixels have no size; export it again"
    if any(np.abs(np.subtract(s.orientation, first.orientation)).max() > TURNED for s in slices):
        return None, "its slices have different directions, as in a localizer of several planes"
    if any(np.abs(np.subtract(s.pixel_spacing, first.pixel_spacing)).max() > TURNED for s in slices):
        return None, "its slices have pixels of different sizes"
    normal = np.cross(across, down)
    places = np.array([s.position for s in slices])
    order = np.argsort(places @ normal, kind="stable")
    along = (places @ normal)[order]
    steps = np.diff(along)
    between = (
        round(float((along[-1] - along[0]) / max(1, len(steps))), 4)
        if len(steps) and steps.min() > SAME_PLACE
        else 0.0
    )
    problem = _spacing_problem(steps)
    between = (
        between or float(np.median(steps[steps > SAME_PLACE])) if (steps > SAME_PLACE).any() else thickness
    )
    if between <= 0:
        problem = problem or "it is a single slice that does not state its thickness"
        between = 1.0
    if not all(map(is_size_mm, (between, *first.pixel_spacing))):
        row, column = first.pixel_spacing
        return (
            None,
            f"it says that voxels measure {column:g} × {row:g} × {between:g} mm, which can't be right; "
            "export it again",
        )
    sideways = places[order] - places[order[0]] - np.outer(along - along[0], normal)
    if not problem and np.abs(sideways).max() > min(first.pixel_spacing):
        problem = "its slices are shifted against each other (a tilted gantry, or several stacks)"
    return {
        "order": order.tolist(),
        "spacing": (between, *first.pixel_spacing),
        "origin": tuple(places[order[0]].tolist()),
        "orientation": first.orientation,
        "positions": tuple(along.tolist()),
    }, problem


def _spacing_problem(steps: np.ndarray) -> str | None:
    """The problem with the distances between slices, (S - 1,) mm, in order, or None."""
    if not len(steps):
        return None
    if (steps <= SAME_PLACE).any():
        return (
            f"{int((steps <= SAME_PLACE).sum())} of its slices lie at the same place as another (several "
            "echoes or times, or sent twice); export them as separate series"
        )
    usual = float(np.median(steps))
    gaps = steps / usual
    if (np.abs(gaps - 1) <= UNEVEN).all():
        return None
    whole = np.abs(gaps - gaps.round()) <= UNEVEN * gaps.round().clip(1)
    if whole.all():
        missing = int(gaps.round().sum()) - len(gaps)
        return (
            f"{missing} of its slices are missing (a gap of {steps.max():.1f} mm where {usual:.1f} is usual)"
        )
    return f"its slices are unevenly spaced, {steps.min():.2f} to {steps.max():.2f} mm apart"


def load_series(series: Series) -> sitk.Image:
    """The pixels of a series with its place in the patient, float32 (size: columns, rows, slices; mm; left,
    back, up).

    Rescale slope and intercept are applied, MONOCHROME1 is inverted so that bright is bright, and padding gets the
    smallest of all other values. Raises MedFLError for a series with problems, for a file that can't be decoded or
    whose values are not finite, and if a decoder is not installed.
    """
    if series.problems:
        raise MedFLError(f"the series “{series.description}” can't be used: {'; '.join(series.problems)}")
    volume = np.empty((series.slices, series.rows, series.columns), np.float32)
    whole = {path: read_with_pixels(path) for path in dict.fromkeys(series.files)} if series.frames else {}
    for index in range(series.slices):
        path, frame = series.place_of(index)
        volume[index] = decode_slice(path, whole.get(path), frame or 0)
    if (padding := np.isnan(volume)).any():
        if padding.all():
            raise MedFLError(f"the series “{series.description}” holds only padding; export it again")
        volume[padding] = volume[~padding].min()
    image = sitk.GetImageFromArray(volume)
    between, row, column = series.spacing
    image.SetSpacing((column, row, between))
    image.SetOrigin(series.origin)
    image.SetDirection(
        np.stack([series.orientation[:3], series.orientation[3:], series.normal], axis=1).ravel().tolist()
    )
    return image
