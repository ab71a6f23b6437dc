"""How a hospital joins: what it approved, what it tells of itself, and what its terminal says of it."""

from collections.abc import Callable
from datetime import UTC, date, datetime

from common import counted
from federation.hospital.faults import HospitalError
from federation.hospital.hospital import Hospital
from federation.hospital.identity import Identity
from federation.hospital.promise import planned_noise
from federation.hospital.rehearsal import round_seconds
from federation.protocol.agreement import approval, unusual
from federation.protocol.answers import Facts, Introduction, Part
from federation.protocol.log import say
from federation.protocol.messages import SOON, Failure
from federation.protocol.requests import Join


def introduce(asked: Join, identity: Identity, hospital: Callable[[], Hospital]) -> Introduction | Facts:
    """Who this hospital is and what it holds. hospital: makes the hospital, which takes its data in."""
    if identity.cid is not None and identity.cid >= asked.hospitals:
        return identity.introduction()  # there is no such share; the server says so
    ours, theirs = identity.introduction().versions["torch"], asked.versions.get("torch")
    if ours != theirs:
        say(
            f"this hospital runs torch {ours} and the server {theirs}; that is allowed, and figures may "
            f"differ a little"
        )
    if ending := ends_soon(asked.until):
        say(ending)
    mine = hospital()
    say(f"code and settings: {approval(identity.code, asked.settings)} (settings: {unusual(asked.settings)})")
    facts = mine.facts()
    parts = facts.parts
    if warning := mine.data.without_tumour():
        say(warning)
    if identity.role == "check":
        seconds, most = round_seconds(mine), mine.federation.round_timeout
        say(
            f"a round will take about {seconds:.0f} s here, of the {most:.0f} s that the server waits"
            + (": it would be left out; ask the coordinator for a longer --round-timeout" * (seconds > most))
        )
        return facts
    next_step = "waiting for the first round"
    if not mine.federation.rounds:
        next_step = "the server has a model scored on the test patients; nothing is trained"
    else:
        kept = mine.federation.withhold_model or mine.federation.pretraining
        say(f"at the end the federation's model {'stays at the server' if kept else 'comes here'}")
        next_step += " (it only observes: nothing is trained here)" * (identity.role == "observe")
    say(f"joined as {identity.label}: {facts.data}, {what_trains(mine, parts)}; {next_step}")
    if mine.budget:
        noise = planned_noise(mine.budget, mine.federation, asked.run)
        noise_said = "" if noise is None else f"noise of {noise:.3g} clips; "
        say(
            f"promised to the patients: epsilon {mine.budget.epsilon:g} at delta {mine.budget.delta:g}, of "
            f"which {mine.budget.spent:.3g} is spent; {noise_said}only the last layers are trained, and the "
            "server gets no scores"
        )
    return facts


def ends_soon(until: str) -> str | None:
    """A sentence where this hospital's admission ends within 30 days. until: the day, ISO 8601, or empty."""
    try:
        left = date.fromisoformat(until) - datetime.now(UTC).date()
    except ValueError:  # none, or no day of any year
        return None
    if left > SOON:
        return None
    days = counted(max(left.days, 0), "day")
    return (
        f"this hospital's admission ends on {until}, in {days}; ask the coordinator to admit it again before"
    )


def what_trains(hospital: Hospital, parts: dict[str, Part]) -> str:
    """Who trains, validates and tests here, in words."""
    if hospital.federation.pretraining:
        train = parts["train"]
        return f"pretraining on {counted(train.slices, 'slice')} of {counted(train.patients, 'volume')}, no masks"
    return (
        f"patients: {parts['train'].patients} train, {parts['val'].patients} validate, "
        f"{parts['test'].patients} kept for the test"
    )


def check_consent(settings: str, identity: Identity) -> None:
    """Raises HospitalError where this hospital has not approved its code with these settings, as messages
    carry them."""
    wanted = approval(identity.code, settings)
    if identity.approved is not None and wanted not in identity.approved:
        raise HospitalError(
            Failure.CONSENT,
            f"code and settings {wanted} are not approved (settings: {unusual(settings)}); "
            f"if you agree to them, start again with --approve {wanted}",
        )
