"""The exported graph computes what inference.py computes, for any size and number of slices, and carries what
a reader needs."""

import copy
import json
import re
from dataclasses import replace
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from running import ROOT, run_here, run_script
from uploads import COLOURS, RNG, picture

from appearance.doubts import SENTENCES, doubts
from appearance.features import FLAIR, MEASURES, describe_volume
from checkpoint import describe, load_checkpoint, save_checkpoint
from common import MedFLError, __version__, git_commit
from dataset import load_dataset
from deployment import export_onnx
from deployment.app.cases import read_case
from deployment.export_onnx import export, rules
from inference import predict_volume
from runs.models import PHANTOM_MODEL
from transunet import ARCHITECTURES, TransUNet


def run(session, volume, first=0, count=None) -> np.ndarray:
    feeds = {
        "volume": volume,
        "first": np.array(first),
        "count": np.array(len(volume) if count is None else count),
    }
    return session.run(["probability"], feeds)[0]


@pytest.fixture(scope="module")
def checkpoint(home):
    return load_checkpoint(PHANTOM_MODEL)


@pytest.fixture(scope="module")
def graph(checkpoint):
    return export_onnx.build_graph(checkpoint.model)


@pytest.fixture
def built(monkeypatch, graph):
    """The graph is built once for all tests; each gets its own copy."""
    monkeypatch.setattr(export_onnx, "build_graph", lambda model: copy.deepcopy(graph))


@pytest.fixture(scope="module")
def exported(checkpoint, graph) -> bytes:
    with mock.patch.object(export_onnx, "build_graph", lambda model: copy.deepcopy(graph)):
        return export(checkpoint, half=False)[0]


@pytest.fixture(scope="module")
def session(exported):
    return onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])


def measured(session, volume, first=0) -> dict[str, list]:
    names = [*MEASURES, "blank", "copies"]
    feeds = {"volume": volume, "first": np.array(first), "count": np.array(1)}
    return {name: values.tolist() for name, values in zip(names, session.run(names, feeds))}


def smooth(slices: int, rows: int, columns: int) -> np.ndarray:
    """A picture with structure at several scales, (S, H, W, 3) uint8."""
    coarse = (
        np.random.default_rng(0)
        .integers(0, 255, (slices, rows // 8 + 1, columns // 8 + 1, 3))
        .astype(np.uint8)
    )
    return np.ascontiguousarray(coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :rows, :columns])


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 33, 90), (11, 256, 256), (3, 300, 17)])
def test_any_volume_gives_the_same_whole_and_in_blocks(checkpoint, session, shape):
    volume = smooth(*shape)
    expected = predict_volume(checkpoint.model, volume)
    whole = run(session, volume)
    assert whole.dtype == np.float32 and np.abs(whole - expected).max() < 1e-4
    blocks = np.concatenate(
        [run(session, volume, first, min(4, len(volume) - first)) for first in range(0, len(volume), 4)]
    )
    assert np.abs(blocks - whole).max() < 1e-5


def test_a_long_volume_loses_no_digits(checkpoint, session):
    """200 slices have 13 million pixels; a sum of them one after the other in float32 was wrong by a
    thousandth."""
    volume = smooth(200, 256, 256)
    mean, deviation = export_onnx.volume_statistics(torch.from_numpy(volume))
    with torch.inference_mode():
        expected = export_onnx.probability(
            checkpoint.model, torch.from_numpy(volume[:2]), mean, deviation
        ).numpy()
    assert np.abs(run(session, volume, 0, 2) - expected).max() < 1e-4


