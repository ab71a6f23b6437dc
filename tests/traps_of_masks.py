"""Masks of DICOM that make their reader compute or allocate without end: SEG and RTSTRUCT."""

import struct
from collections.abc import Callable
from copy import copy

import numpy as np
import pydicom
import SimpleITK as sitk
from bombs import dicom, picture, stored
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from radiology.bounds import InMemory
from radiology.contours import read_structure_set
from radiology.segmentation import make_segmentation, read_segmentation
from radiology.series import find_series, load_series

LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"  # Label Map Segmentation Storage


def jpeg_of_passes(count: int, side: int) -> bytes:
    """A JPEG whose last pass is there so many times."""
    plain = picture((side, side), "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    return plain[:-2] + plain[last:-2] * count + plain[-2:]


def frame_of_precincts(side: int) -> bytes:
    """A frame of JPEG 2000 whose precincts are a pixel large, without a pixel."""
    size = struct.pack(">HIIIIIIIIHBBB", 0, side, side, 0, 0, side, side, 0, 0, 1, 15, 1, 1)
    coding = struct.pack(">BBHBBBBBBB", 1, 0, 1, 0, 0, 4, 4, 0, 1, 0)
    parts = [(b"\xff\x51", size), (b"\xff\x52", coding), (b"\xff\x5c", b"\x40\x48")]
    head = b"\xff\x4f" + b"".join(name + struct.pack(">H", len(part) + 2) + part for name, part in parts)
    return head + b"\xff\x90" + struct.pack(">HHIBB", 10, 0, 54, 0, 1) + b"\xff\x93" + bytes(40) + b"\xff\xd9"


def slices() -> list[InMemory]:
    """Two slices of one series."""
    about = {"FrameOfReferenceUID": "1.9", "StudyID": "1", "AccessionNumber": "1", "PatientName": "a"}
    return [
        InMemory(
            f"{k}.dcm",
            stored(dicom(SOPInstanceUID=f"1.2.3.{k}", ImagePositionPatient=[0, 0, 3 * k], **about)),
        )
        for k in (1, 2)
    ]


def mask_in_dicom(change: Callable[[pydicom.Dataset], None]) -> object:
    """What is read of a mask over `slices`, whose file was changed."""
    (series,), _ = find_series(slices())
    for file in series.files:
        file.seek(0)
    reference = load_series(series)
    for file in series.files:
        file.seek(0)
    mask = make_segmentation(np.pad(np.ones((2, 9, 9), np.uint8), ((0, 0), (9, 46), (9, 46))), series)
    change(mask)
    return read_segmentation(InMemory("mask.dcm", stored(mask)), reference)


def packed_mask(syntax: str, frame: bytes, side: int) -> Callable[[pydicom.Dataset], None]:
    """A change to a label map whose frames are all the same compressed one."""

    def change(mask: pydicom.Dataset) -> None:
        mask.file_meta.TransferSyntaxUID = syntax
        mask.SegmentationType, mask.Rows, mask.Columns = "LABELMAP", side, side
        mask.BitsAllocated, mask.BitsStored, mask.HighBit = 8, 8, 7
        mask.file_meta.MediaStorageSOPClassUID = mask.SOPClassUID = LABEL_MAP
        mask.PixelData = encapsulate([frame] * mask.NumberOfFrames)
        mask["PixelData"].VR, mask["PixelData"].is_undefined_length = "OB", True

    return change


def many_segments(mask: pydicom.Dataset) -> None:
    mask.SegmentSequence = [copy(mask.SegmentSequence[0]) for _ in range(5_000)]
    for number, segment in enumerate(mask.SegmentSequence, start=1):
        segment.SegmentNumber = number


def outlines(count: int, side: int) -> bytes:
    """An RTSTRUCT of so many triangles over the whole slice."""
    corners = Dataset()
    corners.ContourGeometricType = "CLOSED_PLANAR"
    corners.ContourData = [0, 0, 0, side - 1, 0, 0, 0, side - 1, 0]
    tumour, outline = Dataset(), Dataset()
    tumour.ROINumber, tumour.ROIName, outline.ReferencedROINumber = 1, "GTV", 1
    outline.ContourSequence = [corners] * count
    return stored(dicom(StructureSetROISequence=[tumour], ROIContourSequence=[outline], Modality="RTSTRUCT"))


def traps_of_masks() -> dict[str, Callable[[], object]]:
    """Every trap by its name: what reads it."""
    return {
        "a mask of 4 million precincts": lambda: mask_in_dicom(
            packed_mask(JPEG2000Lossless, frame_of_precincts(2048), 2048)
        ),
        "a mask of 3,000 passes": lambda: mask_in_dicom(
            packed_mask(JPEGBaseline8Bit, jpeg_of_passes(3_000, 2048), 2048)
        ),
        "a mask of 5,000 segments": lambda: mask_in_dicom(many_segments),
        "5,000 outlines over the whole slice": lambda: read_structure_set(
            InMemory("rt.dcm", outlines(5_000, 512)), sitk.Image((512, 512, 1), sitk.sitkFloat32)
        ),
    }
