"""The split of the patients into training, validation and test, stratified by site."""

import hashlib
import json
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from borders.limits import read_json_file
from common import MedFLError, counted
from storage.files import write_json

PARTS = ("train", "val", "test")
VAL_FRACTION, TEST_FRACTION = 0.1, 0.2  # shares of the patients, by default
MIN_SITE = 3  # a smaller site is used only for training: it can't give a patient to each part


@dataclass(frozen=True)
class Split:
    """Names of the patients of each part; a patient is in exactly one."""

    seed: int
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def part(self, name: str) -> tuple[str, ...]:
        """The patients of "train", "val", "test" or "all"."""
        return self.train + self.val + self.test if name == "all" else getattr(self, name)

    def sha256(self) -> str:
        """SHA-256 of the split as JSON with sorted keys; the same on every machine."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def make_split(
    sites: dict[str, str], seed: int, val_fraction: float = VAL_FRACTION, test_fraction: float = TEST_FRACTION
) -> Split:
    """The split of these patients (name to site), the same for the same patients, seed and fractions.

    Validation and test get their shares of all patients, rounded; each site contributes its part by the largest
    remainders. Sites with fewer than 3 patients are used only for training. Raises MedFLError for fractions out of
    range, or if no patient is left to train on.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise MedFLError(
            "the validation and test fractions must be 0 or more and add up to less than 1; choose others"
        )
    shuffle = np.random.default_rng(seed)
    groups = {site: [p for p in sorted(sites) if sites[p] == site] for site in sorted(set(sites.values()))}
    groups = {site: list(shuffle.permutation(names)) for site, names in groups.items()}
    room = {site: len(names) if len(names) >= MIN_SITE else 0 for site, names in groups.items()}
    test = _shares(room, round(test_fraction * len(sites)))
    room = {site: n - test[site] for site, n in room.items()}
    val = _shares(room, round(val_fraction * len(sites)))
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for site, names in groups.items():
        parts["test"] += names[: test[site]]
        parts["val"] += names[test[site] : test[site] + val[site]]
        parts["train"] += names[test[site] + val[site] :]
    if not parts["train"]:
        raise MedFLError(
            f"the split leaves none of {counted(len(sites), 'patient')} to train on; lower --val-fraction or "
            f"--test-fraction"
        )
    return Split(seed, **{part: tuple(sorted(str(n) for n in names)) for part, names in parts.items()})


def make_folds(
    sites: dict[str, str], folds: int, seed: int, val_fraction: float = VAL_FRACTION
) -> list[Split]:
    """Splits of these patients (name to site) for a cross-validation: each patient is in the test part of exactly
    one.

    Each site is shuffled and dealt to the folds in turn, so that their sizes differ by one at most. Validation
    patients are drawn from the others as `make_split` does. Raises MedFLError for fewer than 2 folds, for more
    folds than patients, and if no patient is left to train on.
    """
    if not 2 <= folds <= len(sites):
        raise MedFLError(f"{len(sites)} patients can't be divided into {folds} folds; choose another number")
    shuffle = np.random.default_rng(seed)
    dealt: list[str] = []
    for site in sorted(set(sites.values())):
        dealt += [str(name) for name in shuffle.permutation([p for p in sorted(sites) if sites[p] == site])]
    splits = []
    for number in range(folds):
        test = tuple(sorted(dealt[number::folds]))
        rest = make_split({p: site for p, site in sites.items() if p not in test}, seed, val_fraction, 0.0)
        splits.append(Split(seed, rest.train, rest.val, test))
    return splits


def _shares(room: dict[str, int], total: int) -> dict[str, int]:
    """`total` places given to the sites in proportion to their patients, by the largest remainders. One patient of
    each site stays for training."""
    everyone = sum(room.values())
    if not everyone:
        return dict.fromkeys(room, 0)
    exact = {site: total * n / everyone for site, n in room.items()}
    given = {site: min(int(share), max(room[site] - 1, 0)) for site, share in exact.items()}
    for site in sorted(room, key=lambda s: (given[s] - exact[s], s)):
        if sum(given.values()) < total and given[site] + 1 < room[site]:
            given[site] += 1
    return given


def save_split(split: Split, path: Path) -> None:
    """Write the split as JSON: version, seed, train, val, test."""
    write_json(path, {"version": 1, **asdict(split)})


def load_split(path: Path, patients: set[str]) -> Split:
    """The split in `path`, with the patients' names as the dataset writes them: a Mac encodes accents otherwise.
    Raises MedFLError for another format, unknown patients, or a patient in two parts."""
    here = {unicodedata.normalize("NFC", name): name for name in patients}

    def as_here(name: str) -> str:
        return name if name in patients else here.get(unicodedata.normalize("NFC", name), name)

    try:
        content = read_json_file(Path(path))
        told = [map(str, content[part]) for part in PARTS]
        split = Split(int(content["seed"]), *(tuple(map(as_here, names)) for names in told))
    except FileNotFoundError as error:
        raise MedFLError(
            f"there is no split file {path}; give the training's split.json with --split-file"
        ) from error
    except OSError as error:
        raise MedFLError(f"{path} can't be read ({error.strerror}); check its permissions") from error
    except json.JSONDecodeError as error:
        raise MedFLError(f"{path} is not JSON ({error}); correct it there, or delete the file") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:  # the last of an infinite seed
        raise MedFLError(
            f"{path} is not a split file of MedFL; name the split.json that the training wrote"
        ) from error
    if content.get("version") != 1:
        raise MedFLError(
            f"{path} is a split of version {content.get('version')}, but this MedFL reads version 1; use the "
            f"MedFL that wrote it"
        )
    named = split.part("all")
    if len(set(named)) != len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise MedFLError(
            f"{path} names {twice} twice, but a patient belongs to one part once; correct it or delete the file"
        )
    unknown = sorted(set(named) - patients)
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise MedFLError(
            f"{path} names {unknown[0]}{more} that the dataset does not hold; choose the data it was made "
            "for, or delete it to draw a new split, which may train on its test patients"
        )
    return split


def split_for(
    path: Path, sites: dict[str, str], seed: int, val_fraction: float, test_fraction: float
) -> Split:
    """The split in `path`, which must name exactly these patients; if there is no file, a new split, written
    there."""
    if Path(path).exists():
        split = load_split(path, set(sites))
        if set(split.part("all")) != set(sites):
            raise MedFLError(
                f"{path} leaves out patients of this dataset; delete it to draw a new split, which may train on its "
                "test patients"
            )
        return split
    split = make_split(sites, seed, val_fraction, test_fraction)
    save_split(split, path)
    return split
