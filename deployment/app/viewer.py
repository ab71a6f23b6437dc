"""The open case: picture, controls, figures and downloads. Runs by itself when a control moves, without the
model."""

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st

from checkpoint import Checkpoint
from common import MedFLError
from deployment.app.case import Case
from deployment.app.cases import add_truth
from deployment.app.correcting import MASK_KINDS, Corrected, correct, corrected, said_of, show_components
from deployment.app.nifti import mirror, write_nifti
from deployment.app.pictures import (
    BLUE,
    ORANGE,
    VIEWS,
    base_picture,
    blended,
    comparison,
    fill,
    marked,
    outline,
    png,
    probability_picture,
)
from deployment.app.readout import (
    Prediction,
    component_rows,
    csv_text,
    flip_spread,
    mask_name,
    slice_rows,
    summary,
    zip_masks,
)
from deployment.app.report import draw_report
from deployment.app.sending import send_button
from deployment.app.uploads import take_uploads
from escaping import markdown, plain
from limits import is_size_mm
from scans.orientation import UNKNOWN
from transunet import TransUNet

if TYPE_CHECKING:  # radiology/ is optional
    from deployment.app.source import Source

OUTLINE, FILL, PROBABILITY, COMPARISON = "outline", "fill", "probability", "truth"
LEGENDS = {
    OUTLINE: "Solid orange line: what the model takes for tumour.",
    FILL: "Orange: what the model takes for tumour.",
    PROBABILITY: "Over the slice: dark blue is probability 0, yellow is 1.",
    COMPARISON: "Yellow: both. Orange, solid edge: the model alone. Blue, dashed edge: the truth alone.",
}
REPORTED = 5  # components, in a report of one page
SIDES = ("on the picture's right", "on the picture's left")


@st.fragment
def show_case(checkpoint: Checkpoint, card: list[tuple[str, str]]) -> None:
    """Everything below the case's name. Reads the case, its prediction and the doubts from the session."""
    state = st.session_state
    case, prediction = state.case, state.prediction
    for doubt in state.doubts:
        st.warning(markdown(doubt), icon=":material/visibility_off:")
    for note in case.notes:
        st.info(markdown(note), icon=":material/info:")
    left, right = st.columns([3, 2], gap="medium")
    with right:
        look = controls(case, checkpoint.threshold)
    done = corrected(case, prediction, look["threshold"])
    masks = done.mask
    rows = slice_rows(case, prediction, look["threshold"], masks)
    figures = summary(case, rows, masks)
    if "slice" not in state:
        state.slice = 1 + int(np.argmax([row["tumour_pixels"] for row in rows]))
    with left:
        number = choose_slice(rows, len(case.slices))
        show_picture(case, prediction, masks, number, look)
    with right:
        show_figures(case, rows[number - 1], figures, done)
        show_components(done)
        more(checkpoint, case, prediction)
        correct(checkpoint, dict(card)["SHA-256"], case, done, look["threshold"])
        downloads(
            case, prediction.probability, done, rows,
            texts_of_report(case, figures, done, look["threshold"]), number, card, state.doubts,
        )  # fmt: skip
        if case.dicom is not None:
            send_button(case.dicom, done, prediction.probability, look["threshold"], checkpoint)


def controls(case: Case, default_threshold: float) -> dict:
    """How the reader wants to see it: view, level, width, overlay, opacity, threshold."""
    state = st.session_state
    overlays = [OUTLINE, FILL, PROBABILITY] + ([COMPARISON] if case.truth is not None else [])
    view = st.segmented_control("Channel", list(VIEWS), default="FLAIR", required=True, wrap=True, key="view")
    overlay = st.segmented_control(
        "Overlay", overlays, default=OUTLINE, required=True, wrap=True, key="overlay"
    )
    st.button(
        "Show the overlay" if state.get("hidden") else "Hide the overlay",
        shortcut="o",
        key="toggle",
        on_click=lambda: state.update(hidden=not state.get("hidden")),
    )
    opacity = st.slider(
        "Opacity",
        0.0,
        1.0,
        0.5,
        0.05,
        key="opacity",
        disabled=overlay not in (FILL, PROBABILITY, COMPARISON),
        help="Of the overlays fill, probability and truth.",
    )
    threshold = st.slider(
        "Threshold of the probability",
        0.05,
        0.95,
        default_threshold,
        0.05,
        key="threshold",
        help="A pixel counts as tumour from this probability on. The model is not run again.",
    )
    with st.expander("Window and level"):
        level = st.slider("Level", 0, 255, 128, key="level")
        width = st.slider("Window width", 1, 510, 255, key="width")
    return {
        "view": view or "FLAIR",
        "overlay": overlay if overlay in overlays else OUTLINE,
        "hidden": bool(state.get("hidden")),
        "opacity": opacity,
        "threshold": threshold,
        "level": level,
        "width": width,
    }


