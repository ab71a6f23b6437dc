"""Whole federations: real servers and hospitals in processes of their own, on phantoms."""

import json
import re
import time

import pytest
import torch
from federations import BEST, LAST, SMALL, Scene, Wiretap, children, history, left_running
from running import run_script

from checkpoint import load_checkpoint
from dataset import load_dataset
from federation.server.history import COLUMNS
from transunet import TransUNet

pytestmark = pytest.mark.slow
ROUNDS = 3


@pytest.fixture(scope="module")
def whole(home, phantoms, tmp_path_factory):
    """A run of two hospitals that nothing disturbed, and every byte between them and the server."""
    scene = Scene(tmp_path_factory.mktemp("whole"))
    tap = Wiretap(scene.address)
    hospitals = [
        scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms, *more, address=tap.address)
        for k, more in enumerate([["--energy"], []])
    ]
    hospitals[0].wait_for("no server at")  # hospitals may start first
    server = scene.server("--rounds", ROUNDS, "--energy", *SMALL)
    assert server.end() == 0, server.output
    ended = time.monotonic()
    codes = [hospital.end() for hospital in hospitals]
    waited = time.monotonic() - ended
    tap.close()
    assert left_running(scene.folder) == []
    return scene, server, hospitals, codes, waited, tap


def test_everybody_ends_with_0_and_a_closing_line(whole):
    _, server, hospitals, codes, waited, _ = whole
    assert codes == [0, 0] and waited < 30
    for hospital in hospitals:
        *_, ended, then = hospital.output.splitlines()
        assert "the federation is over" in ended and then.startswith("next: ")
    assert "hospital-0 joined" in server.output and "missing: hospital-" in server.output


