"""One study of an archive, from its scans to the objects that are sent back, each only once."""

import pydicom

from checkpoint import Checkpoint
from radiology.dicomweb import DICOMweb
from radiology.prediction import Proposal, propose
from radiology.report import Author, make_objects
from radiology.retrieval import FoundSeries, FoundStudy, Retrieval


def predict_and_send(
    study: FoundStudy,
    listed: list[FoundSeries],
    archive: DICOMweb,
    retrieval: Retrieval,
    checkpoint: Checkpoint,
    structure_set: bool = False,
) -> tuple[Proposal, int]:
    """The model's proposal for a study, and how many objects were sent: those that the archive did not have.
    Fetched files are removed. Raises MedFLError if the study has no FLAIR, or the archive fails."""
    with retrieval.fetched(study, listed, with_mask=False) as fetched:
        proposal = propose(fetched, checkpoint, retrieval.rules)
        objects = make_objects(proposal, Author.of(checkpoint), structure_set)
        return proposal, send_new(archive, study.uid, objects)


def send_new(archive: DICOMweb, study: str, objects: list[pydicom.Dataset]) -> int:
    """Send the objects of a study that the archive does not have. Returns their number."""
    new = [o for o in objects if not archive.has(study, str(o.SeriesInstanceUID), str(o.SOPInstanceUID))]
    if new:
        archive.send(study, new)
    return len(new)
