"""Give the patients of one dataset to hospitals, so that a federation can be tried without a second hospital.

    python partition.py --partition site --clients 4 --data-dir data --plot partition.png --json partition.json

Prints a table of the hospitals and how much they differ; the JSON is {"0": {"train": [...], "val": [...],
"test": [...]}, ...}. The central split is divided: each hospital gets a share of the central training, validation
and test patients.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from borders import escaping
from common import MedFLError, counted, run_script, tell
from dataset import add_mask_option, load_dataset
from scans.cache import add_cache_option, choose_cache
from split import PARTS, TEST_FRACTION, VAL_FRACTION, Split, make_split
from storage.files import atomic_write, write_json

KINDS = ("iid", "site", "dirichlet", "quantity", "tumour-size")
MIN_TRAIN = 2  # training patients that every hospital gets
CLASSES = 3  # of tumour burden: equal thirds of the patients by the tumour's share of the volume
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#999999",
)  # Okabe and Ito's colours, for the sites
POWER = 1.0  # quantity: hospital k gets a share in proportion to (k + 1) ** -POWER


@dataclass(frozen=True)
class Partition:
    """The patients of each hospital: one split per hospital, its share of the central split, and a label for
    each."""

    hospitals: tuple[Split, ...]
    labels: tuple[str, ...]

    def as_json(self) -> dict:
        """{"0": {"train": [names], "val": [...], "test": [...]}, "1": ...}."""
        return {
            str(k): {part: list(split.part(part)) for part in PARTS} for k, split in enumerate(self.hospitals)
        }

    def sha256(self) -> str:
        """SHA-256 of the JSON with sorted keys; the same on every machine."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()


def make_partition(
    table: pd.DataFrame, split: Split, kind: str, clients: int, alpha: float = 0.5, seed: int = 0
) -> Partition:
    """The partition that puts every patient of the split into exactly one of `clients` hospitals. The same
    arguments give the same partition.

    table: `Dataset.table`. kind: "iid", shuffled and dealt out; "site", by the scan's real hospital, with the
    smallest sites merged or the largest divided until the number fits; "dirichlet", patients of each class of
    tumour burden in shares drawn from a symmetric Dirichlet distribution with concentration `alpha` (Hsu et
    al. 2019, arXiv:1909.06335); "quantity", sizes by a power law; "tumour-size", sorted by the mean area of
    the tumour and cut into pieces. For every kind, each hospital gets at least 2 training patients. Raises
    MedFLError for an unknown kind or too few patients.
    """
    if kind not in KINDS:
        raise MedFLError(f"there is no partition {kind}; choose one of {', '.join(KINDS)}")
    if clients < 1 or not alpha > 0:
        raise MedFLError("a partition needs 1 hospital or more and an --alpha above 0; choose others")
    if len(split.train) < MIN_TRAIN * clients:
        raise MedFLError(
            f"{counted(len(split.train), 'training patient')} are too few for {counted(clients, 'hospital')} with "
            f"{MIN_TRAIN} or more each; lower --clients"
        )
    table = table[table["patient"].isin(split.part("all"))].sort_values("patient", ignore_index=True)
    shuffle = np.random.default_rng([seed, clients])
    labels = [f"hospital-{k}" for k in range(clients)]
    groups: Sequence[list[str] | np.ndarray]
    if kind == "site":
        groups, labels = _by_site(table, clients, shuffle)
    elif kind == "dirichlet":
        groups = _by_burden(table, clients, alpha, shuffle)
    elif kind == "tumour-size":
        area = table["tumour_pixels"] / table["tumour_slices"].clip(lower=1)
        groups = np.array_split(table["patient"].to_numpy()[np.argsort(area, kind="stable")], clients)
    else:
        shares = np.ones(clients) if kind == "iid" else np.arange(1, clients + 1.0) ** -POWER
        groups = _cut(shuffle.permutation(table["patient"].to_numpy()), shares)
    filled = _fill_up([[str(name) for name in group] for group in groups], set(split.train))
    return Partition(
        tuple(
            Split(split.seed, *(tuple(p for p in split.part(part) if p in set(group)) for part in PARTS))
            for group in filled
        ),
        tuple(labels),
    )


