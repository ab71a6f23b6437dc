"""Train one model in one place.

    python train_centralized.py --data-dir data --epochs 30
    python train_centralized.py --data-dir data --minutes 28
    python train_centralized.py --resume                      --start-or-resume: resumes if there is a run
    torchrun --nproc-per-node 2 train_centralized.py --data-dir data     by several processes (runs/data_parallel.py)
    python train_centralized.py --cid 0 --clients 4 --partition site --out models/local_0    one hospital by itself
    python train_centralized.py --cid 0 --clients 4 --init models/transunet_federated_best.pth --steps 50

Writes into --out (default models/): transunet_centralized_best.pth, the weights that did best on the validation
patients; transunet_centralized_last.pth, which --resume needs; split.json; centralized_curves.png;
centralized.log, a line per minute (speed and remaining time) and per epoch; and centralized_history.csv, a line
per epoch. With --cid, "local" replaces "centralized" in these names.

Columns of the history: epoch, step, seconds (training and scoring so far), learning_rate, train_loss, train_dice
(soft, over batches), val_loss (mean of the same loss over whole validation volumes), val_dice and val_dice_median
(mean and median volume Dice; all three are empty if nothing is held out), encoder (how it began: pretrained,
random, or a file's name).
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from borders import escaping
from checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_start,
    refuse_to_overwrite,
    update_metadata,
)
from common import MedFLError, add_settings, counted, run_script, settings_from, tell, typed
from dataset import Dataset, add_mask_option, load_dataset
from partition import add_partition_options, make_partition
from runs.central import CentralTraining
from runs.data_parallel import Processes
from runs.energy import NAME as ENERGY
from runs.energy import Meter, in_words, keep, summed
from runs.history import stored_settings
from runs.tracking import add_tracking, check_installed, open_trackers
from runs.usage import choose_device
from scans.cache import add_cache_option, choose_cache
from split import PARTS, TEST_FRACTION, VAL_FRACTION, Split, load_split, make_split, save_split, split_for
from storage.files import claim
from training import TrainingSettings


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="folder with kaggle_3m somewhere below (default data)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("models"), help="folder for the output files (default models)"
    )
    parser.add_argument("--split-file", type=Path, help="use this split instead of the one in --out")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=VAL_FRACTION,
        help=f"share of the patients for validation (default {VAL_FRACTION})",
    )
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=TEST_FRACTION,
        help=f"share of the patients kept for the test (default {TEST_FRACTION})",
    )
    parser.add_argument(
        "--cid", type=int, help="train hospital K of a federation by itself, on its share of the dataset"
    )
    add_partition_options(parser)
    parser.add_argument("--init", type=Path, help="start from this checkpoint instead of random weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out after its last complete epoch, with its settings",
    )
    parser.add_argument(
        "--energy",
        action="store_true",
        help=f"measure the electricity used; write it, with the method, into {ENERGY} and the checkpoint",
    )
    parser.add_argument(
        "--start-or-resume",
        action="store_true",
        help="for a service: continue the run in --out, or start one if there is none",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start even if --out holds a run; that run is lost"
    )
    add_tracking(parser)
    add_settings(parser, TrainingSettings)
    add_cache_option(parser)
    add_mask_option(parser)
    return parser.parse_args()


def choose_split(arguments: argparse.Namespace, sites: dict[str, str], seed: int) -> Split:
    """The split that the options ask for. Raises MedFLError if the split in --out has another seed or other
    sizes."""
    path, fractions = arguments.out / "split.json", (arguments.val_fraction, arguments.test_fraction)
    if arguments.split_file or arguments.resume:
        split = load_split(arguments.split_file or path, set(sites))
        if not arguments.resume:
            save_split(split, path)  # beside the checkpoint, where evaluate.py looks
        return split
    split = split_for(path, sites, seed, *fractions)
    if split.seed != seed:
        raise MedFLError(
            f"{path} was drawn with --seed {split.seed}; choose another --out for this seed, delete the "
            "file, or name it with --split-file to keep its patients"
        )
    asked, there = make_split(sites, seed, *fractions), [len(split.part(p)) for p in PARTS]
    if there != [len(asked.part(p)) for p in PARTS]:
        raise MedFLError(
            f"{path} holds {' / '.join(map(str, there))} patients for training, validation and test, but the "
            "fractions ask for other numbers; choose another --out, or delete the file"
        )
    return split


def share_of(arguments: argparse.Namespace, dataset: Dataset, split: Split, seed: int) -> tuple[Split, dict]:
    """One hospital's share of the split, and the checkpoint's origin entry for it. Raises MedFLError for a
    hospital number that does not exist."""
    kind, clients, alpha = arguments.partition, arguments.clients, arguments.alpha
    if not 0 <= arguments.cid < clients:
        raise MedFLError(
            f"--cid is {arguments.cid}, but {clients} hospitals are numbered from 0; choose another, or more "
            "--clients"
        )
    partition = make_partition(dataset.table, split, kind, clients, alpha, seed)
    origin = {
        "kind": "local",
        "hospital": f"hospital-{arguments.cid}",
        "partition": kind,
        "clients": clients,
        "alpha": alpha,
    }
    return partition.hospitals[arguments.cid], origin


def started_from(path: Path, settings: TrainingSettings, split: Split) -> tuple[Checkpoint, str]:
    """The checkpoint of --init, and how the new checkpoint names it. Prints a note if the model may have seen test
    patients."""
    start = load_start(path, settings.model, settings.image_size, settings.norm, settings.classes)
    if start.metadata.get("data", {}).get("split_sha256") not in (None, split.sha256()):
        print(
            f"note: {path} was trained on another split, and may have seen patients that are "
            "kept for the test here"
        )
    before = start.metadata.get("origin", {})
    return start, before.get("strategy") or before.get("kind") or path.name


def prepare(arguments: argparse.Namespace, processes: Processes) -> CentralTraining:
    """The training that the options ask for. Prints a few lines about it."""
    settings = settings_from(arguments, TrainingSettings)
    name = "centralized" if arguments.cid is None else "local"
    best, last = (arguments.out / f"transunet_{name}_{which}.pth" for which in ("best", "last"))
    if arguments.start_or_resume:
        arguments.resume = last.exists()
    kept: dict = {}
    if arguments.resume:
        settings, kept = stored_settings(last), load_checkpoint(last).metadata["origin"]
        for option in ("partition", "clients", "alpha"):
            setattr(arguments, option, kept.get(option, getattr(arguments, option)))
        print("the settings are those of the run in --out; other training options are ignored")
    device = choose_device(arguments.device)
    with processes.first_before_others():
        dataset = load_dataset(arguments.data_dir, mask_suffix=arguments.mask_suffix)
        tell(dataset.notes)
        split = choose_split(arguments, {p.name: p.site for p in dataset.patients}, settings.seed)
        if not (arguments.resume or arguments.overwrite):
            refuse_to_overwrite([best, last])
    share, whole, origin = split, None, {"kind": "centralised"}
    if arguments.cid is not None:
        whole = split
        share, origin = share_of(arguments, dataset, split, settings.seed)
    start = None
    if arguments.resume:
        origin = {**kept, **origin}
    elif arguments.init:
        start, origin["started_from"] = started_from(arguments.init, settings, split)
    print(
        f"{dataset.name} in {escaping.terminal(dataset.root)}: "
        f"{counted(len(share.train), 'patient')} to train on, {len(share.val)} for "
        f"validation, {len(share.test)} kept for the test"
    )
    training = CentralTraining(
        dataset, share, settings, device, arguments.out, arguments.resume, whole, origin, start, processes
    )
    precision = str(training.learner.precision).removeprefix("torch.")
    print(
        f"{settings.model} at {settings.image_size} pixels, encoder {training.settings.encoder}, "
        f"{device.type}, {precision}, "
        f"{len(training.batches)} steps an epoch{f', by {processes.count} processes' * (processes.count > 1)}"
    )
    if arguments.resume and training.is_complete:
        print(
            f"this run is finished ({counted(training.progress.epoch, 'epoch')}); nothing was trained. Start a new one "
            f"in another --out, with --init {training.best} to train its model further"
        )
    return training


def train(arguments: argparse.Namespace, training: CentralTraining, meter: Meter | None) -> None:
    """Run the training to its end. After Ctrl-C, print how to continue it."""
    try:
        training.run()
    except KeyboardInterrupt:
        if meter:
            keep(meter.record(), arguments.out, arguments.resume)
        saved = training.saved_epoch
        print(
            f"\nstopped in epoch {saved + 1}; "
            + (f"--resume continues after epoch {saved}" if saved else "nothing to resume yet")
        )
        raise


def finish(arguments: argparse.Namespace, training: CentralTraining, meter: Meter | None) -> None:
    """Print the result, what the run took, and the next command."""
    if meter:
        used = summed(keep(meter.record(), arguments.out, arguments.resume))
        update_metadata(training.best, energy=used)
        print(in_words(used))
    for tracker in training.trackers:
        tracker.picture("curves", arguments.out / f"{training.name}_curves.png")
        tracker.model(training.best)
        tracker.close()
    done = training.progress
    print(
        f"{training.best}: epoch {done.best_epoch}"
        + (f", validation Dice {done.best:.3f}" if training.chooses else ", the last: nothing was chosen")
    )
    print(training.told_at_the_end())
    if training.split.test:
        print(
            f"next: python evaluate.py --checkpoint {typed(training.best)} --data-dir {typed(arguments.data_dir)}"
        )


def main() -> None:
    arguments = parse()
    choose_cache(arguments.cache)
    check_installed(arguments.tensorboard, arguments.mlflow)
    processes = Processes()
    with processes.first_before_others():
        claimed = claim(arguments.out, "training") if processes.first else None
    training = prepare(arguments, processes)
    if processes.first:
        training.trackers = open_trackers(
            arguments.out, arguments.tensorboard, arguments.mlflow, arguments.resume
        )
    for tracker in training.trackers:
        tracker.settings(asdict(training.settings))
    meter = (
        Meter("training", training.learner.device.type == "cuda")
        if arguments.energy and processes.first
        else None
    )
    train(arguments, training, meter)
    processes.close()
    if processes.first:
        finish(arguments, training, meter)
    if claimed:
        claimed.release()


if __name__ == "__main__":
    run_script(main)
