"""Reads NIfTI (and NRRD) files and writes masks with nibabel, which is optional."""

import gzip
import re
from typing import TYPE_CHECKING

import numpy as np

from borders.limits import MAX_PIXELS, SIZES_MM, is_size_mm
from common import MedFLError
from deployment.app.case import MIN_SIDE, Case
from deployment.app.framing import FRAMED, Frame, frame
from deployment.app.volumes import load, short, size
from preprocessing import CHANNELS
from scans.nifti_file import (
    SUFFIXES,
    WHOLE,
    doubt,
    finite,
    stem,
    unlike_sizes,
)
from scans.orientation import (
    UNKNOWN,
    closest_axes,
    from_shown,
    mirrored,
    same_place,
    to_shown,
)

if TYPE_CHECKING:
    import nibabel

BRIGHTEST = 99.9  # percentile of the voxels above 0 that becomes 255
BELOW = 0.25  # share of the values other than 0: if more of them lie below 0, 0 is not the black of this file
DARKEST = 0.5  # percentile of the values other than 0 that becomes black in such a file
TRUTH = re.compile(r"(mask|seg|segm|segmentation|labels?|glistrboost|manuallycorrected)$", re.IGNORECASE)
OTHER_MASK = re.compile(r"(brain|skull|head)[_-]?(mask|seg\w*)$", re.IGNORECASE)


def read_nifti(files: list[tuple[str, bytes]]) -> Case:
    """The case of one scan, as axial slices from feet to head, and of its mask (`..._mask`, `..._seg`) if it
    was uploaded too.

    One volume fills all three channels; three volumes are pre-contrast, FLAIR and post-contrast; several
    files on one grid (as in BraTS) are identified by their names. Raises MedFLError if they can't be one
    case.
    """
    scans, truths = _scans_and_truths(files)
    notes: list[str] = []
    if len(scans) == 1:
        _refuse_another_sequence(scans[0][0])
        named = dict.fromkeys(CHANNELS, scans[0])
    else:
        named, notes = _channels(scans)
    loaded = {name: load(name, content) for name, content in dict(named.values()).items()}
    first = named["FLAIR"][0]
    stored = loaded[first]
    name = short(first)
    _check_grids(stored, {short(other): image for other, image in loaded.items()}, name)
    if len(scans) == 1:
        planes, flair, more, is_bytes = _one_file(name, stored)
    else:
        planes, flair, more, is_bytes = _several_files(
            {channel: file for channel, (file, _) in named.items()}, loaded
        )
    axes = closest_axes(mirrored(stored.affine)[:3, :3])
    volume = to_shown(planes, axes)
    if min(volume.shape[1:3]) < MIN_SIDE or volume[..., 0].size > MAX_PIXELS:
        raise MedFLError(
            f"{name} has {size(volume)}, which this page can't hold; prepare it with data/prepare_hospital.py and open "
            "the slices"
        )
    columns, rows, between = (float(stored.header.get_zooms()[axis]) for axis in axes[0])
    doubted = _doubt_of_sizes(name, stored.header, (columns, rows, between))
    case = Case(
        name=stem(name),
        slices=[f"{stem(name)}_{k + 1}" for k in range(len(volume))],
        volume=volume,
        groups=np.zeros(len(volume), int),
        spacing=None if doubted else (rows, columns, between),
        measured=not doubted,
        nifti=stored,
        notes=[*notes, *more, *doubted],
    )
    if not is_bytes:
        case.notes.append(
            "The intensities of each sequence were scaled to 0–255: 0 and below become 0, and the "
            f"{BRIGHTEST} % percentile of the rest becomes 255."
        )
    if why := doubt(stored.header):
        case.notes.append(
            f"{UNKNOWN.capitalize()}: {name} {why}. Left and right may be exchanged; if you know which side "
            "is the patient's left, choose it below."
        )
    case.oriented = why is None
    _frame(case, to_shown(flair, axes), is_axial=axes[0][2] == 2)  # slices follow the last stored axis
    if truths:
        case.truth = read_nifti_mask(case, *truths[0])
    others = dict.fromkeys(other for other, _ in [*named.values(), *truths] if other != first)
    case.notes += [
        f"{short(other)} names other numbers than {name}: make sure that both are of one patient and one day."
        for other in others
        if _of_others(first, other)
    ]
    return case


def _several_files(
    files: dict[str, str], loaded: dict[str, "nibabel.Nifti1Image"]
) -> tuple[np.ndarray, np.ndarray, list[str], bool]:
    """What `_one_file` returns, of the files of all channels together. files: their names, by channel."""
    each = [_one_file(short(files[channel]), loaded[files[channel]], 1) for channel in CHANNELS]
    return (
        np.concatenate([volume for volume, *_ in each], axis=3),
        each[CHANNELS.index("FLAIR")][1],
        list(dict.fromkeys(note for *_, notes_of, _ in each for note in notes_of)),
        all(is_bytes for *_, is_bytes in each),
    )


