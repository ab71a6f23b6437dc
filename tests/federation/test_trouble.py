"""What goes wrong in a federation of real processes: hospitals that hang, die, are refused, or whose data
break."""

import contextlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from federations import LAST, ROOT, SMALL, Wiretap, child_of, children, history, left_running, signal_tree
from running import run_here

from dataset import load_dataset

pytestmark = pytest.mark.slow


def test_a_hospital_hangs_comes_back_is_killed_and_returns(scene, phantoms):
    server = scene.server("--rounds", 1000, "--round-timeout", 30, *SMALL)
    steady = scene.hospital("hospital-0", "--cid", 0, "--data-dir", phantoms)
    server.wait_for("hospital-0 joined")
    shaky = scene.hospital("hospital-1", "--cid", 1, "--data-dir", phantoms)  # late: the server waits
    server.wait_for("round 1 of 1000: ")
    worker = child_of(shaky, "hospital")
    signal_tree(worker, signal.SIGSTOP)  # it hangs, and its connection lives on
    server.wait_for("without hospital-1: no answer within 30 s")
    signal_tree(worker, signal.SIGCONT)
    server.wait_for("hospital-1 answers again")
    takes_part_again(shaky)
    os.kill(child_of(shaky, "supernode"), signal.SIGKILL)  # the hospital brings it back
    shaky.wait_for("the connection ended; connecting again")
    server.wait_for("hospital-1 is back")
    takes_part_again(shaky)
    shaky.kill()
    again = scene.hospital("hospital-1", "--cid", 1, "--data-dir", phantoms)
    again.wait_for(r"(?m)^[-\d :]+round \d+ of 1000")
    for script in (server, steady, again):  # Ctrl-C on any side
        script.process.send_signal(signal.SIGINT)
        assert script.end() == 130, script.output
    assert left_running(scene.folder) == []


def takes_part_again(hospital) -> None:
    """Wait until it tells of one more round than so far."""
    told = r"(?m)^[-\d :]+round \d+ of 1000"
    hospital.wait_for(told, len(re.findall(told, hospital.output)) + 1)


def test_a_lost_quorum_ends_with_3_everywhere(scene, phantoms):
    server = scene.server("--rounds", 1000, "--round-timeout", 15, "--min-clients", 2, *SMALL)
    stays, leaves = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms) for k in (0, 1)]
    server.wait_for("round 1 of 1000: ")
    leaves.process.send_signal(signal.SIGTERM)
    assert leaves.end() == 130
    assert server.end() == 3 and "continue with --resume" in server.output, server.output
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


def contents(folder: Path) -> list[bytes]:
    """What is in the files of a server's folder, but for its split, and for the hospitals' own pages, which lie
    there where both run in one place; files of a round under way come and go."""
    found = []
    for path in folder.rglob("*"):
        if not any(own in path.name for own in ("split", "mercy.html", "hope.html")):  # also half written
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                found.append(path.read_bytes())
    return found


def test_own_data_of_different_sizes_and_one_that_breaks(scene, phantoms):
    large = own_folder(phantoms, scene.folder / "large", slice(0, 7))
    small = own_folder(phantoms, scene.folder / "small", slice(7, 10))
    tap = Wiretap(scene.address)
    server = scene.server("--rounds", 1000, *SMALL)
    one = scene.hospital("mercy", "--own-data", large, "--name", "mercy")
    two = scene.hospital("hope", "--own-data", small, "--name", "hope", address=tap.address)
    server.wait_for("round 1 of 1000: ")
    assert all(row["val_dice"] == "" for row in history(scene.out)), (
        "a hospital of fewer than 3 validation patients sends no score"
    )
    assert (scene.folder / "models" / "mercy_split.json").exists()
    mask = small / "case 0" / "axial-2_mask.tif"
    hidden = mask.rename(scene.folder / "hidden.tif")
    server.wait_for("without hope: its data can't be used")
    assert f"{mask.parent.name}/axial-2.tif has no mask" in two.output
    server.wait_for(r"round \d+ of 1000: [^\n]*\n[^\n]*\n +mercy[^\n]*\n(?! +hope)")
    hidden.rename(mask)
    takes_part_again(two)
    places = [bytes(tap.said), server.output.encode(), *contents(scene.out)]
    for secret in (b"axial-", b"case 0", str(small).encode(), b"_mask"):
        assert not any(secret in place for place in places), secret
    tap.close()
    assert one.process.poll() is None


def test_training_that_fails_everywhere_is_told_and_bounded(scene, phantoms):
    server = scene.server("--rounds", 2, *SMALL, "--lr", 1e30, "--clip", 1e30)
    hospitals = [scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms) for k in (0, 1)]
    assert server.end() == 3 and "its training failed" in server.output, server.output
    assert [h.end() for h in hospitals] == [3, 3] and all("--lr" in h.output for h in hospitals)


def test_who_is_refused_is_told_why(scene, phantoms, tmp_path):
    other = tmp_path / "other version"
    shutil.copytree(
        ROOT,
        other,
        ignore=shutil.ignore_patterns(".git", ".venv*", "data", "models", "tests", "docs", "__pycache__"),
    )
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
        "the one installed here is MedFL 0.0.9": scene.hospital(
            "old", "--cid", 1, "--data-dir", phantoms, "--wait", 5, root=other
        ),
    }
    for sentence, script in refused.items():
        assert script.end() == 2 and sentence in script.output, script.output
    assert first.process.poll() is None and "hospital-0 refused" in server.output
    other_data = scene.hospital("fewer", "--cid", 2, "--data-dir", fewer)
    server.wait_for("hospital-2 joined")
    second = scene.hospital("hospital-1", "--cid", 1, "--data-dir", phantoms)  # two of three agree
    assert other_data.end() == 2 and "divide another dataset" in other_data.output, other_data.output
    assert first.process.poll() is None and second.process.poll() is None


def test_check_looks_at_data_and_connection_alone(scene, phantoms, tmp_path):
    options = ("--cid", 0, "--data-dir", phantoms, "--check")
    client = ("run_client.py", "--server", "127.0.0.1:9")
    alone = run_here(*client, *options, cwd=tmp_path)
    assert alone.returncode == 2 and "the data are fine, but no server answers" in alone.stderr
    server = scene.server(*SMALL)
    server.wait_for("listening on")
    check = scene.hospital("check", *options)
    assert check.end() == 0 and "nothing was trained" in check.output
    impatient = run_here(*client, *options[:-1], "--wait", 2, cwd=tmp_path)
    assert impatient.returncode == 2 and "wait longer with --wait" in impatient.stderr
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "1.tif").write_bytes(b"no picture")
    broken = run_here(*client, "--own-data", tmp_path / "broken", "--name", "broken", cwd=tmp_path)
    assert broken.returncode == 2 and "has no mask" in broken.stderr
    assert json.dumps(children(tmp_path)).count("supernode") == 0
