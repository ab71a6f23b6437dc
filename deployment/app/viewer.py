"""The open case: the viewer, and beside it figures, corrections and downloads. It runs separately when the
reader draws or moves a control, without the model."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import streamlit as st

from appearance.doubts import of_brain
from borders.escaping import markdown
from borders.limits import is_size_mm
from checkpoint import Checkpoint
from common import MedFLError
from deployment.app.beside import choose_beside
from deployment.app.case import Case, as_trained
from deployment.app.cases import add_truth
from deployment.app.correcting import MASK_KINDS, Corrected, correct, corrected, said_of, show_components
from deployment.app.nifti import mirror, write_nifti
from deployment.app.pictures import flair_picture, marked, outline, png, probability_picture
from deployment.app.readout import (
    Prediction,
    class_texts,
    component_rows,
    csv_text,
    flip_spread,
    mask_name,
    slice_rows,
    summary,
    zip_masks,
)
from deployment.app.report import draw_report
from deployment.app.scan_viewer import show_scan
from deployment.app.sending import send_button
from deployment.app.uploads import take_uploads
from inference import labelled
from tasks import Task

if TYPE_CHECKING:  # radiology/ is optional
    from deployment.app.source import Source

REPORTED = 5  # components in a report of one page
SIDES = ("on the picture's right", "on the picture's left")


@st.fragment
def show_case(checkpoint: Checkpoint, card: list[tuple[str, str]]) -> None:
    """Everything below the case's name. Reads the case, its prediction and the doubts from the session."""
    state = st.session_state
    case, prediction = state.case, state.prediction
    threshold: float = state.setdefault("threshold", checkpoint.threshold)
    done = corrected(case, prediction, threshold)
    picture, side = st.columns([3, 1], gap="small")
    with picture:
        show_scan(case, prediction, done.mask, done.proposal, threshold, state.get("beside"), checkpoint.task)
    with side, st.container(key="side"):
        show_side(checkpoint, card, case, prediction, done, threshold)


def show_side(
    checkpoint: Checkpoint,
    card: list[tuple[str, str]],
    case: Case,
    prediction: Prediction,
    done: Corrected,
    threshold: float,
) -> None:
    """The column beside the picture: doubts, figures, corrections, downloads."""
    state = st.session_state
    for doubt in state.doubts:
        st.warning(markdown(doubt), icon=":material/visibility_off:")
    for note in as_trained(case, checkpoint.task.channels).notes:
        st.info(markdown(note), icon=":material/info:")
    rows = slice_rows(case, prediction, threshold, done.mask)
    figures = summary(case, rows, done.mask)
    number = state.get("slice", 1 + int(np.argmax([row["tumour_pixels"] for row in rows])))
    of_classes = class_texts(case, done.mask, prediction.classes, checkpoint.labels)
    lines = figure_texts(case, figures, done, checkpoint.task, of_classes)
    show_figures(case, rows[number - 1], lines)
    show_components(done)
    more(checkpoint, case, prediction)
    correct(checkpoint, dict(card)["SHA-256"], case, done)
    downloads(
        case, prediction, done, rows,
        texts_of_report(lines, done, threshold), number, card, state.doubts, checkpoint,
    )  # fmt: skip
    if case.dicom is not None:
        send_button(case.dicom, done, prediction.probability, threshold, checkpoint)