def _doubt_of_sizes(
    name: str, header: "nibabel.Nifti1Header", sizes: tuple[float, float, float]
) -> list[str]:
    """A note if the voxel's sizes (columns, rows, slices; mm) can't be right, or contradict its place; else none."""
    if unlike := unlike_sizes(header):
        return [f"{name} {unlike}: there are no figures in mm unless you give the sizes."]
    if all(map(is_size_mm, sizes)):
        return []
    columns, rows, between = sizes
    return [
        f"According to the file voxels measure {columns:g} × {rows:g} × {between:g} mm, which can't be "
        f"right (they are {SIZES_MM[0]:g} to {SIZES_MM[1]:g} mm): there are no figures in mm unless you "
        "give the sizes."
    ]


def _scans_and_truths(
    files: list[tuple[str, bytes]],
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """An upload's scans, and its mask if there is one. Raises MedFLError for anything else."""
    files = [(name, content) for name, content in files if not name.lower().endswith(".json")]
    scans = [(name, content) for name, content in files if not _is_truth(name)]
    truths = [file for file in files if _is_truth(file[0])]
    if not scans or len(truths) > 1 or not all(name.lower().endswith(SUFFIXES) for name, _ in files):
        raise MedFLError(
            "a NIfTI case is one scan, or one for each channel, and at most one mask (named ..._mask or "
            "..._seg); upload only these"
        )
    return scans, truths


def _of_others(one: str, other: str) -> bool:
    """Whether the long numbers in two files' names, of a patient or a day, differ. Research sets have one grid for all
    patients, so the grid doesn't show it."""
    found = [re.findall(r"\d{3,}", stem(name)) for name in (one, other)]
    return all(found) and found[0] != found[1]


def _frame(case: Case, flair: np.ndarray, is_axial: bool) -> None:
    """Frame the network's input like its training slices. flair: as stored, (S, H, W)."""
    if case.spacing is None:
        return
    rows, columns, between = case.spacing
    framed = frame(case.volume, flair, (between, rows, columns), is_axial)
    case.feed = framed
    if framed and framed.box.told:
        case.notes.append(FRAMED.format(told=" and ".join(framed.box.told)))


def _is_truth(name: str) -> bool:
    return bool(TRUTH.search(stem(name)) and not OTHER_MASK.search(stem(name)))


def _channels(scans: list[tuple[str, bytes]]) -> tuple[dict[str, tuple[str, bytes]], list[str]]:
    """The file of each channel, by the rules for series' names; FLAIR stands in for missing channels."""
    try:
        from radiology.rules import load_rules, role_of
        from radiology.series import Series
    except ModuleNotFoundError as error:
        raise MedFLError(
            f"several NIfTI files can't be told apart without {error.name}, which is not installed here; "
            "upload one scan and at most one mask (named ..._mask or ..._seg)"
        ) from error
    rules, found = load_rules(), {}
    for name, content in scans:
        role, _ = role_of(Series("", "", "", "NIfTI", stem(name), ()), rules)
        if role in found:
            raise MedFLError(f"two of the files say that they are {role}; upload one of each")
        if role in CHANNELS:
            found[role] = (name, content)
    if "FLAIR" not in found:
        raise MedFLError(
            f"none of the {len(scans)} NIfTI files says in its name that it is FLAIR; rename one"
        )
    notes = [f"{channel} is {short(found[channel][0])}." for channel in CHANNELS if channel in found]
    if missing := [channel for channel in CHANNELS if channel not in found]:
        notes.append(
            f"FLAIR stands in for {' and '.join(missing)}, as in the training set where one was missing."
        )
    if spare := len(scans) - len(found):
        notes.append(f"{spare} NIfTI files were ignored: no channel needs them.")
    return {channel: found.get(channel, found["FLAIR"]) for channel in CHANNELS}, notes


def _refuse_another_sequence(name: str) -> None:
    """Raises MedFLError for a single file whose name says that it is not FLAIR but another sequence."""
    try:
        from radiology.rules import load_rules, role_of
        from radiology.series import Series
    except ModuleNotFoundError:  # without the rules a name can't be interpreted
        return
    role, _ = role_of(Series("", "", "", "NIfTI", stem(name), ()), load_rules())
    if role in CHANNELS and role != "FLAIR":
        raise MedFLError(
            f"{short(name)} is {role} by its name, but the network needs FLAIR; open the FLAIR file, with "
            "or without this one"
        )


def _check_grids(stored: "nibabel.Nifti1Image", others: dict, name: str) -> None:
    for other, image in others.items():
        if not same_place(stored, image):
            raise MedFLError(
                f"{other} lies on another grid than {name}; prepare them with data/prepare_hospital.py, "
                "which aligns sequences"
            )


def _one_file(
    name: str, image: "nibabel.Nifti1Image", most: int = 3
) -> tuple[np.ndarray, np.ndarray, list[str], bool]:
    """A file's stored voxels as uint8, (I, J, K, 1 or 3), its FLAIR (or only sequence) in the file's own
    numbers, (I, J, K), notes about them, and whether they were bytes."""
    values = np.asarray(image.dataobj)
    if values.dtype.names:  # stored as RGB
        values = np.stack([values[channel] for channel in values.dtype.names[:3]], axis=-1)
    values = values.reshape(*values.shape[:3], -1)
    if values.shape[3] not in (1, most):
        raise MedFLError(
            f"{name} holds {values.shape[3]} volumes, but a case has one, or three (pre-contrast, FLAIR and "
            "post-contrast); choose another file"
        )
    try:
        good, odd = finite(values)
    except MedFLError as error:
        raise MedFLError(f"{name} {error}") from error
    notes = []
    if odd:
        notes.append(f"{odd} values were not finite and became background.")
    planes = [good[..., channel] for channel in range(good.shape[3])]
    flair = planes[CHANNELS.index("FLAIR") % len(planes)]
    if any(centred(plane) for plane in planes):
        notes.append(
            "Many values lie below 0, as after a z-score: they were scaled from the lowest to the highest, "
            "and the background became black."
        )
    planes = [to_bytes(plane) for plane in planes]
    if most == 3:
        planes = [planes[channel % len(planes)] for channel in range(3)]
    return np.stack(planes, axis=-1), flair, notes, values.dtype == np.uint8


def centred(values: np.ndarray) -> bool:
    """Whether so many values lie below 0 that 0 is not the black of this sequence."""
    return values.dtype != np.uint8 and bool((values < 0).sum() > BELOW * np.count_nonzero(values))


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Intensities of one sequence as uint8: 0 stays 0, the brightest become 255. uint8 stays as it is.

    A sequence around 0 (`centred`) is shifted first: its darkest values become 0, and so do values of exactly
    0 if they are the background.
    """
    if values.dtype == np.uint8:
        return values
    values = np.asarray(values, np.float32)
    if centred(values):
        there = values != 0
        values = np.where(there, values - np.percentile(values[there], DARKEST).astype(np.float32), 0)
    above = values[values > 0]
    top = float(np.percentile(above, BRIGHTEST)) if above.size else 1.0
    return (values / max(top, 1e-6) * 255).clip(0, 255).round().astype(np.uint8)


def read_nifti_mask(case: Case, name: str, content: bytes) -> np.ndarray:
    """A mask with the case's shape and place from a NIfTI file, (S, H, W) uint8: every label above 0 is
    tumour."""
    image = load(name, content)
    values = np.asarray(image.dataobj)
    if values.dtype.names:
        raise MedFLError(
            f"{short(name)} holds colours, but a mask holds numbers; choose the mask of this scan"
        )
    if values.shape[3:] == (1,):  # one volume may be stated as a fourth dimension
        values = values[..., 0]
    mask = to_shown(values, closest_axes(mirrored(image.affine)[:3, :3]))
    if mask.shape != case.volume.shape[:3]:
        raise MedFLError(
            f"the mask has {size(mask)}, but the scan {size(case.volume)}; choose the mask of this scan"
        )
    if case.nifti is not None and not same_place(case.nifti, image):
        raise MedFLError(
            f"{short(name)} has another position than the scan, by its affine; choose the mask of this scan"
        )
    if case.nifti is None and (why := doubt(image.header)):
        raise MedFLError(
            f"{short(name)} {why}, so it can't be placed on these slices; choose a mask that states it"
        )
    told = mask[np.isfinite(mask)]
    if ((told < 0) | (np.abs(told - np.rint(told)) > WHOLE)).any():
        raise MedFLError(
            f"{short(name)} holds values that are not labels (0, 1, 2 and so on), such as probabilities; "
            "save it as a mask"
        )
    return np.where(mask > 0.5, np.uint8(255), np.uint8(0))


def mirror(case: Case) -> None:
    """Exchange left and right of a case whose file does not state them, and of the files written from it."""
    import nibabel

    scan = case.nifti
    assert scan is not None  # the page asks only about files of this kind
    (left, *_), _ = closest_axes(mirrored(scan.affine)[:3, :3])
    affine = scan.affine.copy()
    affine[:3, left] *= -1
    affine[:3, 3] += scan.affine[:3, left] * (scan.shape[left] - 1)
    case.nifti = nibabel.Nifti1Image(scan.dataobj, affine)
    case.volume = np.ascontiguousarray(case.volume[:, :, ::-1])
    case.truth = None if case.truth is None else np.ascontiguousarray(case.truth[:, :, ::-1])
    if isinstance(case.feed, Frame):
        case.feed = case.feed.mirrored()


def write_nifti(scan: "nibabel.Nifti1Image", mask: np.ndarray, has_labels: bool = False) -> bytes:
    """A mask (S, H, W) uint8 as .nii.gz, voxel for voxel on the scan that was uploaded: 1 where there is tumour, or the
    mask's own labels, if it has any."""
    axes = closest_axes(mirrored(scan.affine)[:3, :3])
    values = mask if has_labels else (mask > 0).astype(np.uint8)
    return nifti_bytes(from_shown(values, axes), scan.affine)


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """Voxels (X, Y, Z) uint8 as .nii.gz; affine: (4, 4), from indices to mm towards the right, front and
    top."""
    import nibabel

    image = nibabel.Nifti1Image(np.ascontiguousarray(voxels), affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), mtime=0)
