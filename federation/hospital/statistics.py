"""What a hospital's images look like on average, told so that no two tellings differ by a few patients.

A mean over 8 patients and later one over 9 give the ninth by subtraction, and means over 8, 8 others and all of
them with a seventeenth give that one. So means are only told over enough patients, rounded, and anew only where
sums and differences of all tellings give no figure of fewer; else what was told last is told again. What was
told, and of whom, stays in a file of the hospital's own.
"""

import json
from collections import Counter
from pathlib import Path

from common import MedFLError
from federation.protocol.answers import Images
from storage.files import alone, atomic_write

ENOUGH = 8  # patients of a mean, and of whatever means can be worked out of several
DIGITS = 3  # that count


class ToldStatistics:
    """The tellings so far, in `file`. Raises MedFLError where it is damaged."""

    def __init__(self, file: Path):
        self.file = file

    def tell(self, patients: tuple[str, ...], images: Images | None) -> Images | None:
        """What is told of these patients, of whose images this is the average; None where nothing may be."""
        with alone(self.file):  # another process may have the same label
            told = self._read()
            if images is None:
                return None
            if _tell_of_enough([*(set(one["patients"]) for one in told), set(patients)]):
                told.append({"patients": sorted(patients), "images": rounded(images)})
                with atomic_write(self.file, "w", private=True) as file:
                    json.dump({"version": 1, "told": told}, file)
        return told[-1]["images"] if told else None

    def _read(self) -> list[dict]:
        if not self.file.exists():
            return []
        try:
            return list(json.loads(self.file.read_text(encoding="utf-8"))["told"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MedFLError(
                f"{self.file} is damaged, so it is not known what was told of the images; put back a copy"
            ) from error


def _tell_of_enough(groups: list[set[str]]) -> bool:
    """Whether whatever can be worked out of means over these groups, of which the last is new, is over enough
    patients: those who are in the same of them can't be told apart, so each such set has to be large enough. The
    same patients again would give what changed of one of them."""
    *former, new = groups
    alike = Counter(tuple(one in group for group in groups) for one in set().union(*groups))
    return new not in former and len(new) >= ENOUGH and min(alike.values()) >= ENOUGH


def rounded(images: Images) -> Images:
    """The same with fewer digits."""
    return {
        name: {kind: [float(f"{value:.{DIGITS}g}") for value in values] for kind, values in one.items()}
        for name, one in images.items()
    }
