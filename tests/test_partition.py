"""The division of one dataset among hospitals."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from running import run_here, run_script

from common import MedFLError
from dataset import load_dataset
from partition import (
    KINDS,
    MIN_TRAIN,
    Partition,
    burden_classes,
    describe_hospitals,
    heterogeneity,
    make_partition,
)
from split import PARTS, Split, make_split


def cohort(sizes: dict[str, int], seed: int = 0) -> pd.DataFrame:
    """A patient table: sites of these sizes, tumours of random size."""
    random = np.random.default_rng(seed)
    rows = []
    for site, count in sizes.items():
        for number in range(count):
            slices, tumour = int(random.integers(20, 40)), int(random.integers(500, 60_000))
            pixels = slices * 256 * 256
            rows.append(
                {
                    "patient": f"{site}{number:02}",
                    "site": site,
                    "slices": slices,
                    "pixels": pixels,
                    "tumour_slices": slices // 3,
                    "tumour_pixels": tumour,
                    "tumour_share": tumour / pixels,
                }
            )
    return pd.DataFrame(rows)


LIKE_THE_REAL = {"CS": 6, "DU": 16, "EZ": 1, "FG": 5, "HT": 12}


def parts_of(table, seed=0):
    return make_split(dict(zip(table["patient"], table["site"])), seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clients", [1, 2, 4, 7, 13])
def test_everybody_is_in_exactly_one_hospital_and_keeps_the_part(kind, clients):
    table = cohort(LIKE_THE_REAL)
    split = parts_of(table)
    partition = make_partition(table, split, kind, clients, alpha=0.1, seed=3)
    assert len(partition.hospitals) == clients == len(partition.labels)
    for part in PARTS:
        everybody = [name for hospital in partition.hospitals for name in hospital.part(part)]
        assert sorted(everybody) == sorted(split.part(part))
    assert all(len(hospital.train) >= MIN_TRAIN for hospital in partition.hospitals)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_the_tables_order_does_not(kind):
    table = cohort(LIKE_THE_REAL)
    split = parts_of(table)
    hashes = [
        make_partition(t, split, kind, 3, 0.5, seed).sha256()
        for t, seed in ((table, 1), (table.sample(frac=1, random_state=0), 1), (table, 2))
    ]
    assert hashes[0] == hashes[1]
    if kind in ("iid", "dirichlet", "quantity"):
        assert hashes[0] != hashes[2]


def test_site_keeps_real_sites_merges_the_smallest_and_halves_the_largest():
    table = cohort(LIKE_THE_REAL)
    split = parts_of(table)
    whole = make_partition(table, split, "site", 5)
    assert whole.labels == ("CS", "DU", "EZ", "FG", "HT")
    assert {name[:2] for name in whole.hospitals[0].part("all")} == {"CS"}
    assert len(whole.hospitals[2].train) == MIN_TRAIN  # EZ's one patient, and one that the largest site gave
    joined = make_partition(table, split, "site", 4)
    assert joined.labels == ("CS", "DU", "EZ + FG", "HT")
    assert {name[:2] for name in joined.hospitals[2].part("all")} == {"EZ", "FG"}
    halved = make_partition(table, split, "site", 6)
    assert {"DU/1", "DU/2"} <= set(halved.labels)
    sizes = [
        len(h.part("all")) for h, label in zip(halved.hospitals, halved.labels) if label.startswith("DU/")
    ]
    assert sum(sizes) in (15, 16) and abs(sizes[0] - sizes[1]) <= 1


def test_quantity_follows_the_power_law():
    table = cohort({"AA": 110})
    sizes = [len(h.part("all")) for h in make_partition(table, parts_of(table), "quantity", 4).hospitals]
    assert sizes == [53, 26, 18, 13]  # 110 in shares 1, 1/2, 1/3, 1/4 of 25/12


def test_tumour_size_sorts_by_the_mean_area():
    table = cohort(LIKE_THE_REAL)
    area = dict(zip(table["patient"], table["tumour_pixels"] / table["tumour_slices"]))
    pieces = [
        [area[name] for name in h.part("all")]
        for h in make_partition(table, parts_of(table), "tumour-size", 3).hospitals
    ]
    assert max(pieces[0]) < min(pieces[1]) and max(pieces[1]) < min(pieces[2])


def test_a_small_alpha_makes_unlike_hospitals():
    table = cohort({"AA": 200})
    split = parts_of(table)
    unlike, alike = (
        np.mean(
            [
                heterogeneity(make_partition(table, split, "dirichlet", 4, alpha, seed), table)
                for seed in range(8)
            ]
        )
        for alpha in (0.1, 1000)
    )
    assert unlike > 3 * alike


def test_heterogeneity_of_extremes():
    table = cohort({"AA": 30})
    classes = burden_classes(table)
    assert np.bincount(classes).tolist() == [10, 10, 10]
    sorted_by_share = table.assign(tumour_slices=1, tumour_pixels=table["tumour_share"])
    apart = heterogeneity(make_partition(sorted_by_share, parts_of(table), "tumour-size", 3), table)
    middle = (np.array([1.0, 0, 0]) + np.ones(3) / 3) / 2  # between a hospital of one class and everybody
    divergence = 0.5 * np.log2(1 / middle[0]) + 0.5 * np.sum(np.log2((1 / 3) / middle) / 3)
    assert apart == pytest.approx(np.sqrt(divergence))
    assert heterogeneity(make_partition(table, parts_of(table), "iid", 1), table) == pytest.approx(
        0, abs=1e-7
    )


def test_the_tumours_share_counts_the_pixels_of_patients_without_one():
    table = cohort({"AA": 6})
    table.loc[0, ["tumour_pixels", "tumour_share", "tumour_slices"]] = 0
    row = describe_hospitals(make_partition(table, parts_of(table), "iid", 1), table).iloc[0]
    assert row["tumour_share"] == pytest.approx(100 * table["tumour_pixels"].sum() / table["pixels"].sum())


def test_too_few_patients_and_unknown_kinds_are_refused():
    table = cohort({"AA": 6})
    with pytest.raises(MedFLError, match="lower --clients"):
        make_partition(table, parts_of(table), "iid", 4)
    with pytest.raises(MedFLError, match="choose one of"):
        make_partition(table, parts_of(table), "random", 2)
    with pytest.raises(MedFLError, match="--alpha above 0"):
        make_partition(table, parts_of(table), "dirichlet", 2, alpha=0)


@pytest.mark.slow
def test_the_command_prints_writes_and_draws(phantoms, tmp_path):
    done = run_script(
        "partition.py",
        "--partition",
        "iid",
        "--clients",
        3,
        "--data-dir",
        phantoms,
        "--plot",
        tmp_path / "p.png",
        "--json",
        tmp_path / "p.json",
    )
    assert done.returncode == 0 and "heterogeneity" in done.stdout, done.stderr
    content = json.loads((tmp_path / "p.json").read_text())
    assert list(content) == ["0", "1", "2"] and all(list(h) == list(PARTS) for h in content.values())
    dataset = load_dataset(phantoms, progress=False)
    assert sorted(n for h in content.values() for part in h.values() for n in part) == [
        p.name for p in dataset.patients
    ]
    assert (tmp_path / "p.png").stat().st_size > 5_000
    rows = describe_hospitals(make_partition(dataset.table, parts_of(dataset.table), "iid", 3), dataset.table)
    assert rows["slices"].sum() == dataset.table["slices"].sum()
    done = run_here(
        "partition.py",
        "--partition",
        "dirichlet",
        "--alpha",
        0.1,
        "--seed",
        1,
        "--data-dir",
        phantoms,
        "--json",
        tmp_path / "p.json",
    )
    assert done.returncode == 0 and "--partition dirichlet --alpha 0.1, and" in done.stdout, done.stderr
    split = make_split({p.name: p.site for p in dataset.patients}, 1)
    wanted = make_partition(dataset.table, split, "dirichlet", 2, 0.1, 1)
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads(json.dumps(wanted.as_json()))
    assert wanted != make_partition(
        dataset.table, split, "dirichlet", 2, 0.5, 1
    )  # else the option could be lost


def test_two_training_patients_a_hospital_are_enough_and_one_gives_the_mean_area():
    table = cohort({"AA": 6})
    split = make_split(dict(zip(table["patient"], table["site"])), 0, 0, 0)
    partition = make_partition(table, split, "iid", 3)
    assert [len(hospital.train) for hospital in partition.hospitals] == [2, 2, 2]
    row = describe_hospitals(make_partition(table, split, "iid", 1), table).iloc[0]
    assert row["tumour_area"] == pytest.approx(table["tumour_pixels"].sum() / table["tumour_slices"].sum())


def test_heterogeneity_is_a_mean_over_patients():
    table = cohort({"AA": 30})
    table["tumour_slices"], table["tumour_pixels"] = 1, table["tumour_share"]
    names = list(table.sort_values("tumour_share")["patient"])
    parts = [Split(0, tuple(names[:2]), (), ()), Split(0, tuple(names[2:]), (), ())]
    both = Partition(tuple(parts), ("a", "b"))
    distances = []
    for of in ([1.0, 0, 0], [8 / 28, 10 / 28, 10 / 28]):
        middle = (np.array(of) + 1 / 3) / 2
        distances.append(
            np.sqrt(sum(scipy.stats.entropy(p, middle, base=2) for p in (of, np.ones(3) / 3)) / 2)
        )
    assert heterogeneity(both, table) == pytest.approx((2 * distances[0] + 28 * distances[1]) / 30)
