"""Is joining worth it? Compares hospitals alone, federated variants, fine-tuned copies and one central model on the
same test patients.

    python benchmarks/federated_study.py demo --data-dir data/phantoms --out models/study       the end of `make demo`
    python benchmarks/federated_study.py sites --data-dir data --out models/study_sites  real sites, two seeds
    python benchmarks/federated_study.py strategies --out models/study_strategies    all strategies, three partitions
    python benchmarks/federated_study.py half --out models/study_half  half-precision updates
    python benchmarks/federated_study.py privacy-8 --simulate --init MODEL --out models/privacy_8    privacy: 2, 8, 32

Every arrangement makes the same number of passes over the training slices that it sees: all hospitals together as many
as the central model, and a hospital alone as many over its own slices. Fine-tuning comes on top. An interrupted study
continues with the first unfinished training. Writes into --out: study.csv,
a line per partition, seed, model and hospital (`COLUMNS`); for each partition a table as JSON and PNG, over
all seeds; and each training's folder with its log. Federations run as real processes, or with --simulate in
Flower's simulation engine, whose weights are the same.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from batches import TrainingBatches
from checkpoint import load_checkpoint
from common import ROOT, MedFLError, run_script
from dataset import Dataset, load_dataset
from evaluation.comparison import ALL, Row, as_text, compare, draw_table, lines_of, table_of
from evaluation.comparison import COLUMNS as OF_A_TABLE
from federation.runtime.processes import free_port
from partition import make_partition
from split import make_split
from storage.files import atomic_write, write_json

COLUMNS = ("partition", "seed", *OF_A_TABLE)
FEDERATED, LOCAL, CENTRAL = (
    "transunet_federated_best.pth",
    "transunet_local_best.pth",
    "transunet_centralized_best.pth",
)


@dataclass(frozen=True)
class Study:
    """What a study trains. variants: names of federations and their further options of run_server.py; the first
    is fine-tuned. tune_passes: passes over a hospital's slices in fine-tuning. alone: whether hospitals alone
    and a central model are trained as well. A batch holds 16 slices, the default of all trainings."""

    variants: dict[str, list[str]]
    partitions: tuple[str, ...] = ("site",)
    seeds: tuple[int, ...] = (0,)
    clients: int = 4
    rounds: int = 12
    local_epochs: int = 1
    image_size: int = 128
    model: str = "tiny"
    tune_passes: int = 2
    alone: bool = True


FEDAVG: dict[str, list[str]] = {"fedavg": []}
FEDPROX = {"fedprox": ["--strategy", "fedprox"]}
PLAIN = ["--norm", "group"]
PRIVATE = {"plain": PLAIN} | {
    f"epsilon_{epsilon}": [*PLAIN, "--dp-clip", "2", "--dp-epsilon", epsilon]
    for epsilon in ("1e5", "1e4", "1e3", "100", "8")
}
STUDIES = {
    "demo": Study(FEDAVG, clients=3, rounds=16, image_size=64, model="mini"),
    "sites": Study(FEDAVG | FEDPROX, seeds=(0, 1)),
    "strategies": Study(
        FEDAVG
        | FEDPROX
        | {
            name: ["--strategy", name]
            for name in ("fedavgm", "fedadam", "fedyogi", "fedmedian", "fedtrimmedavg", "krum")
        }
        | {"own-norm": ["--keep-norm-local"]},
        ("site", "dirichlet", "iid"),
        clients=5,
        rounds=10,
        image_size=64,
    ),
    "half": Study(
        FEDAVG | {name: ["--update-dtype", name] for name in ("float16", "bfloat16")},
        seeds=(0, 1, 2),
        clients=2,
        rounds=5,
        local_epochs=6,
        image_size=64,
        alone=False,
    ),
    **{
        f"privacy-{clients}": Study(
            PRIVATE, ("iid",), clients=clients, rounds=5, local_epochs=2, image_size=64, alone=False
        )
        for clients in (2, 8, 32)
    },
}


def run_logged(commands: list[list[str]], folder: Path, log: Path) -> None:
    """Run scripts of the repository side by side in a folder. Raises MedFLError if one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        running = [
            subprocess.Popen(
                [sys.executable, str(ROOT / command[0]), *command[1:]],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for command in commands
        ]
        try:
            while any(process.poll() is None for process in running) and not any(
                process.poll() for process in running
            ):
                time.sleep(0.2)
        finally:
            for process in running:
                process.terminate()
            codes = [process.wait() for process in running]
    if any(codes):
        raise MedFLError(f"a training failed; see {log}, fix the cause and start the study again")


def finished(folder: Path, what: str, commands: list[list[str]]) -> None:
    """Run the commands of one training, unless an earlier start of the study finished it."""
    mark = folder / "done.json"
    if mark.exists():
        return
    began = time.monotonic()
    run_logged(commands, folder, folder / "log.txt")
    write_json(mark, {"seconds": round(time.monotonic() - began, 1)})
    print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)


