"""The federation's parts, each by itself: messages, weights on the way, averaged weights, joining, the bundle."""

import io
import zipfile

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

import federation.history
from common import MedFLError, __version__
from federation.bundle import FILES, ROOT, make_bundle
from federation.client_app import guard
from federation.history import mean_dice
from federation.hospital import HospitalError, proximal_pull
from federation.messages import TRAINED, Failure, expect, message, read
from federation.processes import is_loopback, parse_address
from federation.settings import FederationSettings, from_json, to_json
from federation.state import RunState, load_run
from federation.weights import from_record, pack, payload, to_record, unpack
from training import Learner, TrainingSettings
from transunet import TransUNet


def test_weights_travel_unchanged_and_counters_stay():
    model, other = TransUNet("tiny", 32), TransUNet("tiny", 32)
    counter = next(name for name in other.state_dict() if name.endswith("num_batches_tracked"))
    other.state_dict()[counter].fill_(7)
    arrays = to_record(pack(model.state_dict()))
    other.load_state_dict(unpack(from_record(arrays), other.state_dict()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]) or name.endswith("num_batches_tracked"), name
    assert other.state_dict()[counter] == 7
    assert payload(arrays) == sum(4 * v.numel() for v in model.state_dict().values() if v.is_floating_point())


@pytest.mark.parametrize("arrays", [None, ConfigRecord({}), ArrayRecord({}), ArrayRecord({"weights": Array(np.zeros(3))}),
                                    ArrayRecord({"other": Array(np.zeros(3, np.float32))}),
                                    ArrayRecord({"weights": Array(np.zeros((3, 1), np.float32))}),
                                    ArrayRecord({"weights": Array("float32", (3,), "numpy.ndarray", b"no array")})])
def test_a_message_without_usable_weights_is_told_apart(arrays):
    with pytest.raises(MedFLError, match="weights"):
        from_record(arrays)


def test_weights_of_another_architecture_are_refused():
    with pytest.raises(MedFLError, match="another architecture"):
        unpack(pack(TransUNet("tiny", 48).state_dict()), TransUNet("tiny", 32).state_dict())


def test_messages_and_settings_come_back_as_they_were():
    assert read(message({"a": [1, None]})) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        message({"a": float("nan")})
    given = TrainingSettings(lr=0.5, pretrained=True, encoder_weights="/a/path.pth"), FederationSettings(clients=4, min_clients=3)
    training, federation = from_json(to_json(*given))
    assert federation == given[1] and training.lr == 0.5 and training.encoder_weights is None and not training.pretrained
    for text in ("nonsense", "{}", '{"training": {}, "federation": {}}'):
        with pytest.raises(MedFLError, match="same version"):
            from_json(text)


def test_the_proximal_gradient_is_that_of_its_closed_form():
    """The gradient of f(w) + mu / 2 |w - w0|^2 by autograd, against what a training step sees."""
    torch.manual_seed(0)
    model = TransUNet("tiny", 32)
    start = [p.detach().clone() for p in model.parameters()]
    pull = proximal_pull(model, mu=0.3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    loss = model(images).square().mean() + 0.15 * sum((p - w).square().sum() for p, w in zip(model.parameters(), start))
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    model.zero_grad()
    model(images).square().mean().backward()
    pull()
    for p, gradient in zip(model.parameters(), wanted):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)


def test_the_pull_reaches_the_training_step():
    """With a huge mu a step's gradient points back to the start, whatever the loss says."""
    settings = TrainingSettings(image_size=32, batch_size=2, clip=1e9, ema_decay=0.0)
    learner = Learner(TransUNet("tiny", 32), settings, torch.device("cpu"))
    learner.adjust_gradients = proximal_pull(learner.model, mu=1e6)
    with torch.no_grad():
        learner.model.head.weight.add_(1.0)
    learner.train_epoch([(torch.randn(2, 3, 32, 32), torch.zeros(2, 1, 32, 32))])
    torch.testing.assert_close(learner.model.head.weight.grad, torch.full_like(learner.model.head.weight, 1e6), rtol=1e-3, atol=1)


def state_of(tmp_path, **training) -> RunState:
    return RunState(TransUNet("tiny", 32), TrainingSettings(image_size=32, **training), FederationSettings(), tmp_path, None)


def test_averaged_weights_over_rounds_follow_their_definition(tmp_path):
    state, plain = state_of(tmp_path), state_of(tmp_path, ema_decay=0.0)
    one, two = torch.full_like(state.weights, 1.0), torch.full_like(state.weights, 2.0)
    state.take(one)
    assert torch.equal(state.final_weights, one)
    for subject in (state, plain):
        subject.take(two)
    assert state.final_weights[0].item() == pytest.approx(1 + (1 - 2 / 11) * 1.0)
    assert torch.equal(plain.final_weights, two)


def test_plateau_halves_the_rate_and_survives_a_restart(tmp_path):
    state = state_of(tmp_path, schedule="plateau")
    for _ in range(5):  # patience 3: the first sets the mark, the fifth is one too many
        state.plateau.step(0.5)
    assert state.rate == 0.5
    state.save_last()
    again = state_of(tmp_path, schedule="plateau")
    kept = torch.load(state.last, weights_only=True)["state"]
    again.restore(kept)
    assert again.rate == 0.5
    for _ in range(4):
        again.plateau.step(0.5)
    assert again.rate == 0.25
    assert state_of(tmp_path).rate is None


