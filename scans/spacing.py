"""A patient's voxel sizes in millimetres, from the `volume.json` beside the slices.

{"version": 1, "spacing_mm": [between slices, row, column], "slice_positions_mm": [one per slice], ...}
"""

from pathlib import Path, PurePath

from borders.limits import SIZES_MM, is_size_mm, read_json, read_json_file
from common import MedFLError

NAME = "volume.json"
VERSION = 1


def read_spacing(path: PurePath, slices: int, content: bytes | None = None) -> tuple[float, float, float]:
    """Millimetres between a patient's slices, rows and columns.

    slices: the patient's number of slices; content: the file's bytes, if they are in memory and not on disk.
    Raises MedFLError for a file that can't be read, another version, invalid sizes, and the `volume.json` of
    other slices.
    """
    again = "make it again with data/prepare_hospital.py, or remove it to work without millimetres"
    try:
        told = read_json_file(Path(path)) if content is None else read_json(content)
        version = told["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MedFLError(f"{path} is not the {NAME} of a prepared patient; {again}") from error
    if version != VERSION:
        raise MedFLError(
            f"{path} has version {version}, but this MedFL reads version {VERSION}; use the MedFL that "
            f"wrote it, or {again}"
        )
    spacing, positions = told.get("spacing_mm"), told.get("slice_positions_mm")
    if not (isinstance(spacing, list) and len(spacing) == 3 and all(map(is_size_mm, spacing))):
        raise MedFLError(
            f"{path} must have three sizes of {SIZES_MM[0]:g} to {SIZES_MM[1]:g} mm as spacing_mm (between "
            f"slices, row, column); {again}"
        )
    if not isinstance(positions, list) or len(positions) != slices:
        count = len(positions) if isinstance(positions, list) else 0
        raise MedFLError(f"{path} describes {count} slices, but the patient has {slices}; {again}")
    between, row, column = map(float, spacing)
    return between, row, column
