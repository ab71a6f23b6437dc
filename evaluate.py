"""Score a checkpoint on a dataset, by the rules in evaluation/metrics.py.

    python evaluate.py --checkpoint models/transunet_centralized_best.pth --data-dir data

    python evaluate.py --compare models/transunet_federated_best.pth models/local_*/transunet_local_best.pth

Prints a table per site and overall, then calibration, lesions, risk over coverage and the worst patients.
Dice is the volume Dice of each patient, tumour slices and empty slices apart. Where a patient's folder holds a
volume.json (data/prepare_hospital.py writes it), volumes in cm³, HD95 in mm and surface Dice are added. With
--compare a row per model, a column per hospital, all on the same test patients (evaluation/comparison.py).
"""

import argparse
from pathlib import Path

import escaping
from checkpoint import Checkpoint, load_checkpoint, update_metadata
from common import (
    SMALLEST_GROUP,
    MedFLError,
    counted,
    run_script,
    tell,
    typed,
    utc_now,
    write_csv,
    write_json,
)
from dataset import Dataset, add_mask_option, load_dataset
from energy import Meter, in_words
from evaluation.calibration import draw_reliability
from evaluation.comparison import COLUMNS, as_text, compare, draw_table, lines_of
from evaluation.failures import as_lines, failures, without_sizes
from evaluation.metrics import NO_INTERVAL, report
from evaluation.overlays import draw_outlines
from evaluation.scoring import fit_temperature, score_patients
from inference import predict_volume, to_mask
from scans.cache import add_cache_option, choose_cache
from split import Split, load_split, make_split
from usage import choose_device


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
        help="whom to score (default test)",
    )
    parser.add_argument(
        "--split-file",
        type=Path,
        help="who is in which part (default split.json beside the checkpoint; "
        "of a federation's model it is made again)",
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
        help="measure the electricity of the scoring, and tell that of the training if the checkpoint knows it",
    )
    parser.add_argument("--reliability", type=Path, help="draw the reliability diagram into this PNG")
    parser.add_argument(
        "--fit-temperature",
        action="store_true",
        help="first fit the temperature of the probabilities on the validation patients and store it in the "
        "checkpoint (train_centralized.py has done so; for a federation's model)",
    )
    parser.add_argument(
        "--write-back", action="store_true", help="write the test scores into the checkpoint's metadata"
    )
    add_cache_option(parser)
    add_mask_option(parser)
    return parser.parse_args()


def split_of(arguments: argparse.Namespace, dataset: Dataset, checkpoint: Checkpoint, part: str) -> Split:
    """The split that the model was trained on. part: whom it is needed for. Raises MedFLError for another,
    where it matters, and where nobody is in that part."""
    path = arguments.split_file or checkpoint.path.parent / "split.json"
    about = checkpoint.metadata.get("data", {})
    if about.get("split") and arguments.split_file is None:  # of a federation, whose server knows no patient
        path, split = (
            "the split of this dataset",
            make_split({p.name: p.site for p in dataset.patients}, **about["split"]),
        )
    else:
        split = load_split(path, {p.name for p in dataset.patients})
    trained_on = about.get("split_sha256")
    if trained_on is None and about.get("split") and arguments.split_file:
        print(f"the model is of hospitals with own data; whether {path} is one of theirs can't be checked")
    elif part in ("test", "val") and trained_on != split.sha256():
        raise MedFLError(
            f"{path} is not the split that {checkpoint.path} was trained on, so its test patients may have "
            "been trained on; name the training's own with --split-file, or take --split all"
        )
    if not split.part(part):
        raise MedFLError(f"{path} holds no {part} patients; choose another --split")
    return split


def number(value: float | None, digits: int = 3) -> str:
    """A figure as the tables show it."""
    return "–" if value is None else f"{value:.{digits}f}"


