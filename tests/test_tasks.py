"""Another task than the tumour: its file, its files' way into the layout, and a model of it."""

import json
import shutil
import time

import nibabel
import numpy as np
import pytest
from PIL import Image
from running import run_here
from scripted import facts as said

from checkpoint import load_checkpoint
from common import MedFLError
from data.prepare_task import pairs, read_nifti, to_8_bits, write_patient
from dataset import load_dataset
from deployment.app.card import card_rows
from federation.protocol.answers import Facts, parse
from federation.protocol.settings import FederationSettings
from federation.server.description import describe_run
from federation.server.progress import Progress
from tasks import FOLDER, LGG, named_task, read_task
from training import TrainingSettings
from transunet import TransUNet


def test_the_tasks_that_come_with_medfl():
    assert {path.stem: read_task(path).name for path in FOLDER.glob("*.toml")} == {
        name: name for name in ("lgg", "hippocampus", "wounds")
    }
    assert named_task("lgg") == LGG  # which a bundle has without its file
    assert named_task("lgg").site_of("TCGA_CS_4941_19960909") == "CS"
    assert named_task("hippocampus").site_of("hippocampus_001") is None


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("labels = [1, 2]\n", "labels = [0]\n", "labels must be from 1 to 255"),
        ('channels = ["T1"]', "channels = []", "channels"),
        ('channels = ["T1"]', 'channels = ["a", "b", "c", "d"]', "channels"),
        ('region = "hippocampus"', "", "region"),
        ('region = "hippocampus"', 'region = "a"\nmore = 1', "more"),
        ("volume-foreground-v1", "none", "normalisation must be"),
        ('region = "hippocampus"', 'region = "a"\nsite = "(a)(b)"', "one group"),
        ('region = "hippocampus"', 'region = "a"\nsite = "("', "no regular expression"),
        ('region = "hippocampus"', 'region = "a"\nsite = "^(a+)+$"', "could take for ever"),
        ('region = "hippocampus"', 'region = "a"\nsite = "a*a*a*a*(b)"', "could take for ever"),
        ('region = "hippocampus"', f'region = "a"\nsite = "{"(?:a|aa)" * 40}(b)"', "could take for ever"),
        ('region = "hippocampus"', f'region = "a"\nsite = "{"a?" * 40}(b)"', "could take for ever"),
        ("labels = [2]", "labels = [1, 2]", "hold each of the labels once"),
        ("labels = [2]", "labels = [3]", "hold each of the labels once"),
        ("labels = [2]", "labels = []", "classes.1.labels"),
        ('name = "posterior"', 'name = "Anterior"', "different names"),
        ('name = "posterior"', 'name = "=1+1"', "classes.1.name"),
        ('[[classes]]\nname = "posterior"\nlabels = [2]', "", "hold each of the labels once"),
        ('title = "', "title = ", "no task file"),
        ('title = "', r'title = "\u001b[2J', "can't be printed"),
        ('title = "', "a = " + "[" * 5_000 + "\ntitle = ", "no task file"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(tmp_path, before, after, sentence):
    text = (FOLDER / "hippocampus.toml").read_text()
    assert before in text
    (tmp_path / "own.toml").write_text(text.replace(before, after))
    with pytest.raises(MedFLError, match=sentence):
        read_task(tmp_path / "own.toml")


def test_a_pattern_is_looked_for_in_the_beginning_of_a_name():
    task = named_task("lgg").model_copy(update={"site": ".*.*.*(b)"})
    began = time.monotonic()
    assert task.site_of("a" * 4_000) is None and time.monotonic() - began < 5


def test_an_unknown_name_is_told():
    with pytest.raises(MedFLError, match="hippocampus, lgg, wounds"):
        named_task("liver")


def volumes(folder, count: int = 6) -> None:
    """Bright ellipsoids of two labels in noise, NIfTI, 2 × 1 × 3 mm."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        x, y, z = np.mgrid[:20, :24, :6]
        inside = ((x - 10) / 5) ** 2 + ((y - 12) / 6) ** 2 + ((z - 3) / 2.5) ** 2 < 1
        labels = (inside * np.where(y > 12, 1, 2)).astype(np.uint8)
        values = (random.gamma(4, 25, inside.shape) + 300 * inside).astype(np.float32)
        for kind, content in (("images", values), ("labels", labels)):
            image = nibabel.Nifti1Image(content, np.diag([2.0, 1.0, 3.0, 1.0]))
            nibabel.save(image, folder / kind / f"h_{number:02}.nii.gz")


def photographs(folder, count: int = 6) -> None:
    """Red spots on skin of two clinics, PNG pairs."""
    random = np.random.default_rng(1)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        y, x = np.mgrid[:48, :64]
        spot = (x - 20 - 4 * number) ** 2 + (y - 24) ** 2 < 80
        skin = np.array([200, 160, 140]) + random.normal(0, 8, (48, 64, 3))
        skin[spot] = [150, 40, 40]
        name = f"{('north', 'south')[number % 2]}_{number}"
        Image.fromarray(skin.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.png")
        Image.fromarray(spot.astype(np.uint8) * 255).save(folder / "labels" / f"{name}.png")


def test_slices_lie_as_a_radiologist_sees_them(tmp_path):
    """The first voxel of RAS (right is positive) is left, back and below: the last slice's corner but for z."""
    values = np.zeros((4, 5, 3), np.float32)
    values[0, 0, 0], values[3, 4, 2] = 1, 2
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 1.0, 3.0, 1.0])), tmp_path / "a.nii")
    volume, spacing, _ = read_nifti(tmp_path / "a.nii")
    assert volume.shape == (3, 5, 4) and spacing == (3.0, 1.0, 2.0)
    assert volume[0, 4, 3] == 1 and volume[2, 0, 0] == 2
    turned = nibabel.Nifti1Image(values[::-1], np.diag([-2.0, 1.0, 3.0, 1.0]))  # stored the other way round
    nibabel.save(turned, tmp_path / "b.nii")
    assert (read_nifti(tmp_path / "b.nii").slices == volume).all()


