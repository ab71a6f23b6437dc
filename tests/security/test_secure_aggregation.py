"""What a curious server gets to see under secure aggregation, and rounds in which hospitals drop out: real
processes.

All run a copy of MedFL that writes down what the server receives and what hospitals hide, and in which
hospital-3's program dies in another stage of each round.
"""

import numpy as np
import pytest
from federations import BEST, SMALL, Scene
from running import change, copy_of_medfl

from checkpoint import load_checkpoint
from federation.protocol.masks import steps
from federation.protocol.settings import FederationSettings

pytestmark = pytest.mark.slow
STAGES = ("keys", "shares", "update", "unmask")  # of rounds 1 to 4, in which hospital-3 dies
HOSPITALS = 4


@pytest.fixture(scope="module")
def watched(home, phantoms, tmp_path_factory):
    """The folder with what was written down, the server's output, its best model."""
    folder = tmp_path_factory.mktemp("watched")
    root, notes = copy_of_medfl(folder / "medfl"), folder / "notes"
    notes.mkdir()
    app, rounds = (
        root / "federation" / "hospital" / "secure_stages.py",
        root / "federation" / "server" / "secure_round.py",
    )
    change(
        app,
        "def secure_stage(",
        f"""import os
from pathlib import Path
from federation.hospital.identity import Identity


def die_in(stage: str) -> None:
    if Identity.load(Path()).label == "hospital-3":
        with open({str(notes / "stages")!r}, "a") as file:
            file.write(stage + " ")
        if {STAGES}[Path(file.name).read_text().count("keys") - 1] == stage:
            os._exit(1)


def secure_stage(""",
    )
    begin = "    with party(context) as mine:\n        "
    change(
        app,
        f"{begin}if isinstance(asked, Keys)",
        f"    die_in(asked.query)\n{begin}if isinstance(asked, Keys)",
    )
    change(
        app,
        f"{begin}mine.given = mine.given if given",
        f"""    label = Identity.load(Path()).label
    np.savez(f"{notes}/update-{{task.round}}-{{label}}", update=update.numpy(), examples=examples)
    die_in("update")
{begin}mine.given = mine.given if given""",
    )
    change(
        rounds,
        "        if len(values) != len(self.total):",
        f"""        np.save(f"{notes}/received-{{self.number}}-{{member.label}}", values)
        if len(values) != len(self.total):""",
    )
    change(
        rounds,
        "        return weights.float()\n",
        f'        np.savez(f"{notes}/sum-{{self.number}}", before=sent, after=weights)\n        return '
        f"weights.float()\n",
    )
    settings = root / "federation" / "protocol" / "settings.py"
    change(settings, "return max(self.quorum, LEAST) if", "return self.clients if")  # all begin a round
    scene = Scene(folder)
    server = scene.server(
        "--clients",
        HOSPITALS,
        "--rounds",
        len(STAGES),
        "--partition",
        "iid",
        "--val-fraction",
        0,
        "--round-timeout",
        60,
        *SMALL,
        "--secure-aggregation",
        root=root,
    )
    hospitals = [
        scene.hospital(f"hospital-{k}", "--cid", k, "--data-dir", phantoms, root=root)
        for k in range(HOSPITALS)
    ]
    try:
        for number in range(1, len(STAGES) + 1):  # a deadline for each: a busy machine takes a minute a round
            server.wait_for(f"round {number} of {len(STAGES)}: ")
        assert server.end() == 0, server.output
        assert [hospital.end() for hospital in hospitals] == [0] * HOSPITALS
    finally:
        left = scene.close()
    assert left == []
    return notes, server.output, load_checkpoint(scene.out / BEST)


def updates_of(notes, number: int) -> dict[str, tuple[np.ndarray, int]]:
    """What hospitals hid in a round, and their slices, by label."""
    found = {path.stem.split("-", 2)[2]: np.load(path) for path in notes.glob(f"update-{number}-*.npz")}
    return {
        label: (content["update"].astype(np.float64), int(content["examples"]))
        for label, content in found.items()
    }


@pytest.mark.parametrize("number", range(1, len(STAGES) + 1))
def test_the_sum_is_that_of_federated_averaging_whatever_the_stage_of_a_drop_out(watched, number):
    """hospital-3 is missing where it died before its update was there, and counted where it died after."""
    notes, output, _ = watched
    stage, updates, result = (
        STAGES[number - 1],
        updates_of(notes, number),
        np.load(notes / f"sum-{number}.npz"),
    )
    counted = {
        label: update for label, update in updates.items() if label != "hospital-3" or stage == "unmask"
    }
    assert len(counted) == HOSPITALS - (stage != "unmask")
    slices = sum(examples for _, examples in counted.values())
    mean = sum(update * examples for update, examples in counted.values()) / slices
    most = max(examples for _, examples in updates.values())
    joined = HOSPITALS - (stage == "keys")
    step = 2 * FederationSettings().secure_range / steps(joined)
    error = np.abs(result["after"] - result["before"] - mean).max()
    assert 0 < error < len(counted) * step * most / slices and np.abs(mean).max() > 1000 * error
    assert (f"round {number} without hospital-3: it is not reachable" in output) == (stage != "unmask")


def chi_square(values: np.ndarray) -> float:
    """How far the bytes of these numbers are from all being equally frequent, in standard deviations of
    chance."""
    counts = np.bincount(values.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))


def test_what_the_server_receives_of_one_hospital_is_noise(watched):
    notes, _, _ = watched
    for label, (update, _) in updates_of(notes, 1).items():
        received = np.load(notes / f"received-1-{label}.npy")
        chance = 1 / np.sqrt(len(received))
        assert received.dtype == np.uint32 and len(received) == len(update)
        assert abs(np.corrcoef(received, update)[0, 1]) < 5 * chance
        assert abs(np.corrcoef(received[1:], received[:-1])[0, 1]) < 5 * chance
        assert abs(chi_square(received)) < 6
        assert abs(np.corrcoef(received, np.load(notes / f"received-2-{label}.npy"))[0, 1]) < 5 * chance
        # the same figures tell an update that is not hidden
        scale = FederationSettings().secure_range
        bare = ((update + scale) * steps(HOSPITALS) / (2 * scale)).astype(np.uint32)
        assert np.corrcoef(bare, update)[0, 1] > 0.99 and chi_square(bare) > 1000


def test_the_checkpoint_says_that_the_server_saw_sums(watched):
    assert watched[2].metadata["origin"]["privacy"]["secure_aggregation"] is True
