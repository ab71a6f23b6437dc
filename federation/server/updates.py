"""A round's updates on disk. Memory holds one block of them at a time, however many hospitals there are.

An update is a file of float32 values. Strategies and the screening get changes (a hospital's weights minus the
weights that were sent) in float64, a block of columns of all hospitals at a time. Lengths, directions and distances
all follow from the inner products of all pairs of changes, which take one pass.
"""

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import MedFLError

BLOCK = 4_000_000  # values in memory at a time, over all hospitals: 32 MB in float64


class NoRoom(MedFLError):
    """The server's disk is full, which is not the fault of the hospital whose update it was."""


@dataclass
class Update:
    """A hospital's update without its values. trained, statistics: the factors by which the screening shortened its
    changes of trained weights and of statistics. aside: why its statistics don't count, empty if they do."""

    label: str
    examples: int
    file: Path
    trained: float = 1.0
    statistics: float = 1.0
    aside: str = ""


class Updates:
    """The updates of one round to the weights `sent`, (n,) float32.

    is_statistic: which weights are statistics that nobody trains, (n,) bool. within: the folder in which the updates
    get a folder of their own.
    """

    def __init__(self, sent: torch.Tensor, is_statistic: torch.Tensor, within: Path):
        self.sent, self.is_statistic = sent, is_statistic
        self._folder = _made(within)
        self._of: dict[str, Update] = {}
        self._products: tuple[list[str], np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[Update]:
        """The updates in the order of their labels, so that nothing depends on which hospital answered first."""
        return iter(self._of[label] for label in sorted(self._of))

    @property
    def labels(self) -> list[str]:
        """The hospitals' labels, in order."""
        return sorted(self._of)

    def add(self, label: str, weights: torch.Tensor, examples: int) -> None:
        """Add a hospital's weights, (n,) float32, and the number of its training slices. Raises NoRoom on a full
        disk."""
        path = self._folder / label.encode().hex()  # some systems treat mercy and Mercy as one file
        try:
            with open(path, "wb") as file:  # numpy's tofile reports no error on a full disk
                file.write(weights.contiguous().numpy().data)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise NoRoom(
                f"the updates of a round don't fit into {self._folder.parent} ({error.strerror or error}); "
                "free the disk, then continue with --resume"
            ) from error
        self._of[label], self._products = Update(label, examples, path), None

    def drop(self, label: str) -> None:
        """Leave an update out."""
        self._of.pop(label).file.unlink(missing_ok=True)
        if self._products:
            labels, trained, of_statistics = self._products
            kept = [k for k, one in enumerate(labels) if one != label]
            square = np.ix_(kept, kept)
            self._products = [labels[k] for k in kept], trained[square], of_statistics[square]

    def cut(self, label: str, trained: float, statistics: float) -> None:
        """Shorten an update: from now on its changes of trained weights and of statistics are multiplied by these
        factors."""
        update = self._of[label]
        update.trained, update.statistics = trained, 0.0 if update.aside else statistics

    def set_aside(self, label: str, why: str) -> None:
        """Ignore a hospital's change of the statistics; its trained weights count."""
        self._of[label].aside, self._of[label].statistics = why, 0.0

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._of, self._products = {}, None

    def shares(self, ratio: float) -> np.ndarray:
        """Each hospital's weight in the mean, (hospitals,) float64, by its slices, `capped`."""
        counts = np.array(capped([update.examples for update in self], ratio))
        return counts / counts.sum()

    def products(self) -> tuple[np.ndarray, np.ndarray]:
        """The inner products of all pairs of changes, separately for trained weights and for statistics, each
        (hospitals, hospitals) float64; before any cut."""
        if self._products is None:
            labels = self.labels
            whole, of_statistics = (np.zeros((len(labels), len(labels))) for _ in range(2))
            for columns, block in self._blocks():
                whole += block @ block.T
                part = block[:, self.is_statistic[columns].numpy()]
                of_statistics += part @ part.T
            self._products = labels, whole - of_statistics, of_statistics
        return self._products[1:]

    def distances(self) -> np.ndarray:
        """The squared distance between the changes of each two hospitals, after the cuts, (hospitals, hospitals)
        float64."""
        total = np.zeros((len(self), len(self)))
        for part, name in zip(self.products(), ("trained", "statistics")):
            factors = np.array([getattr(update, name) for update in self])
            part = part * np.outer(factors, factors)
            total += part.diagonal()[:, None] + part.diagonal() - 2 * part
        return total

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All changes, after the cuts, in blocks: the slice of values, and their changes, (hospitals, values)
        float64."""
        factors = np.array([[update.trained, update.statistics] for update in self]).reshape(-1, 2)
        for columns, block in self._blocks():
            if (factors != 1).any():
                block *= factors[:, self.is_statistic[columns].numpy().astype(int)]
            yield columns, block

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        size, files = max(1, BLOCK // max(1, len(self))), [update.file for update in self]
        for start in range(0, len(self.sent), size):
            columns = slice(start, min(start + size, len(self.sent)))
            block = np.empty((len(files), columns.stop - start))
            for row, file in zip(block, files):
                row[:] = np.fromfile(file, np.float32, len(row), offset=4 * start)
            block -= self.sent[columns].numpy()
            yield columns, block


def capped(counts: list[int], ratio: float) -> list[float]:
    """Counts of slices or patients as weights, none larger than `ratio` times their median, so that a hospital that
    claims a hundred times as many as the others does not dominate the mean."""
    most = ratio * statistics.median(counts)
    return [min(float(count), most) for count in counts]


def _made(within: Path) -> Path:
    """A new folder in `within`."""
    try:
        within.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=within, prefix=".updates-"))
    except OSError as error:
        raise MedFLError(
            f"{within} can't be written ({error.strerror or error}); free space there, or choose another --out"
        ) from error


def remove_leftovers(within: Path) -> None:
    """Remove the updates that a killed server left behind."""
    for folder in within.glob(".updates-*"):
        shutil.rmtree(folder, ignore_errors=True)
