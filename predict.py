"""Segment slices: any TIFF, PNG or JPEG files, or folders of them; or a study in a hospital's archive.

    python predict.py patient_folder slice.png --checkpoint models/transunet_centralized_best.pth --out predictions
    python predict.py --dicomweb https://pacs.example/dicom-web --login login.toml --study 1.2.3 --checkpoint MODEL

Writes <name>_mask.png (0 or 255, the slice's own size; a model of several classes writes their labels) per slice,
predictions.csv (file, patient, slice, tumour_pixels, tumour_share, and the pixels of each class) and components.csv:
each connected part's volume with an interval from the probability, and its two largest perpendicular diameters
(evaluation/components.py), in cm³ and mm where a volume.json gives the spacing. The slices of a folder belong to one
patient and are normalised together, as in training. Files that are named one by one form a volume if they lie in one
folder and have the same name before the slice number. A file without a number is a volume of its own; a single slice
is segmented less reliably. `*_mask.*` files are ignored.

For a study in an archive, the mask is sent back as DICOM SEG, with a structured report of the measurements. Both are
marked as unverified research output. Nothing is kept on this machine. Needs requirements-dicom.txt (docs/archive.md).
"""

import argparse
import csv
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from borders.escaping import cell, terminal
from checkpoint import load_checkpoint
from common import ROOT, MedFLError, counted, run_script
from dataset import add_mask_option
from evaluation.components import COLUMNS as OF_COMPONENT
from evaluation.components import find_components
from inference import labelled, predict_classes, to_mask
from runs.models import find_checkpoints
from runs.usage import choose_device
from scans.folders import refuse_dangling, walk
from scans.naming import MASK_SUFFIX, group_volumes, is_image, is_mask, slice_number
from scans.pairing import pair
from scans.pictures import read_volume
from scans.spacing import NAME, read_spacing
from storage.files import atomic_write, write_csv

TABLE = "predictions.csv"
COLUMNS = ("file", "patient", "slice", "tumour_pixels", "tumour_share")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="*",
        metavar="IN",
        help="slices, or folders of slices (also in sub-folders)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="the model, a .pth file (default: the newest *_best.pth in models/, else the phantom model)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="folder for the masks (default predictions)"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also write <name>_probability.png, where 255 is certain"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    add_mask_option(parser)
    archive = parser.add_argument_group("a study in an archive")
    archive.add_argument(
        "--dicomweb", metavar="URL", help="the archive's address, such as https://pacs.example/dicom-web"
    )
    archive.add_argument("--study", metavar="UID", help="the study's StudyInstanceUID")
    archive.add_argument("--rtstruct", action="store_true", help="also send the outline as RTSTRUCT")
    archive.add_argument(
        "--rules", type=Path, help="rules that tell series apart (default radiology/series_rules.toml)"
    )
    archive.add_argument(
        "--login", help='file with the login at the archive, readable by you only; or "ask" for a prompt'
    )
    arguments = parser.parse_args()
    if bool(arguments.inputs) == bool(arguments.dicomweb) or bool(arguments.study) != bool(
        arguments.dicomweb
    ):
        parser.error("give slices, or --dicomweb with --study")
    return arguments


def find_slices(
    inputs: list[Path], out: Path, mask_suffix: str = MASK_SUFFIX
) -> tuple[list[Path], set[Path]]:
    """The slices in the given files and folders, each once and without what an earlier run wrote to `out`; and
    the folders in which slices were found, for inputs that are folders.

    Raises MedFLError for an input that is missing, can't be read or is no picture, and if no slice is left.
    """
    files: list[Path] = []
    folders: set[Path] = set()
    for given in inputs:
        if given.is_dir():
            below = given.resolve() in out.resolve().parents
            inside = {
                folder: found
                for folder, found in walk(given)
                if not (below and folder.resolve().is_relative_to(out.resolve()))
            }
            files += pair((file for found in inside.values() for file in found), mask_suffix).images
            folders |= inside.keys()
        elif not given.exists():
            refuse_dangling(given)
            raise MedFLError(f"there is no {given}; check the name")
        elif is_image(given, mask_suffix):
            files.append(given)
        elif not is_mask(given, mask_suffix):
            raise MedFLError(f"{given} is no TIFF, PNG or JPEG; convert it first")
    if not files:
        raise MedFLError(
            "there is no slice in the named files (TIFF, PNG or JPEG; masks are ignored); name other files"
        )
    return list(dict.fromkeys(files)), folders


def output_names(files: list[Path]) -> dict[Path, str]:
    """A name for each slice's outputs: the slice's name, preceded by its folder's name where two slices share one.
    macOS and Windows treat names as equal that differ only in case or in how accents are encoded."""
    counts = Counter(_on_any_disk(file.stem) for file in files)
    names = {
        file: file.stem
        if counts[_on_any_disk(file.stem)] == 1
        else f"{file.parent.name}_{file.stem}_{file.suffix[1:]}"
        for file in files
    }
    first: dict[str, Path] = {}
    for file, name in names.items():
        if first.setdefault(_on_any_disk(name), file) != file:
            raise MedFLError(
                f"the masks of {first[_on_any_disk(name)]} and {file} would have the same name; predict their folders "
                "one after the other"
            )
    return names


