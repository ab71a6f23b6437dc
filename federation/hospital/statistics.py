"""What a hospital's images look like on average, told so that no two tellings differ by a few patients.

A mean over 8 patients and later one over 9 give the ninth by subtraction. So means are only told over enough
patients, rounded, and anew only of patients who differ from those of every earlier telling by as many; else what
was told last is told again. What was told, and of whom, stays in a file of the hospital's own.
"""

import json
from pathlib import Path

from common import MedFLError, atomic_write
from federation.protocol.answers import Images

ENOUGH = 8  # patients of a mean, and by which two means differ
DIGITS = 3  # that count


class ToldStatistics:
    """The tellings so far, in `file`. Raises MedFLError where it is damaged."""

    def __init__(self, file: Path):
        self.file = file

    def tell(self, patients: tuple[str, ...], images: Images | None) -> Images | None:
        """What is told of these patients, of whose images this is the average; None where nothing may be."""
        told = self._read()
        if images is None:
            return None
        if len(patients) >= ENOUGH and all(
            len(set(patients) ^ set(one["patients"])) >= ENOUGH for one in told
        ):
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


def rounded(images: Images) -> Images:
    """The same with fewer digits."""
    return {
        name: {kind: [float(f"{value:.{DIGITS}g}") for value in values] for kind, values in one.items()}
        for name, one in images.items()
    }
