"""Score a checkpoint on a dataset, by the rules in evaluation/metrics.py.

    python evaluate.py --checkpoint models/transunet_centralized_best.pth --data-dir data

    python evaluate.py --compare models/transunet_federated_best.pth models/local_*/transunet_local_best.pth

Prints a table per site and overall, then calibration, lesions, risk over coverage and the worst patients.
Dice is the volume Dice of each patient; slices with tumour and empty slices have figures of their own. Where a
patient's folder holds a volume.json (data/prepare_hospital.py writes it), volumes in cm³, HD95 in mm and surface
Dice are added. --compare prints a row per model and a column per hospital, all on the same test patients
(evaluation/comparison.py).
"""

import argparse
from pathlib import Path

from borders import escaping
from checkpoint import Checkpoint, load_checkpoint, update_metadata
from common import MedFLError, counted, run_script, tell, typed, utc_now
from dataset import Dataset, add_mask_option, load_dataset
from evaluation.calibration import draw_reliability
from evaluation.comparison import COLUMNS, as_text, compare, draw_table, lines_of
from evaluation.failures import as_lines, failures, without_sizes
from evaluation.metrics import report
from evaluation.overlays import draw_outlines
from evaluation.scoring import classes_to_score, fit_temperature, score_patients
from evaluation.tables import sites_told, table_lines, without_mm, write_patients
from inference import predict_volume, to_mask
from runs.energy import Meter, in_words
from runs.usage import choose_device
from scans.cache import add_cache_option, choose_cache
from split import Split, load_split, make_split
from storage.files import write_csv, write_json


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, help="the model, a .pth file")
    which.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="several models, in the order of the rows",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="folder with kaggle_3m somewhere below (default data)",
    )
    parser.add_argument(
        "--split",
        choices=("test", "val", "train", "all"),
        default="test",
        help="the patients to score (default test)",
    )
    parser.add_argument(
        "--split-file",
        type=Path,
        help="file with the patients of each part (default split.json beside the checkpoint; "
        "for a federation's model the split is made again)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--csv",
        type=Path,
        help="write a line per patient (with --compare: per model and hospital) to this file",
    )
    parser.add_argument("--plot", type=Path, help="with --compare: draw the table into this PNG")
    parser.add_argument(
        "--overlays",
        type=Path,
        help="write pictures of the best, the median and the worst patient to this folder",
    )
    parser.add_argument(
        "--energy",
        action="store_true",
        help="measure the electricity of the scoring, and report that of the training if the checkpoint has it",
    )
    parser.add_argument("--reliability", type=Path, help="draw the reliability diagram into this PNG")
    parser.add_argument(
        "--fit-temperature",
        action="store_true",
        help="first fit the temperature of the probabilities on the validation patients and store it in the "
        "checkpoint (for a federation's model; train_centralized.py does it itself)",
    )
    parser.add_argument(
        "--write-back", action="store_true", help="write the test scores into the checkpoint's metadata"
    )
    add_cache_option(parser)
    add_mask_option(parser)
    return parser.parse_args()


def split_of(arguments: argparse.Namespace, dataset: Dataset, checkpoint: Checkpoint, part: str) -> Split:
    """The split that the model was trained on. part: the part that is needed. Raises MedFLError for another split,
    where that matters, and if the part is empty."""
    path = arguments.split_file or checkpoint.path.parent / "split.json"
    about = checkpoint.metadata.get("data", {})
    if about.get("split") and arguments.split_file is None:  # a federation's: its server knows no patients
        path, split = (
            "the split of this dataset",
            make_split({p.name: p.site for p in dataset.patients}, **about["split"]),
        )
    else:
        split = load_split(path, {p.name for p in dataset.patients})
    trained_on = about.get("split_sha256")
    if trained_on is None and about.get("split") and arguments.split_file:
        print(
            f"hospitals trained the model on their own data; nothing shows whether {path} is one of their splits"
        )
    elif part in ("test", "val") and trained_on != split.sha256():
        raise MedFLError(
            f"{path} is not the split that {checkpoint.path} was trained on, so its test patients may have "
            "been trained on; name that training's split with --split-file, or take --split all"
        )
    if not split.part(part):
        raise MedFLError(f"{path} holds no {part} patients; choose another --split")
    return split


