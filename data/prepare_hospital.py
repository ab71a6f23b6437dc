"""Turns a hospital's export, DICOM or NIfTI, into what training reads: aligned slices under pseudonyms, with
their masks.

    python data/prepare_hospital.py --dicom /data/export --out /data/prepared --dry-run    only say what would be taken
    python data/prepare_hospital.py --dicom /data/export --out /data/prepared
    python data/prepare_hospital.py --nifti /data/study --out /data/prepared

Needs requirements-dicom.txt. Key, table of names and report stay beside the archive, in <archive>_private. A
run that was broken off goes on; what is whole and unchanged is not made again.
"""

import argparse
import sys
from pathlib import Path

from common import MedFLError, run_script

try:
    from tqdm import tqdm

    from radiology.archive import PAGE, REPORT, Preparation
    from radiology.nifti import find_volumes
    from radiology.pseudonyms import Pseudonyms, check_folders
    from radiology.rules import DEFAULT, load_rules
    from radiology.series import Refused, Series, find_series
    from radiology.studies import Study, plan_studies, shared_numbers
except ModuleNotFoundError as error:
    missing = error.name
else:
    missing = None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dicom", type=Path, help="folder with DICOM files, in any order and depth")
    source.add_argument(
        "--nifti",
        type=Path,
        help="folder with a folder per patient, in it NIfTI volumes or a folder per study",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the prepared patients; it can be handed on"
    )
    parser.add_argument(
        "--private", type=Path, help="folder for key, table of names and report (default ARCHIVE_private)"
    )
    parser.add_argument(
        "--rules", type=Path, help="how series are told apart (default radiology/series_rules.toml)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be taken and left out, and write nothing"
    )
    return parser.parse_args()


def find(arguments: argparse.Namespace) -> "tuple[list[Series], list[Refused]]":
    """Series and refused files of the archive. Raises MedFLError for a folder that is missing or holds
    nothing."""
    source = arguments.dicom or arguments.nifti
    if not source.is_dir():
        raise MedFLError(f"there is no folder {source}; name the one that the archive exported to")
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    if not paths:
        raise MedFLError(f"{source} holds no file; name the folder that the archive exported to")
    looked = tqdm(paths, desc="reading headers", unit="file", disable=None)
    return find_series(looked) if arguments.dicom else find_volumes(source, looked)


def print_plan(studies: "list[Study]", refused: "list[Refused]") -> None:
    """What would be taken for which channel, and what is left out and why."""
    for study in studies:
        print(
            f"\npatient {study.patient_id or '(no number)'}, study {study.when[:8] or study.uid}: "
            + ("is prepared" if study.channels else "is left out")
        )
        for line in study.lines:
            s = line.series
            print(
                f"  {'' if s.number is None else s.number:>5} {s.description[:32]:32} {s.modality:5} "
                f"{s.slices:>4} × {s.columns}×{s.rows:<5} {line.used_as or '–':13} {line.why}"
            )
    for one in refused:
        print(f"{one.path}: {one.why}")
    whole = sum(bool(study.channels) for study in studies)
    print(
        f"\n{whole} of {len(studies)} studies would be prepared, {sum(s.mask is not None for s in studies)} "
        f"with a mask; {len(refused)} files belong to none; nothing was written"
    )


def main() -> None:
    arguments = parse()
    if missing:
        raise MedFLError(
            f"this needs {missing}, which is not installed; `pip install -r requirements-dicom.txt`"
        )
    source = arguments.dicom or arguments.nifti
    private = arguments.private or source.resolve().parent / f"{source.resolve().name}_private"
    check_folders(source, arguments.out, private)
    rules = load_rules(arguments.rules or DEFAULT)
    found, refused = find(arguments)
    studies = plan_studies(found, rules)
    for number, told in shared_numbers(found).items():
        named = f" ({number or 'none'})" if arguments.dry_run else "; --dry-run names it"
        print(f"{told}{named}", file=sys.stderr)
    if arguments.dry_run:
        return print_plan(studies, refused)
    preparation = Preparation(
        arguments.out, Pseudonyms(private), rules, lambda text: tqdm.write(text, file=sys.stderr)
    )
    try:
        preparation.run(studies)
    finally:
        preparation.write_overview(studies, refused)
    masked, whole = sum(made.mask for made in preparation.of(studies)), len(preparation.of(studies))
    if not whole:
        raise MedFLError(
            f"none of {len(studies)} studies could be prepared; {private / REPORT} says why for each series"
        )
    print(
        f"{whole} of {len(studies)} studies in {arguments.out}, {masked} with a mask; look through "
        f"{arguments.out / PAGE}"
    )
    print(
        f"{private / REPORT} says of each series what became of it; that folder leads back to patients and "
        f"stays here"
    )


if __name__ == "__main__":
    run_script(main)
