"""A case: the slices that a reader looks at together, and its limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from appearance.doubts import of_brain
from deployment.app.framing import FRAMED, Feed, Frame

if TYPE_CHECKING:  # optional
    import nibabel

    from deployment.app.source import Source
    from radiology.prepared import PreparedPatient

MIN_SIDE = 16  # pixels
LONE_SLICE = (
    "A lone slice is normalised by itself and not with its patient's other slices: its mask is less "
    "reliable. Open a patient's slices together."
)


@dataclass(frozen=True)
class Opened:
    """A prepared patient at the time it was opened. slices: digest of its slices; version: of its truth."""

    patient: "PreparedPatient"
    slices: str
    version: str


@dataclass
class Case:
    """The slices that a reader looks at together.

    name: of the patient or the file; slices: a name for each; volume: (S, H, W, 3) uint8; groups: for each
    slice the number of the volume that it is normalised with (0 for all slices of a patient); truth: (S, H,
    W) uint8 0/255 or None; spacing: mm between rows, columns and slices, or None; measured: whether the
    spacing comes from the files; oriented: whether it is known that the patient's left is on the right of
    each slice; notes: what a reader should know about how the files were read; feed: the network's input, if
    it differs from the slices; nifti, dicom: the source image or series (dicom.Source), if there is one, to
    write a mask in the same space; prepared: the hospital's prepared patient, if the case is one; numbers:
    the classes that values of a mask may mean (`Task.numbers`).
    """

    name: str
    slices: list[str]
    volume: np.ndarray
    groups: np.ndarray
    truth: np.ndarray | None = None
    spacing: tuple[float, float, float] | None = None
    measured: bool = False
    oriented: bool = False
    notes: list[str] = field(default_factory=list)
    feed: Feed | None = None
    nifti: "nibabel.Nifti1Image | None" = None
    dicom: "Source | None" = None
    prepared: "Opened | None" = None
    numbers: Mapping[int, int] = field(default_factory=dict)

    @property
    def fed(self) -> np.ndarray:
        """The network's input, (s, h, w, 3) uint8."""
        return self.volume if self.feed is None else self.feed.fed

    @property
    def is_volume(self) -> bool:
        """Whether the slices belong to one patient, so that sums over them are meaningful."""
        return len(self.slices) > 1 and int(self.groups.max()) == 0


def as_trained(case: Case, channels: Sequence[str]) -> Case:
    """The case as a model of these channels takes it: only brain scans are framed, because all others were whole
    slices in the training."""
    if of_brain(channels) or not isinstance(case.feed, Frame):
        return case
    start = FRAMED.split(",")[0]
    return replace(case, feed=None, notes=[note for note in case.notes if not note.startswith(start)])


def short(name: str) -> str:
    """A file's name without its folders, shortened if it is very long."""
    name = PurePosixPath(name).name
    return name if len(name) <= 60 else f"{name[:40]}…{name[-15:]}"
