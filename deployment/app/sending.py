"""A button that sends the mask on the page back to the archive that was named when the page was started:

    streamlit run deployment/app/app.py -- --dicomweb https://pacs.example/dicom-web --login login.toml

Without these options the page sends nothing anywhere. The archive is not contacted before the button is
pressed.
"""

import argparse
import hashlib
import sys
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from borders.escaping import markdown
from checkpoint import Checkpoint
from common import MedFLError, counted
from deployment.app.correcting import Corrected

if TYPE_CHECKING:  # radiology/ is optional
    from deployment.app.source import Source


def options() -> argparse.Namespace:
    """The archive that the page was started with; its address is None without one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dicomweb")
    parser.add_argument("--login")
    return parser.parse_known_args(sys.argv[1:])[0]


def send_button(
    source: "Source", done: Corrected, probability: np.ndarray, threshold: float, checkpoint: Checkpoint
) -> None:
    """The button and the result, if an archive was named. probability: (S, H, W) float32 of the case."""
    archive = options()
    if archive.dicomweb is None:
        return
    pressed = st.button(
        "Send to the archive",
        key="send",
        icon=":material/upload:",
        help="As DICOM SEG and structured report, marked as unverified research output.",
    )
    if not pressed:
        return
    try:
        with st.spinner("sending"):
            sent = send(archive, source, done, probability, threshold, checkpoint)
    except MedFLError as error:
        st.error(markdown(f"{error}."))
    else:
        st.success(f"{counted(sent, 'object')} sent." if sent else "The archive has it already.")


def send(
    archive: argparse.Namespace,
    source: "Source",
    done: Corrected,
    probability: np.ndarray,
    threshold: float,
    checkpoint: Checkpoint,
) -> int:
    """Send the mask of its source series, and a report. Returns the number of objects that the archive did
    not have. Raises MedFLError if the archive does not have the study, or does not accept them."""
    from deployment.app.dicom import as_proposal
    from radiology.delivery import send_new
    from radiology.dicomweb import DICOMweb
    from radiology.login import read_login
    from radiology.report import Author, make_objects

    there = DICOMweb(archive.dicomweb, read_login(archive.login))
    study = there.find_study(source.series.study_uid)
    way = f"page, threshold {threshold:.2f}"
    if done.changed:  # not the same object as the proposal
        way += f", corrected to {hashlib.sha256(done.mask.tobytes()).hexdigest()}"
    proposal = as_proposal(source, done.mask, way, None if done.by_hand else probability)
    return send_new(there, study.uid, make_objects(proposal, Author.of(checkpoint)))
