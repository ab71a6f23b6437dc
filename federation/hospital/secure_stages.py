"""A hospital's stages of secure aggregation. Its secrets stay in Flower's memory between a round's messages."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import ConfigRecord, Context

from common import MedFLError
from federation.hospital.faults import HospitalError
from federation.hospital.sums import Sums
from federation.protocol.masks import sha256_of
from federation.protocol.messages import Failure
from federation.protocol.requests import Agree, Keys, Shares, Train, Unmask
from federation.protocol.secure_aggregation import Party, WrongShares

SECRETS = "secure"  # the record in that memory


def secure_stage(asked: Keys | Shares | Agree | Unmask, node: int, context: Context, sums: Sums) -> dict:
    """The hospital's answer in a stage of the secure aggregation that brings no update."""
    if isinstance(asked, Keys | Shares):
        with refusing():
            sums.check_run(asked.run)
    with party(context) as mine:
        if isinstance(asked, Keys):
            keys = mine.keys(node)
            return {"keys": keys, "signature": sums.signature(asked.run, asked.round, keys)}
        if isinstance(asked, Shares):
            sealed = mine.share(*sums.participants(asked), [asked.run, asked.round])
            return {"sealed": sealed, "promised": mine.promised, "seed": sha256_of(mine.seed)}
        mine.given = sums.given()
        if isinstance(asked, Agree):
            return {"codes": mine.agree(asked.summed, asked.missing)}
        shares = mine.reveal(asked.summed, asked.missing, asked.agreed)
        sums.remember(mine.given)
        return {"shares": shares}


def masked(
    task: Train,
    update: torch.Tensor,
    examples: int,
    limit: float,
    context: Context,
    model: str,
    begun: str = "",
    given: dict[str, list[str]] | None = None,
) -> np.ndarray:
    """The weighted update under its masks, (n,) uint32.

    model: SHA-256 of the weights that came; begun: SHA-256 of what else the training began with; given: as `Sums`
    keeps it. Raises HospitalError if the message lacks something that is needed.
    """
    if task.sealed is None or not task.most:
        raise HospitalError(
            Failure.PROTOCOL, "the server asked for a masked update without the other hospitals' shares"
        )
    share = min(1.0, examples / task.most)
    # the masks are bound to everything that decides how large an update is, so all hospitals must be told the same:
    # if the others had a learning rate near 0, the sum would be one hospital's update
    of = [task.run, task.round, task.most, model, task.settings, task.rate]
    with party(context) as mine:
        mine.given = mine.given if given is None else given
        return mine.masked(task.sealed, update, share, limit, of, task.promised, begun)


def fix_run(run: str, sums: Sums) -> None:
    """Join a run with secure aggregation; no other run can be joined until this hospital is started again."""
    with refusing(Failure.CONSENT):
        sums.join(run)


@contextmanager
def party(context: Context) -> Iterator[Party]:
    """This hospital's part in the secure aggregation; its new state is kept afterwards. Steps that it refuses
    become HospitalErrors."""
    mine = (
        Party(**json.loads(str(context.state.config_records[SECRETS]["json"])))
        if SECRETS in context.state
        else Party()
    )
    try:
        yield mine
    except WrongShares as error:
        raise HospitalError(Failure.PROTOCOL, str(error), of=str(error.node)) from error
    except MedFLError as error:
        raise HospitalError(Failure.PROTOCOL, str(error)) from error
    finally:
        context.state[SECRETS] = ConfigRecord({"json": json.dumps(mine.kept())})


@contextmanager
def refusing(failure: Failure = Failure.PROTOCOL) -> Iterator[None]:
    """Steps that this hospital refuses become HospitalErrors."""
    try:
        yield
    except MedFLError as error:
        raise HospitalError(failure, str(error)) from error