def choose_slice(rows: list[dict], count: int) -> int:
    """The slice to show, from 1: a slider, and a chart of the tumour's area over the slices to jump by."""
    state = st.session_state
    if count == 1:
        return 1

    def jump() -> None:
        picked = state.areas.selection.get("picked")
        if picked:
            state.slice = int(picked[0]["slice"])

    number = st.slider("Slice", 1, count, key="slice")
    table = pd.DataFrame(
        {"slice": [row["slice"] for row in rows], "tumour pixels": [row["tumour_pixels"] for row in rows]}
    )
    bars = (
        alt.Chart(table)
        .mark_bar(cursor="pointer")
        .encode(
            x=alt.X("slice:O", axis=alt.Axis(labelAngle=0, labelOverlap=True), title=None),
            y=alt.Y("tumour pixels:Q", title="tumour px"),
            color=alt.condition(alt.datum.slice == number, alt.value(_css(ORANGE)), alt.value(_css(BLUE))),
            tooltip=["slice", "tumour pixels"],
        )
        .add_params(alt.selection_point(name="picked", fields=["slice"]))
        .properties(height=170)
    )
    st.altair_chart(
        bars,
        key="areas",
        on_select=jump,
        selection_mode="picked",
        alt=f"Tumour area in each of {count} slices, slice {number} marked; the slider above does the same",
    )
    return number


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def draw(case: Case, prediction: Prediction, masks: np.ndarray, index: int, look: dict) -> np.ndarray:
    """The picture of slice `index`, from 0, as the reader wants it, (h, w, 3) uint8."""
    picture = base_picture(case.volume[index], look["view"], look["level"], look["width"])
    if look["hidden"]:
        return picture
    if look["overlay"] == COMPARISON and case.truth is not None:
        return comparison(picture, masks[index], case.truth[index], look["opacity"])
    if look["overlay"] == PROBABILITY:
        return blended(picture, probability_picture(prediction.probability[index]), look["opacity"])
    if look["overlay"] == FILL:
        return fill(picture, masks[index], ORANGE, look["opacity"])
    return outline(picture, masks[index], ORANGE)


def show_picture(case: Case, prediction: Prediction, masks: np.ndarray, number: int, look: dict) -> None:
    """The picture of a slice, and under it what is to be seen."""
    found = int(np.count_nonzero(masks[number - 1]))
    said = f"{found:,} pixels marked as tumour" if found else "no tumour found"
    side = "the patient's left is on the right" if case.oriented else UNKNOWN
    picture = png(marked(draw(case, prediction, masks, number - 1, look), case.oriented))
    st.image(  # within the page, not at an address that would answer for longer than the case is open
        f"data:image/png;base64,{base64.b64encode(picture).decode()}",
        width="stretch",
        alt=f"{plain(case.name)}, slice {number} of {len(case.slices)}, {look['view']}: {said}; {side}",
    )
    legend = "Overlay hidden (press o)." if look["hidden"] else LEGENDS[look["overlay"]]
    st.caption(
        f"Slice {number} of {len(case.slices)} ({markdown(case.slices[number - 1])}): {said}. {legend}"
    )


