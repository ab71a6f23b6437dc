"""The round loop on a grid whose hospitals answer as a test says: what is kept, averaged, left out, and when
it ends."""

import os
import resource
import signal

import pytest
from flwr.app import Message
from scripted import Worker, federate, make_fast

from checkpoint import describe, load_checkpoint, save_checkpoint
from common import MedFLError
from federation.protocol.agreement import to_json
from federation.protocol.messages import message, read
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack
from federation.server import app as server_app
from federation.server.audit import AuditLog
from federation.server.state import BEST, LAST, RunState, load_run, nothing_left, with_rounds
from training import TrainingSettings
from transunet import TransUNet


@pytest.fixture
def run(monkeypatch, tmp_path):
    make_fast(monkeypatch)
    return lambda workers, rounds, **training: federate(workers, rounds, tmp_path, **training)


def kept(state: RunState) -> tuple[float, dict]:
    """The value of the best checkpoint's weights, and its metadata."""
    checkpoint = load_checkpoint(state.best)
    weights = pack(checkpoint.model.state_dict())
    assert (weights == weights[0]).all()
    return weights[0].item(), checkpoint.metadata


def test_the_best_is_the_model_that_was_scored(run):
    """The score in round 2's answers is of the model after round 1; random weights are never kept."""
    code, state, _ = run([Worker("hospital-0", [0.9, 0.6, 0.4, 0.3])], 3)
    value, metadata = kept(state)
    assert code == 0 and value == 1.0 and metadata["training"]["rounds_done"] == 1
    assert metadata["scores"]["val"]["volume_dice"]["mean"] == 0.6


def test_the_last_model_is_the_average_over_rounds(run):
    worker = Worker("hospital-0", [0.1, 0.2, 0.3])
    _, state, _ = run([worker], 2)
    assert (
        worker.got[-1][0].item() == pytest.approx(1 + (1 - 2 / 11))
        and kept(state)[0] == worker.got[-1][0].item()
    )
    assert pack(load_checkpoint(state.last).model.state_dict())[0] == worker.got[-1][0]


def test_patience_ends_the_rounds(run):
    _, state, said = run([Worker("hospital-0", [0.1, *[0.5] * 9])], 9, patience=2)
    assert state.progress.round == 4 and any(
        "stopped" in line for line in said
    )  # best after 1; 2 and 3 were no better


def test_the_plateau_rate_reaches_the_hospitals(run):
    worker = Worker("hospital-0", [0.5] * 8)
    run([worker], 7, schedule="plateau")
    assert [about.get("rate") for about in worker.heard] == [1.0] * 6 + [0.5, None]


def test_an_unusable_update_is_left_out_everywhere(run):
    good, bad = Worker("hospital-0", [0.5] * 2), Worker("hospital-1", [0.7] * 2, factor=float("nan"))
    code, state, said = run([good, bad], 1)
    assert code == 0 and state.weights[0] == 1.0 and list(state.progress.hospitals) == ["hospital-0"]
    assert [row["site"] for row in state.progress.rows if row["round"] == 1] == ["hospital-0"]
    assert any("without hospital-1" in line for line in said)


def test_a_round_is_tried_twice_and_no_more(run):
    assert run([Worker("hospital-0", [0.5] * 2, failures=1)], 1)[0] == 0
    assert run([Worker("hospital-0", [0.5] * 2, failures=2)], 1)[0] == 3


def test_the_best_of_an_earlier_run_does_not_stay(run, tmp_path):
    (tmp_path / BEST).write_bytes(b"of an earlier run")
    _, state, _ = run([Worker("hospital-0", [None] * 2)], 1)
    assert kept(state)[0] == 1.0


