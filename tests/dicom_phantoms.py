"""DICOM series of phantoms for the tests: scanned on any grid, written by pydicom with an archive's tags."""

from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from radiology.segmentation import write_segmentation
from radiology.series import find_series


def image_of(
    volume: np.ndarray, spacing: tuple[float, float, float], origin=(0.0, 0.0, 0.0), direction=None
) -> sitk.Image:
    """(S, H, W) as an image; spacing in mm between slices, rows, columns; direction: columns are the axes x,
    y, z."""
    image = sitk.GetImageFromArray(volume.astype(np.float32))
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(np.asarray(direction, float).ravel().tolist())
    return image


def write_series(
    folder: Path,
    image: sitk.Image,
    patient: dict | None = None,
    study: str = "1.2.3",
    frame: str = "1.2.3.9",
    slope: float = 1.0,
    intercept: float = 0.0,
    signed: bool = False,
    **tags,
) -> list[Path]:
    """Write an image as a classic MR series, a file per slice; `tags` by keyword go into every file. Returns
    the files."""
    volume = np.rint((sitk.GetArrayFromImage(image) - intercept) / slope)
    matrix = np.array(image.GetDirection()).reshape(3, 3)
    columns, rows, between = image.GetSpacing()
    uid, paths = tags.pop("SeriesInstanceUID", generate_uid()), []
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(volume):
        file = pydicom.Dataset()
        file.file_meta = FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = MRImageStorage
        file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
        file.StudyInstanceUID, file.SeriesInstanceUID, file.FrameOfReferenceUID = study, uid, frame
        file.Modality, file.ImageType, file.InstanceNumber = "MR", ["ORIGINAL", "PRIMARY", "M"], index + 1
        for name in (
            "StudyDate",
            "StudyTime",
            "AccessionNumber",
            "PatientBirthDate",
            "PatientSex",
            "StudyID",
            "SeriesNumber",
            "Laterality",
            "PositionReferenceIndicator",
            "PatientName",
            "PatientID",
            "ReferringPhysicianName",
        ):
            setattr(file, name, None)
        file.Manufacturer, file.ManufacturerModelName, file.MagneticFieldStrength = (
            "Phantom Works",
            "Painter 3",
            1.5,
        )
        file.Rows, file.Columns = pixels.shape
        file.PixelSpacing, file.SliceThickness, file.SpacingBetweenSlices = [rows, columns], between, between
        file.ImageOrientationPatient = matrix[:, :2].T.ravel().round(9).tolist()
        file.ImagePositionPatient = [round(v, 5) for v in image.TransformIndexToPhysicalPoint((0, 0, index))]
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, int(signed)
        if (slope, intercept) != (1.0, 0.0):
            file.RescaleSlope, file.RescaleIntercept, file.RescaleType = slope, intercept, "US"
        file.PixelData = pixels.astype("<i2" if signed else "<u2").tobytes()
        for name, value in {**(patient or {}), **tags}.items():
            setattr(file, name, value)
        paths.append(folder / f"IM{index:04d}")
        file.save_as(paths[-1], enforce_file_format=True)
    return paths


SPACING = (6.0, 0.9, 0.9)  # mm, of a phantom's own grid


def phantom(seed: int = 0, slices: int = 16, size: int = 256) -> tuple[list[sitk.Image], sitk.Image]:
    """Pre-contrast, FLAIR and post-contrast of a painted head of size × 0.9 mm, on one grid, and its mask."""
    from phantoms.painting import SCANNERS, paint_patient

    volume, truth = paint_patient(np.random.default_rng(seed), SCANNERS["DU"], slices, size, None)
    spacing = (SPACING[0], 230.4 / size, 230.4 / size)
    origin = (-115.0, -110.0, -30.0)
    return [image_of(volume[..., c], spacing, origin) for c in range(3)], image_of(truth > 0, spacing, origin)


