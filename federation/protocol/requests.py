"""What the server asks of hospitals, as types with bounds. What hospitals answer is in answers.py."""

from typing import Annotated, Literal

from pydantic import Field

from federation.protocol.answers import (
    Count,
    Promise,
    PublicKeys,
    Seconds,
    Secret,
    Sha256,
    Share,
    Text,
    Text256,
    Typed,
)
from federation.protocol.messages import End, Query

Round = Annotated[int, Field(ge=1, le=1_000_000)]
Settings = Annotated[str, Field(max_length=10_000)]  # both kinds of settings, as JSON


class Request(Typed):
    """ticket: a random text that the answer returns, so that it answers nothing else."""

    ticket: Text = ""


class Join(Request):
    """Who are you, and what do you hold? hospitals: how many the federation has; versions: the server's; until: the
    day (ISO 8601) on which your admission ends, empty where no keys are asked for."""

    query: Literal[Query.JOIN]
    settings: Settings
    run: Text
    versions: Annotated[dict[Text, Text], Field(max_length=16)]
    hospitals: Count
    until: Annotated[str, Field(pattern=r"^(\d{4}-\d\d-\d\d)?$")] = ""


class Task(Request):
    """What comes with weights. run: its random name; without: parts of the weights that are left out."""

    settings: Settings
    run: Text
    without: Annotated[list[Literal["encoder", "norm", "rest"]], Field(max_length=2)]


class Score(Task):
    """Score the model that came. part: on validation patients, or on those kept for the test; last: whether
    training is over."""

    part: Literal["val", "test"] = "val"
    last: bool = True


class Train(Task):
    """Score the model that came, train it, and send what became of it.

    rate: a share of the learning rate, None where hospitals follow the cosine. seconds: the time there is.
    partition: its SHA-256, None where all have data of their own. most: slices that a hospital counts at
    most, sealed: the other hospitals' sealed shares, by their nodes, and promised: the SHA-256 of these; all
    of secure aggregation, None without it.
    """

    round: Round
    rate: Share | None
    seconds: Seconds
    partition: Text | None
    most: Count | None = None
    sealed: dict[Text, Secret] | None = None
    promised: dict[Text, Promise] | None = None


class Model(Request):
    """The federation's model, to be kept. metadata: what its file says of it, as JSON; sha256: of weights and
    metadata (`weights.model_hash`)."""

    query: Literal[Query.MODEL]
    settings: Settings
    which: Literal["best", "last"]
    metadata: Annotated[str, Field(max_length=1_000_000)]
    sha256: Text


class Ping(Request):
    """Are you there?"""

    query: Literal[Query.PING]


class Keys(Request):
    """Secure aggregation: make new secrets for a round, and give the public keys."""

    query: Literal[Query.KEYS]
    run: Text
    round: Round


class Participant(PublicKeys):
    """A hospital's public keys of a round, and its label."""

    label: Text


class Shares(Request):
    """Secure aggregation: give the other hospitals their shares of your secrets. keys: the participants, by
    node."""

    query: Literal[Query.SHARES]
    run: Text
    round: Round
    keys: dict[Text, Participant]


class Agree(Request):
    """Secure aggregation: say to the others whose updates are in the sum. summed, missing: nodes whose updates
    are in it, and nodes that gave shares and no update."""

    query: Literal[Query.AGREE]
    summed: list[Annotated[int, Field(ge=0)]]
    missing: list[Annotated[int, Field(ge=0)]]


class Unmask(Request):
    """Secure aggregation: give the shares that uncover the sum. summed, missing: as the hospitals agreed;
    agreed: what the others said of these to this one (`answers.Agreed`), by their nodes."""

    query: Literal[Query.UNMASK]
    summed: list[Annotated[int, Field(ge=0)]]
    missing: list[Annotated[int, Field(ge=0)]]
    agreed: dict[Text, Sha256]


class Over(Request):
    """The federation is over for you. detail: what the sentence of this code says besides."""

    query: Literal[Query.END]
    code: Annotated[End, Field(strict=False)]  # a message carries its text
    detail: Text256 = ""


QUERIES: dict[Query, type[Typed]] = {
    Query.JOIN: Join,
    Query.PING: Ping,
    Query.KEYS: Keys,
    Query.SHARES: Shares,
    Query.AGREE: Agree,
    Query.UNMASK: Unmask,
    Query.MODEL: Model,
    Query.END: Over,
}
