"""The models of this page: choosing one, loading it once for all readers, and returning memory after its
work."""

import contextlib
import ctypes
import gc
import threading
from pathlib import Path

import streamlit as st

from borders.escaping import markdown, web
from checkpoint import Checkpoint, load_checkpoint
from common import ROOT, MedFLError
from deployment.app.card import card_rows
from runs.models import find_checkpoints
from runs.usage import choose_device

MODELS = ROOT / "models"
ARENA_MAX = -8  # glibc's M_ARENA_MAX: threads share their heaps, so one can use what another frees


@st.cache_resource(max_entries=2, show_spinner="loading the model")
def load_model(path: Path, changed: float) -> tuple[Checkpoint, str]:
    """The checkpoint and its SHA-256. changed: the file's time, so that a new file is loaded again."""
    checkpoint = load_checkpoint(path, choose_device())
    # Streamlit collects garbage after each run of the page. The libraries' objects are not garbage; searching
    # them took 0.2 s a run
    gc.collect()
    gc.freeze()
    _of_glibc("mallopt", ARENA_MAX, 2)
    return checkpoint, checkpoint.sha256()


def named(path: Path) -> str:
    """The name of a checkpoint's file, with its folder unless that is `models`."""
    return path.name if path.parent == MODELS else f"{path.parent.name}/{path.name}"


def choose_model() -> tuple[Checkpoint, list[tuple[str, str]]]:
    """The model that is chosen in the sidebar; its card is shown. Ends the page with a sentence if no model
    can be used."""
    try:
        paths = find_checkpoints(MODELS)
    except MedFLError as error:
        stop(error)
    with st.sidebar:
        st.header("Model")
        path = st.selectbox(
            "Checkpoint", paths, format_func=named, help="The best by validation comes first."
        )
    try:
        checkpoint, sha256 = load_model(path, path.stat().st_mtime)
        card = card_rows(checkpoint, sha256, next(checkpoint.model.parameters()).device.type)
    except (MedFLError, OSError) as error:
        stop(error)
    with st.sidebar:
        st.html(
            '<dl class="card">'
            + "".join(f"<dt>{web(subject)}</dt><dd>{web(text)}</dd>" for subject, text in card)
            + "</dl>"
        )
    return checkpoint, card


def stop(error: Exception) -> None:
    """Show what is wrong and what to do, and nothing else."""
    st.error(markdown(f"No model: {error}"))
    st.stop()


def give_memory_back() -> None:
    """Return freed memory to the system a moment later, because it takes 0.1 to 0.2 s and a reader should not
    wait for it. Streamlit runs the page in new threads each time, and glibc keeps the memory that each of
    them freed: without this a session of 50 volumes grew by 600 MiB."""
    later = threading.Timer(1.0, _of_glibc, ("malloc_trim", 0))
    later.daemon = True
    later.start()


def _of_glibc(name: str, *numbers: int) -> None:
    """Call a function of the C library; nothing happens except on Linux with glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None)[name](*numbers)
