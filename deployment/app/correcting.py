"""From the model's proposal to the mask that a reader accepts: components on and off, a corrected mask, and
*Save as truth* for a hospital's prepared patient.

The mask that the reader drew or uploaded is `st.session_state.edited`, (S, H, W) uint8 0/255, or absent; the
proposal is kept beside it.
"""

from dataclasses import dataclass

import numpy as np
import streamlit as st

from borders.escaping import markdown
from checkpoint import Checkpoint
from common import MedFLError, counted
from deployment.app.case import Case
from deployment.app.cases import add_truth
from deployment.app.patients import DATA
from deployment.app.readout import Prediction
from deployment.app.scan_viewer import take_drawing
from deployment.app.uploads import take_uploads
from evaluation.components import INTERVAL, Component, Components, find_components, volume_interval
from inference import to_mask

MASK_KINDS = ["tif", "tiff", "png", "nii", "gz", "nrrd", "dcm"]
OF_A_CASE = (
    "edited", "edits", "measured_of", "components_of", "saved", "save_refusal", "edit_refusal", "version", "no_tumour",
    "kept", "unsaved", "closing", "shown", "wanted", "beside", "beside_refusal", "other_model", "dates",
)  # fmt: skip


@dataclass(frozen=True)
class Corrected:
    """The mask that the reader accepts. proposal: the model's mask at the threshold; mask: the proposal or
    the reader's own mask, without the components that are off, both (S, H, W) uint8 0/255. found: the
    components, None if the slices form no volume; on: the numbers of those that count. by_hand: whether the
    reader drew or uploaded the mask."""

    proposal: np.ndarray
    mask: np.ndarray
    found: Components | None
    on: frozenset[int]
    by_hand: bool

    @property
    def parts(self) -> list[Component]:
        """The components that count."""
        return [part for part in self.found.parts if part.number in self.on] if self.found else []

    @property
    def interval(self) -> tuple[float, float] | None:
        """The bounds of the volume in cm³, as in `evaluation.components.INTERVAL`, if they are known."""
        voxels = volume_interval(self.found, set(self.on)) if self.found else None
        size = next((part.voxel_cm3 for part in self.found.parts), None) if self.found else None
        return (voxels[0] * size, voxels[1] * size) if voxels and size else None

    @property
    def changed(self) -> int:
        """The number of pixels that differ from the proposal."""
        return int(np.count_nonzero(self.mask != self.proposal))


def corrected(case: Case, prediction: Prediction, threshold: float) -> Corrected:
    """The mask after the reader's switches and edits. Components are determined once for each proposal or
    edit; at first all are on."""
    state = st.session_state
    proposal = to_mask(prediction.probability, threshold)
    edited: np.ndarray | None = state.get("edited")
    base = proposal if edited is None else edited
    if not (case.is_volume or len(case.slices) == 1):
        return _noted(Corrected(proposal, base, None, frozenset(), edited is not None))
    source = (edited, prediction, threshold if edited is None else None, case.spacing)
    former = state.get("measured_of", (None,) * 4)
    if former[0] is not edited or former[1] is not prediction or former[2:] != source[2:]:
        probability = prediction.probability if edited is None else None
        state.components_of = find_components(base, case.spacing, probability)
        state.measured_of, state.edits = source, state.get("edits", 0) + 1
    found: Components = state.components_of
    on = frozenset(part.number for part in found.parts if state.get(_key(part), True))
    mask = base
    if len(on) < len(found.parts):
        mask = np.where(np.isin(found.labels, list(on)), np.uint8(255), np.uint8(0))
    return _noted(Corrected(proposal, mask, found, on, edited is not None))


def as_drawn() -> Corrected:
    """The open case's mask with the reader's last stroke."""
    state = st.session_state
    take_drawing()
    return corrected(state.case, state.prediction, state.threshold)


def _noted(done: Corrected) -> Corrected:
    """The same mask, and whether it would be lost with the case."""
    kept: np.ndarray | None = st.session_state.get("kept")
    st.session_state.unsaved = done.changed > 0 and (kept is None or not np.array_equal(kept, done.mask))
    return done


def _key(part: Component) -> str:
    return f"component-{st.session_state.get('edits', 0)}-{part.number}"


def said_of(part: Component) -> str:
    """A component in words."""
    sizes = part.cm3(part.voxels), part.cm3(part.low), part.cm3(part.high)
    texts = [None if size is None else f"{size:.2f} cm³" for size in sizes]
    if sizes[0] is None:
        texts = [None if n is None else f"{n:,} voxels" for n in (part.voxels, part.low, part.high)]
    words = [f"{texts[0]}" + (f" ({texts[1]} to {texts[2]})" if texts[1] else "")]
    first, last = part.slices
    words.append(f"slice {first}" if first == last else f"slices {first} to {last}")
    if part.diameters is not None:
        unit = "pixels" if part.voxel_cm3 is None else "mm"
        longest, across = part.diameters
        words.append(f"{longest:.1f} × {across:.1f} {unit} in slice {part.diameter_slice}")
    else:
        words.append(f"{part.pieces} small ones together")
    return f"{part.number}: {', '.join(words)}"


