"""The options with which a run's server was started, kept in its folder, so that --resume needs none of them again."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from common import MedFLError
from storage.files import atomic_write

FILE = "server.json"


class Remembered(BaseModel):
    """The address on which a server listens, and its keys."""

    model_config = ConfigDict(extra="forbid")

    address: str
    kit: Path | None
    own_gateway: bool

    def save(self, out: Path) -> None:
        """Keep it in `out`; only the owner can read it."""
        with atomic_write(out / FILE, "w", private=True) as file:
            file.write(self.model_dump_json(indent=2) + "\n")


def remembered(out: Path) -> Remembered | None:
    """The options with which the run in `out` was started; None if it kept none. Raises MedFLError if the file is
    damaged."""
    path = out / FILE
    if not path.exists():
        return None
    try:
        return Remembered.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, ValueError, OSError) as error:
        raise MedFLError(
            f"{path} is damaged; remove it, and give --address and --kit with --resume"
        ) from error