def trained(
    study: Study, dataset: Dataset, partition: str, seed: int, out: Path, simulated: bool, init: Path | None
) -> list[Path]:
    """The checkpoints of one partition and seed, in the order of the table's rows. init: the model that federations
    start from."""
    data = str(dataset.root.resolve())
    common = ["--data-dir", data, "--seed", str(seed), "--image-size", str(study.image_size)]
    common += ["--model", study.model]
    common += ["--encoder", "random"]  # as measured, also on a machine that reaches the hub
    divided = ["--partition", partition, "--clients", str(study.clients)]
    split = make_split({p.name: p.site for p in dataset.patients}, seed)
    shares = make_partition(dataset.table, split, partition, study.clients, seed=seed).hospitals
    passes = [len(TrainingBatches(dataset, share.train, study.image_size, 16, seed)) for share in shares]
    where, found, times = f"{partition}, seed {seed}", [], study.rounds * study.local_epochs

    def central(name: str, what: str, steps: int, *options: str) -> Path:
        finished(
            out / name,
            f"{where}, {what}, {steps} steps",
            [["train_centralized.py", *common, "--overwrite", "--out", ".", "--steps", str(steps), *options]],
        )
        return out / name / (LOCAL if "--cid" in options else CENTRAL)

    for variant, options in study.variants.items():
        address = f"127.0.0.1:{free_port()}"
        server = [
            "run_server.py",
            "--overwrite",
            *common[2:],
            *divided,
            "--rounds",
            str(study.rounds),
            "--local-epochs",
            str(study.local_epochs),
            "--out",
            ".",
            *options,
            *(["--init", str(init.resolve())] if init else []),
        ]
        if simulated:
            commands = [[*server, "--simulate", str(study.clients), "--data-dir", data]]
        else:
            client = ["run_client.py", "--data-dir", data, "--server", address, "--cid"]
            commands = [[*server, "--address", address], *([*client, str(k)] for k in range(study.clients))]
        folder = out / variant
        finished(
            folder, f"{where}, {variant}, {times * sum(passes)} steps of all hospitals together", commands
        )
        own = sorted(folder.rglob("hospital-*_federated_best.pth"))
        found += own or [folder / FEDERATED]
    if not study.alone:
        return found
    first = out / next(iter(study.variants)) / FEDERATED
    for k, steps in enumerate(passes):
        found.append(
            central(
                f"tuned_{k}",
                f"fine-tuned at hospital-{k}",
                steps * study.tune_passes,
                *divided,
                "--cid",
                str(k),
                "--init",
                str(first.resolve()),
                "--lr",
                "1e-4",
            )
        )
    for k, steps in enumerate(passes):
        found.append(central(f"alone_{k}", f"hospital-{k} alone", steps * times, *divided, "--cid", str(k)))
    return [*found, central("central", "centralised", times * sum(passes))]


def pooled(tables: list[dict]) -> dict:
    """One table over the seeds. A patient counts once, with the mean over the seeds that test the patient."""
    rows = []
    for place, row in enumerate(tables[0]["rows"]):
        of: dict[str, list[float]] = {}
        for table in tables:
            for figures in table["rows"][place]["patients"]:
                of.setdefault(figures["patient"], []).append(figures["dice"])
        mean = [
            {"patient": patient, "dice": float(np.mean(values))} for patient, values in sorted(of.items())
        ]
        rows.append(Row(row["name"], mean))
    return table_of(rows, {ALL: tuple(figures["patient"] for figures in rows[0].patients)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES, help="which study")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/phantoms"), help="a dataset (default data/phantoms)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("models/study"),
        help="folder for the output files (default models/study)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to use instead of the study's own")
    parser.add_argument(
        "--simulate", action="store_true", help="run federations in Flower's simulation engine"
    )
    parser.add_argument(
        "--init", type=Path, help="a model that federations start from, instead of random weights"
    )
    arguments = parser.parse_args()
    study, out = STUDIES[arguments.study], arguments.out
    seeds = tuple(arguments.seeds or study.seeds)
    dataset = load_dataset(arguments.data_dir)
    about = json.loads(
        json.dumps(
            {
                "data": dataset.name,
                "patients": len(dataset.patients),
                **asdict(study),
                "seeds": seeds,
                "init": arguments.init and arguments.init.name,
            }
        )
    )
    if (out / "study.json").exists() and json.loads(
        (out / "study.json").read_text(encoding="utf-8")
    ) != about:
        raise MedFLError(f"{out} holds another study; choose another --out, or delete it")
    write_json(out / "study.json", about)
    lines = []
    for partition in study.partitions:
        tables = []
        for seed in seeds:
            paths = trained(
                study,
                dataset,
                partition,
                seed,
                out / f"{partition}_{seed}",
                arguments.simulate,
                arguments.init,
            )
            split = make_split({p.name: p.site for p in dataset.patients}, seed)
            tables.append(compare([load_checkpoint(path) for path in paths], dataset, split))
            lines += [[partition, seed, *line] for line in lines_of(tables[-1])]
            with atomic_write(out / "study.csv", "w") as file:
                csv.writer(file).writerows([COLUMNS, *lines])
        table = tables[0] if len(tables) == 1 else pooled(tables)
        title = f"{dataset.name}, {partition}, {study.clients} hospitals, {len(tables)} seed{'s' * (len(tables) > 1)}"
        print(
            f"{title}, {table['columns'][ALL]} test patients; differences are paired\n{as_text(table)}",
            flush=True,
        )
        write_json(out / f"{partition}.json", table)
        draw_table(table, out / f"{partition}.png", title)
    print(f"wrote {out}/study.csv, and a table as JSON and PNG for each partition")


if __name__ == "__main__":
    run_script(main)
