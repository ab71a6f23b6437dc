"""The objects that are sent to an archive: a proposal as DICOM SEG and its measurements as a structured report (TID
1500), both marked as unverified research output, and optionally the outline as RTSTRUCT for radiotherapy.

UIDs are derived from model and source files, so the same proposal is always the same object.
"""

import hashlib
import warnings
from dataclasses import dataclass
from typing import Any

import highdicom
import pydicom
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    ReferencedSegment,
    SourceSeriesForSegmentation,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom.sr.codedict import codes
from pydicom.uid import UID, generate_uid

from checkpoint import Checkpoint
from common import MedFLError, __version__
from evaluation.components import Component
from radiology.bounds import File
from radiology.contours import make_structure_set
from radiology.prediction import Proposal
from radiology.segmentation import EXPECTED, MANUFACTURER, SERIES_NUMBER, make_segmentation
from radiology.series import Series

NOTICE = "Unverified research output, not for diagnosis"
SCHEME = "99MEDFL"  # for concepts that have no code in DICOM
REPORT_NUMBER, STRUCTURE_NUMBER = SERIES_NUMBER + 1, SERIES_NUMBER + 2


@dataclass(frozen=True)
class Author:
    """The model that made a proposal. model: its file and architecture; sha256: of its file."""

    model: str
    sha256: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Author":
        """The author for a checkpoint."""
        return cls(f"{checkpoint.path.name} (TransUNet {checkpoint.model.name})", checkpoint.sha256())


def make_objects(proposal: Proposal, author: Author, structure_set: bool = False) -> list[pydicom.Dataset]:
    """A proposal as DICOM objects: a SEG, a report that refers to it, and an RTSTRUCT if wanted. An empty proposal
    gives only a report that says so. Raises MedFLError for a series that lacks required tags."""
    digest = _digest(proposal, author)
    objects: list[pydicom.Dataset] = []
    if proposal.mask.any():
        objects.append(_segmentation(proposal, author, digest))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about source tags that deviate from the standard
            objects.append(_report(proposal, author, digest, objects[0] if objects else None))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MedFLError(f"the source series lacks what a structured report needs ({error})") from error
    if structure_set and proposal.mask.any():
        made = make_structure_set(
            proposal.mask,
            proposal.series,
            _uid(digest, "RTSTRUCT series"),
            _uid(digest, "RTSTRUCT"),
            STRUCTURE_NUMBER,
        )
        made.SeriesDescription = f"{MANUFACTURER} outline, unverified research output"
        made.StructureSetDescription = (
            f"{NOTICE}. {author.model}, MedFL {__version__}, SHA-256 {author.sha256}"
        )
        objects.append(made)
    return objects


def _digest(proposal: Proposal, author: Author) -> str:
    """A digest of everything that determines a proposal: model, version, the way it was made, and the files that the
    model saw."""
    files = sorted(str(_instance(file)) for series in proposal.sources for file in series.files)
    return hashlib.sha256("\n".join([__version__, author.sha256, proposal.way, *files]).encode()).hexdigest()


def _instance(file: File) -> UID:
    with file.open("rb") as content:
        return pydicom.dcmread(
            content, stop_before_pixels=True, specific_tags=["SOPInstanceUID"]
        ).SOPInstanceUID


def _uid(digest: str, what: str) -> UID:
    return generate_uid(entropy_srcs=[digest, what])


def _segmentation(proposal: Proposal, author: Author, digest: str) -> highdicom.seg.Segmentation:
    """The mask from `make_segmentation`, with its author and the notice."""
    made = make_segmentation(proposal.mask, proposal.series)
    made.SeriesInstanceUID, made.SOPInstanceUID = _uid(digest, "SEG series"), _uid(digest, "SEG")
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.ContentDescription = NOTICE
    made.SegmentSequence[0].SegmentAlgorithmName = author.model[:64]
    made.SegmentSequence[
        0
    ].SegmentationAlgorithmIdentificationSequence = highdicom.AlgorithmIdentificationSequence(
        name=MANUFACTURER,
        version=__version__,
        family=codes.DCM.ArtificialIntelligence,
        parameters={"model": author.model, "sha256": author.sha256},
    )
    return made


