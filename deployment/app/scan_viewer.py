"""The viewer of deployment/viewer as a part of this page: voxels go to the browser, and the reader's drawing
comes back.

Voxels travel in the page's websocket, so nothing of a case has an address. A message to the browser is the length of
its head (4 bytes, little endian), the head as JSON, and the parts that the head names with their lengths:

- pixels: (S, H, W, 3) uint8; codes: (S, H, W) uint8, the probability as from `codes_of`. They are sent once for
  each case and model, and again if the browser reports that it lacks them.
- truth, mask: (S, H, W) uint8, or nothing if there is no truth, or if the mask is the proposal. They are sent
  when they differ from those that the browser shows.
- beside_pixels, beside_mask: of the picture beside the case, (s, h, w, 3) and (s, h, w) uint8, if there is one.
  They are sent with the case, and when that picture changes.

The browser reports three events: `wanted`, it lacks parts; `slice`, another slice is shown, counted from 0;
`drawn`, the reader moved the threshold or drew: {"voxels": the number of voxels drawn on, "threshold":
number, "mask": base64 of a gzip of the mask's bits, or null if it is the proposal}.
"""

import base64
import binascii
import json
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st
from streamlit.components.v2.get_bidi_component_manager import get_bidi_component_manager
from streamlit.components.v2.manifest_scanner import ComponentConfig, ComponentManifest

from common import ROOT, MedFLError, __version__
from deployment.app.beside import Beside
from deployment.app.case import Case
from deployment.app.readout import Prediction
from inference import to_mask
from tasks import LGG, Task

FOLDER = "deployment/viewer/dist"  # the built files
KEY = "scan"  # the component's key in the session's state
CODES = 200  # steps of the probability; the viewer's thresholds are whole numbers of steps
LEAST, MOST = 0.05, 0.95  # thresholds


@dataclass
class Shown:
    """The browser's content, and the version numbers that the message gives to the voxels, to truth and mask,
    and to the picture beside the case."""

    prediction: Prediction | None = None
    truth: np.ndarray | None = None
    mask: np.ndarray | None = None
    beside: Beside | None = None
    voxels: int = 0
    masks: int = 0
    besides: int = 0


def codes_of(probability: np.ndarray) -> np.ndarray:
    """Probabilities of any shape as uint8: the largest k with k / 200 not above the probability, so that every
    threshold of a whole number of steps gives the same mask of both."""
    edges = (np.arange(CODES + 1) / CODES).astype(np.float32)
    return (np.searchsorted(edges, probability, side="right") - 1).astype(np.uint8)