def print_table(figures: dict, region: str) -> None:
    """One line per site and one over all patients; where a spacing is known, the same in cm³ and mm. region: what is
    outlined."""
    slices = f"{region} slices"
    wide = max(15, len(slices) + 2)
    print(
        f"{'site':8}{'patients':>9}{'Dice mean':>11}{'median':>8}{'95 % interval':>17}{'IoU':>7}{slices:>{wide}}"
        f"{'false on empty':>16}{'missed':>8}{'HD95 in the plane px':>22}{'slices of one only':>20}"
    )
    for site, row in [*figures["sites"].items(), ("all", figures)]:
        ci95 = row["volume_dice"]["ci95"]
        interval = f"{ci95[0]:.3f} to {ci95[1]:.3f}" if ci95 else NO_INTERVAL
        print(
            f"{escaping.terminal(site):8}{row['patients_scored']:>9}{number(row['volume_dice']['mean']):>11}"
            f"{number(row['volume_dice']['median']):>8}{interval:>17}{number(row['volume_iou']['mean']):>7}"
            f"{number(row['slice_dice_tumour']):>{wide}}{number(row['empty_slice_false_positive_rate']):>16}"
            f"{row['missed_patients']:>8}{number(row['hd95_in_plane_px']['mean'], 1):>22}"
            f"{row['hd95_in_plane_px']['slices_with_one_mask']:>20}"
        )
    if "volume_cm3" in figures:
        print_table_in_mm(figures)


def print_table_in_mm(figures: dict) -> None:
    """Means in cm³ and mm over the patients whose spacing is known, one line per site that has some and one
    over all."""
    print(
        f"\n{'site':8}{'with mm':>9}{'truth cm³':>11}{'predicted':>11}{'difference':>12}"
        f"{'|difference|':>14}{'HD95 mm':>9}{'undefined':>11}{'surface Dice 2 mm':>19}"
    )
    for site, row in [*figures["sites"].items(), ("all", figures)]:
        if volume := row.get("volume_cm3"):
            print(
                f"{escaping.terminal(site):8}{volume['patients']:>9}{volume['truth']:>11.2f}{volume['prediction']:>11.2f}"
                f"{volume['difference']:>+12.2f}{volume['absolute_difference']:>14.2f}"
                f"{number(row['hd95_mm']['mean'], 1):>9}{row['hd95_mm']['undefined']:>11}"
                f"{number(row['surface_dice_2mm']['mean']):>19}"
            )


def write_patients(figures: dict, path: Path) -> None:
    """A line per patient: patient, site, slices, dice, iou, HD95 in the plane, and `metrics.FIGURES_IN_MM` where a
    spacing is known."""
    patients = figures["patients"]
    write_csv(path, [list(patients[0]), *(row.values() for row in patients)])


def without_mm(figures: dict) -> dict:
    """Figures of `metrics.summarise` less those that need a spacing."""
    return {
        name: value
        for name, value in figures.items()
        if name not in ("hd95_mm", "surface_dice_2mm", "volume_cm3")
    }


def sites_told(figures: dict) -> dict[str, dict]:
    """The sites that a file which is handed on may tell: none of one patient or two, and not so many that those who
    are left, whose figures are all patients' less the sites', are one or two."""
    counts = {site: row["patients_scored"] for site, row in figures["sites"].items()}
    told = [site for site in sorted(counts, key=lambda site: -counts[site]) if counts[site] >= SMALLEST_GROUP]
    while told and 0 < figures["patients_scored"] - sum(counts[site] for site in told) < SMALLEST_GROUP:
        told.pop()
    return {site: figures["sites"][site] for site in sorted(told)}


def write_overlays(figures: dict, dataset: Dataset, checkpoint: Checkpoint, folder: Path) -> None:
    """Pictures of the patients with the best, the median and the worst Dice, called so."""
    ranked = sorted(figures["patients"], key=lambda row: row["dice"])
    for rank, row in (("best", ranked[-1]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[0])):
        volume, truth = dataset.volume(row["patient"])
        prediction = to_mask(predict_volume(checkpoint.model, volume), checkpoint.threshold)
        path = folder / f"{rank}_{row['patient'].replace('/', '_')}.png"
        title = f"{rank}: {row['patient']}, volume Dice {row['dice']:.3f}"
        draw_outlines(volume, truth, prediction, title, path, dataset.is_oriented(row["patient"]))
        print(f"wrote {escaping.terminal(path)}")


