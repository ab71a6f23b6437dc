"""From what a user uploads to a case: slices in order, their truth if it came along, and the space between pixels.

Everything stays in memory; nothing is written to disk.
"""

import gzip
import io
import lzma
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from common import MedFLError
from preprocessing import IMAGE_SUFFIXES, group_volumes, is_image, is_mask, read_mask, read_slice, slice_number
from spacing import NAME, read_spacing

MAX_FILES = 1_000  # in one upload, masks and all
MAX_PIXELS = 12 * 2**20  # of a case: 192 slices of 256×256; more would need more than 1.5 GiB at the normalisation
MAX_UNPACKED = 256 * 2**20  # bytes that an archive may unpack to
MIN_SIDE = 16  # pixels
NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".dicom", ".ima")  # or any other name, where the content says so
LONE_SLICE = ("A lone slice is normalised by itself and not with its patient's other slices: its mask is less reliable. Open a "
              "patient's slices together.")
# what Python's zipfile and its decompressors raise for an archive that is damaged, encrypted or of another kind
DAMAGED = (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError, ValueError, IndexError, zlib.error,
           lzma.LZMAError)
KINDS = ["tif", "tiff", "png", "jpg", "jpeg", "zip", "nii", "gz", "json"]  # that the page's upload offers


@dataclass
class Case:
    """What is looked at together.

    name: the patient's, or the file's; slices: a name for each; volume: (S, H, W, 3) uint8; groups: for each slice the number
    of the volume that it is normalised with (0 for all slices of a patient); truth: (S, H, W) uint8 0/255 or None;
    spacing: mm between rows, columns and slices, or None; measured: whether the files tell it; notes: what a reader should know
    about how it was read; nifti, dicom: the image or the series (dicom.Source) that it came from, if it did, to write a mask in
    the same space.
    """

    name: str
    slices: list[str]
    volume: np.ndarray
    groups: np.ndarray
    truth: np.ndarray | None = None
    spacing: tuple[float, float, float] | None = None
    measured: bool = False
    notes: list[str] = field(default_factory=list)
    nifti: object = None
    dicom: object = None

    @property
    def is_volume(self) -> bool:
        """Whether the slices are one patient's, so that sums over them mean something."""
        return len(self.slices) > 1 and int(self.groups.max()) == 0


def read_case(files: list[tuple[str, bytes]]) -> Case:
    """The case that (name, content) of uploaded files make: slices, DICOM, one ZIP of either, or a NIfTI file.

    Raises MedFLError, in one sentence, for everything else.
    """
    files = [(name.replace("\\", "/"), content) for name, content in files]
    archives = [name for name, _ in files if name.lower().endswith(".zip")]
    if archives:
        if len(files) > 1:
            raise MedFLError(f"{_short(archives[0])} came with other files; upload a ZIP by itself")
        files = unpack_zip(*files[0])
    _check_number(len(files))
    if any(_is_dicom(*file) for file in files):
        return _dicom().read_dicom(files)
    if any(name.lower().endswith(NIFTI) for name, _ in files):
        from nifti import read_nifti  # nibabel is optional

        return read_nifti(files)
    return _read_slices(dict(files))


def _check_number(files: int) -> None:
    if files > MAX_FILES:
        raise MedFLError(f"{files} files are more than the {MAX_FILES} of one case; upload one patient at a time")


def _is_dicom(name: str, content: bytes) -> bool:
    return name.lower().endswith(DICOM) or content[128:132] == b"DICM"


def _dicom():
    """The module that reads DICOM. Raises MedFLError where what it needs is not installed, or not here."""
    try:
        import dicom
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("radiology"):  # left out of a Space
            raise MedFLError("DICOM files carry the patient's name, so this published page takes none; run the page on a machine "
                             "of your own, or upload slices or NIfTI") from error
        raise MedFLError(f"DICOM files need {error.name}; install it (`pip install -r requirements-dicom.txt`), or upload slices "
                         "or NIfTI") from error
    return dicom


def unpack_zip(name: str, content: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of a ZIP's files, folders and hidden files left out. Raises MedFLError for a damaged archive, names
    that point out of it, and more than may be unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_number(len(entries))
            for entry in entries:
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts[:1]):
                    raise MedFLError(f"{_short(name)} holds a name that points out of the archive; pack the slices anew")
            if sum(entry.file_size for entry in entries) > MAX_UNPACKED:
                raise MedFLError(f"{_short(name)} unpacks to more than {MAX_UNPACKED >> 20} MB; pack one patient at a time")
            files, room = [], MAX_UNPACKED
            for entry in entries:
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if any(part.startswith((".", "__MACOSX")) for part in path.parts):
                    continue
                with archive.open(entry) as file:
                    piece = file.read(room + 1)  # a header can lie about the size
                room -= len(piece)
                if room < 0:
                    raise MedFLError(f"{_short(name)} unpacks to more than {MAX_UNPACKED >> 20} MB; pack one patient at a time")
                files.append((str(path), piece))
    except DAMAGED as error:
        raise MedFLError(f"{_short(name)} can't be unpacked (damaged, encrypted or of another kind); pack it anew") from error
    if not files:
        raise MedFLError(f"{_short(name)} holds no files; pack the slices into it")
    return files