def test_what_the_graph_measures_is_what_appearance_measures(session, phantoms):
    dataset = load_dataset(phantoms, progress=False)
    real = [np.array(dataset.volume(patient.name)[0]) for patient in dataset.patients[:2]]
    noise = np.random.default_rng(1).integers(0, 255, (2, 90, 50, 3)).astype(np.uint8)
    noise[..., 0] = 7
    noise[..., 2] = noise[..., 1]
    framed = np.zeros((2, 90, 90, 3), np.uint8)
    framed[:, 4:86, 4:86] = 200  # 0.05 × 90 = 4.5, which is rounded to 4: the fifth row is no frame
    for volume in [*real, smooth(3, 300, 17), smooth(1, 64, 64), noise, framed, np.full_like(framed, 77)]:
        found = measured(session, volume)
        for name, values in describe_volume(torch.from_numpy(volume)).items():
            assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-6), (name, volume.shape)
        assert found["blank"] == [np.ptp(volume[..., channel]) == 0 for channel in range(3)]
        assert found["copies"] == [np.array_equal(volume[..., k], volume[..., FLAIR]) for k in range(3)]
    assert measured(session, framed)["appearance"][0] == 0
    later = measured(session, real[0], first=1)
    assert later["appearance"] == later["blank"] == [], "a page that works block by block would measure again"
    assert later["foreground_mean"] == measured(session, real[0])["foreground_mean"]


def test_the_pages_doubts_are_the_apps(ask, session, exported, phantoms):
    from sklearn.datasets import load_sample_image

    properties = {entry.key: entry.value for entry in onnx.load_from_string(exported).metadata_props}
    rules = json.loads(properties["plausibility"])
    dataset = load_dataset(phantoms, progress=False)
    training = dataset.image_statistics(tuple(patient.name for patient in dataset.patients))
    patient = [(path.name, path.read_bytes()) for path in dataset.patients[0].images]
    flat = np.zeros((64, 64, 3), np.uint8)
    copies = np.repeat(np.asarray(Image.open(dataset.patients[0].images[4]))[..., 1:2], 3, axis=2)
    given = [
        patient,
        patient[4:5],
        [("a_1.png", picture(load_sample_image("china.jpg")))],
        [("a_1.png", picture(flat))],
        [("a_1.png", picture(copies))],
        [("a_1.png", picture(255 - copies))],
        [("a_1.png", picture(COLOURS[:20]))],
        [("a_1.png", picture(RNG.integers(0, 255, (99, 99, 3), np.uint8)))],
    ]
    volumes, told = [read_case(files).volume for files in given], []
    for statistics in (training, None):
        answers = ask(
            *[
                (files, {"rules": rules, "training": statistics, "measured": measured(session, volume)})
                for files, volume in zip(given, volumes)
            ]
        )
        for volume, answer in zip(volumes, answers):
            assert answer["doubts"] == doubts(volume, statistics)
            told += answer["doubts"]
    ends = [sentence.split("}")[-1] for sentence in SENTENCES.values()]
    assert [end for end in ends if not any(text.endswith(end) for text in told)] == [], "untried"


def test_a_page_of_another_task_doubts_as_the_app_does(ask, session, phantoms):
    """Neither speaks of brain scans, sequences or 256 pixels to who segments something else."""
    dataset = load_dataset(phantoms, progress=False)
    training = dataset.image_statistics(tuple(patient.name for patient in dataset.patients))
    grey = np.repeat(
        np.full((40, 99, 1), 200, np.uint8) - RNG.integers(0, 90, (40, 99, 1), np.uint8), 3, axis=2
    )
    grey[10:30, 30:60] //= 2
    for channels in (("T1",), ("red", "green", "blue")):
        volume = read_case(files := [("a_1.png", picture(grey))]).volume
        given = {"rules": rules(channels), "training": training, "measured": measured(session, volume)}
        answer = ask((files, json.loads(json.dumps(given))))[0]
        assert answer["doubts"] == doubts(volume, training, channels) != []
        said = " ".join(answer["doubts"])
        assert "the images that the model was trained on" in said
        assert not any(word in said for word in ("brain", "FLAIR", "256", "identical", "invert")), said


def test_the_file_tells_what_it_is_and_nothing_of_the_machine(checkpoint, exported):
    properties = {entry.key: entry.value for entry in onnx.load_from_string(exported).metadata_props}
    assert json.loads(properties["metadata"]) == checkpoint.metadata
    assert ["SHA-256", checkpoint.sha256()] in json.loads(properties["card"])
    assert json.loads(properties["plausibility"])["channels"] == ["pre-contrast", "FLAIR", "post-contrast"]
    version = json.loads(properties["version"])
    assert version == {"medfl": __version__, "commit": git_commit(), "model": checkpoint.sha256()}
    assert str(ROOT).encode() not in exported and b"site-packages" not in exported


