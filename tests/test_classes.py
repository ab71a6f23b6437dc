"""A region with several classes: their masks, loss, probability and figures, in one place and in a federation."""

import gzip
import json

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import run_here
from scripted import facts as said
from test_tasks import volumes

from benchmarks.local_federation import LocalHospital, run
from checkpoint import load_checkpoint
from common import MedFLError
from dataset import load_dataset
from deployment.app.card import card_rows
from deployment.app.case import Case, as_trained
from deployment.app.cases import add_truth, read_case
from deployment.app.nifti import write_nifti
from deployment.app.pictures import png
from deployment.app.readout import class_texts, predict_case
from evaluation.metrics import score_classes
from evaluation.scoring import classes_to_score
from federation.hospital.faults import HospitalError
from federation.hospital.hospital import Hospital
from federation.protocol.answers import Facts, parse
from federation.protocol.settings import FederationSettings
from inference import labelled, predict_classes, to_mask
from preprocessing import network_input, volume_statistics
from radiology.prepared import find_prepared
from radiology.truths import correction, save_truth
from tasks import LGG, read_task
from training import TrainingSettings, segmentation_loss
from transunet import TransUNet

MINI = {"model": "mini", "image_size": 32, "encoder": "random"}
NAMES = ("anterior", "posterior")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ellipsoids of two classes, prepared: label 1 in front, 2 behind."""
    folder = tmp_path_factory.mktemp("classes")
    volumes(folder / "source", 12)
    prepared = run_here(
        "data/prepare_task.py",
        "--task",
        "hippocampus",
        "--source",
        folder / "source",
        "--out",
        folder / "data",
    )
    assert prepared.returncode == 0 and "--classes 2 it outlines anterior and posterior" in prepared.stdout
    return folder / "data"


def test_masks_hold_the_classes(data):
    dataset = load_dataset(data, progress=False)
    patient = dataset.patients[0]
    _, truth = dataset.volume(patient.name)
    assert dataset.classes == NAMES and set(np.unique(truth)) == {0, 1, 2}
    assert dataset.tumour_pixels(patient.name) == np.count_nonzero(truth, axis=(1, 2)).tolist()
    # the same files under a task that counts them the other way round are other data
    text = (data / "task.toml").read_text()
    turned = text.replace("labels = [1]", "labels = [0]").replace("labels = [2]", "labels = [1]")
    (data / "task.toml").write_text(turned.replace("labels = [0]", "labels = [2]"))
    try:
        again = load_dataset(data, progress=False)
        assert again.content != dataset.content
        assert np.array_equal(again.volume(patient.name)[1] == 1, truth == 2)
    finally:
        (data / "task.toml").write_text(text)


def test_a_value_of_no_class_is_refused(data, tmp_path):
    folder = tmp_path / "data" / "h"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "task.toml").write_text((data / "task.toml").read_text())
    for name, value in (("h_1", 90), ("h_1_mask", 7)):
        Image.new("L", (32, 32), value).save(folder / f"{name}.png")
    with pytest.raises(MedFLError, match="has the value 7, but the classes of its task are 1, 2"):
        load_dataset(tmp_path / "data", progress=False)
    Image.new("L", (32, 32), 2).convert("P").save(folder / "h_1_mask.png")  # whose numbers are a palette's
    with pytest.raises(MedFLError, match="pixels of type P"):
        load_dataset(tmp_path / "data", progress=False)


def test_the_loss_is_that_of_a_softmax_with_the_background():
    torch.manual_seed(0)
    logits, classes = torch.randn(3, 2, 8, 8), torch.randint(0, 3, (3, 8, 8))
    masks = torch.stack([classes == 1, classes == 2], dim=1).float()
    whole = torch.cat([torch.zeros(3, 1, 8, 8), logits], dim=1)
    shares = whole.softmax(dim=1)[:, 1:]
    dice = [
        (2 * (shares[:, k] * masks[:, k]).sum() + 1) / (shares[:, k].sum() + masks[:, k].sum() + 1)
        for k in range(2)
    ]
    loss, mean = segmentation_loss(logits, masks)
    assert mean.item() == pytest.approx(float(sum(dice) / 2), abs=1e-6)
    assert loss.item() == pytest.approx(float(F.cross_entropy(whole, classes) + 1 - mean), abs=1e-5)


def test_one_class_has_the_loss_of_a_sigmoid():
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    share = logits.sigmoid()
    dice = (2 * (share * masks).sum() + 1) / (share.sum() + masks.sum() + 1)
    expected = F.binary_cross_entropy_with_logits(logits, masks) + 1 - dice
    assert segmentation_loss(logits, masks)[0].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_region_is_what_a_softmax_leaves_of_the_background():
    torch.manual_seed(0)
    model = TransUNet("mini", 32, classes=3)
    volume = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    probability, classes = predict_classes(model, volume)
    assert set(np.unique(classes)) <= {1, 2, 3} and len(np.unique(classes)) > 1
    with torch.inference_mode():
        pixels = torch.from_numpy(volume)
        logits = model(network_input(pixels, *volume_statistics(pixels), 32))
        shares = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1).softmax(dim=1).numpy()
    assert probability == pytest.approx(1 - shares[:, 0], abs=1e-5)
    assert np.array_equal(classes, shares[:, 1:].argmax(axis=1) + 1)
    model.temperature = 3.0  # makes it less sure, and moves no mask
    assert np.array_equal(to_mask(predict_classes(model, volume)[0], 0.5), to_mask(probability, 0.5))


def test_a_class_counts_only_inside_of_the_region():
    classes, truth = np.array([[[1, 2, 2]]]), np.array([[[1, 2, 0]]])
    inside = np.array([[[255, 255, 0]]])
    assert score_classes(inside, classes, truth, NAMES) == {
        "anterior": {"dice": 1.0, "there": True},
        "posterior": {"dice": 1.0, "there": True},
    }
    everywhere = score_classes(np.full((1, 1, 3), 255), classes, truth, (*NAMES, "third"))
    assert [one["dice"] for one in everywhere.values()] == [1.0, pytest.approx(2 / 3), 1.0]
    assert not everywhere["third"]["there"]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, home):
    """The folder of a model that outlines both classes."""
    out = tmp_path_factory.mktemp("trained")
    options = ("--data-dir", data, "--out", out, "--model", "mini", "--encoder", "random", "--image-size", 32)
    done = run_here("train_centralized.py", *options, "--classes", 2, "--steps", 150, "--batch-size", 8)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_both_classes_are_learnt_scored_and_written(data, trained, tmp_path):
    best = trained / "transunet_centralized_best.pth"
    table = tmp_path / "s.json"
    scored = run_here(
        "evaluate.py", "--checkpoint", best, "--data-dir", data, "--split", "all", "--json", table
    )  # fmt: skip
    figures = json.loads(table.read_text())
    assert scored.returncode == 0 and "\nposterior " in scored.stdout, scored.stderr
    assert list(figures["classes"]) == list(NAMES)
    assert all(figures["classes"][name]["mean"] > 0.6 for name in NAMES), figures["classes"]
    assert all(one["patients_without"] == 0 for one in figures["classes"].values())
    assert {f"dice_{name}" for name in NAMES} < figures["patients"][0].keys()
    seen = run_here("predict.py", data / "h_00", "--checkpoint", best, "--out", tmp_path / "p")
    assert seen.returncode == 0, seen.stderr
    lines = (tmp_path / "p" / "predictions.csv").read_text().splitlines()
    assert lines[0].endswith(",pixels of anterior,pixels of posterior")
    for line in lines[1:]:
        pixels, _, *of_classes = line.split(",")[3:]
        assert int(pixels) == sum(map(int, of_classes))
    labels = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "p").glob("*_mask.png"))]
    truth = [np.asarray(Image.open(path)) for path in sorted((data / "h_00").glob("*_mask.png"))]
    found, true = np.stack(labels), np.stack(truth)
    assert np.mean(found[true > 0] == true[true > 0]) > 0.6 and set(np.unique(found)) == {0, 1, 2}
    assert dict(card_rows(load_checkpoint(best), "0" * 64))["Classes"] == "anterior and posterior"


def test_the_page_tells_how_much_each_class_is(data, trained):
    checkpoint = load_checkpoint(trained / "transunet_centralized_best.pth")
    volume, truth = load_dataset(data, progress=False).volume("h_00")
    case = Case("h", ["1"] * len(volume), volume, np.zeros(len(volume), int), spacing=(10.0, 10.0, 10.0))
    prediction = predict_case(checkpoint.model, case)
    told = class_texts(case, truth, prediction.classes, checkpoint.labels)
    assert [name for name, _ in told] == ["Of which anterior", "Of which posterior"]
    assert sum(float(text.removesuffix(" cm³")) for _, text in told) == pytest.approx(np.count_nonzero(truth))
    assert class_texts(case, truth, None, {}) == []


def test_a_nifti_mask_of_the_page_holds_the_labels(data, trained):
    """On the voxels of the scan that was opened, as in the label that it was prepared from."""
    checkpoint, source = load_checkpoint(trained / "transunet_centralized_best.pth"), data.parent / "source"
    scan = (source / "images" / "h_00.nii.gz").read_bytes()
    case = as_trained(read_case([("h_00.nii.gz", scan)], checkpoint.task), checkpoint.task.channels)
    prediction = predict_case(checkpoint.model, case)
    mask = labelled(to_mask(prediction.probability, 0.5), prediction.classes, checkpoint.labels.values())
    written = nibabel.Nifti1Image.from_bytes(gzip.decompress(write_nifti(case.nifti, mask, has_labels=True)))
    true = np.asarray(nibabel.load(source / "labels" / "h_00.nii.gz").dataobj)
    found = np.asarray(written.dataobj)
    assert np.mean(found[true > 0] == true[true > 0]) > 0.6 and set(np.unique(found)) == {0, 1, 2}
    region = nibabel.Nifti1Image.from_bytes(gzip.decompress(write_nifti(case.nifti, mask)))
    assert np.array_equal(np.asarray(region.dataobj), found > 0)


def test_the_page_takes_the_classes_masks_as_the_region(data):
    task, folder = read_task(data / "task.toml"), data / "h_00"
    files = [(path.name, path.read_bytes()) for path in sorted(folder.glob("*.png"))]
    case = read_case(files, task)
    _, truth = load_dataset(data, progress=False).volume("h_00")
    assert np.array_equal(case.truth > 0, truth > 0)
    masks = [(name, content) for name, content in files if "_mask" in name]
    assert np.array_equal(add_truth(case, masks), case.truth)
    with pytest.raises(MedFLError, match="has the value 2, but a mask only holds 0 and 255"):
        read_case(files)
    whole = [(name, png(255 * (truth[k] > 0).astype(np.uint8))) for k, (name, _) in enumerate(masks)]
    assert np.array_equal(add_truth(case, whole), case.truth)  # as another model's page saves it


def test_a_framed_scan_gets_its_classes_back_on_the_page():
    torch.manual_seed(0)
    model, values = TransUNet("mini", 32, classes=2), np.random.default_rng(0).gamma(4, 25, (40, 60, 6))
    image = nibabel.Nifti1Image(values.astype(np.float32), np.diag([1.0, 1.0, 5.0, 1.0]))
    case = read_case([("a.nii", image.to_bytes())])
    assert case.feed is not None
    prediction = predict_case(model, case)
    assert prediction.classes.shape == prediction.probability.shape == case.volume.shape[:3]
    _, fed = predict_classes(model, case.fed)
    inside = case.feed.onto_page(np.ones(fed.shape, np.float32)) > 0
    wanted = case.feed.onto_page(fed.astype(np.float32))
    assert np.array_equal(prediction.classes[inside], wanted[inside])


def test_no_whole_region_is_saved_among_masks_of_classes(data):
    patient = find_prepared(data)[0]
    mask = np.zeros((6, 24, 20), np.uint8)
    with pytest.raises(MedFLError, match="tell anterior and posterior apart"):
        save_truth(patient, mask, mask, correction("Ann", "m.pth", "0" * 64, 0.5), "", "")


def test_other_classes_of_the_same_number_are_not_scored(data):
    dataset = load_dataset(data, progress=False)
    assert classes_to_score(NAMES, dataset) == NAMES
    assert classes_to_score(reversed(NAMES), dataset) == () == classes_to_score((), dataset)


def test_a_default_task_with_classes_is_another_task():
    """Two hospitals that number the classes otherwise must not train together."""
    core, oedema = ({"name": name, "labels": [label]} for name, label in (("core", 1), ("oedema", 2)))
    one, other = (
        parse(Facts, said("a", task=LGG.model_dump() | {"labels": (1, 2), "classes": classes}))
        for classes in ([core, oedema], [oedema, core])
    )
    assert one.outlined != other.outlined and None not in (one.outlined, other.outlined)


@pytest.mark.slow
def test_its_region_is_exported_for_the_browser(trained, tmp_path):
    """The exporter itself compares the graph's masks with those of the checkpoint."""
    best = trained / "transunet_centralized_best.pth"
    done = run_here("deployment/export_onnx.py", "--checkpoint", best, "--out", tmp_path / "m.onnx")
    assert done.returncode == 0, done.stderr


