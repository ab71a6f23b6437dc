"""The bundle of code that the server sends to the hospitals: these files of the repository and nothing else."""

from pathlib import Path

from common import __version__
from federation.flower import build_bundle

ROOT = Path(__file__).parent.parent
FILES = (
    "LICENSE",
    "batches.py", "checkpoint.py", "common.py", "curves.py", "dataset.py", "inference.py", "metrics.py", "partition.py",
    "plausibility.py", "preprocessing.py", "spacing.py", "split.py", "torchvision_operators.py", "training.py", "transunet.py",
    "federation/__init__.py", "federation/accountant.py", "federation/aggregation.py", "federation/answers.py",
    "federation/audit.py", "federation/client_app.py", "federation/exchange.py", "federation/history.py",
    "federation/hospital.py", "federation/judging.py", "federation/membership.py", "federation/messages.py",
    "federation/moments.py", "federation/patient_privacy.py", "federation/post.py", "federation/privacy.py",
    "federation/record.py", "federation/rounds.py", "federation/screening.py", "federation/secure_aggregation.py",
    "federation/secure_round.py", "federation/server_app.py", "federation/settings.py", "federation/state.py",
    "federation/updates.py", "federation/weights.py",
)


def make_bundle() -> bytes:
    """The bundle; the same files give the same bytes. Text files travel with line feeds, whatever the checkout has."""
    files = {name: (ROOT / name).read_bytes().replace(b"\r\n", b"\n") for name in FILES}
    return build_bundle(files, __version__)