def _report(
    proposal: Proposal, author: Author, digest: str, segmentation: pydicom.Dataset | None
) -> Comprehensive3DSR:
    """The measurements as an unverified TID 1500 report."""
    device = DeviceObserverIdentifyingAttributes(
        uid=_uid(author.sha256, "model"),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=author.model[:64],
    )
    content = MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(
                observer_type=codes.DCM.Device, observer_identifying_attributes=device
            )
        ),
        procedure_reported=codes.LN.BrainMRI,
        imaging_measurements=[
            _measurements(proposal, author, digest, segmentation),
            *(_component(part, author, digest) for part in proposal.components),
        ],
        title=codes.DCM.ImagingMeasurementReport,
    )
    evidence = [_evidence(proposal.series, index) for index in range(len(proposal.series.files))]
    made = Comprehensive3DSR(
        evidence=([segmentation] if segmentation is not None else []) + evidence,
        content=content,
        series_instance_uid=_uid(digest, "SR series"),
        series_number=REPORT_NUMBER,
        sop_instance_uid=_uid(digest, "SR"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    made.SeriesDescription = f"{MANUFACTURER} measurements, unverified research output"
    made.ManufacturerModelName, made.SoftwareVersions = MANUFACTURER, __version__
    return made


def _measurements(
    proposal: Proposal, author: Author, digest: str, segmentation: pydicom.Dataset | None
) -> MeasurementsAndQualitativeEvaluations | VolumetricROIMeasurementsAndQualitativeEvaluations:
    """Volume and largest area of the tumour that the model found."""
    about: dict[str, Any] = dict(
        tracking_identifier=TrackingIdentifier(uid=_uid(digest, "tumour"), identifier="tumour"),
        algorithm_id=_algorithm(author),
        finding_type=codes.SCT.Neoplasm,
        finding_sites=[FindingSite(anatomic_location=codes.SCT.Brain)],
        measurements=[
            Measurement(
                name=codes.SCT.Volume, value=round(proposal.volume_ml, 3), unit=codes.UCUM.CubicCentimeter
            ),
            Measurement(
                name=codes.SCT.AreaOfDefinedRegion,
                value=round(proposal.largest_area_mm2, 1),
                unit=codes.UCUM.SquareMillimeter,
                derivation=codes.SCT.Maximum,
            ),
        ],
        qualitative_evaluations=[_unverified()],
    )
    if segmentation is None:
        return MeasurementsAndQualitativeEvaluations(**about)
    segment = ReferencedSegment(
        segmentation.SOPClassUID,
        segmentation.SOPInstanceUID,
        segment_number=1,
        source_series=SourceSeriesForSegmentation(proposal.series.uid),
    )
    return VolumetricROIMeasurementsAndQualitativeEvaluations(**about, referenced_segment=segment)


def _component(part: Component, author: Author, digest: str) -> MeasurementsAndQualitativeEvaluations:
    """One connected part of the mask: volume, its interval, and the two largest perpendicular diameters."""
    cm3, mm = codes.UCUM.CubicCentimeter, codes.UCUM.Millimeter
    volume, low, high = part.cm3(part.voxels), part.cm3(part.low), part.cm3(part.high)
    measured = [Measurement(name=codes.SCT.Volume, value=round(volume or 0.0, 3), unit=cm3)]
    if low is not None and high is not None:
        method = CodedConcept("interval", SCHEME, "From the voxels' probabilities of 0.9 and of 0.1")
        measured += [
            Measurement(name=codes.SCT.Volume, value=round(value, 3), unit=cm3, derivation=end, method=method)
            for value, end in ((low, codes.SCT.Minimum), (high, codes.SCT.Maximum))
        ]
    if part.diameters is not None:
        measured += [
            Measurement(name=name, value=round(value, 1), unit=mm)
            for name, value in zip((codes.SCT.LongAxis, codes.SCT.ShortAxis), part.diameters, strict=True)
        ]
    name = f"component {part.number}" + (f", {part.pieces} small ones together" if part.pieces > 1 else "")
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=_uid(digest, name), identifier=name),
        algorithm_id=_algorithm(author),
        finding_type=codes.SCT.Neoplasm,
        finding_sites=[FindingSite(anatomic_location=codes.SCT.Brain)],
        measurements=measured,
        qualitative_evaluations=[_unverified()],
    )


def _algorithm(author: Author) -> AlgorithmIdentification:
    return AlgorithmIdentification(
        name=MANUFACTURER,
        version=__version__,
        parameters=[f"model {author.model}", f"sha256 {author.sha256}"],
    )


def _unverified() -> QualitativeEvaluation:
    return QualitativeEvaluation(
        name=CodedConcept("status", SCHEME, "Status of this output"),
        value=CodedConcept("unverified", SCHEME, NOTICE),
    )


def _evidence(series: Series, index: int) -> pydicom.Dataset:
    """A source file's header; required tags that anonymisers remove are empty."""
    with series.files[index].open("rb") as content:
        header = pydicom.dcmread(content, stop_before_pixels=True)
    for name in EXPECTED:
        if name not in header:
            setattr(header, name, None)
    return header