def refuse_to_mix(names: dict[Path, str], out: Path) -> None:
    """Raises MedFLError where a mask of an earlier run is another slice's: patients whose slices have the same names
    would be mixed."""
    try:
        with open(out / TABLE, encoding="utf-8", newline="") as table:
            former = {row["file"] for row in csv.DictReader(table)}
    except (OSError, KeyError, ValueError, csv.Error):  # no run came to its end here
        return
    for file, name in names.items():
        if (out / f"{name}_mask.png").exists() and cell(str(file)) not in former:
            raise MedFLError(
                f"{out} holds a mask of another slice called {name}; choose another --out, or empty that one"
            )


def _on_any_disk(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def spacing_of(slices: list[Path]) -> tuple[float, float, float] | None:
    """mm between rows, columns and slices of a patient, or None without a `volume.json` beside the slices."""
    path = slices[0].parent / NAME
    if not path.exists():
        return None
    between, rows, columns = read_spacing(path, len(slices))
    return rows, columns, between


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """(H, W) uint8 as a grey PNG."""
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def predict_slices(arguments: argparse.Namespace) -> None:
    """Segment files, and write masks and tables."""
    files, folders = find_slices(arguments.inputs, arguments.out, arguments.mask_suffix)
    if arguments.out.resolve() in {file.parent.resolve() for file in files}:
        raise MedFLError(
            f"{arguments.out} holds slices, and the masks could overwrite others there; choose another --out"
        )
    names, volumes = output_names(files), group_volumes(files, folders)
    refuse_to_mix(names, arguments.out)
    path = arguments.checkpoint or find_checkpoints(ROOT / "models")[0]
    checkpoint = load_checkpoint(path, choose_device(arguments.device))
    if arguments.checkpoint is None:
        data = terminal(checkpoint.metadata.get("data", {}).get("name", "unknown data"))
        print(f"with {path}, trained on {data}")
    labels = checkpoint.labels
    rows: list[tuple] = []
    parts: list[tuple] = []
    for patient, slices in tqdm(volumes, desc="segmenting", unit="volume", disable=None):
        spacing = spacing_of(slices) if slices[0].parent in folders else None
        probabilities, classes = predict_classes(checkpoint.model, read_volume(slices))
        found = find_components(to_mask(probabilities, checkpoint.threshold), spacing, probabilities)
        parts += [(patient, *part.row().values()) for part in found.parts]
        for file, probability, likeliest in zip(slices, probabilities, classes):
            mask = to_mask(probability, checkpoint.threshold)
            if labels:
                mask = labelled(mask, likeliest, labels.values())
            write_picture(mask, arguments.out / f"{names[file]}_mask.png")
            if arguments.probabilities:
                write_picture(
                    (probability * 255).round().astype(np.uint8),
                    arguments.out / f"{names[file]}_probability.png",
                )
            tumour = int(np.count_nonzero(mask))
            of_classes = (int(np.count_nonzero(mask == label)) for label in labels.values())
            rows.append((str(file), patient, slice_number(file), tumour, tumour / mask.size, *of_classes))
    write_csv(arguments.out / TABLE, [(*COLUMNS, *(f"pixels of {name}" for name in labels)), *rows])
    write_csv(arguments.out / "components.csv", [("patient", *OF_COMPONENT), *parts])
    print(
        f"{counted(len(rows), 'slice')} segmented in {counted(len(volumes), 'volume')}, "
        f"{terminal(checkpoint.task.region)} in "
        f"{sum(row[COLUMNS.index('tumour_pixels')] > 0 for row in rows)}; wrote "
        f"{arguments.out}"
    )
    print(f"next: look at {arguments.out / TABLE}, or at the slices with `make app`")


def predict_study(arguments: argparse.Namespace) -> None:
    """Fetch a study from an archive, segment it, and send back what the model proposes."""
    try:
        from radiology.delivery import predict_and_send
        from radiology.dicomweb import DICOMweb
        from radiology.login import read_login
        from radiology.retrieval import Retrieval, passing_folder
        from radiology.rules import DEFAULT, load_rules
    except ModuleNotFoundError as error:
        raise MedFLError(
            f"this needs {error.name}, which is not installed; `pip install -r requirements-dicom.txt`"
        ) from error
    archive = DICOMweb(arguments.dicomweb, read_login(arguments.login))
    rules = load_rules(arguments.rules or DEFAULT)
    checkpoint = load_checkpoint(arguments.checkpoint, choose_device(arguments.device))
    study = archive.find_study(arguments.study)
    with passing_folder() as private:
        retrieval = Retrieval(archive, rules, private)
        listed = archive.find_series(study.uid)
        proposal, sent = predict_and_send(study, listed, archive, retrieval, checkpoint, arguments.rtstruct)
    for note in proposal.notes:
        print(f"note: {note}")
    what = f"{proposal.volume_ml:.1f} ml proposed as tumour" if proposal.mask.any() else "no tumour proposed"
    print(
        f"{what}; "
        + (
            f"{sent} objects were sent to the study"
            if sent
            else "the archive already has this model's result"
        )
    )
    print("next: look at the study in the archive's viewer")


def main() -> None:
    arguments = parse()
    if arguments.dicomweb:
        predict_study(arguments)
    else:
        predict_slices(arguments)


if __name__ == "__main__":
    run_script(main)
