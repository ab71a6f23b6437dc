"""Bring scans of another task into MedFL's layout: a folder per patient, a PNG per slice, its mask beside it.

    python data/prepare_task.py --task hippocampus --source Task04_Hippocampus --out data/hippocampus
    python data/prepare_task.py --task wounds --source photographs --out data/wounds
    python train_centralized.py --data-dir data/hippocampus --out models/hippocampus

--source holds images/ and labels/ (or imagesTr/ and labelsTr/) with files of the same names: NIfTI volumes,
or PNG, TIFF or JPEG pictures, each of which is a patient of one slice. The task's file is copied to the
slices, so that every script knows what they show. NIfTI needs nibabel (pip install nibabel).
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from borders.limits import fits
from common import MedFLError, counted, run_script, typed
from scans.folders import TREES_OF_IMAGES, TREES_OF_MASKS, contents
from scans.naming import IMAGE_SUFFIXES
from scans.nifti_file import doubt, read_content, read_image, unlike_sizes
from scans.orientation import OFF_GRID, distance_apart
from scans.pictures import read_slice
from scans.spacing import NAME as SPACING
from storage.files import atomic_write, text_of, write_json
from tasks import FOLDER, NAME, Task, known, named_task

NIFTI = (".nii", ".nii.gz")
ENDS = (0.5, 99.5)  # percentiles that become black and white
NOISE = 0.05  # share of white: values no further below 0 come from resampling, and become black
BACKGROUND = 0.1  # share of the voxels above which 0 is background, even if there are values below 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, help=f"one of {known()}, or a task file of your own")
    parser.add_argument("--source", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the patients; a new or empty one")
    return parser.parse_args()


def pairs(source: Path) -> list[tuple[str, Path, Path]]:
    """Name, image and label of each patient. Raises MedFLError for an image without a label, a label without
    an image, and an empty folder."""
    found: dict[str, dict[str, Path]] = {"images": {}, "labels": {}}
    for (kind, files), names in zip(found.items(), (TREES_OF_IMAGES, TREES_OF_MASKS)):
        if not source.is_dir():
            raise MedFLError(f"there is no folder {source}; --source holds images/ and labels/")
        trees = [folder for folder in contents(source)[0] if folder.name.lower() in names]
        if len(trees) != 1:
            raise MedFLError(
                f"there is no folder {source / kind}; --source holds images/ and labels/ (or imagesTr/ and labelsTr/)"
                if not trees
                else f"{trees[0]} and {trees[1]} both hold {kind}; move one away"
            )
        for path in contents(trees[0])[1]:
            suffix = next((s for s in (*NIFTI, *IMAGE_SUFFIXES) if path.name.lower().endswith(s)), None)
            if suffix:
                name = path.name[: path.name.lower().index(suffix)]
                # nnU-Net numbers the channels of an image; a task reads the first one
                name = name.removesuffix("_0000") if kind == "images" else name
                if files.setdefault(name, path) != path:
                    raise MedFLError(
                        f"{files[name]} and {path.name} are both called {name}; remove one of them"
                    )
    if odd := sorted(found["images"].keys() ^ found["labels"].keys()):
        raise MedFLError(
            f"{odd[0]} is only in one of images/ and labels/ in {source}; add the other file, or move this "
            "one away"
        )
    if not found["images"]:
        raise MedFLError(f"{source / 'images'} holds no NIfTI file and no picture; name another --source")
    return [(name, image, found["labels"][name]) for name, image in found["images"].items()]


class Volume(NamedTuple):
    """Axial slices (S, H, W) as a radiologist sees them (the patient's right at the left, front up), the mm
    between slices, rows and columns, and the affine of the voxels, (4, 4)."""

    slices: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray


def read_nifti(path: Path) -> Volume:
    """A NIfTI volume. Raises MedFLError for a file that is not a volume, or that gives no orientation."""
    try:
        import nibabel
    except ImportError as error:
        raise MedFLError("NIfTI files need nibabel; install it with `pip install nibabel`") from error
    try:
        stored = read_image(read_content(path))
        if why := doubt(stored.header):
            raise MedFLError(f"{why}: left and right can't be told apart; convert the scan again")
        if why := unlike_sizes(stored.header):
            raise MedFLError(f"{why}; convert the scan again")
        image = nibabel.as_closest_canonical(stored)
        if not fits(image.shape[::-1]):
            raise MedFLError("has more voxels than can be read at once; make it smaller")
        values = np.asarray(image.get_fdata(dtype=np.float32))
    except MedFLError as error:
        raise MedFLError(f"{path} {error}") from error
    except Exception as error:  # nibabel and the decompressors raise exceptions of many kinds
        raise MedFLError(
            f"{path} can't be read as NIfTI ({type(error).__name__}); export it again"
        ) from error
    if values.ndim != 3 or not np.isfinite(values).all():
        raise MedFLError(f"{path} is not a three-dimensional volume of finite values; export it again")
    column, row, between = map(float, image.header.get_zooms()[:3])
    slices = np.flip(values.transpose(2, 1, 0), axis=(1, 2))
    return Volume(slices, (between, row, column), image.affine)


def lie_together(one: Volume, other: Volume) -> bool:
    """Whether the voxels of two volumes of one size lie at the same places. They don't if a label was saved
    without its scan's orientation; it would be mirrored."""
    apart = distance_apart(one.affine, other.affine, one.slices.shape[::-1])
    return apart <= OFF_GRID * min(one.spacing)


def to_8_bits(volume: np.ndarray) -> np.ndarray:
    """Any intensities as uint8. Black is 0, or the lowest value if many values lie below 0, as in CT and
    standardised MRI; even then a background of exactly 0 stays black."""
    above = volume[volume > 0]
    if not above.size:
        return np.zeros(volume.shape, np.uint8)
    low, high = np.percentile(volume[volume != 0], ENDS[0]), np.percentile(above, ENDS[1])
    low = low if low < -NOISE * high else 0.0
    bright = (255 * ((volume - low) / max(high - low, 1e-6)).clip(0, 1)).round().astype(np.uint8)
    outside = volume == 0
    if outside.mean() > BACKGROUND:
        bright[outside] = 0
    return bright


def region(labels: np.ndarray, task: Task, path: Path) -> np.ndarray:
    """The task's region as a mask, uint8 0 or 255; where it has classes, the labels stay. Raises MedFLError for values
    that the task doesn't name."""
    odd = np.setdiff1d(np.unique(labels), (0, *task.labels))
    if odd.size:
        raise MedFLError(
            f"{path} has the value {odd[0]:g}, but the labels of {task.name} are "
            f"{', '.join(map(str, task.labels))}; list all labels of the region in the task file"
        )
    return labels.astype(np.uint8) if task.classes else np.where(labels != 0, np.uint8(255), np.uint8(0))


def write_patient(name: str, image: Path, label: Path, task: Task, out: Path) -> None:
    """Write one patient's folder. Raises MedFLError if image and label don't match."""
    spacing = None
    if image.name.lower().endswith(NIFTI):
        scan, outlined = read_nifti(image), read_nifti(label)
        if scan.slices.shape == outlined.slices.shape and not lie_together(scan, outlined):
            raise MedFLError(
                f"{label} has another position than {image}, by its affine; export the label on the image's "
                "own grid"
            )
        pixels, labels, spacing = to_8_bits(scan.slices), outlined.slices, scan.spacing
    else:
        pixels = read_slice(image)[None]
        if len(task.channels) == 1 and (pixels != pixels[..., :1]).any():
            raise MedFLError(
                f"{image} has colours, but {task.name} has one channel; save it in grey, or name three "
                "channels in the task file"
            )
        labels = read_slice(label)
        if (labels != labels[..., :1]).any():
            raise MedFLError(
                f"{label} is a coloured picture, but labels are grey values; save it with one number for "
                "each region"
            )
        labels = labels[None, ..., 0]
    if pixels.shape[:3] != labels.shape:
        raise MedFLError(f"{image} and {label} differ in size; export the label on the image's own grid")
    masks = region(labels, task, label)
    for number, (picture, mask) in enumerate(zip(pixels, masks), start=1):
        for content, kind in ((picture, ""), (mask, "_mask")):
            with atomic_write(out / name / f"{name}_{number}{kind}.png") as file:
                Image.fromarray(content).save(file, format="PNG")
    if spacing:
        positions = [spacing[0] * k for k in range(len(masks))]
        about = {"version": 1, "spacing_mm": list(spacing), "slice_positions_mm": positions}
        write_json(out / name / SPACING, about)


def main() -> None:
    arguments = parse()
    task = named_task(arguments.task)
    if arguments.out.exists() and any(arguments.out.iterdir()):
        raise MedFLError(f"{arguments.out} is not empty; name a new folder with --out")
    found = pairs(arguments.source)
    for name, image, label in tqdm(found, desc="preparing", unit="patient", disable=None):
        write_patient(name, image, label, task, arguments.out)
    path = FOLDER / f"{arguments.task}.toml"
    content = text_of(path if path.exists() else Path(arguments.task))
    with atomic_write(arguments.out / NAME, "w") as file:
        file.write(content)
    print(f"{task.title}: {counted(len(found), 'patient')} in {arguments.out}")
    print(f"next: python train_centralized.py --data-dir {typed(arguments.out)}")
    if task.classes:
        names = " and ".join(one.name for one in task.classes)
        print(f"      with --classes {len(task.classes)} it outlines {names} each by itself")


if __name__ == "__main__":
    run_script(main)
