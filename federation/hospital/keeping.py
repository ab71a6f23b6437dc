"""The federation's model, as it comes to a hospital at the end."""

import json
from pathlib import Path
from typing import Literal

from checkpoint import describe, save_checkpoint
from federation.hospital.faults import HospitalError
from federation.hospital.hospital import Hospital
from federation.protocol.messages import Failure
from federation.protocol.weights import Record, from_record, model_hash, unpack

SAME = ("format", "architecture")  # entries of the metadata that say which network it is


def keep_model(
    hospital: Hospital, which: Literal["best", "last"], arrays: Record, metadata: str, sha256: str
) -> Path:
    """Write the federation's best or last model into a file of this hospital's own, whole; where.

    Args:
        arrays: the weights. metadata: the file's, as JSON. sha256: of both, as `model_hash` makes it.

    Raises:
        HospitalError: what came is not what was announced, or another network than was trained.
    """
    weights, settings = from_record(arrays), hospital.training
    if hospital.federation.withhold_model or model_hash(weights, metadata) != sha256:
        raise HospitalError(
            Failure.PROTOCOL, "the model that came is not the announced one; nothing was written"
        )
    model = settings.network()
    try:
        about = json.loads(metadata)
        came = [about[name] for name in SAME]
    except (ValueError, KeyError, TypeError, RecursionError):
        came = []
    here = describe(model)
    if came != [here[name] for name in SAME]:
        raise HospitalError(Failure.PROTOCOL, "the model that came is another network; nothing was written")
    path = hospital.identity.file("federated_best.pth" if which == "best" else "federated_last.pth")
    save_checkpoint(path, unpack(weights, model.state_dict()), about)
    return path