def figure_texts(case: Case, figures: dict, done: Corrected) -> list[tuple[str, str]]:
    """The case's figures in words, with their units."""
    texts = [
        ("Tumour", f"{figures['tumour_pixels']:,} pixels"),
        ("Slices with tumour", f"{figures['slices_with_tumour']} of {figures['slices']}"),
        ("Share of the head", f"{100 * figures['foreground_share']:.1f} %"),
        ("Largest diameter", f"{figures['largest_diameter_px']:.1f} pixels"),
    ]
    if case.spacing:
        texts += [
            ("Volume", f"{figures['volume_cm3']:.1f} cm³"),
            ("Largest diameter in mm", f"{figures['largest_diameter_mm']:.1f} mm"),
        ]
    if done.interval:
        texts.append(("Volume, 80 %", "{:.1f} to {:.1f} cm³".format(*done.interval)))
    if done.parts and done.parts[0].diameters:
        longest, across = done.parts[0].diameters
        unit = "mm" if case.spacing else "pixels"
        texts.append(("Perpendicular diameters", f"{longest:.1f} × {across:.1f} {unit}"))
    if figures.get("dice") is not None:
        texts += [
            ("Dice with the truth", f"{figures['dice']:.3f}"),
            ("IoU with the truth", f"{figures['iou']:.3f}"),
        ]
    return texts


def texts_of_report(case: Case, figures: dict, done: Corrected, threshold: float) -> list[tuple[str, str]]:
    """The figures that the report shows: the case's, how the mask came to be, and its largest components."""
    texts = [*figure_texts(case, figures, done), ("Threshold", f"{threshold:.2f}")]
    if done.changed:
        texts.append(("Corrected", f"{done.changed:,} pixels of the proposal changed"))
    return texts + [("Component", said_of(part)) for part in done.parts[:REPORTED]]


def show_figures(case: Case, row: dict, figures: dict, done: Corrected) -> None:
    """The case's figures, then those of the slice that is shown."""
    st.header("All slices" if len(case.slices) > 1 else "This slice")
    st.table(pd.DataFrame(figure_texts(case, figures, done), columns=["figure", "value"]).set_index("figure"))
    said = [f"{row['tumour_pixels']:,} pixels", f"{row['largest_diameter_px']:.1f} pixels across"]
    if row["mean_probability"] is not None:
        said.append(f"mean probability inside of the mask {row['mean_probability']:.2f}")
    if row["flip_spread"] is not None:
        said.append(f"change of the probability when mirrored {row['flip_spread']:.2f}")
    if row.get("dice") is not None:
        said.append(f"Dice {row['dice']:.3f}, IoU {row['iou']:.3f}")
    st.caption(
        f"Slice {row['slice']}: {'; '.join(said)}. The probability is the network's own, not a measured "
        "chance of its being right."
    )


# Streamlit keeps a widget's callback longer than the widget. So these are no closures: they would keep a
# closed case alive.


def take_spacing() -> None:
    """The pixel size that was typed in becomes the case's, once both numbers are there."""
    state = st.session_state
    plane, between = state.pixel_size, state.slice_distance
    sizes = (plane, plane, between)
    state.case.spacing = sizes if all(map(is_size_mm, sizes)) else None


def take_side() -> None:
    """What the reader knows of the side becomes the case's; a mirrored case is segmented again."""
    state = st.session_state
    if state.side == SIDES[1]:
        mirror(state.case)
        state.pop("predicted_by")
    state.case.oriented = state.side in SIDES


def take_truth() -> None:
    """The masks that were uploaded become the case's truth, or the reason is kept why they can't."""
    state = st.session_state
    files = state[f"truth-{state.get('truths', 0)}"]
    state.truths = state.get("truths", 0) + 1  # a new uploader, which is empty
    try:
        state.case.truth = add_truth(state.case, take_uploads(files))
        state.truth_refusal = None
    except MedFLError as error:
        state.truth_refusal = f"{error}."


def read_mirrored(model: TransUNet) -> None:
    """A second pass, over the mirrored slices."""
    state = st.session_state
    state.prediction.spread = flip_spread(model, state.case, state.prediction.probability)


