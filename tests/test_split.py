"""split.py: a patient is in one part, every site keeps somebody to train, and a file says the same
everywhere."""

import json
import unicodedata

import numpy as np
import pytest

from common import MedFLError
from split import Split, load_split, make_split, save_split, split_for

COUNTS = {"CS": 6, "DU": 16, "EZ": 1, "FG": 5, "HT": 12}


def cohort(counts):
    """{patient: site}, with these many patients a site."""
    return {f"TCGA_{site}_{i:04d}": site for site, count in counts.items() for i in range(count)}


def random_cohort(seed):
    random = np.random.default_rng(seed)
    return cohort({f"S{i}": int(random.integers(1, 15)) for i in range(random.integers(1, 9))})


def at_site(names, sites, site):
    return sum(sites[name] == site for name in names)


FORTY = cohort(COUNTS)
RECORDED_TEST = (
    "TCGA_CS_0003",
    "TCGA_DU_0002",
    "TCGA_DU_0003",
    "TCGA_DU_0014",
    "TCGA_FG_0004",
    "TCGA_HT_0002",
    "TCGA_HT_0003",
    "TCGA_HT_0010",
)
RECORDED_SHA256 = "6e07804e04971791d8e6459d8ee7d456de26da363142b40860b00bd81c47beb7"


def test_forty_patients_are_28_4_and_8():
    split = make_split(FORTY, 0)
    assert (len(split.train), len(split.val), len(split.test)) == (28, 4, 8)
    assert {site: at_site(split.test, FORTY, site) for site in COUNTS} == {
        "CS": 1,
        "DU": 3,
        "EZ": 0,
        "FG": 1,
        "HT": 3,
    }


@pytest.mark.parametrize("seed", range(40))
def test_every_patient_is_in_exactly_one_part_and_every_site_trains(seed):
    sites = random_cohort(seed)
    val, test = np.random.default_rng([seed, 1]).dirichlet([1, 1, 1])[:2]
    split = make_split(sites, seed, val, test)
    assert sorted(split.train + split.val + split.test) == sorted(sites) == sorted(split.part("all"))
    for site in set(sites.values()):
        everyone = at_site(sites, sites, site)
        train = at_site(split.train, sites, site)
        assert train >= 1 and (train == everyone or everyone >= 3), (site, everyone, train)


@pytest.mark.parametrize("seed", range(40))
def test_sites_give_in_proportion(seed):
    sites = random_cohort(seed)
    split = make_split(sites, seed)
    room = {site: n for site in set(sites.values()) if (n := at_site(sites, sites, site)) >= 3}
    for part, fraction in (("test", 0.2), ("val", 0.1)):
        names = split.part(part)
        assert len(names) == min(round(fraction * len(sites)), sum(n - 1 for n in room.values()))
        given = {site: at_site(names, sites, site) for site in room}
        for site, n in room.items():
            fair = round(fraction * len(sites)) * n / sum(room.values())
            assert abs(given[site] - fair) <= 1 or given[site] == n - 1, (part, site)
        room = {site: n - given[site] for site, n in room.items()}


def test_shares_are_rounded_not_cut():
    split = make_split(cohort({"A": 13, "B": 13}), 0)  # 5.2 to test, 2.6 to validation
    assert (len(split.train), len(split.val), len(split.test)) == (18, 3, 5)


def test_many_single_patients_do_not_empty_the_one_large_site():
    sites = cohort({**{f"S{i}": 1 for i in range(17)}, "B": 3})
    split = make_split(sites, 0)
    assert at_site(split.train, sites, "B") == 1 and at_site(split.test, sites, "B") == 2


def test_no_fractions_give_everybody_to_training():
    split = make_split(FORTY, 0, 0, 0)
    assert split.train == tuple(sorted(FORTY)) and split.val == split.test == ()


def test_the_seed_decides_and_the_order_of_the_patients_does_not():
    turned = dict(reversed(FORTY.items()))
    assert make_split(FORTY, 3) == make_split(turned, 3)
    assert make_split(FORTY, 3).sha256() == make_split(turned, 3).sha256()
    others = [make_split(FORTY, seed) for seed in range(5)]
    assert len({split.test for split in others}) == 5 and len({split.sha256() for split in others}) == 5


def test_the_split_is_the_same_as_when_it_was_first_made():
    """Federations compare this number between machines: another numpy or platform may not change it."""
    assert make_split(FORTY, 0).test == RECORDED_TEST
    assert make_split(FORTY, 0).sha256() == RECORDED_SHA256


