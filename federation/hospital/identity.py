"""Who a hospital is, as run_client.py writes it down for its app, and the files that are a hospital's own."""

import secrets
from pathlib import Path
from typing import Literal, cast

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field

from federation.protocol.answers import Introduction, PatientPrivacy
from federation.protocol.messages import local_versions
from scans.naming import MASK_SUFFIX
from storage.files import atomic_write

# in the folder that run_client.py makes for its app: who the hospital is, how the federation ended for it, and
# why it waits for a server of the same version
IDENTITY, ENDED, WAITING = "hospital.json", "ended.json", "waiting.json"

OwnFile = Literal[
    "split.json",
    "norms.pt",
    "federated_best.pth",
    "federated_last.pth",
    "privacy.json",
    "optimiser.pt",
    "painter.pt",
    "sums.json",
    "images.json",
    "scored.json",
]


class Identity(BaseModel):
    """Who a hospital is.

    label: its name in the federation. session: a random number of this start. cid: its share of a divided
    dataset, None with data of its own. data: the folder of its scans; mask_suffix: what ends a mask's
    name there. medfl: the version installed here.
    models: the folder of its own files. shared_cores: those that it shares with the other simulated
    hospitals, None with a machine of its own. code: SHA-256 of what runs at a hospital of the MedFL that is
    installed here. commit: of its working copy, None outside one. key: the file of its private key, None
    without a kit. members: the public keys of the consortium's hospitals by label, as this one knows them,
    None without a kit or a list. approved: hashes of code and settings that it consents to, None for any
    settings of this code. patient_privacy: what it promises its patients, None without. role: whether it
    trains, only scores, or asks whether it could join. energy: whether it measures its electricity and reports it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    cid: int | None
    data: Path
    mask_suffix: str = MASK_SUFFIX
    device: str
    medfl: str
    models: Path
    code: str
    commit: str | None = None
    shared_cores: int | None = None
    key: Path | None = None
    members: dict[str, str] | None = None
    approved: list[str] | None = None
    patient_privacy: PatientPrivacy | None = None
    role: Literal["train", "observe", "check"] = "train"
    energy: bool = False
    session: str = Field(default_factory=lambda: secrets.token_hex(8))

    @property
    def own_data(self) -> bool:
        """Whether all patients in the folder are this hospital's."""
        return self.cid is None

    def file(self, name: OwnFile) -> Path:
        """Where a file of this hospital's own lies."""
        return self.models / f"{self.label}_{name}"

    def private_key(self) -> ec.EllipticCurvePrivateKey | None:
        """The key with which it signs what it says; None without a kit."""
        if self.key is None:
            return None
        return cast(
            ec.EllipticCurvePrivateKey, serialization.load_ssh_private_key(self.key.read_bytes(), None)
        )

    def introduction(self) -> Introduction:
        """What the server learns before the data are looked at."""
        return Introduction(
            label=self.label,
            session=self.session,
            cid=self.cid,
            versions=local_versions(self.medfl),
            role=self.role,
        )

    def save(self, folder: Path) -> None:
        """Write it into the folder in which the app runs."""
        places = {"data": self.data, "models": self.models, "key": self.key}
        resolved = self.model_copy(update={name: path and path.resolve() for name, path in places.items()})
        with atomic_write(folder / IDENTITY, "w") as file:
            file.write(resolved.model_dump_json(indent=2))

    @classmethod
    def load(cls, folder: Path) -> "Identity":
        """Back from `save`."""
        return cls.model_validate_json((folder / IDENTITY).read_text(encoding="utf-8"))