def print_energy(used: dict, checkpoint: Checkpoint, figures: dict) -> None:
    """What the scoring used, a patient, and what the training used, by the Dice that it gave."""
    share = {name: [value / figures["patients_scored"] for value in used[name]] for name in ("kwh", "co2_g")}
    print(f"scoring: {in_words({**used, **share}).replace(' Wh ', ' Wh a patient ', 1)}")
    trained = checkpoint.metadata.get("energy")
    told = (
        in_words(trained, figures["volume_dice"]["mean"]) if trained else "energy was not measured (--energy)"
    )
    print(f"training: {told}")


def store_temperature(arguments: argparse.Namespace, dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Fit the temperature on the validation patients, and keep it in the model and its file. Raises MedFLError
    without such patients, or where another part is scored that was not split off."""
    patients = split_of(arguments, dataset, checkpoint, "val").val
    checkpoint.model.temperature = fit_temperature(checkpoint.model, dataset, patients)
    checkpoint.metadata["temperature"] = checkpoint.model.temperature
    update_metadata(checkpoint.path, temperature=checkpoint.model.temperature)
    print(f"temperature {checkpoint.model.temperature:.3f} of {counted(len(patients), 'validation patient')}")


def compare_models(arguments: argparse.Namespace) -> None:
    """Print and write the table of several models. Raises MedFLError where they were not trained on one
    split."""
    single = "write_back", "overlays", "reliability", "fit_temperature", "energy"
    if arguments.split != "test" or any(getattr(arguments, name) for name in single):
        raise MedFLError(
            "--compare scores test patients, and goes with --json, --csv and --plot; leave the other "
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


def main() -> None:
    arguments = parse()
    choose_cache(arguments.cache)
    if arguments.compare:
        return compare_models(arguments)
    if arguments.plot:
        raise MedFLError("--plot draws the table of --compare; leave it out, or use --overlays")
    if arguments.write_back and arguments.split != "test":
        raise MedFLError("--write-back stores test scores alone; leave --split at test")
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
    rows = score_patients(
        checkpoint.model, dataset, patients, checkpoint.threshold, progress=True, closely=True
    )
    figures, failed = report(rows), failures(rows)
    print(f"{arguments.checkpoint} on {dataset.name}, {arguments.split}: {counted(len(rows), 'patient')}")
    print_table(figures, dataset.region)
    if without := figures["patients_without_tumour"]:
        print(
            f"note: {without} of {counted(len(rows), 'patient')} have no {dataset.region} in their masks; their Dice "
            f"is 1 where nothing was predicted and 0 elsewhere, and does not say how well a {dataset.region} is found"
        )
    print("", *as_lines(failed, dataset.region), sep="\n")
    if meter:
        print_energy(meter.record(), checkpoint, figures)
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
        print(f"wrote {arguments.json}")
    if arguments.csv:
        write_patients(figures, arguments.csv)
        print(f"wrote {arguments.csv}")
    if arguments.reliability:
        draw_reliability(
            failed["calibration"], arguments.reliability, f"{dataset.name}: {counted(len(rows), 'patient')}"
        )
        print(f"wrote {arguments.reliability}")
    if arguments.overlays:
        write_overlays(figures, dataset, checkpoint, arguments.overlays)
    if arguments.write_back:
        # a checkpoint is handed on: no word of how large the patients' tumours are
        test = {
            **without_mm(figures),
            **without_sizes(failed),
            "patients": len(rows),
            "sites": {site: without_mm(row) for site, row in sites_told(figures).items()},
        }
        update_metadata(arguments.checkpoint, scores={**checkpoint.metadata["scores"], "test": test})
        print(f"wrote the test scores into {arguments.checkpoint}")
    print(
        f"next: python predict.py FOLDER --checkpoint {typed(arguments.checkpoint)}, or look at scans with `make app`"
    )


if __name__ == "__main__":
    run_script(main)
