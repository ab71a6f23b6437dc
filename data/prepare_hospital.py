"""Turn a hospital's scans into training data: aligned slices under pseudonyms, with their masks.

    python data/prepare_hospital.py --dicom /data/export --out /data/prepared --dry-run    only list what would be used
    python data/prepare_hospital.py --dicom /data/export --out /data/prepared
    python data/prepare_hospital.py --nifti /data/study --out /data/prepared
    python data/prepare_hospital.py --dicomweb https://pacs.example/dicom-web --login login.toml --since 2026-01-31 \
        --out /data/prepared

Needs requirements-dicom.txt. Key, table of names and report are kept beside the export, in <export>_private,
or for an archive in <out>_private; fetched files are stored there until they are prepared. An interrupted run
continues; studies that are complete and unchanged are neither fetched nor prepared again.
"""

import argparse
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

from borders.escaping import terminal
from common import MedFLError, counted, run_script, typed
from scans.folders import walk

try:
    from tqdm import tqdm

    from radiology.archive import PAGE, REPORT, Made, Preparation
    from radiology.collection import NAME as COLLECTION
    from radiology.collection import collection_in
    from radiology.connection import (
        add_dimse_options,
        add_login_option,
        add_query_options,
        connect,
        read_query,
    )
    from radiology.layout import UNMASKED
    from radiology.ledger import Ledger
    from radiology.nifti import find_volumes
    from radiology.pseudonyms import Pseudonyms, check_folders
    from radiology.retrieval import INCOMING, Archive, FoundStudy, Retrieval, ordered
    from radiology.rules import DEFAULT, Rules, load_rules
    from radiology.series import Refused, Series, find_series
    from radiology.studies import Study, plan_studies, shared_numbers
    from radiology.unpacking import is_zip, private_room, remove_unpacked, unpack
    from radiology.worklist import prepare_studies
except ModuleNotFoundError as error:
    missing = error.name
else:
    missing = None

NAMED = 5  # how many of the missing patients' numbers are printed at most


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--dicom",
        type=Path,
        help="folder with DICOM files, in any order and depth; a ZIP in it holds one patient",
    )
    source.add_argument(
        "--nifti",
        type=Path,
        help="folder with a folder (or a ZIP) per patient, which holds NIfTI volumes or a folder per study; or "
        "a collection with dataset.json, as in nnU-Net and the Decathlon",
    )
    source.add_argument(
        "--dicomweb", metavar="URL", help="an archive's address, such as https://pacs.example/dicom-web"
    )
    source.add_argument(
        "--dimse", metavar="TITLE@HOST:PORT", help="an archive that speaks classic DICOM only"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the prepared patients; it can be passed on"
    )
    parser.add_argument(
        "--private",
        type=Path,
        help="folder for key, table of names and report (default EXPORT_private, or OUT_private)",
    )
    parser.add_argument(
        "--rules", type=Path, help="rules that tell series apart (default radiology/series_rules.toml)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be used and left out, and write nothing"
    )
    if not missing:
        add_query_options(parser)
        add_login_option(parser)
        add_dimse_options(parser)
    return parser.parse_args()


def find(arguments: argparse.Namespace) -> "tuple[list[Series], list[Refused]]":
    """Series and refused files of the export; each ZIP in it holds one patient and is unpacked. Raises
    MedFLError for a folder that is missing or empty."""
    source = arguments.dicom or arguments.nifti
    if is_zip(source) and source.is_file():
        paths, source = [source], source.parent
    elif source.is_dir():
        paths = [path for folder, files in walk(source) for path in files]
    else:
        raise MedFLError(f"there is no folder {source}; name the folder that the archive exported to")
    if not paths:
        raise MedFLError(f"{source} holds no file; name the folder that the archive exported to")
    roots: dict[Path, list[Path]] = {source: sorted(path for path in paths if not is_zip(path))}
    refused: list[Refused] = []
    packs = sorted(filter(is_zip, paths))
    root = private_room(arguments.private) if packs else source
    for packed in packs:
        try:
            files = unpack(packed, root / packed.relative_to(source).with_suffix(""))
        except MedFLError as error:
            refused.append(Refused(packed, str(error)))
        else:
            roots.setdefault(root, []).extend(files)
    looked = {
        root: tqdm(files, desc="reading headers", unit="file", disable=None) for root, files in roots.items()
    }
    if arguments.dicom:
        found, more = find_series(chain.from_iterable(looked.values()))
        return found, refused + more
    each = [find_volumes(root, files) for root, files in looked.items()]
    return [series for found, _ in each for series in found], refused + [r for _, more in each for r in more]


def print_plan(studies: "list[Study]", refused: "list[Refused]") -> None:
    """Print which series would be used for which channel, and what is left out and why."""
    for study in studies:
        print(
            f"\npatient {terminal(study.patient_id or '(no number)')}, study "
            f"{terminal(study.when[:8] or study.uid)}: "
            + ("is prepared" if study.channels else "is left out")
        )
        for line in study.lines:
            s = line.series
            named = f"{terminal(s.description)[:32]:32} {terminal(s.modality):5}"
            print(
                f"  {'' if s.number is None else s.number:>5} {named} "
                f"{s.slices:>4} × {s.columns}×{s.rows:<5} {line.used_as or '–':13} {terminal(line.why)}"
            )
    for one in refused:
        print(f"{terminal(one.path)}: {terminal(one.why)}")
    whole = sum(bool(study.channels) for study in studies)
    print(
        f"\n{whole} of {len(studies)} studies would be prepared, {sum(s.mask is not None for s in studies)} "
        f"with a mask; {counted(len(refused), 'file')} without a patient; nothing was written"
    )
    print("next: the same command without --dry-run")


