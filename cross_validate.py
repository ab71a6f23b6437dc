"""Cross-validation: train K models, test each on another part of the patients, and pool the test patients.

    python cross_validate.py --data-dir data --folds 5 --minutes 12

Every patient is tested once, by a model that never saw the patient. The result can be compared with published
figures. After an interruption, give the same command again: finished folds are kept, and the interrupted one
continues after its last epoch. Writes into --out (default models/cross_validation): plan.json, the settings and the
folds; fold_K/, as train_centralized.py writes it, with rows.json, the figures of its test patients; scores.json and
patients.csv, over all patients.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import load_checkpoint
from common import MedFLError, add_settings, counted, run_script, settings_from, tell, typed, utc_now
from dataset import Dataset, add_mask_option, load_dataset
from evaluation.failures import as_lines, failures
from evaluation.metrics import report
from evaluation.scoring import classes_to_score, score_patients
from evaluation.tables import table_lines, write_patients
from runs.central import CentralTraining
from runs.history import stored_settings
from runs.usage import choose_device
from scans.cache import add_cache_option, choose_cache
from split import VAL_FRACTION, Split, make_folds, save_split
from storage.files import claim, write_json
from training import TrainingSettings

LAST = "transunet_centralized_last.pth"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="folder with the scans (default data)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("models/cross_validation"),
        help="folder for the output files (default models/cross_validation)",
    )
    parser.add_argument(
        "--folds", type=int, default=5, help="number of models and of parts of the patients (default 5)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=VAL_FRACTION,
        help=f"share of a fold's other patients for validation (default {VAL_FRACTION})",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    add_settings(parser, TrainingSettings)
    add_cache_option(parser)
    add_mask_option(parser)
    return parser.parse_args()


def keep_plan(plan: dict, path: Path) -> None:
    """Write the plan. Raises MedFLError if the folder holds folds of another plan."""
    if not path.exists():
        return write_json(path, plan)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MedFLError(f"{path} can't be read; choose another --out") from error
    unlike = sorted(name for name in plan if before.get(name) != plan[name])
    if unlike:
        raise MedFLError(
            f"{path.parent} holds folds with other {' and '.join(unlike)}; give the command that made them, on "
            "the same data, or choose another --out"
        )


def fold_rows(
    dataset: Dataset, split: Split, settings: TrainingSettings, device: torch.device, out: Path
) -> list[dict]:
    """The figures of a fold's test patients. If there are none yet, trains the fold's model first, or continues its
    training."""
    done = out / "rows.json"
    if done.exists():
        try:
            return json.loads(done.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MedFLError(f"{done} can't be read; delete it to score the fold again") from error
    save_split(split, out / "split.json")
    resume = (out / LAST).exists()
    if resume:
        settings = stored_settings(out / LAST)
    training = CentralTraining(dataset, split, settings, device, out, resume)
    training.run()
    best = load_checkpoint(training.best, device)
    classes = classes_to_score(best.labels, dataset)
    rows = score_patients(
        best.model, dataset, split.test, best.threshold, progress=True, closely=True, classes=classes
    )
    write_json(done, rows)
    return rows


def main() -> None:
    arguments = parse()
    settings, device = settings_from(arguments, TrainingSettings), choose_device(arguments.device)
    choose_cache(arguments.cache)
    dataset = load_dataset(arguments.data_dir, mask_suffix=arguments.mask_suffix)
    tell(dataset.notes)
    sites = {patient.name: patient.site for patient in dataset.patients}
    splits = make_folds(sites, arguments.folds, settings.seed, arguments.val_fraction)
    plan = {
        "patients": [split.sha256() for split in splits],
        "settings": asdict(settings),
        "scans or masks": dataset.content,  # a finished fold is not scored again, so its figures are of these
    }
    claimed = claim(arguments.out, "training")
    keep_plan(plan, arguments.out / "plan.json")
    rows: list[dict] = []
    for number, split in enumerate(splits, start=1):
        print(
            f"fold {number} of {len(splits)}: {counted(len(split.train), 'patient')} to train on, "
            f"{len(split.val)} for validation, {len(split.test)} for the test",
            flush=True,
        )
        rows += fold_rows(dataset, split, settings, device, arguments.out / f"fold_{number}")
    figures, failed = report(rows), failures(rows)
    print(
        f"\n{dataset.name}, {counted(len(rows), 'patient')}, each scored by the one of {len(splits)} models that "
        "never saw the patient"
    )
    print(*table_lines(figures, dataset.region), sep="\n")
    print("", *as_lines(failed, dataset.region), sep="\n")
    about = {"data": dataset.name, "folds": len(splits), "settings": asdict(settings), "created": utc_now()}
    write_json(arguments.out / "scores.json", {**about, **figures, **failed})
    write_patients(figures, arguments.out / "patients.csv")
    print(f"wrote {arguments.out / 'scores.json'} and {arguments.out / 'patients.csv'}")
    print(
        f"next: python train_centralized.py --data-dir {typed(arguments.data_dir)}, to train one model for use"
    )
    claimed.release()


if __name__ == "__main__":
    run_script(main)
