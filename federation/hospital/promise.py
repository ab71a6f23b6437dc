"""The promise to a hospital's patients (`--dp-sgd-epsilon`): whether it can be kept in a federation, and the noise that
each round needs for it."""

from common import MedFLError, counted
from federation.hospital.faults import HospitalError
from federation.hospital.identity import Identity
from federation.privacy.budget import PatientBudget
from federation.privacy.patients import CHANCE, STEPS
from federation.protocol.messages import Failure
from federation.protocol.requests import Train
from federation.protocol.settings import FederationSettings
from training import TrainingSettings


def patient_budget(
    identity: Identity, training: TrainingSettings, federation: FederationSettings, patients: int
) -> PatientBudget | None:
    """The budget behind the promise; None if the hospital made no promise.

    Args:
        patients: how many train.

    Raises:
        HospitalError: the promise can't be kept with these settings, or its file is damaged.
    """
    promise = identity.patient_privacy
    if promise is None:
        return None
    try:
        budget = PatientBudget(promise.epsilon, promise.delta, identity.file("privacy.json"))
    except MedFLError as error:
        raise HospitalError(Failure.PRIVACY, str(error)) from error
    if federation.pretraining:
        raise HospitalError(
            Failure.PRIVACY,
            "pretraining changes all of the encoder, and the promise to the patients covers the last layers only; "
            "take part without --dp-sgd-epsilon, or not at all",
        )
    if training.norm == "batch":
        raise HospitalError(
            Failure.PRIVACY,
            "with BatchNorm a patient changes what the others' scans teach, and no "
            "privacy of patients can be promised; the server has to start with --norm group",
        )
    if budget.delta * patients >= 1:
        raise HospitalError(
            Failure.PRIVACY,
            f"--dp-sgd-delta {budget.delta:g} would allow to tell all of one of the "
            f"{counted(patients, 'patient')}; choose one far below 1 / patients",
        )
    return budget


def planned_noise(budget: PatientBudget | None, federation: FederationSettings, run: str) -> float | None:
    """The noise, in clips, with which all rounds of a run stay within the budget; None without a budget, and for a
    run that has begun. Raises HospitalError if too little of the budget is left."""
    if budget is None or budget.has_begun(run) or not federation.rounds:
        return None
    try:
        return budget.multiplier(run, federation.rounds * federation.steps_a_round(STEPS), CHANCE)
    except MedFLError as error:
        raise HospitalError(Failure.PRIVACY, str(error)) from error


def reserve(budget: PatientBudget, federation: FederationSettings, task: Train) -> float:
    """Take a round's share out of the budget. Returns the round's noise, in clips. Raises HospitalError if too
    little of the budget is left."""
    steps = federation.steps_a_round(STEPS)
    left = (federation.rounds - task.round + 1) * steps
    try:
        return budget.reserve(task.run, task.round, steps, left, CHANCE)
    except MedFLError as error:
        raise HospitalError(Failure.PRIVACY, str(error)) from error
