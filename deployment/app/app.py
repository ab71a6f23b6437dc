"""The page on which a clinician looks at a scan and the mask that a model proposes.

    streamlit run deployment/app/app.py

Uploaded files stay in the memory of this process while their page is open; they are not written to disk and
not sent anywhere. `streamlit run` finds `app` here, which is this page behind deployment/app/guard.py.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.starlette import App

from appearance.doubts import doubts
from borders.escaping import markdown
from checkpoint import Checkpoint
from common import MedFLError, counted
from deployment.app.card import NOTICE
from deployment.app.case import Case, as_trained
from deployment.app.cases import KINDS, read_case
from deployment.app.correcting import OF_A_CASE, as_drawn
from deployment.app.guard import Guard, forget_media
from deployment.app.models import choose_model, give_memory_back
from deployment.app.patients import choose_patient, data_folder, keep_how_sure, open_patient
from deployment.app.pictures import icon
from deployment.app.readout import predict_case
from deployment.app.uploads import take_uploads
from deployment.app.viewer import show_case
from tasks import LGG, Task

SAMPLES = Path(__file__).parent / "samples"
SAMPLE = "This is a phantom: painted, not measured."
PHANTOMS_ONLY = (
    "This model learned from phantoms only, which are painted: it knows nothing of real scans, and its "
    "outline of one means nothing."
)
STYLE = """
<style>
  .block-container {padding-top: 4rem; max-width: 78rem}
  :has(> .st-key-notice), .st-key-notice {position: sticky; top: 3.75rem; z-index: 90}
  .st-key-notice p {margin: 0; font-weight: 600; font-size: .9rem}
  dl.card {margin: 0 !important; padding: 0}
  .card dt {font-size: .75rem; opacity: .85; margin-top: .5rem}
  .card dd {font-size: .85rem; margin: 0 !important; overflow-wrap: anywhere}
  h1 {font-size: 1.7rem !important; padding: .5rem 0 !important}
  h2 {font-size: 1.25rem !important; padding: .4rem 0 !important}
  [data-testid=stCaptionContainer], [data-testid=stCaptionContainer] *, [data-testid=stWidgetLabel] * {
    color: inherit !important; opacity: 1 !important;
  }
  @media (max-width: 40rem) {.block-container {padding-left: 1rem; padding-right: 1rem}}
  @media (forced-colors: active) {  /* a switch is made of backgrounds, which would go */
    [data-testid=stCheckbox] label > :not([data-testid], input) {
      forced-color-adjust: none; outline: 1px solid ButtonText;
    }
  }
</style>
"""
# an open case: the picture fills the window, and the column beside it scrolls separately
READING = """
<style>
  .block-container {padding: .4rem .75rem 0; max-width: none}
  [data-testid=stHeader] {background: none; height: 2.5rem; min-height: 0; pointer-events: none}
  [data-testid=stHeader] :is(button, a) {pointer-events: auto}
  [data-testid=stMainBlockContainer] > [data-testid=stVerticalBlock] {gap: .25rem}
  h1 {position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); padding: 0 !important}
  h2 {font-size: 1.05rem !important; padding: 0 !important}
  :has(> .st-key-notice), .st-key-notice {top: 0}
  .st-key-notice {padding: 0 3rem}
  .st-key-notice [data-testid=stAlertContainer] {padding: .15rem .75rem}
  .st-key-open-case button {padding: .1rem .6rem; min-height: 1.9rem}
  .medfl-viewer, .st-key-side {height: calc(100dvh - 5.25rem); min-height: 24rem}
  .st-key-side {display: block; overflow-y: auto; padding: 0 .4rem .5rem .1rem}
  .st-key-side > * {margin-bottom: .5rem}
  :is(.st-key-notice, .st-key-side) [data-testid=stMarkdownContainer] {margin-bottom: 0}
  .st-key-side [data-testid=stAlertContainer] {padding: .5rem .75rem}
  .st-key-side [data-testid=stAlertContainer] p {margin: 0}
  @media (max-width: 40rem) {
    .medfl-viewer, .st-key-side {height: auto}
    .st-key-notice {padding: 0 2.5rem}
    .st-key-notice p {font-size: .75rem}
  }
</style>
"""
FOLDED = "<style>[data-testid=stColumn]:has(.st-key-side) {display: none}</style>"


def open_case(read: Callable[[], Case], sample: bool = False) -> None:
    """Show the case that `read` returns, or keep the reason why there is none. sample: whether it is one of
    the page's own phantoms."""
    state = st.session_state
    state.uploads = state.get("uploads", 0) + 1  # makes a new, empty uploader
    close_case()
    try:
        state.case = read()
        if sample:
            state.case.notes.append(SAMPLE)
    except MedFLError as error:
        state.refusal = f"{error}."


def fold() -> None:
    """Give the picture the whole window, or show the column beside it again."""
    st.session_state.folded = not st.session_state.unfolded


def ask_or_close() -> None:
    """Close the case; with unsaved corrections, ask first."""
    if "threshold" in st.session_state:  # it was shown
        as_drawn()
    if st.session_state.get("unsaved"):
        st.session_state.closing = True
    else:
        close_case()


def close_case() -> None:
    """Forget the case and everything derived from it."""
    for name in (
        "case",
        "prediction",
        "predicted_by",
        "doubts",
        "refusal",
        "truth_refusal",
        "slice",
        "pixel_size",
        "slice_distance",
        "side",
        "threshold",
        "folded",
        *OF_A_CASE,
    ):
        st.session_state.pop(name, None)
    forget_media()
    give_memory_back()


