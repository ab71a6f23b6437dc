"""What hospitals answer, as types with bounds: whatever is not of this form is the fault of who sent it, and
is not used.

A Dice lies from 0 to 1, counts are not negative, texts are short, and no entry is unknown. Bounds that depend
on a hospital (no more patients than it announced) are looked at by who knows the announcement.
"""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from appearance.features import MEASURES
from common import SMALLEST_GROUP, MedFLError
from split import PARTS
from tasks import DEFAULT, LGG, Task

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")  # of a hospital
NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")  # of an entry that is named in a sentence

Count = Annotated[int, Field(ge=0, le=100_000_000)]
Seconds = Annotated[float, Field(ge=0, le=1e8)]
Share = Annotated[float, Field(ge=0, le=1)]


def _printable(text: str) -> str:
    """No line ends and no codes that a terminal would obey."""
    if not text.isprintable():
        raise ValueError("letters that can't be printed")
    return text


Text = Annotated[str, Field(max_length=64), AfterValidator(_printable)]
# a key, or shares that are sealed. Ours have 1,224 letters; shares of 50,000 from one of 40 hospitals would keep the
# server busy for minutes, because opening a secret takes long for its length
Secret = Annotated[str, Field(max_length=2_000)]
Hexadecimal = Annotated[Secret, Field(pattern=r"^([0-9a-f]{2})*$")]
Text256 = Annotated[str, Field(max_length=256), AfterValidator(_printable)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Promise = Annotated[list[Sha256], Field(min_length=2, max_length=2)]
Epsilon = Annotated[float, Field(ge=0, le=1e12)]


class Typed(BaseModel):
    """A message's text: no number is rounded or made of a text, none is infinite, nothing is added."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Introduction(Typed):
    """Who a hospital is, before its data are looked at. session: a random number of its start; cid: its share
    of a divided dataset, None with data of its own; role: whether it trains, only scores, or asks whether it
    could join."""

    label: Text
    session: Text
    cid: Annotated[int, Field(ge=0, le=1_000_000)] | None
    versions: Annotated[dict[Text, Text], Field(max_length=16)]
    role: Literal["train", "observe", "check"] = "train"


class Failed(Typed):
    """Why a hospital could not do what it was asked, as one of `messages.Failure`. of: the node of the hospital
    whose shares it could not use."""

    failure: Text
    label: Text | None = None
    session: Text | None = None
    of: Text | None = None


class Part(Typed):
    """How much of a hospital's data trains, chooses or is kept for the test."""

    patients: Count
    slices: Count


class PatientPrivacy(Typed):
    """What a hospital promises its patients."""

    epsilon: Epsilon
    delta: Share


def _of_a_measure(values: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Mean and deviation over patients of everything that `appearance.features.MEASURES` names, and nothing
    else."""
    if values.keys() != MEASURES.keys() or any(
        one.keys() != {"mean", "deviation"} or any(len(numbers) != MEASURES[name] for numbers in one.values())
        for name, one in values.items()
    ):
        raise ValueError("other measures")
    return values


Images = Annotated[
    dict[str, dict[str, list[Annotated[float, Field(ge=-1e6, le=1e6)]]]], AfterValidator(_of_a_measure)
]


class Facts(Introduction):
    """What a hospital says of itself at joining. images: what its training images look like on average, of
    enough patients; task: what is outlined in its data, None for the default."""

    own_data: bool
    data: Text
    parts: dict[str, Part]
    images: Images | None
    device: Text
    split_sha256: Text | None
    partition_sha256: Text | None
    patient_privacy: PatientPrivacy | None
    task: Task | None = None

    @property
    def outlined(self) -> tuple | None:
        """What is outlined in its data, and in what; None for the default."""
        task = self.task or LGG
        is_default = task.name == DEFAULT and (task.region, task.channels, task.classes) == (
            LGG.region,
            LGG.channels,
            LGG.classes,
        )
        return None if is_default else task.outlines

    @model_validator(mode="after")
    def _consistent(self) -> "Facts":
        if self.parts.keys() != set(PARTS):
            raise ValueError("other parts")
        if self.own_data != (self.cid is None):  # a share has a number
            raise ValueError("own data with a number, or a share without one")
        if self.images is not None and self.parts["train"].patients < SMALLEST_GROUP:
            raise ValueError("a mean over so few patients")
        return self


class Energy(Typed):
    """Electricity of a hospital's work on one message. kwh: the least and the most that it can have been; method:
    how that is known."""

    kwh: Annotated[list[Annotated[float, Field(ge=0, le=1e4)]], Field(min_length=2, max_length=2)]
    method: Text256
    cpu_seconds: Seconds


class Result(Typed):
    """A model's score: mean volume Dice over so many validation patients; None over none. energy: of the work, where
    the hospital measures it."""

    val_dice: Share | None
    val_patients: Count
    seconds: Seconds
    energy: Energy | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Result":
        if (self.val_dice is None) != (self.val_patients == 0):
            raise ValueError("a Dice without patients, or patients without one")
        return self


class Tested(Typed):
    """A model's score on the patients that a hospital kept for the test; None over none."""

    test_dice: Share | None
    test_patients: Count
    seconds: Seconds

    @model_validator(mode="after")
    def _consistent(self) -> "Tested":
        if (self.test_dice is None) != (self.test_patients == 0):
            raise ValueError("a Dice without patients, or patients without one")
        return self


class Trained(Result):
    """What a hospital tells of a round's training, beside the update. examples: the training slices behind
    it."""

    round: Count
    examples: Count
    train_loss: Annotated[float, Field(ge=0, le=1e9)] | None
    patient_epsilon: Epsilon | None


class PublicKeys(Typed):
    """Secure aggregation: a hospital's public keys of a round, for masks and for sealing; signature: of its
    consortium key, where it has one."""

    keys: Annotated[list[Secret], Field(min_length=2, max_length=2)]
    signature: Text256 | None = None


class SealedShares(Typed):
    """Secure aggregation: what a hospital gives into the others' care, by their nodes; promised: SHA-256 of
    each share, of its seed and of its key; seed: that of the seed itself."""

    sealed: dict[Text, Hexadecimal]
    promised: dict[Text, Promise]
    seed: Sha256


class Agreed(Typed):
    """Secure aggregation: a code for each other hospital, by its node, that says which hospitals this one was
    told to be in the sum."""

    codes: dict[Text, Sha256]


class OpenShares(Typed):
    """Secure aggregation: the shares that uncover the sum, by the nodes whose secrets they are of."""

    shares: dict[Text, Hexadecimal]


Kind = TypeVar("Kind", bound=Typed)


def parse(kind: type[Kind], about: object, what: str = "its answer") -> Kind:
    """A message's text as its type. Raises MedFLError, which begins with `what` and names the entry that is
    wrong, where it is anything else."""
    try:
        return kind.model_validate(about)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # names that are none of ours come from elsewhere, and are not repeated
        place = [str(part) for part in first["loc"][:4] if isinstance(part, int | str)]
        known = all(NAME.fullmatch(part) for part in place)
        name = (".".join(place) if known else "entry") or "combination of entries"
        value = first["input"]
        if isinstance(value, int | float) and not isinstance(value, bool):
            said = f"{value:.6g}" if abs(value) < 1e300 else "a number beyond all bounds"
            raise MedFLError(f"{what} says {name} {said}") from error
        raise MedFLError(f"{what} has no usable {name}") from error
    except Exception as error:  # nested too deep, or a number of too many digits
        raise MedFLError(f"{what} can't be read") from error


def announced(result: Result | Tested, facts: Facts) -> None:
    """Raises MedFLError where a score is over more patients than the hospital announced."""
    tested = isinstance(result, Tested)
    count = result.test_patients if isinstance(result, Tested) else result.val_patients
    most = facts.parts["test" if tested else "val"].patients
    if count > most:
        raise MedFLError(f"its score counts {count} patients, and it joined with {most}")