def unpack_gzip(name: str, content: bytes) -> bytes:
    """What a .gz file holds. Raises MedFLError for a damaged one, or one that unpacks to too much."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            unpacked = file.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise MedFLError(f"{_short(name)} can't be unpacked; copy it again") from error
    if len(unpacked) > MAX_UNPACKED:
        raise MedFLError(f"{_short(name)} unpacks to more than {MAX_UNPACKED >> 20} MB; crop it first")
    return unpacked


def _read_slices(files: dict[str, bytes]) -> Case:
    """A case of TIFF, PNG and JPEG slices, with masks and a prepared patient's `volume.json` among them."""
    paths = {PurePosixPath(name): content for name, content in files.items()}
    images = [path for path in paths if is_image(path)]
    if not images:
        raise MedFLError("there is no slice in the upload (TIFF, PNG or JPEG, not a _mask file); choose other files")
    masks = {path.parent / path.stem[:-len("_mask")]: path for path in paths if is_mask(path)}
    volumes = group_volumes(images)
    numbered = {name for name, slices in volumes if slice_number(slices[0]) is not None}
    if len([v for v in volumes if slice_number(v[1][0]) is not None]) > 1:
        raise MedFLError(f"these are slices of {len(numbered)} patients ({', '.join(sorted(numbered)[:3])}); open one at a time")
    if numbered and len(volumes) > 1:
        odd = next(slices[0] for _, slices in volumes if slice_number(slices[0]) is None)
        raise MedFLError(f"{_short(odd.name)} has no slice number at its end and others have; open it by itself")
    order = [path for _, slices in volumes for path in slices]
    pixels = [read_slice(path, paths[path]) for path in order]
    _check_sizes(order, pixels)
    known = [masks.get(path.with_suffix("")) for path in order]
    case = Case(name=next(iter(numbered), order[0].stem), slices=[path.name for path in order], volume=np.stack(pixels),
                groups=np.zeros(len(order), int) if numbered else np.arange(len(order)))
    if any(known):
        case.truth = _read_masks(order, [mask and (mask, paths[mask]) for mask in known], case.volume.shape)
    if not case.is_volume:
        case.notes.append(LONE_SLICE)
    if spare := len(masks) - sum(mask is not None for mask in known):
        case.notes.append(f"{spare} masks belong to no slice of the upload and were passed over.")
    told = [path for path in paths if path.name == NAME]
    if len(told) > 1:
        raise MedFLError(f"{len(told)} files are called {NAME}, and a patient has one; open one patient at a time")
    if told:
        between, rows, columns = read_spacing(told[0], len(order), paths[told[0]])
        case.spacing, case.measured = (rows, columns, between), True
    if left := len(paths) - len(images) - len(masks) - len(told):
        case.notes.append(f"{left} files are neither slices nor masks and were passed over.")
    return case


def _check_sizes(order: list[PurePosixPath], pixels: list[np.ndarray]) -> None:
    rows, columns, _ = pixels[0].shape
    if min(rows, columns) < MIN_SIDE:
        raise MedFLError(f"{_short(order[0].name)} is {columns}×{rows} pixels, too small for a slice; choose another file")
    for path, one in zip(order, pixels):
        if one.shape != pixels[0].shape:
            raise MedFLError(f"{_short(path.name)} is {one.shape[1]}×{one.shape[0]} pixels and {_short(order[0].name)} is "
                             f"{columns}×{rows}; open slices of one size together")
    if len(pixels) * rows * columns > MAX_PIXELS:
        raise MedFLError(f"{len(pixels)} slices of {columns}×{rows} pixels are more than this page can hold; open fewer slices")


def _read_masks(order: list[PurePosixPath], masks: list[tuple | None], shape: tuple) -> np.ndarray:
    """The truth of each slice, (S, H, W) uint8. Raises MedFLError where one is missing or has another size."""
    truth = []
    for path, mask in zip(order, masks):
        if mask is None:
            raise MedFLError(f"{_short(path.name)} has no mask and other slices have; add {_short(path.stem)}_mask, or leave all "
                             "masks out")
        pixels = read_mask(*mask)
        if pixels.shape != shape[1:3]:
            raise MedFLError(f"{_short(mask[0].name)} is {pixels.shape[1]}×{pixels.shape[0]} pixels and its slice is "
                             f"{shape[2]}×{shape[1]}; choose masks of the slices' size")
        truth.append(pixels)
    return np.stack(truth)


def add_truth(case: Case, files: list[tuple[str, bytes]]) -> np.ndarray:
    """The truth, (S, H, W) uint8, that uploaded masks give for a case that is open. A mask belongs to the slice of its name
    without `_mask`; for a lone slice any one mask does. Raises MedFLError where they don't fit."""
    files = [(PurePosixPath(name.replace("\\", "/")), content) for name, content in files]
    if case.dicom is not None and len(files) == 1 and files[0][0].suffix.lower() not in IMAGE_SUFFIXES:
        return _dicom().read_dicom_mask(case, str(files[0][0]), files[0][1])
    if len(files) == 1 and str(files[0][0]).lower().endswith(NIFTI):
        from nifti import read_nifti_mask

        return read_nifti_mask(case, *files[0])
    order = [PurePosixPath(name) for name in case.slices]
    if len(order) == len(files) == 1:
        return _read_masks(order, files, case.volume.shape)
    masks = {path.stem.lower().removesuffix("_mask"): (path, content) for path, content in files}
    if not any(path.stem.lower() in masks for path in order):
        raise MedFLError("no mask has the name of a slice with _mask at its end; rename the masks, or choose others")
    return _read_masks(order, [masks.get(path.stem.lower()) for path in order], case.volume.shape)


def _short(name: str) -> str:
    """A file's name without its folders, cut where it is very long."""
    name = PurePosixPath(name).name
    return name if len(name) <= 60 else f"{name[:40]}…{name[-15:]}"
