"""A second picture beside the open case: the mask of another model for it, or a scan of another date."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import streamlit as st

from borders.escaping import markdown
from checkpoint import Checkpoint
from common import MedFLError
from deployment.app.case import Case, as_trained, short
from deployment.app.cases import read_case
from deployment.app.models import MODELS, load_model, named
from deployment.app.readout import predict_case
from deployment.app.uploads import take_uploads
from inference import to_mask
from runs.models import find_checkpoints


@dataclass(frozen=True)
class Beside:
    """The picture beside the open case. mask: (S, H, W) uint8 0/255, of the case; label: a description."""

    case: Case
    mask: np.ndarray
    label: str


def choose_beside(checkpoint: Checkpoint) -> None:
    """The controls for a second picture. checkpoint: the model of the open case."""
    state = st.session_state
    with st.expander("Side by side", expanded=bool(state.get("beside") or state.get("beside_refusal"))):
        others: list[Path | None] = [path for path in find_checkpoints(MODELS) if path != checkpoint.path]
        if others:
            st.selectbox(
                "Another model",
                [None, *others],
                format_func=lambda path: "none" if path is None else named(path),
                key="other_model",
                on_change=take_other_model,
            )
        st.file_uploader(
            "Another date's scan of this patient",
            accept_multiple_files=True,
            key=f"date-{state.get('dates', 0)}",
            on_change=take_other_date,
            args=(checkpoint,),
        )
        st.caption(
            "Both pictures move together, at the same distance from the middle. The scans are not aligned; "
            "Shift and the wheel move only the right one."
        )
        if refusal := state.get("beside_refusal"):
            st.error(markdown(refusal))


# Streamlit keeps a widget's callback longer than the widget; a closure would therefore keep a closed case alive.


def take_other_model() -> None:
    """Show the mask of the chosen model beside the case."""
    state = st.session_state
    path: Path | None = state.other_model
    state.beside = state.beside_refusal = None
    if path is None:
        return
    try:
        other, _ = load_model(path, path.stat().st_mtime)
        state.beside = _segmented(other, state.case, f"Model {named(path)}")
    except (MedFLError, OSError) as error:
        state.beside_refusal = f"{error}."


def take_other_date(checkpoint: Checkpoint) -> None:
    """Show the uploaded scan, with this model's mask, beside the case, or keep the reason why it can't be
    shown."""
    state = st.session_state
    files = state[f"date-{state.get('dates', 0)}"]
    state.dates = state.get("dates", 0) + 1  # makes a new, empty uploader
    state.beside = state.beside_refusal = None
    try:
        case = read_case(take_uploads(files), checkpoint.task)
        state.beside = _segmented(checkpoint, case, f"Other date, {short(case.name)}")
    except MedFLError as error:
        state.beside_refusal = f"{error}."


def _segmented(checkpoint: Checkpoint, case: Case, label: str) -> Beside:
    probability = predict_case(checkpoint.model, as_trained(case, checkpoint.task.channels)).probability
    return Beside(case, to_mask(probability, checkpoint.threshold), label)
