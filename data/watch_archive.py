"""A worker beside a hospital's archive: it finds new matching studies, predicts, and sends the mask and a
report back.

    python data/watch_archive.py --dicomweb https://pacs.example/dicom-web --login login.toml \\
        --query StudyDescription=*BRAIN* --since 2026-01-31 --checkpoint MODEL --private /data/worker
    python data/watch_archive.py --dicomweb URL --login login.toml --private /data/worker \\
        --prepare-only --out /data/prepared

A study is processed when it has not changed for --quiet seconds; one that changes later is processed again.
Finished studies are listed in the private folder, so that the worker and the archive may be restarted.
Nothing in the archive is changed or deleted. Needs requirements-dicom.txt and, to predict, requirements.txt.
"""

import argparse
import sys
import time
from datetime import datetime
from pathlib import Path

from common import MedFLError, counted, run_script

try:
    from radiology.archive import REPORT, Preparation
    from radiology.connection import add_login_option, add_query_options, read_query
    from radiology.dicomweb import DICOMweb
    from radiology.ledger import Entry, Ledger
    from radiology.login import read_login
    from radiology.pseudonyms import Pseudonyms, check_folders
    from radiology.retrieval import INCOMING, FoundSeries, FoundStudy, Retrieval, Unreachable
    from radiology.rules import DEFAULT, load_rules
    from radiology.watch import Deal, Watch
except ModuleNotFoundError as error:
    missing = error.name
else:
    missing = None

SENT = "sent.jsonl"  # the ledger of predictions, in the private folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dicomweb", required=True, metavar="URL", help="the archive's address")
    if not missing:
        add_login_option(parser)
        add_query_options(parser)
    parser.add_argument("--checkpoint", type=Path, help="the model, a .pth file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--rtstruct", action="store_true", help="also send the outline as RTSTRUCT")
    parser.add_argument(
        "--prepare-only", action="store_true", help="prepare studies for training and send nothing"
    )
    parser.add_argument("--out", type=Path, help="with --prepare-only: folder for the prepared patients")
    parser.add_argument(
        "--private",
        type=Path,
        required=True,
        help="folder for the list of finished studies; it identifies studies and must stay here",
    )
    parser.add_argument(
        "--rules", type=Path, help="rules that tell series apart (default radiology/series_rules.toml)"
    )
    parser.add_argument("--every", type=float, default=60, help="seconds between two queries (default 60)")
    parser.add_argument(
        "--quiet",
        type=float,
        default=120,
        help="seconds without a change before a study is processed (default 120)",
    )
    parser.add_argument("--once", action="store_true", help="end as soon as no study is waiting")
    arguments = parser.parse_args()
    if arguments.prepare_only != bool(arguments.out) or arguments.prepare_only == bool(arguments.checkpoint):
        parser.error("give --checkpoint to predict, or --prepare-only with --out")
    if arguments.every <= 0 or arguments.quiet < 0:
        parser.error("--every must be above 0, and --quiet must not be negative")
    return arguments


def say(text: str) -> None:
    """Print a line with the time; it must not name a patient."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def preparing(arguments: argparse.Namespace, retrieval: "Retrieval", ledger: "Ledger") -> "Deal":
    """The function that prepares a study, in the way and with the ledger of data/prepare_hospital.py."""
    check_folders(arguments.private / INCOMING, arguments.out, arguments.private)
    # its messages can quote headers, so they are not printed; the page and the report hold them
    preparation = Preparation(arguments.out, Pseudonyms(arguments.private), retrieval.rules, lambda _: None)

    def deal(study: "FoundStudy", listed: "list[FoundSeries]") -> "Entry":
        with retrieval.fetched(study, listed) as whole:
            name, rows = preparation.prepare_one(whole)
        entry = Entry(study.uid, "", name, rows)
        known = [*(e for e in ledger.of_all() if e.study != study.uid), entry]
        preparation.write_overview_of(
            [e.name for e in known if e.name], [row for e in known for row in e.rows]
        )
        say(f"{name} prepared" if name else f"a study could not be prepared; {REPORT} says why")
        return entry

    return deal


def sending(arguments: argparse.Namespace, archive: "DICOMweb", retrieval: "Retrieval") -> "tuple[Deal, str]":
    """The function that predicts a study and sends the result back, and the model's hash."""
    from checkpoint import load_checkpoint  # torch is not needed to prepare
    from radiology.delivery import predict_and_send
    from runs.usage import choose_device

    checkpoint = load_checkpoint(arguments.checkpoint, choose_device(arguments.device))

    def deal(study: "FoundStudy", listed: "list[FoundSeries]") -> "Entry":
        proposal, sent = predict_and_send(study, listed, archive, retrieval, checkpoint, arguments.rtstruct)
        say(
            f"a study of {counted(proposal.series.slices, 'slice')} predicted, {counted(sent, 'object')} sent"
        )
        return Entry(study.uid, "")

    return deal, checkpoint.sha256()


def watch(arguments: argparse.Namespace) -> "Watch":
    """The watch as the options describe it. Raises MedFLError for options that can't be right."""
    archive = DICOMweb(arguments.dicomweb, read_login(arguments.login))
    query, rules = read_query(arguments), load_rules(arguments.rules or DEFAULT)
    retrieval = Retrieval(archive, rules, arguments.private)
    arguments.private.mkdir(mode=0o700, parents=True, exist_ok=True)
    if arguments.prepare_only:
        ledger, about = Ledger(arguments.private), ""
        deal = preparing(arguments, retrieval, ledger)
    else:
        deal, about = sending(arguments, archive, retrieval)
        ledger = Ledger(arguments.private, SENT)
    return Watch(retrieval, query, ledger, arguments.quiet, deal, say, about)


def main() -> None:
    arguments = parse()
    if missing:
        raise MedFLError(
            f"this needs {missing}, which is not installed; `pip install -r requirements-dicom.txt`"
        )
    watching = watch(arguments)
    say("watching")
    reachable = True
    while True:
        try:
            watching.look()
            if not reachable:
                say("the archive answers again")
            reachable = True
        except Unreachable as error:
            if reachable:
                say(f"{error}; the next query tries again")
            reachable = False
        if arguments.once and reachable and not watching.waiting:
            return
        time.sleep(arguments.every)


if __name__ == "__main__":
    run_script(main)
