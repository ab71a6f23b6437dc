"""What a reader looks at together, and the bounds of it."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # optional
    import nibabel

    from deployment.app.framing import Feed
    from deployment.app.source import Source
    from radiology.prepared import PreparedPatient

MIN_SIDE = 16  # pixels
LONE_SLICE = (
    "A lone slice is normalised by itself and not with its patient's other slices: its mask is less "
    "reliable. Open a patient's slices together."
)


@dataclass(frozen=True)
class Opened:
    """A prepared patient as it was when it was opened. slices: what its slices held; version: its truth."""

    patient: "PreparedPatient"
    slices: str
    version: str


@dataclass
class Case:
    """What is looked at together.

    name: the patient's, or the file's; slices: a name for each; volume: (S, H, W, 3) uint8; groups: for each
    slice the number of the volume that it is normalised with (0 for all slices of a patient); truth: (S, H,
    W) uint8 0/255 or None; spacing: mm between rows, columns and slices, or None; measured: whether the files
    tell it; oriented: whether it is known that the patient's left is on the right of each slice; notes: what
    a reader should know about how it was read; feed: what the network is given in the place of the slices,
    if that is something else; nifti, dicom: the image or the series (dicom.Source) that it came from, if it
    did, to write a mask in the same space; prepared: the hospital's patient that it is.
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
    feed: "Feed | None" = None
    nifti: "nibabel.Nifti1Image | None" = None
    dicom: "Source | None" = None
    prepared: "Opened | None" = None

    @property
    def fed(self) -> np.ndarray:
        """What the network is given, (s, h, w, 3) uint8."""
        return self.volume if self.feed is None else self.feed.fed

    @property
    def is_volume(self) -> bool:
        """Whether the slices are one patient's, so that sums over them mean something."""
        return len(self.slices) > 1 and int(self.groups.max()) == 0


def short(name: str) -> str:
    """A file's name without its folders, cut where it is very long."""
    name = PurePosixPath(name).name
    return name if len(name) <= 60 else f"{name[:40]}…{name[-15:]}"
