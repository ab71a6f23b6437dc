"""Whole federations: real servers and hospitals in processes of their own, on phantoms."""

import csv
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch

from benchmarks.federated_against_central import loop_with_restarts
from checkpoint import load_checkpoint
from conftest import run_script
from dataset import load_dataset
from federation.history import COLUMNS
from federations import ROOT, SMALL, Scene, Wiretap, child_of, children, left_running, signal_tree
from split import make_split
from training import TrainingSettings
from transunet import TransUNet

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("federation")]
ROUNDS = 3
BEST, LAST = "transunet_federated_best.pth", "transunet_federated_last.pth"


@pytest.fixture
def scene(home, tmp_path):
    made = Scene(tmp_path)
    yield made
    assert made.close() == []


def history(out) -> list[dict]:
    with open(out / "federated_history.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(home, phantoms, tmp_path_factory):
    """A run of two hospitals that nothing disturbed, and every byte between them and the server."""
    scene = Scene(tmp_path_factory.mktemp("whole"))
    tap = Wiretap(scene.address)
    hospitals = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms, address=tap.address) for k in (0, 1)]
    hospitals[0].wait_for("no server at")  # hospitals may start first
    server = scene.server("--rounds", ROUNDS, *SMALL)
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
    assert all("the federation is over" in hospital.output.splitlines()[-1] for hospital in hospitals)
    assert "hospital-0 joined" in server.output and "missing: hospital-" in server.output


def test_history_has_a_row_per_round_and_hospital(whole):
    scene = whole[0]
    rows = history(scene.out)
    assert tuple(rows[0]) == COLUMNS
    wanted = [(str(number), f"hospital-{k}") for number in range(1, ROUNDS + 2) for k in (0, 1)]
    assert [(row["round"], row["site"]) for row in rows] == wanted
    last = [row for row in rows if row["round"] == str(ROUNDS + 1)]
    assert all(row["examples"] == row["train_loss"] == "" and row["bytes_received"] == "0" for row in last)
    size = 4 * sum(v.numel() for v in TransUNet("tiny", 32).state_dict().values() if v.is_floating_point())
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
    assert sum(metadata["data"][part]["patients"] for part in ("train", "val", "test")) == len(dataset.patients)
    assert metadata["data"]["name"] == "phantoms" and metadata["versions"]["flwr"]
    done = run_script("evaluate.py", "--checkpoint", scene.out / BEST, "--data-dir", phantoms)
    assert done.returncode == 0 and "test: 2 patients" in done.stdout, done.stderr


def test_no_message_and_no_file_names_a_patient(whole, phantoms):
    """Neither names nor paths nor figures of one slice: in what travels, and in what the server writes and prints."""
    scene, server, _, _, _, tap = whole
    dataset = load_dataset(phantoms, progress=False)
    secrets = [p.name for p in dataset.patients] + [str(phantoms), dataset.patients[0].images[0].name]
    files = {p.name: p.read_bytes() for p in scene.out.iterdir()}
    assert {BEST, LAST, "federated_history.csv", "federated_curves.png"} == set(files)
    places = {"hospital to server": bytes(tap.said), "server to hospital": bytes(tap.answered),
              "the terminal": server.output.encode()}
    for place, content in {**places, **files}.items():
        for secret in secrets:
            assert secret.encode() not in content, f"{secret} in {place}"
    heard = bytes(tap.said)
    assert b"_mask" not in heard and b".tif" not in heard  # the code that travels the other way has such words
    keys = keys_of_json_texts(heard)
    assert keys <= {b"label", b"session", b"cid", b"versions", b"medfl", b"flwr", b"torch", b"timm", b"own_data", b"data",
                    b"parts", b"train", b"val", b"test", b"patients", b"slices", b"images", b"foreground_mean",
                    b"foreground_deviation", b"mean", b"deviation", b"device", b"split_sha256", b"partition_sha256",
                    b"val_dice", b"val_patients", b"seconds", b"examples", b"train_loss"}
    assert {b"val_dice", b"label", b"split_sha256", b"foreground_mean"} <= keys


def keys_of_json_texts(heard: bytes) -> set[bytes]:
    """Every key, at any depth, of the JSON texts in what hospitals said."""
    text, keys = heard.decode("latin-1"), set()
    for found in re.finditer(r'\{"(label|val_dice|failure)"', text):
        content, _ = json.JSONDecoder(object_pairs_hook=lambda pairs: keys.update(k for k, _ in pairs) or dict(pairs)) \
            .raw_decode(text, found.start())
        assert content
    return {key.encode() for key in keys}


