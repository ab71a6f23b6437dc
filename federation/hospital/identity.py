"""Who a hospital is, as run_client.py writes it down and `Hospital` reads it, and the files that are a hospital's own."""

import secrets
from pathlib import Path

OWN_FILES = {"split": "split.json", "norms": "norms.pt", "model": "federated_best.pth",  # in its models/
             "privacy": "privacy.json", "optimiser": "optimiser.pt"}


def identity(label: str, cid: int | None, data: Path, device: str, medfl: str, models: Path, shared_cores: int | None, code: str,
             approved: list[str] | None = None, promise: dict | None = None) -> dict:
    """Who a hospital is, as it stands in its hospital.json and `Hospital` reads it.

    session, which it draws: a random number of this start. shared_cores: those that it shares with the other simulated
    hospitals, None with a machine of its own. code: SHA-256 of the bundle of the MedFL installed here. approved: hashes of
    code and settings that it consents to, None for any settings of this code. promise: epsilon and delta of its patients'
    privacy, None without.
    """
    files = {f"{what}_file": str((models / f"{label}_{name}").resolve()) for what, name in OWN_FILES.items()}
    return {"label": label, "session": secrets.token_hex(8), "cid": cid, "data": str(data.resolve()), "device": device,
            "medfl": medfl, "shared_cores": shared_cores, "code": code, "approved": approved, "promise": promise, **files}