def test_half_precision_halves_the_weights_and_is_close(built, checkpoint, exported):
    content, difference = export(checkpoint)
    assert len(content) < 0.55 * len(exported)
    assert 0 < difference.probability < export_onnx.BOUND_HALF and difference.of > 1_000_000
    weights = onnx.load_from_string(content).graph.initializer
    assert all(
        numpy_helper.to_array(w).dtype == np.float16
        for w in weights
        if numpy_helper.to_array(w).size > 10_000
    )


@pytest.mark.parametrize(("name", "norm"), [("tiny", "group"), ("base", "batch")])
def test_every_architecture_can_be_exported(tmp_path, monkeypatch, name, norm):
    monkeypatch.setattr(export_onnx, "SIZES", ((2, 64, 64),))
    shallow = replace(ARCHITECTURES[name], size={"depth": 2})  # further layers are of the same kind
    monkeypatch.setitem(ARCHITECTURES, name, shallow)
    torch.manual_seed(0)  # untrained, so all is near the threshold: with other weights a pixel may lie on it
    model = TransUNet(name, 32, norm)
    save_checkpoint(tmp_path / "m.pth", model.state_dict(), describe(model))
    _, difference = export(load_checkpoint(tmp_path / "m.pth"), half=False)
    assert difference.probability < 1e-4


def test_a_graph_that_differs_is_not_kept(built, checkpoint, monkeypatch):
    monkeypatch.setattr(
        export_onnx, "predict_volume", lambda model, volume: predict_volume(model, volume[..., ::-1])
    )
    with pytest.raises(MedFLError, match="nothing was written"):
        export(checkpoint)


@pytest.mark.slow
def test_what_a_static_space_gets_is_shown_and_nothing_else_is_in_it(node):
    """An allow-list: the page, its libraries with their licences, the samples, and the model."""
    done = run_script(
        "deployment/push_to_space.py",
        "--repo",
        "someone/medfl",
        "--checkpoint",
        PHANTOM_MODEL,
        "--static",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was sent" in done.stdout and "mask pixels differ" in done.stdout
    folder = ROOT / "models" / "browser"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == set(re.findall(r"^ *[\d.]+ MB  (\S+)$", done.stdout, re.M))
    assert {
        "index.html",
        "page.js",
        "model.onnx",
        "samples/phantom_1.zip",
        "libs/tiff/LICENSE",
        "MODEL_CARD.md",
    } <= names
    assert not [name for name in names if re.search(r"node_modules|package|\.(map|ts|py|pth)$", name)]
    head = (folder / "README.md").read_text().split("---")[1]
    assert {"sdk: static", "license: mit", "  cross-origin-opener-policy: same-origin"} <= set(
        head.splitlines()
    )
    assert len(re.search("short_description: (.*)", head)[1]) <= 60
    sizes = {name: (folder / name).stat().st_size for name in names - {"model.onnx"}}
    card = sum(size for name, size in sizes.items() if "ort-gpu" in name)
    assert sum(sizes.values()) + 12.8e6 < 48e6  # with the weights of `tiny`
    assert sum(sizes.values()) - card + 12.8e6 < 31e6  # what is loaded where there is no graphics card


def test_the_script_writes_the_file_and_says_how_far_it_is(built, tmp_path):
    done = run_here("deployment/export_onnx.py", "--checkpoint", PHANTOM_MODEL, "--out", tmp_path / "m.onnx")
    assert (
        done.returncode == 0
        and "mask pixels differ" in done.stdout
        and "largest difference of a probability" in done.stdout
    )
    assert onnxruntime.InferenceSession(tmp_path / "m.onnx").get_outputs()[0].name == "probability"
    done = run_script(
        "deployment/export_onnx.py", "--checkpoint", tmp_path / "none.pth", "--out", tmp_path / "n.onnx"
    )
    assert done.returncode == 2 and not (tmp_path / "n.onnx").exists()