@pytest.mark.parametrize("stored", ["turned", "as the scan", "beside it", "nowhere"])
def test_a_label_lies_on_its_scan_or_is_refused(tmp_path, stored):
    """Labels that are saved with a plain affine, as many scripts do, would be mirrored."""
    values = np.zeros((16, 20, 3), np.float32)
    values[2:5, 4:9, 1] = 100
    scan = np.diag([-1.0, 1.0, 3.0, 1.0])
    label = nibabel.Nifti1Image((values > 0).astype(np.uint8), scan)
    if stored == "turned":  # the same places, in another order
        label = nibabel.as_closest_canonical(label)
    elif stored == "beside it":
        label = nibabel.Nifti1Image(label.dataobj, np.diag([1.0, 1.0, 3.0, 1.0]))
    elif stored == "nowhere":
        label.set_sform(None, 0)
    for name, image in (("scan", nibabel.Nifti1Image(values, scan)), ("label", label)):
        nibabel.save(image, tmp_path / f"{name}.nii")
    files = ("a", tmp_path / "scan.nii", tmp_path / "label.nii", named_task("hippocampus"), tmp_path)
    if stored in ("beside it", "nowhere"):
        with pytest.raises(MedFLError, match="another position|does not give the patient's orientation"):
            write_patient(*files)
        return
    write_patient(*files)
    picture, mask = (np.asarray(Image.open(tmp_path / "a" / f"a_2{kind}.png")) for kind in ("", "_mask"))
    assert mask.any() and np.array_equal(picture > 0, mask > 0)


def test_any_intensities_become_8_bits():
    assert to_8_bits(np.zeros((2, 3))).max() == 0
    wide = to_8_bits(np.linspace(0, 3_000, 1_000).reshape(10, 100))
    assert wide.min() == 0 and wide.max() == 255 and wide.dtype == np.uint8
    ringing = to_8_bits(np.concatenate([np.full(50, -20.0), np.linspace(1, 3_000, 50)]))
    assert (ringing[:50] == 0).all()


def test_what_lies_below_0_is_not_black_where_it_matters():
    """Standardised MRI around a background of 0, and CT in Hounsfield units."""
    head = np.random.default_rng(0).normal(size=5_000)
    standardised = to_8_bits(np.concatenate([np.zeros(3_000), head]))
    assert (standardised[:3_000] == 0).all() and (standardised[3_000:] == 0).mean() < 0.02
    air, fat, liver, bone = to_8_bits(np.repeat([-1000.0, -100.0, 60.0, 900.0], 100))[::100].astype(int)
    assert air == 0 < fat < liver < bone == 255