def more(checkpoint: Checkpoint, case: Case, prediction: Prediction) -> None:
    """What not every reader needs: pixel size, truth, a second reading of the mirrored slices."""
    state = st.session_state
    if case.nifti is not None and not case.oriented:
        st.radio("The patient's left is", SIDES, index=None, key="side", on_change=take_side)
    if not case.measured:
        with st.expander("Pixel size in mm"):
            st.caption("Volumes in cm³ and diameters in mm are shown where both are known.")
            st.number_input(
                "Side of a pixel (mm)", 0.0, 10.0, step=0.05, key="pixel_size", on_change=take_spacing
            )
            st.number_input(
                "Distance of slices (mm)", 0.0, 20.0, step=0.5, key="slice_distance", on_change=take_spacing
            )
    with st.expander("Compare with a truth", expanded=bool(state.get("truth_refusal"))):
        st.file_uploader(
            "Masks (NAME_mask.png, 0 and 255) of this case's slices",
            MASK_KINDS,
            accept_multiple_files=True,
            key=f"truth-{state.get('truths', 0)}",
            on_change=take_truth,
        )
        if state.get("truth_refusal"):
            st.error(markdown(state.truth_refusal))
    if prediction.spread is None:
        st.button(
            "Read the mirrored slices as well",
            key="mirror",
            on_click=read_mirrored,
            args=(checkpoint.model,),
            help="A second pass over all slices. Where the two readings differ, the model is not sure.",
        )


def downloads(
    case: Case,
    probability: np.ndarray,
    done: Corrected,
    rows: list[dict],
    figures: list[tuple[str, str]],
    number: int,
    card: list[tuple[str, str]],
    doubts: list[str],
) -> None:
    """What the reader can take along; each is made when it is asked for, in a thread that can't see the
    session."""
    masks, parts = done.mask, component_rows(done.parts)

    def report() -> bytes:
        index = int(np.argmax([row["tumour_pixels"] for row in rows]))
        slices = "one slice" if len(rows) == 1 else f"{len(rows)} slices"
        picture = outline(base_picture(case.volume[index], "FLAIR"), masks[index], ORANGE)
        likely = probability_picture(probability[index])
        pictures = [
            (f"slice {index + 1}, FLAIR, mask outlined", marked(picture, case.oriented)),
            ("probability, 0 dark blue to 1 yellow", marked(likely, case.oriented)),
        ]
        return draw_report(f"{case.name}, {slices}", pictures, rows, figures, card, doubts)

    offers: list[tuple[str, Callable[[], str | bytes], str, str]] = [
        (
            "Mask of this slice",
            lambda: png(masks[number - 1]),
            mask_name(case.slices[number - 1]),
            "image/png",
        ),
        (
            "All masks (ZIP)",
            lambda: zip_masks(case, masks, rows, parts),
            f"{case.name}_masks.zip",
            "application/zip",
        ),
        ("Figures (CSV)", lambda: csv_text(rows), f"{case.name}.csv", "text/csv"),
        ("Components (CSV)", lambda: csv_text(parts), f"{case.name}_components.csv", "text/csv"),
        ("Report (PNG)", report, f"{case.name}_report.png", "image/png"),
    ]
    if (scan := case.nifti) is not None:
        offers.append(
            ("Mask (NIfTI)", lambda: write_nifti(scan, masks), f"{case.name}_mask.nii.gz", "application/gzip")
        )
    if case.dicom is not None:
        offers += dicom_offers(case.dicom, case.name, masks)
    st.header("Download")
    with st.container(horizontal=True):
        for label, make, name, mime in offers:
            st.download_button(label, make, name, mime, key=f"get {label}", on_click="ignore")


def dicom_offers(
    source: "Source", name: str, masks: np.ndarray
) -> list[tuple[str, Callable[[], bytes], str, str]]:
    """What a case of DICOM gives besides: the mask over its source series,
    unless it is empty, and as NIfTI."""
    from deployment.app.dicom import (
        has_nifti,
        write_segmentation,
        write_series_nifti,
    )  # radiology/ is optional

    offers: list[tuple[str, Callable[[], bytes], str, str]] = []
    if masks.any() and source.refusal is None:  # an empty DICOM SEG can't be shown
        offers.append(
            (
                "Mask (DICOM SEG)",
                lambda: write_segmentation(source, masks),
                "medfl_mask.dcm",
                "application/dicom",
            )
        )
    if has_nifti():
        offers.append(
            (
                "Mask (NIfTI)",
                lambda: write_series_nifti(source, masks),
                f"{name}_mask.nii.gz",
                "application/gzip",
            )
        )
    return offers