def test_only_means_over_the_same_patients_are_compared(tmp_path):
    state = state_of(tmp_path, schedule="plateau")
    assert state.judge(0.3, 4, 1) and not state.judge(0.9, 3, 2) and not state.judge(None, 0, 3)
    assert state.judge(0.2, 5, 4) and state.progress.best == 0.2  # one more patient: the count begins anew


def test_the_best_is_kept_and_patience_counts_rounds(tmp_path):
    state = state_of(tmp_path, patience=2)
    assert state.judge(0.3, 4, 1) and not state.judge(0.3, 4, 2) and state.judge(0.4, 4, 3)
    state.progress.round = 5
    assert not state.stopped_early
    state.progress.round = 6
    assert state.stopped_early


def test_mean_dice_is_weighted_by_patients():
    rows = [{"val_dice": 0.5, "val_patients": 1}, {"val_dice": 0.8, "val_patients": 3}, {"val_dice": None, "val_patients": 0}]
    assert mean_dice(rows) == (pytest.approx(0.725), 4) and mean_dice(rows[2:]) == (None, 0)


@pytest.mark.parametrize("wrong", [
    {"val_dice": float("nan")}, {"val_dice": "0.5"}, {"val_patients": -1}, {"seconds": float("inf")}, {"examples": True},
    {"examples": 3.5}, {"train_loss": [1.0]}], ids=str)
def test_broken_answers_are_told_apart(wrong):
    good = {"val_dice": 0.5, "val_patients": 2, "seconds": 1.0, "round": 3, "examples": 7, "train_loss": None,
            "patient_epsilon": None}
    assert expect(good, TRAINED) == good
    with pytest.raises(MedFLError, match=next(iter(wrong))):
        expect({**good, **wrong}, TRAINED)
    with pytest.raises(MedFLError, match="examples"):
        expect({name: value for name, value in good.items() if name != "examples"}, TRAINED)


def fails_with(error: Exception):
    def handle(incoming, context):
        raise error

    return handle


@pytest.mark.parametrize(("error", "code"), [
    (HospitalError(Failure.DATA, "scans/Anna_1.tif is gone"), "data"), (MedFLError("scans/Anna_1.tif is odd"), "training"),
    (MemoryError("Anna"), "resources"), (OSError(28, "No space left on device", "scans/Anna_1.tif"), "resources"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: Anna"), "resources"), (ValueError("Anna"), "bug"),
    (RuntimeError("shape of Anna"), "bug")], ids=lambda value: type(value).__name__)
def test_errors_travel_as_codes_and_their_text_stays(in_a_run, capsys, error, code):
    incoming = Message(message({}), 1, "train")
    reply = guard(incoming, None, fails_with(error), {"label": "mercy", "session": "s"})
    assert read(reply.content) == {"failure": code, "label": "mercy", "session": "s"} and not reply.has_error()
    assert "Anna" in capsys.readouterr().out


def test_the_bundle_holds_the_named_files_and_nothing_else(tmp_path):
    bundle = make_bundle()
    assert bundle == make_bundle()
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info")}
        assert names == {*FILES, "pyproject.toml"}
        assert __version__ in archive.read("pyproject.toml").decode()
    assert all((ROOT / name).exists() for name in FILES)


def test_settings_out_of_range_are_refused():
    for settings in ({"clients": 0}, {"rounds": 0}, {"round_timeout": float("nan")}, {"min_clients": 3}, {"proximal_mu": -1.0}):
        with pytest.raises(MedFLError, match="--" + next(iter(settings)).replace("_", "-")):
            FederationSettings(**settings)
    assert [FederationSettings(clients=n).quorum for n in (1, 2, 3, 5)] == [1, 1, 2, 3]


def test_addresses():
    assert parse_address("127.0.0.1:80") == ("127.0.0.1", 80) and parse_address("[::1]:80") == ("::1", 80)
    for wrong in ("80", "host:", "host:0", "host:99999", "host:a"):
        with pytest.raises(MedFLError, match="HOST:PORT"):
            parse_address(wrong)
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and not is_loopback("0.0.0.0")


def test_a_restart_keeps_everything(tmp_path):
    state = state_of(tmp_path)
    state.take(torch.full_like(state.weights, 1.0))
    state.take(torch.full_like(state.weights, 2.0))
    state.judge(0.3, 4, 1)
    state.save_last()
    again = state_of(tmp_path)
    again.restore(load_run(tmp_path)[2])
    assert torch.equal(again.weights, state.weights) and torch.equal(again.average, state.average)
    assert again.progress == state.progress and again.progress.round == 2


def test_patience_needs_a_score(tmp_path):
    state = state_of(tmp_path, patience=2)
    state.progress.round = 9
    assert not state.stopped_early


def test_a_dice_of_0_counts():
    assert mean_dice([{"val_dice": 0.0, "val_patients": 1}, {"val_dice": 0.8, "val_patients": 1}]) == (0.4, 2)


def test_curves_show_the_dice_after_the_round_it_is_of(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(federation.history, "save_curves", lambda figure, *_: figures.append(figure))
    rows = [{"round": n, "site": "a", "train_loss": 1.0, "val_dice": 0.1 * n, "val_patients": 1} for n in (1, 2)]
    federation.history.draw_curves(rows, tmp_path / "x.png", "")
    loss, dice = figures[0].axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2]]
    assert [list(line.get_xdata()) for line in dice.lines] == [[0, 1], [0, 1]]  # the hospital's, and the mean