def find_studies(archive: "Archive", arguments: argparse.Namespace) -> "list[FoundStudy]":
    """The archive's studies that match. Raises MedFLError if there are none."""
    query = read_query(arguments)
    studies = ordered(archive.find_studies(query))
    if not studies:
        raise MedFLError("the archive has no study that matches; check --patients, --query and --since")
    there = {study.patient_id.strip() for study in studies}
    if absent := [patient for patient in query.patients if patient not in there]:
        tell(
            f"the archive has no matching study of {counted(len(absent), 'patient')} in "
            f"{arguments.patients}: {', '.join(absent[:NAMED])}{', …' if len(absent) > NAMED else ''}"
        )
    return studies


def from_archive(arguments: argparse.Namespace, rules: "Rules") -> "tuple[list[Made], int] | None":
    """Fetch and prepare an archive's studies. Returns the results of those that could be prepared and the
    number found; None after a dry run, which fetches headers only."""
    archive = connect(arguments)
    private = arguments.private
    check_folders(private / INCOMING, arguments.out, private)
    found = find_studies(archive, arguments)
    retrieval = Retrieval(archive, rules, private)
    if arguments.dry_run:
        looked = tqdm(found, desc="reading headers", unit="study", disable=None)
        print_plan([retrieval.plan(study) for study in looked], [])
        return None
    preparation = Preparation(arguments.out, Pseudonyms(private), rules, tell)
    ledger = Ledger(private)
    try:
        bar = tqdm(found, desc="fetching and preparing", unit="study", disable=None)
        prepare_studies(bar, retrieval, preparation, ledger, tell)
    finally:
        entries = ledger.of([study.uid for study in found])
        made = preparation.write_overview_of(
            [entry.name for entry in entries if entry.name], [row for entry in entries for row in entry.rows]
        )
    return made, len(found)


def from_folder(arguments: argparse.Namespace, rules: "Rules") -> "tuple[list[Made], int] | None":
    """Prepare an export's studies. Returns the results of those that could be prepared and the number found;
    None after a dry run."""
    check_folders(arguments.dicom or arguments.nifti, arguments.out, arguments.private)
    try:
        return prepare_folder(arguments, rules)
    finally:
        remove_unpacked(arguments.private)


def prepare_folder(arguments: argparse.Namespace, rules: "Rules") -> "tuple[list[Made], int] | None":
    """As `from_folder`, which removes the unpacked files afterwards."""
    found, refused = find(arguments)
    if arguments.nifti:
        rules = with_labels_of(arguments.nifti, rules, given=arguments.rules is not None)
    studies = plan_studies(found, rules)
    for number, told in shared_numbers(found).items():
        tell(told + (f" ({number or 'none'})" if arguments.dry_run else "; --dry-run names it"))
    if arguments.dry_run:
        print_plan(studies, refused)
        return None
    preparation = Preparation(arguments.out, Pseudonyms(arguments.private), rules, tell)
    try:
        preparation.run(studies)
    finally:
        preparation.write_overview(studies, refused)
    return preparation.of(studies), len(studies)


def with_labels_of(source: Path, rules: "Rules", given: bool) -> "Rules":
    """The rules, with the labels of a collection's dataset.json added if the names of all of them mean tumour
    and the user gave no rules."""
    collection = collection_in(source) if source.is_dir() else None
    labels = collection.tumour_labels() if collection else None
    if collection is None or labels is None or given:
        return rules
    named = ", ".join(f"{value} ({collection.labels[value]})" for value in labels)
    tell(f"these labels of {source / COLLECTION} are taken as tumour: {named}; change this with --rules")
    return replace(rules, labels=labels, text=f"{rules.text}\n{labels}")


def tell(text: str) -> None:
    """Print a line above the progress bar."""
    tqdm.write(terminal(text), file=sys.stderr)


def main() -> None:
    arguments = parse()
    if missing:
        raise MedFLError(
            f"this needs {missing}, which is not installed; `pip install -r requirements-dicom.txt`"
        )
    rules = load_rules(arguments.rules or DEFAULT)
    export = arguments.dicom or arguments.nifti
    beside = (export or arguments.out).resolve()
    arguments.private = arguments.private or beside.parent / f"{beside.name}_private"
    done = from_folder(arguments, rules) if export else from_archive(arguments, rules)
    if done is None:
        return
    made, found = done
    if not made:
        raise MedFLError(
            f"none of {found} studies could be prepared; {arguments.private / REPORT} says why for each series"
        )
    print(
        f"{len(made)} of {found} studies in {arguments.out}, {sum(m.mask for m in made)} with a mask; look through "
        f"{arguments.out / PAGE}"
    )
    print(
        f"{arguments.private / REPORT} lists what happened to each series; that folder identifies patients "
        "and must stay here"
    )
    if any(m.mask for m in made):
        print(f"next: python run_client.py --own-data {typed(arguments.out)} --name LABEL --check")
    else:
        print(
            "no patient has a mask, so none can be used for training; next: python predict.py "
            f"{typed(arguments.out / UNMASKED)} --checkpoint MODEL, or prepare again with their DICOM SEG "
            "or RTSTRUCT"
        )


if __name__ == "__main__":
    run_script(main)