def turn(
    image: sitk.Image, degrees: tuple[float, float, float], shift: tuple[float, float, float]
) -> sitk.Euler3DTransform:
    """A rigid movement about an image's middle."""
    transform = sitk.Euler3DTransform()
    transform.SetCenter(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    transform.SetRotation(*np.radians(degrees))
    transform.SetTranslation(shift)
    return transform


def scan(
    image: sitk.Image,
    side: int,
    slices: int,
    direction=None,
    moved: sitk.Transform | None = None,
    spread: float = 1.0,
    nearest: bool = False,
) -> sitk.Image:
    """An image as a scanner with another grid sees it: side × side pixels, the same middle; the head moved by
    a transform."""
    size, spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
    matrix = np.eye(3) if direction is None else np.asarray(direction, float)
    reach = np.abs(np.linalg.inv(matrix)) @ (size * spacing) * spread
    count = np.array([side, side, slices])
    pixel = reach[:2].max() / side
    steps = np.array([pixel, pixel, reach[2] / slices])
    middle = np.array(image.TransformContinuousIndexToPhysicalPoint(((size - 1) / 2).tolist()))
    grid = sitk.Image(count.tolist(), sitk.sitkFloat32)
    grid.SetSpacing(steps.tolist())
    grid.SetDirection(matrix.ravel().tolist())
    grid.SetOrigin((middle - matrix @ ((count - 1) / 2 * steps)).tolist())
    how = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    return sitk.Resample(image, grid, moved or sitk.Transform(), how, 0.0, sitk.sitkFloat32)


def small_study(
    folder: Path, seed: int, patient: str, study: str, date: str, mask: bool = True, channels=(0, 1, 2)
) -> None:
    """A phantom of 64 pixels and 8 slices, all series on one grid."""
    images, truth = phantom(seed, slices=8, size=64)
    for channel in channels:
        paths = write_series(
            folder / f"series{channel}",
            images[channel],
            {"PatientID": patient},
            study=study,
            StudyDate=date,
            SeriesDescription=("AX T1", "AX FLAIR", "AX T1 GD")[channel],
            SeriesNumber=channel + 1,
        )
        if mask and channel == 1:
            (series,), _ = find_series(paths)
            write_segmentation(sitk.GetArrayFromImage(truth), series, folder / "seg")


def item(**tags) -> pydicom.Dataset:
    """A dataset of these tags, by keyword."""
    dataset = pydicom.Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def write_enhanced_mr(
    path: Path,
    values: np.ndarray,
    first: int = 0,
    measures: str = "shared",
    groups: dict | None = None,
    **tags,
) -> Path:
    """An enhanced MR of values (S, H, W) in 3 × 3 × 4 mm, as Siemens XA and Philips write them.

    first: how many slices below the first one lies; measures: "shared" or "frame", where pixel spacing and
    orientation stand; groups: further shared functional groups.
    """
    count, rows, columns = values.shape
    file = item(
        SOPClassUID=EnhancedMRImageStorage,
        SOPInstanceUID=generate_uid(),
        StudyInstanceUID="1.2.3",
        SeriesInstanceUID=generate_uid(),
        FrameOfReferenceUID="1.2.3.9",
        PatientID="X",
        Modality="MR",
        SeriesNumber=5,
        InstanceNumber=1,
        ImageType=["ORIGINAL", "PRIMARY", "M", "NONE"],
        Manufacturer="Phantom Works",
        Rows=rows,
        Columns=columns,
        NumberOfFrames=count,
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        PixelRepresentation=0,
        **{
            name: None for name in ("StudyDate", "StudyTime", "PatientName", "PatientBirthDate", "PatientSex")
        },
    )
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID

    def place() -> dict:
        return {
            "PixelMeasuresSequence": [item(PixelSpacing=[3.0, 3.0], SliceThickness=4.0)],
            "PlaneOrientationSequence": [item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        }

    shared = item(**(groups or {}), **(place() if measures == "shared" else {}))
    frames = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[-90, -90, 4.0 * (first + k)])],
            FrameContentSequence=[item(DimensionIndexValues=[k + 1])],
            **(place() if measures == "frame" else {}),
        )
        for k in range(count)
    ]
    file.SharedFunctionalGroupsSequence, file.PerFrameFunctionalGroupsSequence = [shared], frames
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = values.astype("<u2").tobytes()
    file.save_as(path, enforce_file_format=True)
    return path
