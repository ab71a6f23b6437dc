"""Synthetic patients in the layout of the LGG MRI download, for tests and first tries without any real scan.

Phantoms are painted, not measured, so a score on phantoms says nothing about real patients.
"""

import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import MedFLError
from phantoms.painting import SCANNERS, paint_patient

PHANTOM = re.compile(r"^TCGA_[A-Z]{2}_PH\d{3}_\d{8}$")
HEADER = (
    "Patient,RNASeqCluster,MethylationCluster,miRNACluster,CNCluster,RPPACluster,OncosignCluster,COCCluster,"
    "histological_type,neoplasm_histologic_grade,tumor_tissue_site,laterality,tumor_location,gender,"
    "age_at_initial_pathologic,race,ethnicity,death01"
)
MISSING_EVERY = 7  # 16 of the 110 real patients lack a sequence


def make_phantoms(
    out: Path, patients: int, slices: int, size: int, seed: int, progress: bool = False
) -> Path:
    """The folder `<out>/kaggle_3m`, filled with phantoms in the download's layout; phantoms of an earlier run
    are replaced.

    patients: 1 to 999. slices: mean per patient; the number varies by 30 %. size: pixels per side. Patient k is the
    same for any number of `patients`. Raises MedFLError for a number out of range, and if that folder holds other
    patients.
    """
    _check(patients, slices, size, seed)
    root = Path(out) / "kaggle_3m"
    try:
        old = _phantoms_in(root)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".phantoms-") as beside:
            names = [
                _write_patient(Path(beside), index, site, slices, size, seed)
                for index, site in enumerate(
                    tqdm(_sites(patients), "making phantoms", disable=None if progress else True)
                )
            ]
            table = [HEADER] + [name.rpartition("_")[0] + "," * HEADER.count(",") for name in names]
            (Path(beside) / "data.csv").write_bytes(("\n".join(table) + "\n").encode())
            for folder in old:
                shutil.rmtree(folder)
            for name in [*names, "data.csv"]:
                (Path(beside) / name).replace(root / name)
    except OSError as error:
        raise MedFLError(
            f"{root} can't be written ({error.strerror or error}); free the space or change --out"
        ) from error
    return root


def _check(patients: int, slices: int, size: int, seed: int) -> None:
    for name, value, least, most in (
        ("--patients", patients, 1, 999),
        ("--slices", slices, 4, 200),
        ("--size", size, 32, 1024),
        ("--seed", seed, 0, 2**63),
    ):
        if not least <= value <= most:
            raise MedFLError(
                f"{name} is {value}, which is out of range; choose a number from {least} to {most}"
            )
    if size % 16:
        raise MedFLError(
            f"--size is {size}, but the network needs a multiple of 16; choose {size // 16 * 16 + 16}"
        )


def _phantoms_in(root: Path) -> list[Path]:
    """Folders of phantoms in `root`. Raises MedFLError if it holds any other folder."""
    folders = (
        [f for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith(".")]
        if root.exists()
        else []
    )
    for folder in folders:
        if not PHANTOM.match(folder.name):
            raise MedFLError(
                f"{root} holds {folder.name}, which is no phantom and would be mixed up with them; choose another "
                f"--out"
            )
    return folders


def _sites(count: int) -> list[str]:
    """The site of each patient: the start of one fixed sequence, so that it does not depend on `count`.

    Three patients of every site come first, because a smaller site is never split. Then comes, each time, the site
    that lacks the most patients.
    """
    sites = [site for site in SCANNERS for _ in range(3)]
    everyone = sum(scanner.patients for scanner in SCANNERS.values())
    while len(sites) < count:
        sites.append(
            max(SCANNERS, key=lambda s: SCANNERS[s].patients * (len(sites) + 1) / everyone - sites.count(s))
        )
    return sites[:count]


def _write_patient(folder: Path, index: int, site: str, slices: int, size: int, seed: int) -> str:
    """Write a patient's slices and masks into `folder / name`. Returns the name."""
    rng = np.random.default_rng([seed, index])
    name = f"TCGA_{site}_PH{index + 1:03d}_{rng.integers(1985, 2006)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
    missing = int(rng.choice([0, 2], p=[0.375, 0.625])) if (index + seed) % MISSING_EVERY == 3 else None
    volume, truth = paint_patient(
        rng, SCANNERS[site], max(3, round(slices * rng.uniform(0.7, 1.3))), size, missing
    )
    (folder / name).mkdir()
    for number, (pixels, mask) in enumerate(zip(volume, truth), start=1):
        Image.fromarray(pixels).save(folder / name / f"{name}_{number}.tif")
        Image.fromarray(mask).save(folder / name / f"{name}_{number}_mask.tif")
    return name