def mask_of(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The mask (S, H, W) uint8 0/255 that the browser sent. Raises MedFLError for anything else."""
    voxels = math.prod(shape)
    size = math.ceil(voxels / 8)
    try:
        bits = zlib.decompressobj(zlib.MAX_WBITS + 16).decompress(
            base64.b64decode(text, validate=True), size + 1
        )
    except (binascii.Error, zlib.error, TypeError, ValueError) as error:
        raise MedFLError("the drawn mask did not arrive; draw once more") from error
    if len(bits) != size:
        raise MedFLError("the drawn mask does not belong to this case; draw once more")
    return 255 * np.unpackbits(np.frombuffer(bits, np.uint8), count=voxels).reshape(shape)


def show_scan(
    case: Case,
    prediction: Prediction,
    mask: np.ndarray,
    proposal: np.ndarray,
    threshold: float,
    beside: Beside | None,
    task: Task,
) -> None:
    """The viewer with a case.

    mask: the mask that the reader accepts; proposal: the model's at the threshold, both (S, H, W) uint8
    0/255. beside: a second picture; task: the model's, which names the channels. The reader's drawing becomes
    `st.session_state.edited`.
    """
    state = st.session_state
    shown: Shown = state.setdefault("shown", Shown())
    wanted = state.pop("wanted", False)
    voxels = wanted or shown.prediction is not prediction
    masks = (
        voxels or shown.truth is not case.truth or shown.mask is None or not np.array_equal(shown.mask, mask)
    )
    state.messages = state.get("messages", 0) + 1
    if voxels:
        shown.prediction, shown.voxels = prediction, state.messages
    if masks:
        shown.truth, shown.masks = case.truth, state.messages
    shown.mask = mask
    parts: dict[str, np.ndarray] = {}
    if voxels:
        parts |= {"pixels": case.volume, "codes": codes_of(prediction.probability)}
    if masks:
        parts["truth"] = np.empty(0, np.uint8) if case.truth is None else case.truth
        parts["mask"] = np.empty(0, np.uint8) if np.array_equal(mask, proposal) else mask
    if voxels or shown.beside is not beside:
        shown.beside, shown.besides = beside, state.messages
        if beside:
            parts |= {"beside_pixels": beside.case.volume, "beside_mask": beside.mask}
    count, height, width = mask.shape
    head = {
        "voxels": shown.voxels, "masks": shown.masks, "count": count, "height": height, "width": width,
        "spacing": case.spacing, "oriented": case.oriented, "together": case.is_volume, "threshold": threshold,
        "beside": beside and _told(beside, shown.besides),
        "channels": None if task == LGG else task.channels,
        "parts": [(name, part.size) for name, part in parts.items()],
    }  # fmt: skip
    _mount(head, parts)


def _told(beside: Beside, number: int) -> dict[str, Any]:
    count, height, width = beside.mask.shape
    return {
        "number": number, "count": count, "height": height, "width": width, "spacing": beside.case.spacing,
        "oriented": beside.case.oriented, "label": beside.label,
    }  # fmt: skip


def _mount(head: dict[str, Any], parts: dict[str, np.ndarray]) -> None:
    said = json.dumps(head).encode()
    blobs = [np.ascontiguousarray(part, np.uint8).data.cast("B") for part in parts.values() if part.size]
    _component()(
        key=KEY,
        data=b"".join([len(said).to_bytes(4, "little"), said, *blobs]),
        on_wanted_change=_take_wanted,
        on_slice_change=_take_slice,
        on_drawn_change=take_drawing,
    )


def _component() -> Any:
    """The component, whose files come from the page's own address. Streamlit only searches installed
    packages, but this page also runs from a folder (so this call is not public API)."""
    manager = get_bidi_component_manager()
    if manager.get_component_asset_root("medfl.viewer") is None:
        manager.register_from_manifest(
            ComponentManifest("medfl", __version__, [ComponentConfig("viewer", FOLDER)]), ROOT
        )
    return st.components.v2.component("medfl.viewer", js="viewer.js", css="viewer.css", isolate_styles=False)


# Streamlit keeps a widget's callback longer than the widget; a closure would therefore keep a closed case alive.


def _take_wanted() -> None:
    st.session_state.wanted = True


def _take_slice() -> None:
    state = st.session_state
    if "case" in state and isinstance(number := state[KEY].slice, int):
        state.slice = 1 + min(max(number, 0), len(state.case.slices) - 1)


def take_drawing() -> None:
    """Take over the reader's mask and threshold for the case, or keep the reason why they can't be used.
    Closing or saving a case also calls this, because the last stroke may arrive together with that press."""
    state = st.session_state
    drawn = state[KEY].drawn if KEY in state else None
    if drawn is None or "prediction" not in state:  # or closed in the meantime
        return
    probability = state.prediction.probability
    try:
        if drawn["voxels"] != state.shown.voxels:  # from another case, or from another model's proposal
            return
        threshold = float(drawn["threshold"])
        edited = None if drawn["mask"] is None else mask_of(drawn["mask"], probability.shape)
    except (MedFLError, KeyError, TypeError, ValueError) as error:
        state.edit_refusal = (
            f"{error}." if isinstance(error, MedFLError) else "The drawn mask did not arrive."
        )
        return
    state.threshold = min(max(threshold, LEAST), MOST) if math.isfinite(threshold) else state.threshold
    state.shown.mask = to_mask(probability, state.threshold) if edited is None else edited
    state.edit_refusal = None
    if edited is None:
        state.pop("edited", None)
    else:
        state.edited = edited
    state.pop("measured_of", None)  # the browser shows all components as on