@pytest.mark.parametrize(
    ("task", "make", "slices", "sites"),
    [("hippocampus", volumes, 6, {"own"}), ("wounds", photographs, 1, {"north", "south"})],
)
def test_a_task_is_prepared_trained_scored_and_told(tmp_path, home, task, make, slices, sites):
    make(tmp_path / "source")
    data, out = tmp_path / "data", tmp_path / "models"
    prepared = run_here(
        "data/prepare_task.py", "--task", task, "--source", tmp_path / "source", "--out", data
    )
    assert prepared.returncode == 0 and "6 patients" in prepared.stdout, prepared.stderr
    dataset = load_dataset(data, progress=False)
    assert dataset.name == named_task(task).title and {p.site for p in dataset.patients} == sites
    assert (dataset.table["slices"] == slices).all() and (dataset.table["tumour_pixels"] > 50).all()
    options = ("--data-dir", data, "--out", out, "--model", "mini", "--encoder", "random", "--image-size", 32)
    trained = run_here("train_centralized.py", *options, "--steps", 2, "--batch-size", 4)
    assert trained.returncode == 0, trained.stderr
    best = out / "transunet_centralized_best.pth"
    scored = run_here(
        "evaluate.py",
        "--checkpoint",
        best,
        "--data-dir",
        data,
        "--json",
        tmp_path / "s.json",
        "--split",
        "all",
    )
    assert scored.returncode == 0 and named_task(task).title in scored.stdout, scored.stderr
    assert f"{named_task(task).region} slices" in scored.stdout and "tumour" not in scored.stdout
    assert ("hd95_mm" in json.loads((tmp_path / "s.json").read_text())) == (task == "hippocampus")
    images = sorted(path for path in data.rglob("*.png") if not path.stem.endswith("_mask"))[:slices]
    seen = run_here("predict.py", *images, "--checkpoint", best, "--out", tmp_path / "predicted")
    assert f", {named_task(task).region} in " in seen.stdout and "tumour" not in seen.stdout, seen.stderr
    card = dict(card_rows(load_checkpoint(best), "0" * 64))
    assert named_task(task).region in card["Task"]
    again = run_here("data/prepare_task.py", "--task", task, "--source", tmp_path / "source", "--out", data)
    assert again.returncode == 2 and "is not empty" in again.stderr


def test_what_does_not_fit_is_told(tmp_path):
    photographs(tmp_path / "source", 2)
    labels = tmp_path / "source" / "labels"
    command = ("data/prepare_task.py", "--source", tmp_path / "source", "--out")
    grey = (FOLDER / "wounds.toml").read_text().replace('["red", "green", "blue"]', '["grey"]')
    (tmp_path / "grey.toml").write_text(grey)
    colours = run_here(*command, tmp_path / "e", "--task", tmp_path / "grey.toml")
    assert colours.returncode == 2 and "has colours, but wounds has one channel" in colours.stderr
    Image.new("L", (64, 48), 7).save(labels / "north_0.png")
    odd = run_here(*command, tmp_path / "a", "--task", "wounds")
    assert odd.returncode == 2 and "has the value 7" in odd.stderr
    Image.new("L", (32, 48)).save(labels / "north_0.png")
    other = run_here(*command, tmp_path / "b", "--task", "wounds")
    assert other.returncode == 2 and "differ in size" in other.stderr
    (labels / "north_0.png").unlink()
    alone = run_here(*command, tmp_path / "c", "--task", "wounds")
    assert alone.returncode == 2 and "north_0 is only in one of" in alone.stderr
    shutil.rmtree(labels)
    none = run_here(*command, tmp_path / "d", "--task", "wounds")
    assert none.returncode == 2 and "there is no folder" in none.stderr


def test_a_federations_model_tells_its_task():
    """As a hospital says it at joining, in JSON."""
    task = named_task("hippocampus")
    facts = parse(Facts, json.loads(json.dumps(said("mercy", task=task.model_dump()))))
    done = Progress(hospitals={"mercy": facts})
    settings, training = FederationSettings(clients=1), TrainingSettings(model="mini", image_size=32)
    about = describe_run(TransUNet("mini", 32), training, settings, done, None, {}, 1)
    assert about["task"] == task.model_dump(mode="json")
    lacks = Progress(hospitals={"mercy": parse(Facts, said("mercy"))})
    assert describe_run(TransUNet("mini", 32), training, settings, lacks, None, {}, 1)["task"] is None


@pytest.mark.parametrize("other", ["south_1.jpg", "south_1_0000.png"])
def test_two_pictures_of_one_name_are_refused(tmp_path, other):
    photographs(tmp_path, 2)
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / other)
    with pytest.raises(MedFLError, match="are both called south_1"):
        pairs(tmp_path)