def show_components(done: Corrected) -> None:
    """A switch for each component."""
    if done.found is None or not done.found.parts:
        return
    with st.expander(f"Components ({len(done.on)} of {len(done.found.parts)} count)", key="components"):
        for part in done.found.parts:
            st.checkbox(said_of(part), True, key=_key(part))
        told = "" if done.by_hand else f" In brackets: {INTERVAL}."
        st.caption(
            "The two largest perpendicular diameters in the plane, as in RANO, between pixels' "
            f"centres.{told}"
        )


def take_edit() -> None:
    """Make the uploaded masks the corrected mask, or keep the reason why they can't be used."""
    state = st.session_state
    files = state[f"edit-{state.get('edit_uploads', 0)}"]
    state.edit_uploads = state.get("edit_uploads", 0) + 1  # makes a new, empty uploader
    try:
        state.edited = add_truth(state.case, take_uploads(files))
        state.edit_refusal = None
    except MedFLError as error:
        state.edit_refusal = f"{error}."


def back_to_the_proposal() -> None:
    """Forget what the reader drew or uploaded."""
    st.session_state.pop("edited", None)


def correct(checkpoint: Checkpoint, sha256: str, case: Case, done: Corrected) -> None:
    """The controls to upload a corrected mask, and to save it if the case is a hospital's prepared
    patient."""
    state = st.session_state
    with st.expander("Correct", expanded=case.prepared is not None or bool(state.get("edit_refusal"))):
        st.caption(f"{counted(done.changed, 'pixel')} of the proposal changed.")
        st.file_uploader(
            "A corrected mask of this case's slices (NAME_mask.png, 0 and 255)",
            MASK_KINDS,
            accept_multiple_files=True,
            key=f"edit-{state.get('edit_uploads', 0)}",
            on_change=take_edit,
        )
        if state.get("edit_refusal"):
            st.error(markdown(state.edit_refusal))
        if done.by_hand:
            st.button("Back to the model's proposal", key="proposal", on_click=back_to_the_proposal)
        if case.prepared is not None:
            _offer_to_save(checkpoint, sha256, done)
        else:
            st.caption(
                f"Download the masks to keep them; a page that is started with {DATA} can save them for "
                "training."
            )


def _offer_to_save(checkpoint: Checkpoint, sha256: str, done: Corrected) -> None:
    """The reader's name, the button, and the result."""
    state = st.session_state
    st.text_input(
        "Your name, for the log",
        value=state.get("reader", ""),
        max_chars=100,
        key="who",
        on_change=_keep_reader,
    )
    empty = not done.mask.any()
    agreed = not empty or st.checkbox(
        f"There is no {markdown(checkpoint.task.region)} in this patient", key="no_tumour"
    )
    st.button(
        "Save as truth",
        key="save",
        icon=":material/save:",
        disabled=not agreed,
        on_click=_save,
        args=(checkpoint.path.name, sha256),
        help="Saves the mask where the hospital's training finds it. A former truth is kept beside it.",
    )
    if state.get("save_refusal"):
        st.error(markdown(state.save_refusal))
    if state.get("saved"):
        st.success(markdown(state.saved))


def _keep_reader() -> None:
    """Keep the name: a field's content is lost when the field is removed, which can happen while a stroke is
    processed."""
    st.session_state.reader = st.session_state.who


def _save(model: str, sha256: str) -> None:
    """Save the mask as the open patient's truth, and keep a sentence about the result."""
    from radiology.truths import ChangedMeanwhile, correction, in_words, save_truth, version_of

    state = st.session_state
    case: Case = state.case
    opened = case.prepared
    assert opened is not None
    done = as_drawn()
    state.reader, state.saved, state.save_refusal = state.get("who") or state.get("reader", ""), None, None
    if not done.mask.any() and not state.get("no_tumour"):
        state.save_refusal = "The mask is empty now; tick the line above the button, and save again."
        return
    try:
        there, saved = save_truth(
            opened.patient,
            done.mask,
            done.proposal,
            correction(state.reader, model, sha256, state.threshold),
            opened.slices,
            state.get("version", opened.version),
        )
    except MedFLError as error:
        if isinstance(error, ChangedMeanwhile):
            state.version = error.version
        state.save_refusal = f"{error}."
    else:
        state.version = version_of(there)
        case.truth = state.kept = done.mask
        where = f"{there.part}/{there.name}" if there.part else there.name
        state.saved = f"Saved in {where}: {in_words(saved)}."