@pytest.mark.parametrize(
    "val, test", [(-0.1, 0.2), (0.1, -0.2), (1, 0), (0, 1), (0.5, 0.5), (0.1, float("nan"))]
)
def test_impossible_fractions_are_refused(val, test):
    with pytest.raises(MedFLError, match="fractions"):
        make_split(FORTY, 0, val, test)


def test_nobody_to_train_is_refused():
    with pytest.raises(MedFLError, match="none of 0 patients"):
        make_split({}, 0)


def test_a_saved_split_comes_back_the_same(tmp_path):
    split = make_split(FORTY, 5)
    save_split(split, tmp_path / "new" / "split.json")
    again = load_split(tmp_path / "new" / "split.json", set(FORTY))
    assert again == split and again.sha256() == split.sha256()
    content = json.loads((tmp_path / "new" / "split.json").read_text())
    assert list(content) == ["version", "seed", "train", "val", "test"] and content["version"] == 1


def test_the_sha256_tells_parts_apart():
    first = Split(0, ("a", "b"), ("c",), ())
    others = [
        Split(1, ("a", "b"), ("c",), ()),
        Split(0, ("a",), ("b", "c"), ()),
        Split(0, ("a", "b"), (), ("c",)),
    ]
    assert len({split.sha256() for split in (first, *others)}) == 4


GOOD = {"version": 1, "seed": 0, "train": ["a", "b"], "val": ["c"], "test": ["d"]}


@pytest.mark.parametrize(
    "content, sentence",
    [
        ('{"version": 1,\n "train": ["a",]}', "is not JSON .*line 2 column"),
        ("", "is not JSON"),
        ("[1, 2]", "not a split file of MedFL"),
        ({**GOOD, "train": None}, "not a split file of MedFL"),
        ({**GOOD, "seed": float("inf")}, "not a split file of MedFL"),
        ({key: value for key, value in GOOD.items() if key != "test"}, "not a split file of MedFL"),
        ({**GOOD, "version": 2}, "version 2"),
        ({**GOOD, "val": ["c", "d"]}, "names d twice"),
        ({**GOOD, "train": ["a", "b", "b"]}, "names b twice"),
        ({**GOOD, "test": ["d", "x", "y"]}, r"names x \(and 1 more\) that the dataset does not hold"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, sentence):
    path = tmp_path / "split.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(MedFLError, match=sentence) as error:
        load_split(path, set("abcd"))
    assert "split.json" in str(error.value) and ";" in str(error.value)


def test_bytes_that_are_no_text_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "split.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MedFLError, match="not a split file of MedFL"):
        load_split(tmp_path / "split.json", set("abcd"))
    with pytest.raises(MedFLError, match="there is no split file"):
        load_split(tmp_path / "other.json", set("abcd"))
    with pytest.raises(MedFLError, match="can't be read .*; check its permissions"):
        load_split(tmp_path, set("abcd"))


def test_a_split_may_name_fewer_patients_than_there_are(tmp_path):
    (tmp_path / "split.json").write_text(json.dumps(GOOD))
    assert load_split(tmp_path / "split.json", set("abcdef")).part("all") == tuple("abcd")


def test_split_for_makes_the_file_once_and_then_takes_it(tmp_path):
    path = tmp_path / "split.json"
    made = split_for(path, FORTY, 0, 0.1, 0.2)
    written = path.read_bytes()
    assert made == make_split(FORTY, 0, 0.1, 0.2) == load_split(path, set(FORTY))
    assert split_for(path, FORTY, 1, 0.3, 0.3) == made and path.read_bytes() == written


def test_split_for_refuses_the_file_of_other_patients(tmp_path):
    path = tmp_path / "split.json"
    split_for(path, FORTY, 0, 0.1, 0.2)
    with pytest.raises(MedFLError, match="leaves out patients"):
        split_for(path, {**FORTY, "new": "CS"}, 0, 0.1, 0.2)
    with pytest.raises(MedFLError, match="does not hold"):
        split_for(path, dict(list(FORTY.items())[1:]), 0, 0.1, 0.2)


def test_a_split_of_a_mac_names_the_same_patients(tmp_path):
    names = ("Jäger", "Müller", "Ömer")
    mac = [unicodedata.normalize("NFD", name) for name in names]
    assert not set(mac) & set(names)
    path = tmp_path / "split.json"
    save_split(Split(0, tuple(mac[:1]), tuple(mac[1:2]), tuple(mac[2:])), path)
    assert load_split(path, set(names)) == Split(0, names[:1], names[1:2], names[2:])
    both = {*names, *mac}  # on Linux they can be two patients
    assert load_split(path, both).part("all") == tuple(mac)