def figure_texts(
    case: Case, figures: dict, done: Corrected, task: Task, of_classes: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The case's figures in words, with their units. of_classes: from `class_texts`."""
    region, pictured = task.region, "head" if of_brain(task.channels) else "image"
    texts = [
        (region[:1].upper() + region[1:], f"{figures['tumour_pixels']:,} pixels"),
        (f"Slices with {region}", f"{figures['slices_with_tumour']} of {figures['slices']}"),
        (f"Share of the {pictured}", f"{100 * figures['foreground_share']:.1f} %"),
        ("Largest diameter", f"{figures['largest_diameter_px']:.1f} pixels"),
    ]
    if case.spacing:
        texts.append(("Volume", f"{figures['volume_cm3']:.1f} cm³"))
    texts += of_classes
    if case.spacing:
        texts.append(("Largest diameter in mm", f"{figures['largest_diameter_mm']:.1f} mm"))
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


def texts_of_report(lines: list[tuple[str, str]], done: Corrected, threshold: float) -> list[tuple[str, str]]:
    """The figures in the report: the case's lines, how the mask was made, and its largest components."""
    texts = [*lines, ("Threshold", f"{threshold:.2f}")]
    if done.changed:
        texts.append(("Corrected", f"{done.changed:,} pixels of the proposal changed"))
    return texts + [("Component", said_of(part)) for part in done.parts[:REPORTED]]


def show_figures(case: Case, row: dict, lines: list[tuple[str, str]]) -> None:
    """The case's figures, then those of the slice that is shown."""
    st.header("All slices" if len(case.slices) > 1 else "This slice")
    names, values = zip(*lines)
    st.table(pd.DataFrame({"value": values}, index=pd.Index(map(markdown, names), name="figure")))
    said = [f"{row['tumour_pixels']:,} pixels", f"{row['largest_diameter_px']:.1f} pixels across"]
    if row["mean_probability"] is not None:
        said.append(f"mean probability inside the mask {row['mean_probability']:.2f}")
    if row["flip_spread"] is not None:
        said.append(f"change of the probability when mirrored {row['flip_spread']:.2f}")
    if row.get("dice") is not None:
        said.append(f"Dice {row['dice']:.3f}, IoU {row['iou']:.3f}")
    st.caption(
        f"Slice {row['slice']} ({markdown(row['file'])}): {'; '.join(said)}. The probability is the "
        "network's own, not a measured chance that it is right."
    )


# Streamlit keeps a widget's callback longer than the widget. So these are not closures, which would keep a
# closed case alive.


def take_spacing() -> None:
    """The entered pixel size becomes the case's as soon as both numbers are given."""
    state = st.session_state
    plane, between = state.pixel_size, state.slice_distance
    sizes = (plane, plane, between)
    state.case.spacing = sizes if all(map(is_size_mm, sizes)) else None


def take_side() -> None:
    """The reader's choice of side becomes the case's; a mirrored case is segmented again."""
    state = st.session_state
    if state.side == SIDES[1]:
        mirror(state.case)
        state.pop("predicted_by")
    state.case.oriented = state.side in SIDES


def take_truth() -> None:
    """Make the uploaded masks the case's truth, or keep the reason why they can't be used."""
    state = st.session_state
    files = state[f"truth-{state.get('truths', 0)}"]
    state.truths = state.get("truths", 0) + 1  # makes a new, empty uploader
    try:
        state.case.truth = add_truth(state.case, take_uploads(files))
        state.truth_refusal = None
    except MedFLError as error:
        state.truth_refusal = f"{error}."


def read_mirrored(checkpoint: Checkpoint) -> None:
    """A second pass, over the mirrored slices."""
    state = st.session_state
    case = as_trained(state.case, checkpoint.task.channels)
    state.prediction.spread = flip_spread(checkpoint.model, case, state.prediction.probability)


def more(checkpoint: Checkpoint, case: Case, prediction: Prediction) -> None:
    """Rarely needed controls: pixel size, truth, a second picture, a second reading of the mirrored
    slices."""
    state = st.session_state
    if case.nifti is not None and not case.oriented:
        st.radio("The patient's left is", SIDES, index=None, key="side", on_change=take_side)
    if not case.measured:
        with st.expander("Pixel size in mm"):
            st.caption("Volumes in cm³ and diameters in mm are shown if both are known.")
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
    choose_beside(checkpoint)
    if prediction.spread is None:
        st.button(
            "Read the mirrored slices as well",
            key="mirror",
            on_click=read_mirrored,
            args=(checkpoint,),
            help="A second pass over all slices. Where the two readings differ, the model is not sure.",
        )


def downloads(
    case: Case,
    prediction: Prediction,
    done: Corrected,
    rows: list[dict],
    figures: list[tuple[str, str]],
    number: int,
    card: list[tuple[str, str]],
    doubts: list[str],
    checkpoint: Checkpoint,
) -> None:
    """The downloads; each is made when it is requested, in a thread that can't see the session."""
    masks, parts, task = done.mask, component_rows(done.parts), checkpoint.task
    classes = prediction.classes
    written = masks if classes is None else labelled(masks, classes, checkpoint.labels.values())

    def report() -> bytes:
        index = int(np.argmax([row["tumour_pixels"] for row in rows]))
        slices = "one slice" if len(rows) == 1 else f"{len(rows)} slices"
        picture = outline(flair_picture(case.volume[index]), masks[index])
        likely = probability_picture(prediction.probability[index])
        pictures = [
            (
                f"slice {index + 1}, {task.channels[len(task.channels) // 2]}, mask outlined",
                marked(picture, case.oriented),
            ),
            ("probability, 0 dark blue to 1 yellow", marked(likely, case.oriented)),
        ]
        return draw_report(f"{case.name}, {slices}", pictures, rows, figures, card, doubts, task.region)

    offers: list[tuple[str, Callable[[], str | bytes], str, str]] = [
        (
            "Mask of this slice",
            lambda: png(written[number - 1]),
            mask_name(case.slices[number - 1]),
            "image/png",
        ),
        (
            "All masks (ZIP)",
            lambda: zip_masks(case, written, rows, parts),
            f"{case.name}_masks.zip",
            "application/zip",
        ),
        ("Figures (CSV)", lambda: csv_text(rows), f"{case.name}.csv", "text/csv"),
        ("Components (CSV)", lambda: csv_text(parts), f"{case.name}_components.csv", "text/csv"),
        ("Report (PNG)", report, f"{case.name}_report.png", "image/png"),
    ]
    if (scan := case.nifti) is not None:
        offers.append(
            (
                "Mask (NIfTI)",
                lambda: write_nifti(scan, written, classes is not None),
                f"{case.name}_mask.nii.gz",
                "application/gzip",
            )
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
    """The additional downloads of a DICOM case: the mask for its source series, unless it is empty, and as
    NIfTI."""
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