def what_to_open(task: Task) -> str:
    """The page's first words: the kind of scans that the model is for."""
    if task == LGG:
        return "Open a brain MRI: slices with pre-contrast, FLAIR and post-contrast as their three channels"
    channels = task.channels[0] if len(task.channels) == 1 else " and ".join(task.channels)
    return f"Open slices ({markdown(channels)}) as in {markdown(task.title)}"


def choose_case(checkpoint: Checkpoint, sha256: str) -> None:
    """The start of a visit: the hospital's prepared patients if there are any, sample cases and uploads."""
    number = st.session_state.get("uploads", 0)
    takes_dicom = (
        importlib.util.find_spec("radiology") is not None
    )  # not in a Space, so that no name is sent there
    task = checkpoint.task
    st.markdown(
        f"{what_to_open(task)}{', or the DICOM series of one study' if takes_dicom else ''}. The model outlines "
        f"what it takes for {'lower-grade glioma' if task == LGG else markdown(task.region)}. "
        f"Nothing is stored{' except a truth that you save' if data_folder() else ''}, and nothing leaves the "
        "computer that runs this page."
    )
    if refusal := st.session_state.get("refusal"):
        st.error(markdown(refusal))
    if patient := choose_patient(checkpoint, sha256):
        with st.spinner("reading the patient"):
            open_case(partial(open_patient, patient, task))
        st.rerun()
    samples = sorted(SAMPLES.glob("*.zip"))
    if samples:
        st.caption("Try a sample. These are phantoms: painted, not measured.")
        with st.container(horizontal=True):
            for path in samples:
                if st.button(
                    path.stem.replace("_", " ").capitalize(), key=path.stem, icon=":material/neurology:"
                ):
                    phantom = [(path.name, path.read_bytes())]
                    open_case(partial(read_case, phantom), sample=True)
                    st.rerun()
    # archives give DICOM files any name, mostly without a suffix
    kinds, also = (None, "DICOM, a ZIP of either") if takes_dicom else (KINDS, "a ZIP of them")
    files = st.file_uploader(
        f"Slices of one patient (TIFF, PNG, JPEG), {also}, or a NIfTI file",
        kinds,
        accept_multiple_files=True,
        key=f"files-{number}",
        help="The number at the end of each file's name gives the order. Masks (NAME_mask.png) may be among "
        "them, and a volume.json.",
    )
    folder = st.file_uploader(
        "Or a patient's folder", accept_multiple_files="directory", key=f"folder-{number}"
    )
    if chosen := files or folder:
        with st.spinner(
            "reading the files"
        ):  # DICOM series are aligned with each other, which takes some seconds
            taken = take_uploads(chosen)
            open_case(partial(read_case, taken, task))
        st.rerun()


def predict(checkpoint: Checkpoint, sha256: str) -> None:
    """Run the model over the case, once for each case and model."""
    state = st.session_state
    if state.get("predicted_by") == sha256:
        return
    state.case.numbers = checkpoint.task.numbers  # of this model, for masks that are uploaded later
    channels = checkpoint.task.channels
    case = as_trained(state.case, channels)
    state.doubts = doubts(case.fed, checkpoint.metadata["preprocessing"].get("training_images"), channels)
    data = checkpoint.metadata.get("data") or {}
    if data.get("name") == "phantoms" and SAMPLE not in case.notes:
        state.doubts.insert(0, PHANTOMS_ONLY)
    slices = counted(len(case.slices), "slice")
    progress = st.progress(0.0, f"segmenting {slices}")

    def told(done: int, others: int) -> None:
        wait = f"; {counted(others, 'other scan')} of other readers take turns with it" if others else ""
        progress.progress(min(1.0, done / len(case.slices)), f"segmenting {slices}: {done} done{wait}")

    for name in ("beside", "beside_refusal", "other_model"):
        state.pop(name, None)  # they belong to another model, or to the case before its sides were exchanged
    state.prediction = predict_case(checkpoint.model, case, told)
    progress.empty()
    state.predicted_by = sha256
    keep_how_sure(checkpoint, sha256, case, state.prediction)
    give_memory_back()


def main() -> None:
    state = st.session_state
    reading = "case" in state
    st.set_page_config(
        page_title="MedFL",
        page_icon=icon(),
        layout="wide",
        initial_sidebar_state="collapsed" if reading else "auto",  # the window is the picture's
    )
    st.html(STYLE + (READING if reading else "") + (FOLDED if state.get("folded") else ""))
    with st.container(key="notice"):
        st.warning(NOTICE, icon=":material/warning:")
    heading = st.empty()
    heading.title(f"MedFL: {markdown(state.get('region', LGG.region))} segmentation")
    checkpoint, card = choose_model()
    state.region = checkpoint.task.region
    heading.title(f"MedFL: {markdown(state.region)} segmentation")
    sha256 = dict(card)["SHA-256"]
    if "case" not in state:
        choose_case(checkpoint, sha256)
        return
    with st.container(key="open-case", horizontal=True, vertical_alignment="center"):  # guard.py asks for it
        st.header(markdown(state.case.name), anchor=False)
        st.toggle("Figures", not state.get("folded"), key="unfolded", on_change=fold)
        st.button("Close this case", on_click=ask_or_close, icon=":material/close:")
    if state.get("closing"):
        st.warning("The corrected mask was not saved.", icon=":material/warning:")
        with st.container(horizontal=True):
            st.button("Close without saving", key="lose", on_click=close_case)
            st.button("Stay", key="stay", on_click=state.pop, args=("closing",))
    predict(checkpoint, sha256)
    show_case(checkpoint, card)


if get_script_run_ctx(suppress_warning=True):
    main()
else:  # `streamlit run` has imported this file, to serve `app`
    app = App(__file__, middleware=[Middleware(Guard)])