def test_a_run_that_is_killed_before_its_first_round_leaves_nothing_to_go_on_with(run, tmp_path):
    """The last round of an earlier run is not taken for this one's."""
    run([Worker("hospital-0", [0.5] * 2)], 1)
    assert load_run(tmp_path)
    model, settings = TransUNet("tiny", 32), TrainingSettings(image_size=32)
    save_checkpoint(tmp_path / "start.pth", model.state_dict(), describe(model))
    server_app.prepare(
        {
            "out": str(tmp_path),
            "resume": False,
            "start": str(tmp_path / "start.pth"),
            "commit": None,
            "settings": to_json(settings, FederationSettings()),
            "started_from": "random weights",
            "init_split": None,
        }
    )
    assert not (tmp_path / LAST).exists()
    with pytest.raises(MedFLError, match="start without --resume"):
        load_run(tmp_path)


def test_a_run_of_another_version_is_refused_with_what_to_do(run, tmp_path):
    _, state, _ = run([Worker("hospital-0", [0.5] * 2)], 1)
    kept = load_checkpoint(state.last, whole=False)
    del kept.state["progress"]["judge"], kept.state["audited"]
    (tmp_path / "audit.jsonl").unlink()  # which says that the file was changed
    save_checkpoint(state.last, kept.model.state_dict(), kept.metadata, kept.state)
    with pytest.raises(MedFLError, match="another version of MedFL.*--init"):
        load_run(tmp_path)


def test_both_paths_pass_over_the_slices_as_often_by_default():
    federation = FederationSettings()
    assert federation.rounds * federation.local_epochs == TrainingSettings().epochs


def test_a_hospital_that_fails_again_and_again_does_not_freeze_the_best(run):
    """It stays connected and gives no update any more; the other one improves round by round."""

    class Leaves(Worker):
        def answer(self, incoming):
            self.failures = int(len(self.heard) >= 2)
            return super().answer(incoming)

    rising = [0.1 * k for k in range(1, 9)]
    _, state, said = run([Worker("hospital-0", rising), Leaves("hospital-1", rising)], 7, patience=3)
    assert state.progress.round == 7 and state.progress.best_round == 7
    assert any("the best model so far is now the choice of hospital-0" in line for line in said)


def test_one_lying_score_does_not_choose_the_model(run):
    class Liar(Worker):
        def answer(self, incoming):
            reply = super().answer(incoming)
            if read(incoming.content).get("round") == 2:
                told = {**read(reply.content), "val_dice": 1.0}
                reply = Message(message(told, reply.content["arrays"]), reply_to=incoming)
            return reply

    rising = [0.1 * k for k in range(1, 6)]
    _, state, _ = run(
        [Worker("hospital-0", rising), Worker("hospital-1", rising), Liar("hospital-2", rising)], 4
    )
    assert state.progress.best_round == 4


@pytest.mark.skipif(os.name == "nt", reason="no limit of a file's size there")
def test_a_full_disk_of_the_server_is_no_hospitals_failure(run, tmp_path):
    """The run ends in a sentence, hospitals are told of no end, and it goes on when there is room."""
    workers = [Worker(f"hospital-{k}", [0.5] * 9) for k in range(2)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(MedFLError, match="don't fit into .* free the disk"):
            run(workers, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not [worker.ends for worker in workers if worker.ends]
    assert not list(tmp_path.glob(".updates-*/*"))
    assert run(workers, 2)[0] == 0


def test_a_run_is_made_longer_or_ended_where_it_is(run, tmp_path):
    assert run([Worker("hospital-0", [0.5] * 9)], 3)[0] == 0
    settings = load_run(tmp_path)[1]
    assert with_rounds(settings, None, 3) is settings and with_rounds(settings, 9, 3).rounds == 9
    assert with_rounds(settings, 2, 1).rounds == 2 and with_rounds(settings, 2, 3).rounds == 3
    AuditLog(tmp_path / "audit.jsonl").write("end", exit=0)  # as the server's app does
    for asked, over in {None: True, 3: True, 1: True, 4: False}.items():
        assert nothing_left(tmp_path, asked) == over, asked
