"""The network's input for a volume whose slices are not squares around a head: framed like the training
slices; radiology/preparation.py resamples instead."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from scans.field_of_view import DISTANCE, Box, Spacing, find_head, square_margins

FRAMED = "The network was given the scan framed like its training scans, {told}; nothing is found outside."


class Feed(Protocol):
    """The network's input for a case if it differs from the slices that are shown. fed: (s, h, w, 3)
    uint8."""

    @property
    def fed(self) -> np.ndarray: ...

    def onto_page(self, values: np.ndarray) -> np.ndarray:
        """The network's output for `fed`, (s, h, w) float32, on the slices that are shown, (S, H, W); 0
        outside."""
        ...


@dataclass(frozen=True)
class Frame:
    """The part of the shown slices with the head, made square. shape: of the shown slices, (S, H, W);
    margins: black rows above, columns left, rows below, columns right; thick: the number of slices averaged
    into one."""

    fed: np.ndarray
    shape: tuple[int, int, int]
    box: Box
    margins: tuple[int, int, int, int]
    thick: int

    def onto_page(self, values: np.ndarray) -> np.ndarray:
        above, left, below, right = self.margins
        inner = values[:, above : values.shape[1] - below, left : values.shape[2] - right]
        page = np.zeros(self.shape, values.dtype)
        page[self.box.inside] = np.repeat(inner, self.thick, axis=0)[: self.box.end[0] - self.box.start[0]]
        return page

    def mirrored(self) -> "Frame":
        """The frame of the slices with left and right exchanged."""
        (first, top, start), (last, bottom, end) = self.box.start, self.box.end
        box = replace(
            self.box, start=(first, top, self.shape[2] - end), end=(last, bottom, self.shape[2] - start)
        )
        above, left, below, right = self.margins
        fed = np.ascontiguousarray(self.fed[:, :, ::-1])
        return replace(self, fed=fed, box=box, margins=(above, right, below, left))


def frame(volume: np.ndarray, flair: np.ndarray, spacing: Spacing, is_axial: bool) -> Frame | None:
    """The frame of slices (S, H, W, 3) uint8 from feet to head, or None if they can be used unchanged. flair:
    their FLAIR as stored, (S, H, W); is_axial: whether they were acquired axially."""
    between, down, across = spacing
    box = find_head(flair, spacing, is_axial)
    part = volume[box.inside]
    above, left, below, right = margins = square_margins(part.shape[1], part.shape[2], down, across)
    thick = 1 if is_axial else max(1, int(DISTANCE / between + 1e-6))
    if not any(margins) and thick == 1 and part.shape == volume.shape:
        return None
    starts = range(0, len(part), thick)
    fed = np.stack([np.floor(part[k : k + thick].mean(axis=0, dtype=np.float32) + 0.5) for k in starts])
    fed = np.pad(fed.astype(np.uint8), ((0, 0), (above, below), (left, right), (0, 0)))
    slices, rows, columns = flair.shape
    return Frame(fed, (slices, rows, columns), box, margins, thick)