def test_a_ray_cluster_of_two_machines_gives_the_same_model(whole, phantoms, tmp_path):
    """Each has one core, so each has a worker, and hospitals' memories are read by both."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="requirements-simulation.txt")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        options = ("--data-dir", phantoms, "--out", tmp_path, "--rounds", ROUNDS, *SMALL)
        done = run_script("run_server.py", "--simulate", 2, "--ray", cluster.address, *options)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    assert len(set(re.findall(r"ClientAppActor pid=(\d+)", done.stdout + done.stderr))) == 2
    real, simulated = (load_checkpoint(out / LAST).model.state_dict() for out in (whole[0].out, tmp_path))
    assert all(torch.equal(real[name], simulated[name]) for name in real)
    assert not list(tmp_path.glob(".hospitals-*"))


def test_history_has_a_row_per_round_and_hospital(whole):
    scene = whole[0]
    rows = history(scene.out)
    assert tuple(rows[0]) == COLUMNS
    wanted = [(str(number), f"hospital-{k}") for number in range(1, ROUNDS + 2) for k in (0, 1)]
    assert [(row["round"], row["site"]) for row in rows] == wanted
    last = [row for row in rows if row["round"] == str(ROUNDS + 1)]
    assert all(row["examples"] == row["train_loss"] == "" and row["bytes_received"] == "0" for row in last)
    size = 4 * sum(v.numel() for v in TransUNet("mini", 32).state_dict().values() if v.is_floating_point())
    assert all(0 < int(row["bytes_sent"]) <= size for row in rows)
    assert all(int(row["bytes_received"]) == size for row in rows if row["round"] != str(ROUNDS + 1))
    assert (scene.out / "federated_curves.png").stat().st_size > 10_000


def test_the_checkpoint_tells_how_it_came_about(whole, phantoms):
    scene = whole[0]
    metadata = load_checkpoint(scene.out / BEST).metadata
    origin = metadata["origin"]
    assert origin["kind"] == "federated" and origin["hospitals"] == 2 and origin["partition"] == "site"
    assert origin["strategy"] == "fedavg" and origin["started_from"] == "random weights"
    dataset = load_dataset(phantoms, progress=False)
    assert sum(metadata["data"][part]["patients"] for part in ("train", "val", "test")) == len(
        dataset.patients
    )
    assert metadata["data"]["name"] == "phantoms" and metadata["versions"]["flwr"]
    done = run_script("evaluate.py", "--checkpoint", scene.out / BEST, "--data-dir", phantoms)
    assert done.returncode == 0 and "test: 2 patients" in done.stdout, done.stderr


def test_energy_is_summed_over_the_server_and_the_hospitals_that_measure_it(whole):
    scene, server, *_ = whole
    records = {one["what"]: one for one in json.loads((scene.out / "energy.json").read_text())}
    assert records.keys() == {"server", "hospital hospital-0"}
    used = load_checkpoint(scene.out / BEST).metadata["energy"]
    for end in (0, 1):
        assert used["kwh"][end] == pytest.approx(sum(one["kwh"][end] for one in records.values()))
        assert all(one["kwh"][end] > 0 for one in records.values())
    assert used["hospitals"] == ["hospital-0"] and used["method"]
    rows = history(scene.out)
    assert used["bytes_moved"] == sum(int(row["bytes_sent"]) + int(row["bytes_received"]) for row in rows)
    assert re.search(r"energy .* of the server and 1 of 2 hospitals; \d+ MB moved", server.output)
    done = run_script("provision.py", "audit", scene.out / "audit.jsonl")
    assert (
        done.returncode == 0
        and load_checkpoint(scene.out / BEST).sha256() in (scene.out / "audit.jsonl").read_text()
    )


def test_no_message_and_no_file_names_a_patient(whole, phantoms):
    """Neither names nor paths nor figures of one slice: in what travels, and in what the server writes and
    prints."""
    scene, server, _, _, _, tap = whole
    dataset = load_dataset(phantoms, progress=False)
    secrets = [p.name for p in dataset.patients] + [str(phantoms), dataset.patients[0].images[0].name]
    files = {p.name: p.read_bytes() for p in scene.out.rglob("*") if p.is_file()}
    written = {
        BEST,
        LAST,
        "federated_history.csv",
        "federated_curves.png",
        "federated_test.json",
        "audit.jsonl",
        "energy.json",
    }
    assert written | {"server.json", "index.html", ".server.lock"} == set(files)
    places = {
        "hospital to server": bytes(tap.said),
        "server to hospital": bytes(tap.answered),
        "the terminal": server.output.encode(),
    }
    for place, content in {**places, **files}.items():
        for secret in secrets:
            assert secret.encode() not in content, f"{secret} in {place}"
    heard = bytes(tap.said)
    assert (
        b"_mask" not in heard and b".tif" not in heard
    )  # the code that travels the other way has such words
    keys = keys_of_json_texts(heard)
    assert keys <= {
        b"label",
        b"session",
        b"cid",
        b"versions",
        b"medfl",
        b"flwr",
        b"torch",
        b"timm",
        b"energy",
        b"kwh",
        b"method",
        b"cpu_seconds",
        b"task",
        b"own_data",
        b"data",
        b"parts",
        b"train",
        b"val",
        b"test",
        b"patients",
        b"slices",
        b"images",
        b"foreground_mean",
        b"foreground_deviation",
        b"appearance",
        b"mean",
        b"deviation",
        b"device",
        b"split_sha256",
        b"partition_sha256",
        b"val_dice",
        b"val_patients",
        b"seconds",
        b"round",
        b"examples",
        b"train_loss",
        b"patient_privacy",
        b"patient_epsilon",
        b"test_dice",
        b"test_patients",
    }
    assert {b"val_dice", b"label", b"split_sha256", b"foreground_mean"} <= keys


def keys_of_json_texts(heard: bytes) -> set[bytes]:
    """Every key, at any depth, of the JSON texts in what hospitals said."""
    text, keys = heard.decode("latin-1"), set()
    for found in re.finditer(r'\{"(label|val_dice|failure)"', text):
        content, _ = json.JSONDecoder(
            object_pairs_hook=lambda pairs: keys.update(k for k, _ in pairs) or dict(pairs)
        ).raw_decode(text, found.start())
        assert content
    return {key.encode() for key in keys}


def test_a_killed_server_goes_on_where_it_was(whole, scene, phantoms):
    hospitals = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms) for k in (0, 1)]
    server = scene.server("--rounds", ROUNDS, *SMALL)
    server.wait_for(r"round 1 of 3: ")
    server.kill()
    until = time.monotonic() + 10
    while (
        left := [
            c for c in children(scene.folder) if re.search(r"runtime.programs \d+ (superlink|serverapp)", c)
        ]
    ) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []
    again = scene.server("--resume")
    assert again.end() == 0, again.output
    assert "continuing after round 1 of 3" in again.output and [h.end() for h in hospitals] == [0, 0]
    wanted = history(whole[0].out)
    for one, other in zip(history(scene.out), wanted, strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}
    one, other = (load_checkpoint(out / LAST).model.state_dict() for out in (scene.out, whole[0].out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_is_scored_by_hospitals_without_training(whole, scene, phantoms):
    """As at the end of the run that made it; one hospital only observes. Nothing else is written or sent."""
    model = whole[0].out / BEST
    server = scene.server("--evaluate", model)
    hospitals = [
        scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms, *("--observer",) * k)
        for k in (0, 1)
    ]
    assert server.end() == 0 and [h.end() for h in hospitals] == [0, 0], server.output
    assert all("nothing is trained" in h.output and "comes here" not in h.output for h in hospitals)
    path = scene.out / "evaluation" / f"{model.stem}_test.json"
    told = json.loads(path.read_text())
    assert f"wrote {path.resolve()}" in server.output
    at_the_end = json.loads((whole[0].out / "federated_test.json").read_text())
    assert (
        told["score"] == at_the_end["best"] and told["model"] == BEST and "--rounds 0" in hospitals[0].output
    )
    assert not list(scene.folder.rglob("*.pth"))


def test_it_starts_from_a_checkpoint_with_another_strategy(whole, scene, phantoms):
    start = whole[0].out / BEST
    server = scene.server(
        "--rounds", 1, "--init", start, "--strategy", "fedprox", "--proximal-mu", 0.5, *SMALL
    )
    hospitals = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms) for k in (0, 1)]
    assert server.end() == 0 and [h.end() for h in hospitals] == [0, 0], server.output
    metadata = load_checkpoint(scene.out / BEST).metadata
    assert (
        metadata["origin"]["started_from"] == f"checkpoint {BEST}"
        and metadata["origin"]["strategy"] == "fedprox"
    )
    first = [row["val_dice"] for row in history(scene.out) if row["round"] == "1" and row["val_dice"]]
    wanted = load_checkpoint(start).metadata["scores"]["val"]["volume_dice"]["mean"]
    assert [float(value) for value in first] == [
        pytest.approx(wanted)
    ]  # the model that was handed over is what is scored
