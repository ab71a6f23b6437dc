"""The list of a hospital's prepared patients, in the folder that MEDFL_DATA names: those without masks first,
starting with those that the model is least sure of. Without that variable the page has no such list."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from borders.escaping import markdown, plain
from borders.limits import MAX_UNPACKED
from checkpoint import Checkpoint
from common import MedFLError, counted
from deployment.app.case import Case, Opened, as_trained
from deployment.app.cases import read_case
from deployment.app.readout import Prediction, predict_case
from inference import to_mask
from scans.spacing import NAME
from tasks import Task

if TYPE_CHECKING:  # radiology/ is optional
    from radiology.prepared import PreparedPatient

DATA = "MEDFL_DATA"
AT_ONCE = 20  # patients that one press of the button measures


def data_folder() -> Path | None:
    """The folder of prepared patients, if one is named."""
    named = os.environ.get(DATA)
    return Path(named) if named else None


def open_patient(patient: "PreparedPatient", task: Task) -> Case:
    """The case of a prepared patient, with its truth if it has one; task: the model's. Raises MedFLError if this page
    can't hold or read it."""
    from radiology.prepared import content_of
    from radiology.truths import version_of

    about = patient.folder / NAME
    files = [*patient.images, *patient.masks, *([about] if about.exists() else [])]
    try:
        if sum(file.stat().st_size for file in files) > MAX_UNPACKED:
            raise MedFLError(
                f"{patient.name} has more than {MAX_UNPACKED >> 20} MB, which this page can't hold"
            )
        opened = Opened(patient, content_of(patient.images), version_of(patient))
        case = read_case([(f"{patient.name}/{file.name}", file.read_bytes()) for file in files], task)
    except OSError as error:
        raise MedFLError(f"{patient.name} can't be read ({error.strerror}); open it again") from error
    case.name, case.prepared = patient.name, opened
    return case


def keep_how_sure(checkpoint: Checkpoint, sha256: str, case: Case, prediction: Prediction) -> None:
    """Store how sure the model is of an open prepared patient, because its prediction exists already. A
    folder that can't be written is reported when a truth is saved."""
    if case.prepared is not None:
        from radiology.sureness import keep_sureness

        mask = to_mask(prediction.probability, checkpoint.threshold)
        try:
            keep_sureness(case.prepared.patient, sha256, prediction.probability, mask)
        except MedFLError as error:
            case.notes.append(f"The order of the patients is not stored: {error}.")


def choose_patient(checkpoint: Checkpoint, sha256: str) -> "PreparedPatient | None":
    """Show the list; the patient that was chosen, once its button is pressed."""
    folder = data_folder()
    if folder is None:
        return None
    st.header("Prepared patients", anchor=False)
    try:
        from radiology.prepared import find_prepared
        from radiology.sureness import known_sureness, least_sure_first
    except ModuleNotFoundError:
        st.error(f"{DATA} is set, but this page is published without the code that reads prepared patients.")
        return None
    try:
        patients = find_prepared(folder)
        known = known_sureness(folder, sha256, patients)
    except (MedFLError, OSError) as error:
        st.error(markdown(f"{error}."))
        return None
    if not patients:
        st.caption(markdown(f"There is no patient in {folder}."))
        return None
    ordered = least_sure_first(patients, known)
    without = sum(not patient.masks for patient in patients)
    st.caption(
        f"{counted(without, 'patient')} without masks, {len(patients) - without} with. Those without come "
        "first, starting with those that the model is least sure of. Expected Dice is the model's own "
        "opinion of its mask."
    )
    names = {
        patient.name: f"{plain(patient.name)}: {'has masks' if patient.masks else 'no mask yet'}, "
        + (
            f"expected Dice {known[patient.name]:.2f}"
            if patient.name in known
            else "not yet shown to the model"
        )
        for patient in ordered
    }
    chosen = st.selectbox("Patient", list(names), format_func=lambda name: names.get(name, ""), key="patient")
    waiting = [patient for patient in ordered if patient.name not in known]
    with st.container(horizontal=True):
        opens = st.button("Open the patient", key="open-patient", icon=":material/folder_open:")
        if waiting and st.button(
            f"Show the next {min(AT_ONCE, len(waiting))} to the model",
            key="measure",
            help="To find those that it is least sure of. The results are stored beside the patients, for "
            "each model.",
        ):
            _measure(checkpoint, sha256, waiting[:AT_ONCE])
            st.rerun()
    return next((patient for patient in ordered if opens and patient.name == chosen), None)


def _measure(checkpoint: Checkpoint, sha256: str, patients: "list[PreparedPatient]") -> None:
    """Show patients to the model, one after the other; unreadable ones are reported and left out."""
    progress = st.progress(0.0, "reading")
    for number, patient in enumerate(patients):
        progress.progress(number / len(patients), f"patient {number + 1} of {len(patients)}")
        try:
            case = as_trained(open_patient(patient, checkpoint.task), checkpoint.task.channels)
        except MedFLError as error:
            st.session_state.refusal = f"{error}."
            continue
        keep_how_sure(checkpoint, sha256, case, predict_case(checkpoint.model, case))
    progress.empty()