def write_overlays(figures: dict, dataset: Dataset, checkpoint: Checkpoint, folder: Path) -> None:
    """Write pictures of the patients with the best, the median and the worst Dice, named by that rank."""
    ranked = sorted(figures["patients"], key=lambda row: row["dice"])
    for rank, row in (("best", ranked[-1]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[0])):
        volume, truth = dataset.volume(row["patient"])
        prediction = to_mask(predict_volume(checkpoint.model, volume), checkpoint.threshold)
        path = folder / f"{rank}_{row['patient'].replace('/', '_')}.png"
        title = f"{rank}: {row['patient']}, volume Dice {row['dice']:.3f}"
        draw_outlines(volume, truth, prediction, title, path, dataset.is_oriented(row["patient"]))
        print(f"wrote {escaping.terminal(path)}")


def print_energy(used: dict, checkpoint: Checkpoint, figures: dict) -> None:
    """Print the energy of the scoring per patient, and that of the training in relation to the Dice."""
    share = {name: [value / figures["patients_scored"] for value in used[name]] for name in ("kwh", "co2_g")}
    print(f"scoring: {in_words({**used, **share}).replace(' Wh ', ' Wh a patient ', 1)}")
    trained = checkpoint.metadata.get("energy")
    told = (
        in_words(trained, figures["volume_dice"]["mean"]) if trained else "energy was not measured (--energy)"
    )
    print(f"training: {told}")


