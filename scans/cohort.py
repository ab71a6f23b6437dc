"""The patients below a folder, in any of the usual layouts, and a list of what is left out."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import MedFLError, counted
from scans.folders import TREES_OF_IMAGES, as_text, walk
from scans.naming import MASK_SUFFIX, group_volumes, slice_number
from scans.pairing import Pairing, pair
from scans.repeats import Slices, first_visits, without_copies

SITE = re.compile(r"^TCGA_([A-Z]{2})_")
PHANTOM = re.compile(r"^TCGA_[A-Z]{2}_PH\d+_")
MARK = re.compile(r"^[-_. ]?[a-z][-_. a-z]*$", re.IGNORECASE)  # a possible end of a mask's name
UNMASKED = "without_masks"
KEPT_APART = {
    "more_studies",
    UNMASKED,
}  # folders that data/prepare_hospital.py keeps apart from the training data
PARTS_OF_OTHERS = {"train", "training", "val", "valid", "validation", "test", "testing"}
OF_MEDFL = {  # files that MedFL writes beside pictures that are not slices
    "split.json", "centralized_history.csv", "local_history.csv", "federated_history.csv", "predictions.csv",
}  # fmt: skip
PACKED = {".zip", ".gz", ".tgz", ".tar", ".7z", ".rar"}
VOLUMES = {".nii", ".nrrd", ".mgz", ".mha", ".mhd", ".gz"}
DICOM = {".dcm", ".ima", ".dicom"}
UNREAD = PACKED | VOLUMES | DICOM | {".bmp", ".gif", ".webp", ".jp2", ".npy", ".npz", ".h5", ".mat"}
HOW = "prepare them with `python data/prepare_hospital.py --{} FOLDER --out PREPARED`, and name PREPARED"
ELSEWHERE = (  # kinds of files that are found instead of slices, and what to do with them
    (DICOM, f"it holds DICOM files: {HOW.format('dicom')}"),
    (VOLUMES, f"it holds NIfTI or similar volumes: {HOW.format('nifti')}"),
    (PACKED, "it holds an archive: unpack it"),
    (UNREAD, "it holds files in formats that MedFL does not read: save them as TIFF or PNG"),
)
HOW_TO_GET = (
    "fetch the scans with `python data/download.py`, or by hand from "
    "https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation, or make a synthetic cohort with "
    "`python data/make_phantoms.py`"
)


@dataclass(frozen=True)
class Patient:
    """One patient's files: name (its path below the root, `anna` or `sub-01/anat`), site code, slices in
    numeric order and the mask of each."""

    name: str
    site: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class Cohort:
    """root: the nearest folder that holds all patients; patients: sorted by name; left_out: one sentence,
    with the number, for each kind of file or patient that is not read."""

    root: Path
    patients: list[Patient]
    left_out: list[str]


def find_cohort(
    top: Path, site: str, file_hash: Callable[[Path], str], mask_suffix: str = MASK_SUFFIX
) -> Cohort:
    """The patients in `top` and below it, each with all its slices and masks.

    A folder with slices is a patient. If several patients have the same content, the one nearest to `top` is
    read; if a person has several visits, the first is read. Phantoms beside real scans are not read.

    Args:
        site: the site of patients whose names contain no code. file_hash: returns the SHA-256 of a file.
        mask_suffix: the end of a mask's name.

    Raises:
        MedFLError: there are no patients, a slice has no mask or a mask has no slice, the same slices have
        different masks, or two folders have some patients in common but not all.
    """
    if not top.is_dir():
        raise MedFLError(_no_folder(top))
    left_out: list[str] = []
    unread: Counter[str] = Counter()
    places = _places(top, left_out, mask_suffix, unread)
    if not places and (top / UNMASKED).is_dir():
        raise MedFLError(
            f"all studies in {top} are in {UNMASKED}, and training needs masks; export the masks as well "
            "(DICOM SEG or RTSTRUCT), and prepare the studies again"
        )
    if not places:
        raise MedFLError(
            f"no patients in {top} (a folder per patient, each slice with its {mask_suffix} file); "
            + next((how for kinds, how in ELSEWHERE if unread.keys() & kinds), HOW_TO_GET)
        )
    if unread:
        kinds = ", ".join(sorted(unread))
        left_out.append(
            f"{counted(unread.total(), 'file')} in formats that are not slices ({kinds}): not read"
        )
    kept = first_visits(top, without_copies(top, places, file_hash, left_out), left_out)
    phantoms = [place for place in kept if PHANTOM.match(place.name)]
    if 0 < len(phantoms) < len(kept):
        kept = {place: patient for place, patient in kept.items() if place not in phantoms}
        left_out.append(f"{counted(len(phantoms), 'phantom')} beside real scans: not read")
    root = Path(os.path.commonpath([place.parent for place in kept]))
    patients = []
    for place, (images, masks) in kept.items():
        code = SITE.match(place.name)
        name = as_text(place.relative_to(root).as_posix())
        patients.append(Patient(name, code[1] if code else site, tuple(images), tuple(masks)))
    _refuse_two_parts(patients)
    parts = sorted({Path(p.name).parts[0] for p in patients} & PARTS_OF_OTHERS)
    if len(parts) > 1:
        left_out.append(
            f"the folders {' and '.join(parts)} are not used as a split: MedFL draws its own over all "
            "patients (--split-file names another)"
        )
    return Cohort(root, sorted(patients, key=lambda patient: patient.name), left_out)


def _refuse_two_parts(patients: list[Patient]) -> None:
    """Raises MedFLError if one name appears in two parts of another split (`train/anna` and `test/anna`):
    that split was made by slice, and read as two patients they could end up on both sides of MedFL's
    split."""
    first: dict[tuple[str, ...], Patient] = {}
    for patient in patients:
        person = tuple(part for part in Path(patient.name).parts if part.lower() not in PARTS_OF_OTHERS)
        other = first.setdefault(person, patient)
        if other is not patient:
            raise MedFLError(
                f"{other.name} and {patient.name} seem to be one patient in two parts of another split; "
                "move all slices of a patient into one folder, or rename one of the folders if they are "
                "two people"
            )


def _no_folder(top: Path) -> str:
    """The message about a folder that does not exist."""
    if top.is_file():
        what = "unpack it" if top.suffix.lower() in PACKED else "name the folder that it lies in"
        return f"{top} is a file, but patients lie in a folder; {what}"
    if str(top).startswith("~"):
        return (
            f"there is no folder {top}, because the shell did not replace the ~; write the whole path, or "
            "leave out the quotes"
        )
    return f"there is no folder {top}; {HOW_TO_GET}"


def _places(top: Path, left_out: list[str], mask_suffix: str, unread: Counter[str]) -> dict[Path, Slices]:
    """The place of each patient, nearest first: the patient's folder, or for a tree of images the folder or
    name in it, as if it lay beside the tree. Files with pixels in other formats are counted in `unread` by
    suffix."""
    apart = written = 0
    files: list[Path] = []
    for folder, inside in walk(top):
        if OF_MEDFL & {file.name for file in inside} and not (found := pair(inside, mask_suffix)).masks:
            written += bool(found.images or found.alone)
        elif KEPT_APART & set(folder.relative_to(top).parts):
            apart += bool(pair(inside, mask_suffix).images)
        else:
            files += inside
            unread.update(kind for file in inside if (kind := file.suffix.lower()) in UNREAD)
    if apart:
        left_out.append(
            f"{counted(apart, 'patient')} kept apart in {' or '.join(sorted(KEPT_APART))}: not read"
        )
    if written:
        left_out.append(f"{counted(written, 'folder')} written by MedFL (a run, predictions): not read")
    pairing = pair(files, mask_suffix)
    by_folder: defaultdict[Path, list[Path]] = defaultdict(list)
    for image in pairing.images:
        by_folder[image.parent].append(image)
    masked = {folder for folder, images in by_folder.items() if any(i in pairing.masks for i in images)}
    places: dict[Path, Slices] = {}
    loose = 0
    for folder, images in by_folder.items():
        if folder not in masked and any(
            folder in other.parents or other in folder.parents for other in masked
        ):
            loose += len(images)
            continue
        masks = {image: _mask_of(image, pairing, mask_suffix) for image in images}
        in_trees = any(mask.parent != image.parent for image, mask in masks.items())
        for place, slices in (
            _patients_of_tree(folder, images) if in_trees else [_patient(folder, top, images)]
        ):
            if place in places:
                raise MedFLError(f"two patients would be called {place}; rename a folder or the files")
            places[place] = (slices, [masks[image] for image in slices])
    if loose:
        left_out.append(f"{counted(loose, 'picture')} without a mask beside or below the patients: not read")
    if pairing.alone:
        wanted, mask = min(pairing.alone.items())
        raise MedFLError(f"{mask} has no slice ({wanted.name}.*); add the slice or remove the mask")
    return places


def _patient(folder: Path, top: Path, images: list[Path]) -> tuple[Path, list[Path]]:
    """The slices and masks of a patient in its own folder."""
    if folder == top:
        raise MedFLError(
            f"{folder} holds slices itself; name the folder above it, which holds a folder for each patient"
        )
    volumes = group_volumes(images, {folder})
    if len(volumes) > 1:
        names = ", ".join(sorted(name for name, _ in volumes)[:3])
        raise MedFLError(
            f"{folder} holds slices with {len(volumes)} names and the same numbers ({names}); give each "
            "patient a folder, and put a patient's sequences into the channels of one picture"
        )
    return folder, volumes[0][1]


def _patients_of_tree(folder: Path, images: list[Path]) -> list[tuple[Path, list[Path]]]:
    """The patients of a folder in a tree of images, whose masks lie in another tree. Each folder below the
    top of the tree is a patient, and at the top each name with slice numbers is one. Their places are given
    as if they lay beside the tree."""
    tree = next(f for f in (folder, *folder.parents) if f.name.lower() in TREES_OF_IMAGES)
    if folder != tree:
        _, slices = _patient(folder, tree, images)
        return [(tree.parent / folder.relative_to(tree), slices)]
    if odd := [image for image in images if slice_number(image) is None]:
        raise MedFLError(
            f"{odd[0]} has no slice number, so its patient is unknown; give each patient a folder in {tree} "
            "and in the masks' tree"
        )
    return [(tree.parent / name, slices) for name, slices in group_volumes(images)]


def _mask_of(image: Path, pairing: Pairing, mask_suffix: str) -> Path:
    """The mask of a slice. Raises MedFLError if there is none; if files beside it have names that could be
    masks, the message suggests the fitting `--mask-suffix`."""
    if image in pairing.masks:
        return pairing.masks[image]
    beside = [sorted((other.stem, image.stem)) for other in pairing.images if other.parent == image.parent]
    ends = {longer[len(shorter) :] for shorter, longer in beside if longer.startswith(shorter)}
    if mark := min(filter(MARK.match, ends), default=None):
        raise MedFLError(
            f"{image.parent} holds slices without masks (files whose names end in {mask_suffix}), but some "
            f"names there end in {mark}; if those are the masks, give --mask-suffix={mark}"
        )
    raise MedFLError(
        f"{image} has no mask ({image.stem}{mask_suffix}{image.suffix}), and no tree of masks has one of "
        "its name; add the mask or remove the slice"
    )


def cohort_name(patients: list[Patient]) -> str:
    """The name of a cohort: "LGG MRI segmentation", "phantoms" or "own data"."""
    last = [patient.name.rpartition("/")[2] for patient in patients]
    if all(PHANTOM.match(name) for name in last):
        return "phantoms"
    return "LGG MRI segmentation" if all(SITE.match(name) for name in last) else "own data"