def _cut(names: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """Consecutive pieces of the names, in proportion to the shares."""
    ends = np.round(np.cumsum(shares / shares.sum()) * len(names)).astype(int)
    return np.split(names, ends[:-1])


def _by_site(
    table: pd.DataFrame, clients: int, shuffle: np.random.Generator
) -> tuple[list[list[str]], list[str]]:
    """Patients by their real site; the two smallest sites are merged, or the largest is halved, until the
    number fits."""
    groups = {str(site): list(rows["patient"]) for site, rows in table.groupby("site")}

    def by_size() -> list[str]:
        return sorted(groups, key=lambda site: (len(groups[site]), site))

    while len(groups) > clients:
        small, next_small = by_size()[:2]
        groups[" + ".join(sorted((small, next_small)))] = groups.pop(small) + groups.pop(next_small)
    while len(groups) < clients:
        large = by_size()[-1]
        names = [str(name) for name in shuffle.permutation(groups.pop(large))]
        half = (len(names) + 1) // 2
        groups[f"{large}/1"], groups[f"{large}/2"] = names[:half], names[half:]
    return [groups[site] for site in sorted(groups)], sorted(groups)


def burden_classes(table: pd.DataFrame) -> np.ndarray:
    """The class of tumour burden of each row, 0 (least) to 2 (most), (patients,) int: thirds by the tumour's
    share."""
    rank = table["tumour_share"].rank(method="first").to_numpy() - 1
    return (rank * CLASSES // max(len(table), 1)).astype(int)


def _by_burden(
    table: pd.DataFrame, clients: int, alpha: float, shuffle: np.random.Generator
) -> list[list[str]]:
    groups: list[list[str]] = [[] for _ in range(clients)]
    classes = burden_classes(table)
    for burden in range(CLASSES):
        names = shuffle.permutation(table["patient"].to_numpy()[classes == burden])
        for group, piece in zip(groups, _cut(names, shuffle.dirichlet([alpha] * clients))):
            group += list(piece)
    return groups


def _fill_up(groups: list[list[str]], train: set[str]) -> list[list[str]]:
    """Give hospitals with too few training patients some from the hospital with the most."""

    def training(group: list[str]) -> list[str]:
        return sorted(name for name in group if name in train)

    for group in groups:
        while len(training(group)) < MIN_TRAIN:
            richest = max(groups, key=lambda g: len(training(g)))
            group.append(training(richest)[-1])
            richest.remove(group[-1])
    return groups


def describe_hospitals(partition: Partition, table: pd.DataFrame) -> pd.DataFrame:
    """A row per hospital: hospital, of (sites), patients, train, val, test, slices, tumour_share (of all
    pixels, percent) and tumour_area (mean pixels in a slice with tumour)."""
    by_name = table.set_index("patient")
    rows = []
    for number, split in enumerate(partition.hospitals):
        mine = by_name.loc[list(split.part("all"))]
        rows.append(
            {
                "hospital": number,
                "of": " ".join(sorted(set(mine["site"]))),
                "patients": len(mine),
                **{part: len(split.part(part)) for part in PARTS},
                "slices": int(mine["slices"].sum()),
                "tumour_share": 100 * mine["tumour_pixels"].sum() / mine["pixels"].sum(),
                "tumour_area": mine["tumour_pixels"].sum() / max(mine["tumour_slices"].sum(), 1),
            }
        )
    return pd.DataFrame(rows)


def heterogeneity(partition: Partition, table: pd.DataFrame) -> float:
    """How much the hospitals differ, 0 (alike) to 1: the Jensen-Shannon distance (base 2) between a hospital's
    shares of the classes of tumour burden and those of all patients, averaged over the patients."""
    table = table[table["patient"].isin([p for split in partition.hospitals for p in split.part("all")])]
    classes = dict(zip(table["patient"], burden_classes(table)))

    def shares(names: tuple[str, ...]) -> np.ndarray:
        return np.bincount([classes[name] for name in names], minlength=CLASSES) / len(names)

    from scipy.spatial.distance import jensenshannon  # here: hospitals use this module too, and don't measure

    everyone = shares(tuple(classes))
    mine = [split.part("all") for split in partition.hospitals]
    return float(
        np.average(
            [jensenshannon(shares(names), everyone, base=2) for names in mine], weights=[len(n) for n in mine]
        )
    )


def draw_partition(partition: Partition, table: pd.DataFrame, path: Path, title: str) -> None:
    """Write a PNG: on the left each hospital's patients by site, on the right the tumour's share of each
    patient's volume."""
    from matplotlib.figure import Figure  # here: hospitals use this module too, and don't draw

    by_name = table.set_index("patient")
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    bars, points = figure.subplots(1, 2)
    bottom = np.zeros(len(partition.hospitals))
    names = [list(split.part("all")) for split in partition.hospitals]
    for site, colour in zip(sorted(set(table["site"])), itertools.cycle(COLOURS)):
        count = np.array([(by_name.loc[mine, "site"] == site).sum() for mine in names])
        bars.bar(partition.labels, count, bottom=bottom, label=site, color=colour)
        bottom += count
    bars.set(title="Patients by site", ylabel="patients")
    bars.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for number, mine in enumerate(names):
        share = 100 * by_name.loc[mine, "tumour_share"]
        points.scatter(number + np.linspace(-0.25, 0.25, len(mine)), np.sort(share), s=14, color=COLOURS[0])
    points.set(title="Tumour's share of each patient's volume", ylabel="percent", xticks=range(len(names)))
    points.set_xticklabels(partition.labels)
    for axes in (bars, points):
        axes.tick_params(axis="x", rotation=0 if len(names) <= 5 else 60)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(escaping.drawn(title))
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def add_partition_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a dataset is divided."""
    parser.add_argument(
        "--partition", choices=KINDS, default="site", help="how the patients are divided (default site)"
    )
    parser.add_argument("--clients", type=int, default=2, help="number of hospitals (default 2)")
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.5,
        help="for dirichlet: a small value makes hospitals differ (default 0.5)",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="folder with kaggle_3m somewhere below (default data)",
    )
    add_partition_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of split and partition (default 0)")
    parser.add_argument("--plot", type=Path, help="draw the partition into this PNG")
    parser.add_argument("--json", type=Path, help="write the partition to this file; it names the patients")
    add_cache_option(parser)
    add_mask_option(parser)
    arguments = parser.parse_args()
    choose_cache(arguments.cache)
    dataset = load_dataset(arguments.data_dir, mask_suffix=arguments.mask_suffix)
    tell(dataset.notes)
    split = make_split(
        {p.name: p.site for p in dataset.patients}, arguments.seed, VAL_FRACTION, TEST_FRACTION
    )
    partition = make_partition(
        dataset.table, split, arguments.partition, arguments.clients, arguments.alpha, arguments.seed
    )
    title = f"{dataset.name}, {arguments.partition}, {arguments.clients} hospitals"
    print(
        title
        + (
            ": " + ", ".join(map(escaping.terminal, partition.labels))
            if arguments.partition == "site"
            else ""
        )
    )
    described = describe_hospitals(partition, dataset.table).to_string(
        index=False, formatters={"tumour_share": "{:.2f} %".format, "tumour_area": "{:.0f} px".format}
    )
    print(escaping.lines(described))
    distance = heterogeneity(partition, dataset.table)
    print(f"heterogeneity (Jensen-Shannon distance of the tumour burden, 0 alike to 1): {distance:.3f}")
    if arguments.json:
        write_json(arguments.json, partition.as_json())
        print(f"wrote {arguments.json}")
    if arguments.plot:
        draw_partition(partition, dataset.table, arguments.plot, title)
        print(f"wrote {arguments.plot}")
    alpha = f" --alpha {arguments.alpha:g}" if arguments.partition == "dirichlet" else ""
    print(
        f"next: python run_server.py --clients {arguments.clients} --partition {arguments.partition}{alpha}, and "
        f"python run_client.py --cid 0 (to {arguments.clients - 1}) --data-dir {arguments.data_dir}"
    )


if __name__ == "__main__":
    run_script(main)