def store_temperature(arguments: argparse.Namespace, dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Fit the temperature on the validation patients, and store it in the model and its file. Raises MedFLError
    without such patients, or if the split is not the one that the model was trained on."""
    patients = split_of(arguments, dataset, checkpoint, "val").val
    checkpoint.model.temperature = fit_temperature(checkpoint.model, dataset, patients)
    checkpoint.metadata["temperature"] = checkpoint.model.temperature
    update_metadata(checkpoint.path, temperature=checkpoint.model.temperature)
    print(
        f"temperature {checkpoint.model.temperature:.3f}, fitted on {counted(len(patients), 'validation patient')}"
    )


def compare_models(arguments: argparse.Namespace) -> None:
    """Print and write the table of several models. Raises MedFLError if they were not trained on the same
    split."""
    single = "write_back", "overlays", "reliability", "fit_temperature", "energy"
    if arguments.split != "test" or any(getattr(arguments, name) for name in single):
        raise MedFLError(
            "--compare scores test patients, and works with --json, --csv and --plot; leave the other "
            "options out"
        )
    checkpoints = [load_checkpoint(path, choose_device(arguments.device)) for path in arguments.compare]
    dataset = load_dataset(arguments.data_dir, mask_suffix=arguments.mask_suffix)
    tell(dataset.notes)
    splits = {checkpoint.path: split_of(arguments, dataset, checkpoint, "test") for checkpoint in checkpoints}
    first = splits[checkpoints[0].path]
    if other := [str(path) for path, split in splits.items() if split.sha256() != first.sha256()]:
        raise MedFLError(
            f"{other[0]} was trained on another split than {checkpoints[0].path}, so their test patients "
            "differ; compare models of one dataset and --seed"
        )
    table = compare(checkpoints, dataset, first, lambda line: print(escaping.terminal(line), flush=True))
    print(f"{dataset.name}, {len(first.test)} test patients, volume Dice; differences are paired")
    print(escaping.lines(as_text(table)))
    about = {
        "data": dataset.name,
        "split_sha256": first.sha256(),
        "created": utc_now(),
        "checkpoints": {str(checkpoint.path): checkpoint.sha256() for checkpoint in checkpoints},
    }
    if arguments.json:
        write_json(arguments.json, {**about, **table})
    if arguments.csv:
        write_csv(arguments.csv, [COLUMNS, *lines_of(table)])
    if arguments.plot:
        draw_table(table, arguments.plot, f"{dataset.name}: {len(first.test)} test patients")
    for path in filter(None, (arguments.json, arguments.csv, arguments.plot)):
        print(f"wrote {path}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Score one model, print its tables, and write what was asked for."""
    checkpoint = load_checkpoint(arguments.checkpoint, choose_device(arguments.device))
    dataset = load_dataset(arguments.data_dir, mask_suffix=arguments.mask_suffix)
    tell(dataset.notes)
    if arguments.fit_temperature:
        store_temperature(arguments, dataset, checkpoint)
    if arguments.split == "all" and arguments.split_file is None:
        patients = [p.name for p in dataset.patients]
    else:
        patients = list(split_of(arguments, dataset, checkpoint, arguments.split).part(arguments.split))
    meter = Meter("inference", choose_device(arguments.device).type == "cuda") if arguments.energy else None
    classes = classes_to_score(checkpoint.labels, dataset)
    if checkpoint.labels and not classes:
        print(
            f"note: the masks don't tell {' and '.join(checkpoint.labels)} apart, so only the whole is scored"
        )
    rows = score_patients(
        checkpoint.model,
        dataset,
        patients,
        checkpoint.threshold,
        progress=True,
        closely=True,
        classes=classes,
    )
    figures, failed = report(rows), failures(rows)
    print(f"{arguments.checkpoint} on {dataset.name}, {arguments.split}: {counted(len(rows), 'patient')}")
    print(*table_lines(figures, dataset.region), sep="\n")
    if without := figures["patients_without_tumour"]:
        print(
            f"note: {without} of {counted(len(rows), 'patient')} have no {dataset.region} in their masks; their Dice "
            f"is 1 where nothing was predicted and 0 elsewhere, and does not say how well a {dataset.region} is found"
        )
    print("", *as_lines(failed, dataset.region), sep="\n")
    if meter:
        print_energy(meter.record(), checkpoint, figures)
    write_results(arguments, figures, failed, dataset, checkpoint)
    if arguments.overlays:
        write_overlays(figures, dataset, checkpoint, arguments.overlays)
    if arguments.write_back:
        write_back(figures, failed, checkpoint)


def write_results(
    arguments: argparse.Namespace, figures: dict, failed: dict, dataset: Dataset, checkpoint: Checkpoint
) -> None:
    """Write the files that the options name: all figures, a line per patient, the reliability diagram."""
    if arguments.json:
        about = {
            "checkpoint": arguments.checkpoint.name,
            "checkpoint_sha256": checkpoint.sha256(),
            "data": dataset.name,
            "split": arguments.split,
            "threshold": checkpoint.threshold,
            "temperature": checkpoint.model.temperature,
            "created": utc_now(),
        }
        write_json(arguments.json, {**about, **figures, **failed})
    if arguments.csv:
        write_patients(figures, arguments.csv)
    if arguments.reliability:
        title = f"{dataset.name}: {counted(len(figures['patients']), 'patient')}"
        draw_reliability(failed["calibration"], arguments.reliability, title)
    for path in filter(None, (arguments.json, arguments.csv, arguments.reliability)):
        print(f"wrote {path}")


def write_back(figures: dict, failed: dict, checkpoint: Checkpoint) -> None:
    """Put the test scores into the checkpoint. Checkpoints are passed on to others, so the sizes of the patients'
    tumours are left out, and sites whose figures could be of one or two patients."""
    test = {
        **without_mm(figures),
        **without_sizes(failed),
        "patients": len(figures["patients"]),
        "sites": {site: without_mm(row) for site, row in sites_told(figures).items()},
    }
    update_metadata(checkpoint.path, scores={**checkpoint.metadata["scores"], "test": test})
    print(f"wrote the test scores into {checkpoint.path}")


def main() -> None:
    arguments = parse()
    choose_cache(arguments.cache)
    if arguments.compare:
        return compare_models(arguments)
    if arguments.plot:
        raise MedFLError("--plot draws the table of --compare; leave it out, or use --overlays")
    if arguments.write_back and arguments.split != "test":
        raise MedFLError("--write-back stores only test scores; leave --split at test")
    evaluate(arguments)
    print(
        f"next: python predict.py FOLDER --checkpoint {typed(arguments.checkpoint)}, or look at scans with `make app`"
    )


if __name__ == "__main__":
    run_script(main)