def test_a_killed_server_goes_on_where_it_was(whole, scene, phantoms):
    hospitals = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms) for k in (0, 1)]
    server = scene.server("--rounds", ROUNDS, *SMALL)
    server.wait_for(r"round 1 of 3: ")
    server.kill()
    until = time.monotonic() + 10
    while (left := [c for c in children(scene.folder) if re.search(r"flower.py \d+ (superlink|serverapp)", c)]) \
            and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []
    again = scene.server("--resume")
    assert again.end() == 0, again.output
    assert "going on after round 1 of 3" in again.output and [h.end() for h in hospitals] == [0, 0]
    wanted = history(whole[0].out)
    for one, other in zip(history(scene.out), wanted, strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}
    one, other = (load_checkpoint(out / LAST).model.state_dict() for out in (scene.out, whole[0].out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_hospital_hangs_comes_back_is_killed_and_returns(scene, phantoms):
    server = scene.server("--rounds", 40, "--round-timeout", 60, *SMALL)
    steady = scene.hospital("hospital-0", "--cid", 0, "--data-dir", phantoms)
    server.wait_for("hospital-0 joined")
    shaky = scene.hospital("hospital-1", "--cid", 1, "--data-dir", phantoms)  # late: the server waits
    server.wait_for("round 1 of 40: ")
    worker = child_of(shaky, "hospital")
    signal_tree(worker, signal.SIGSTOP)  # it hangs, and its connection lives on
    server.wait_for("without hospital-1: no answer within 60 s")
    signal_tree(worker, signal.SIGCONT)
    server.wait_for("hospital-1 answers again")
    takes_part_again(shaky)
    os.kill(child_of(shaky, "supernode"), signal.SIGKILL)  # the hospital brings it back
    shaky.wait_for("the connection ended; connecting again")
    server.wait_for("hospital-1 is back")
    takes_part_again(shaky)
    shaky.kill()
    again = scene.hospital("hospital-1", "--cid", 1, "--data-dir", phantoms)
    again.wait_for(r"(?m)^round \d+ of 40")
    for script in (server, steady, again):  # Ctrl-C on any side
        script.process.send_signal(signal.SIGINT)
        assert script.end() == 130, script.output
    assert left_running(scene.folder) == []


def takes_part_again(hospital) -> None:
    """Wait until it tells of one more round than so far."""
    told = r"(?m)^round \d+ of 40"
    hospital.wait_for(told, len(re.findall(told, hospital.output)) + 1)


def test_a_lost_quorum_ends_with_3_everywhere(scene, phantoms):
    server = scene.server("--rounds", 40, "--round-timeout", 60, "--min-clients", 2, *SMALL)
    stays, leaves = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms) for k in (0, 1)]
    server.wait_for("round 1 of 40: ")
    leaves.process.send_signal(signal.SIGTERM)
    assert leaves.end() == 130
    assert server.end() == 3 and "go on with --resume" in server.output, server.output
    assert stays.end() == 3 and "too few hospitals" in stays.output
    assert (scene.out / LAST).exists()


def own_folder(phantoms, folder, patients):
    """Some phantoms as a hospital's own archive: other names, another layout."""
    for number, patient in enumerate(load_dataset(phantoms, progress=False).patients[patients]):
        target = folder / f"case {number}"
        target.mkdir(parents=True)
        for index, (image, mask) in enumerate(zip(patient.images, patient.masks)):
            shutil.copy(image, target / f"axial-{index}.tif")
            shutil.copy(mask, target / f"axial-{index}_mask.tif")
    return folder


def test_own_data_of_different_sizes_and_one_that_breaks(scene, phantoms):
    large = own_folder(phantoms, scene.folder / "large", slice(0, 7))
    small = own_folder(phantoms, scene.folder / "small", slice(7, 10))
    tap = Wiretap(scene.address)
    server = scene.server("--rounds", 40, *SMALL)
    one = scene.hospital("mercy", "--own-data", large, "--name", "mercy")
    two = scene.hospital("hope", "--own-data", small, "--name", "hope", address=tap.address)
    server.wait_for("round 1 of 40: ")
    assert all(row["val_dice"] == "" for row in history(scene.out)), "a hospital of fewer than 3 validation patients sends no score"
    assert (scene.folder / "models" / "mercy_split.json").exists()
    mask = small / "case 0" / "axial-2_mask.tif"
    hidden = mask.rename(scene.folder / "hidden.tif")
    server.wait_for("without hope: its data can't be used")
    assert f"{mask.parent.name}/axial-2.tif has no mask" in two.output
    server.wait_for(r"round \d+ of 40: [^\n]*\n[^\n]*\n +mercy[^\n]*\n(?! +hope)")
    hidden.rename(mask)
    takes_part_again(two)
    places = [bytes(tap.said), server.output.encode(), *(p.read_bytes() for p in scene.out.iterdir() if "split" not in p.name)]
    for secret in (b"axial-", b"case 0", str(small).encode(), b"_mask"):
        assert not any(secret in place for place in places), secret
    tap.close()
    assert one.process.poll() is None