def test_a_model_of_other_classes_is_refused(data, trained, tmp_path):
    options = (
        "train_centralized.py",
        "--data-dir",
        data,
        "--out",
        tmp_path,
        "--encoder",
        "random",
        "--steps",
        1,
    )
    many = run_here(*options, "--classes", 3)
    assert (
        many.returncode == 2 and "are anterior and posterior; the run needs --classes 2, or 1" in many.stderr
    )
    best = trained / "transunet_centralized_best.pth"
    other = run_here(*options, "--model", "mini", "--image-size", 32, "--init", best)
    assert other.returncode == 2 and "2 classes; give" in other.stderr and "--classes 2" in other.stderr


def test_a_federation_outlines_both_classes(data, tmp_path):
    training = TrainingSettings(**MINI, classes=2, batch_size=8)
    settings = FederationSettings(clients=2, rounds=1, partition="iid", round_timeout=1e6)
    hospitals = [LocalHospital(tmp_path, cid, data) for cid in range(2)]
    state, _ = run(hospitals, training, settings, tmp_path / "out")
    best = load_checkpoint(tmp_path / "out" / "transunet_federated_best.pth")
    assert state.model.classes == best.model.classes == 2 and list(best.labels) == list(NAMES)


def test_a_hospital_without_these_classes_says_so(data, tmp_path):
    training, settings = TrainingSettings(**MINI, classes=3), FederationSettings(clients=1, rounds=1)
    with pytest.raises(HospitalError, match="are anterior and posterior; the run needs --classes 2, or 1"):
        Hospital(LocalHospital(tmp_path, 0, data).identity, training, settings, tmp_path / "memory")