def test_it_starts_from_a_checkpoint_with_another_strategy(whole, scene, phantoms):
    start = whole[0].out / BEST
    server = scene.server("--rounds", 1, "--init", start, "--strategy", "fedprox", "--proximal-mu", 0.5, *SMALL)
    hospitals = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms) for k in (0, 1)]
    assert server.end() == 0 and [h.end() for h in hospitals] == [0, 0], server.output
    metadata = load_checkpoint(scene.out / BEST).metadata
    assert metadata["origin"]["started_from"] == f"checkpoint {BEST}" and metadata["origin"]["strategy"] == "fedprox"
    first = [row["val_dice"] for row in history(scene.out) if row["round"] == "1" and row["val_dice"]]
    wanted = load_checkpoint(start).metadata["scores"]["val"]["volume_dice"]["mean"]
    assert [float(value) for value in first] == [pytest.approx(wanted)]  # the model that was handed over is what is scored


def test_one_hospital_learns_what_the_central_loop_learns(scene, phantoms):
    """Bit for bit, with as many threads: other sums are rounded otherwise, and Adam makes much of it within a few steps."""
    server = scene.server("--clients", 1, "--rounds", 2, "--ema-decay", 0, *SMALL)
    hospital = scene.hospital("hospital-0", "--cid", 0, "--data-dir", phantoms)
    assert server.end() == 0 and hospital.end() == 0, server.output
    dataset = load_dataset(phantoms, progress=False)
    split = make_split({p.name: p.site for p in dataset.patients}, 0)
    settings = TrainingSettings(image_size=32, batch_size=8, warmup_steps=2, epochs=2, ema_decay=0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())  # as a hospital alone on its machine takes
    try:
        wanted = loop_with_restarts(dataset, split, settings).state_dict()
    finally:
        torch.set_num_threads(threads)
    found = load_checkpoint(scene.out / LAST).model.state_dict()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) or name.endswith("num_batches_tracked"), name  # counters don't travel


def test_training_that_fails_everywhere_is_told_and_bounded(scene, phantoms):
    server = scene.server("--rounds", 2, *SMALL, "--lr", 1e30, "--clip", 1e30)
    hospitals = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms) for k in (0, 1)]
    assert server.end() == 3 and "its training failed" in server.output, server.output
    assert [h.end() for h in hospitals] == [3, 3] and all("--lr" in h.output for h in hospitals)


def test_who_is_refused_is_told_why(scene, phantoms, tmp_path):
    other = tmp_path / "other version"
    shutil.copytree(ROOT, other, ignore=shutil.ignore_patterns(".git", ".venv*", "data", "models", "tests", "docs", "__pycache__"))
    common = (other / "common.py").read_text()
    (other / "common.py").write_text(re.sub('__version__ = ".*"', '__version__ = "0.0.9"', common))
    fewer = tmp_path / "fewer"
    shutil.copytree(phantoms, fewer)
    shutil.rmtree(next((fewer / "kaggle_3m").glob("TCGA_*")))
    server = scene.server("--rounds", 1, "--clients", 3, *SMALL)
    first = scene.hospital("hospital-0", "--cid", 0, "--data-dir", phantoms)
    server.wait_for("hospital-0 joined")
    refused = {
        "another hospital has this label": scene.hospital("twin", "--cid", 0, "--data-dir", phantoms),
        "the server has 3 hospitals": scene.hospital("ninth", "--cid", 8, "--data-dir", phantoms),
        "medfl 0.0.9 instead of": scene.hospital("old", "--cid", 1, "--data-dir", phantoms, root=other),
        "divide another dataset": scene.hospital("fewer", "--cid", 2, "--data-dir", fewer),
    }
    for sentence, script in refused.items():
        assert script.end() == 2 and sentence in script.output, script.output
    assert first.process.poll() is None and "hospital-0 refused" in server.output


def test_a_kill_of_any_script_leaves_nothing_running(scene, phantoms):
    server = scene.server("--rounds", 40, *SMALL)
    hospitals = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms) for k in (0, 1)]
    server.wait_for("round 1 of 40: ")
    assert len(children(scene.folder)) >= 8
    for script in (*hospitals, server):
        script.kill()
    assert left_running(scene.folder) == []


def test_check_looks_at_data_and_connection_alone(scene, phantoms, tmp_path):
    options = ("--cid", 0, "--data-dir", phantoms, "--check")
    alone = scene.hospital("alone", *options)
    assert alone.end() == 2 and "the data are fine, but no server answers" in alone.output
    server = scene.server(*SMALL)
    server.wait_for("listening on")
    check = scene.hospital("check", *options)
    assert check.end() == 0 and "nothing was trained" in check.output
    impatient = scene.hospital("impatient", *options[:-1], "--wait", 2, address="127.0.0.1:9")
    assert impatient.end() == 2 and "wait longer with --wait" in impatient.output
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "1.tif").write_bytes(b"no picture")
    broken = scene.hospital("broken", "--own-data", tmp_path / "broken", "--name", "broken")
    assert broken.end() == 2 and "has no mask" in broken.output
    assert json.dumps(children(tmp_path)).count("supernode") == 0
