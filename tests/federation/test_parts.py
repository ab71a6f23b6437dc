"""The federation's parts, each by itself: messages, weights on the way, averaged weights, joining, the
bundle."""

import io
import os
import subprocess
import sys
import warnings
import zipfile
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

import federation.server.history
from common import ROOT, MedFLError, __version__
from federation.hospital.answering import guard
from federation.hospital.faults import HospitalError
from federation.hospital.identity import Identity
from federation.hospital.joining import ends_soon
from federation.hospital.training import proximal_pull
from federation.protocol.agreement import from_json, to_json
from federation.protocol.answers import Trained, parse
from federation.protocol.messages import Failure, message, read
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import from_record, pack, payload, to_record, unpack
from federation.runtime.bundle import make_bundle
from federation.runtime.processes import is_loopback, parse_address
from federation.server.state import RunState, load_run
from training import Learner, TrainingSettings
from transunet import TransUNet

MERCY = Identity(
    label="mercy",
    cid=None,
    data="scans",
    device="cpu",
    medfl=__version__,
    models="models",
    code="0" * 64,
    session="s",
)


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


@pytest.mark.parametrize(
    "arrays",
    [
        None,
        ConfigRecord({}),
        ArrayRecord({}),
        ArrayRecord({"weights": Array(np.zeros(3))}),
        ArrayRecord({"other": Array(np.zeros(3, np.float32))}),
        ArrayRecord({"weights": Array(np.zeros((3, 1), np.float32))}),
        ArrayRecord({"weights": Array("float32", (3,), "numpy.ndarray", b"no array")}),
    ],
)
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
    given = (
        TrainingSettings(lr=0.5, encoder="/a/path.pth"),
        FederationSettings(clients=4, min_clients=3),
    )
    training, federation = from_json(to_json(*given))
    assert federation == given[1] and training.lr == 0.5 and training.encoder == "path.pth"
    for text in ("nonsense", "{}", '{"training": {}, "federation": {}}'):
        with pytest.raises(MedFLError, match="same version"):
            from_json(text)


def test_the_proximal_pull_is_that_of_its_closed_form():
    """Without a gradient a step draws each weight back by rate x mu of what is between it and where it was;
    the encoder's rate is its own."""
    settings = TrainingSettings(
        image_size=32, lr=1e-2, encoder_lr_factor=0.5, weight_decay=0.0, ema_decay=0.0
    )
    learner = Learner(TransUNet("tiny", 32), settings, torch.device("cpu"))
    pull = proximal_pull(learner.optimiser, mu=20.0)
    start = {name: weight.detach().clone() for name, weight in learner.model.named_parameters()}
    with torch.no_grad():
        for weight in learner.model.parameters():
            weight.add_(1.0)
    for scale in (1.0, 0.5):
        learner.set_rate(scale)
        pull()
    for name, weight in learner.model.named_parameters():
        rate = 5e-3 if name.startswith("encoder.") else 1e-2
        left = (1 - rate * 20) * (1 - 0.5 * rate * 20)
        torch.testing.assert_close(weight - start[name], torch.full_like(weight, left), atol=1e-5, rtol=0)


def test_the_pull_reaches_the_training_step_and_is_not_clipped():
    """With a huge mu weights stay where they are, whatever the loss says;
    the gradient is that of the loss."""
    settings = TrainingSettings(image_size=32, batch_size=2, clip=1e-6, ema_decay=0.0)
    learner = Learner(TransUNet("tiny", 32), settings, torch.device("cpu"))
    start = learner.model.head.weight.detach().clone()
    learner.after_step = proximal_pull(learner.optimiser, mu=1e9)
    batch = (torch.randn(2, 3, 32, 32), torch.zeros(2, 1, 32, 32))
    learner.train_epoch([batch])
    assert torch.equal(learner.model.head.weight, start) and learner.model.head.weight.grad.norm() <= 1.01e-6
    learner.after_step = lambda: None
    learner.train_epoch([batch])
    assert not torch.equal(learner.model.head.weight, start)


def state_of(tmp_path, **training) -> RunState:
    return RunState(
        TransUNet("tiny", 32),
        TrainingSettings(image_size=32, **training),
        FederationSettings(),
        tmp_path,
        None,
    )


def test_averaged_weights_over_rounds_follow_their_definition(tmp_path):
    state, plain = state_of(tmp_path), state_of(tmp_path, ema_decay=0.0)
    one, two = torch.full_like(state.weights, 1.0), torch.full_like(state.weights, 2.0)
    state.take(one)
    assert torch.equal(state.final_weights, one)
    for subject in (state, plain):
        subject.take(two)
    assert state.final_weights[0].item() == pytest.approx(1 + (1 - 2 / 11) * 1.0)
    assert torch.equal(plain.final_weights, two)


def one(dice: float, patients: int = 4) -> dict[str, tuple[float, int]]:
    return {"hospital-0": (dice, patients)}


def test_plateau_halves_the_rate_and_survives_a_restart(tmp_path):
    state = state_of(tmp_path, schedule="plateau")
    for number in range(5):  # patience 3: the first sets the mark, the fifth is one too many
        state.judge(one(0.5), number)
    assert state.rate == 0.5
    state.save_last()
    again = state_of(tmp_path, schedule="plateau")
    again.restore(torch.load(state.last, weights_only=True)["state"])
    assert again.rate == 0.5
    for number in range(4):
        again.judge(one(0.5), number)
    assert again.rate == 0.25
    again.judge(one(0.6), 9)
    for number in range(3):
        again.judge(one(0.6), number)
    assert again.rate == 0.25 and state_of(tmp_path).rate is None


def test_the_best_is_kept_and_patience_counts_judged_rounds(tmp_path):
    state = state_of(tmp_path, patience=2)
    assert [state.judge(one(dice), number)[0] for number, dice in enumerate((0.3, 0.3, 0.4), 1)] == [
        True,
        False,
        True,
    ]
    state.progress.round = 9
    assert not state.stopped_early
    state.judge({}, 4)
    state.judge(one(0.4), 5)
    assert not state.stopped_early
    state.judge(one(0.4), 6)
    assert state.stopped_early


TOLD = {
    "val_dice": 0.5,
    "val_patients": 2,
    "seconds": 1.0,
    "round": 3,
    "examples": 7,
    "train_loss": None,
    "patient_epsilon": None,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"val_dice": float("nan")},
        {"val_dice": "0.5"},
        {"val_dice": 7.0},
        {"val_dice": 10**400},
        {"val_dice": -0.1},
        {"val_patients": -1},
        {"val_patients": 2**2100},
        {"seconds": float("inf")},
        {"examples": True},
        {"examples": 3.5},
        {"train_loss": [1.0]},
        {"train_loss": 1e308},
        {"round": -1},
        {"patient_epsilon": "much"},
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_an_answer_out_of_its_bounds_is_told_apart(wrong):
    assert parse(Trained, TOLD).model_dump() == {**TOLD, "energy": None}
    with pytest.raises(MedFLError, match=next(iter(wrong))):
        parse(Trained, {**TOLD, **wrong})


@pytest.mark.parametrize(
    "about",
    [
        {name: value for name, value in TOLD.items() if name != "examples"},
        {**TOLD, "more": 1},
        {**TOLD, "val_dice": None},
        {**TOLD, "val_patients": 0},
        None,
        [],
        {1: 2},
    ],
    ids=str,
)
def test_an_answer_of_another_form_is_told_apart(about):
    with pytest.raises(MedFLError, match="its answer"):
        parse(Trained, about)


def fails_with(error: Exception):
    def handle(incoming, context):
        raise error

    return handle


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HospitalError(Failure.DATA, "scans/Anna_1.tif is gone"), "data"),
        (MedFLError("scans/Anna_1.tif is odd"), "training"),
        (MemoryError("Anna"), "resources"),
        (OSError(28, "No space left on device", "scans/Anna_1.tif"), "resources"),
        (FileNotFoundError(2, "No such file or directory", "scans/Anna_1.tif"), "data"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: Anna"), "resources"),
        (RuntimeError("could not create a primitive: Anna"), "resources"),  # oneDNN's words for the same
        (ValueError("Anna"), "bug"),
        (RuntimeError("shape of Anna"), "bug"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_travel_as_codes_and_their_text_stays(in_a_run, capsys, error, code):
    incoming = Message(message({}), 1, "train")
    reply = guard(incoming, None, fails_with(error), MERCY)
    assert (
        read(reply.content) == {"failure": code, "label": "mercy", "session": "s"} and not reply.has_error()
    )
    assert "Anna" in capsys.readouterr().out


def test_an_admission_that_ends_soon_is_told_at_the_hospital():
    today = datetime.now(UTC).date()
    soon, later = (today + timedelta(days=days) for days in (12, 40))
    assert f"ends on {soon}, in 12 days" in ends_soon(str(soon))
    assert ends_soon(str(later)) is None and ends_soon("") is None and ends_soon("2030-13-40") is None


def test_the_bundle_holds_what_both_apps_import_and_nothing_else(tmp_path):
    bundle = make_bundle()
    assert bundle == make_bundle()
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info")}
        assert __version__ in archive.read("pyproject.toml").decode()
        archive.extractall(tmp_path)
    assert {
        "LICENSE",
        "pyproject.toml",
        "federation/server/rounds.py",
        "federation/hospital/app.py",
        "training.py",
    } <= names
    assert not [
        name
        for name in names
        if name.startswith(("tests/", "deployment/", "federation/runtime/", "run_", "radiology/"))
    ]
    code = (
        "import sys; from pathlib import Path; import federation.server.app, federation.hospital.app\n"
        "files = {Path(m.__file__) for m in sys.modules.values() if getattr(m, '__file__', None)}\n"
        "print(*(f for f in files if f.is_relative_to(sys.argv[1]) and 'site-packages' not in f.parts))\n"
        "print(len([f for f in files if f.is_relative_to(sys.argv[2])]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, ROOT, tmp_path],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    elsewhere, here = done.stdout.splitlines()
    assert elsewhere == "" and int(here) > 30, "a module that the bundle lacks came from the repository"


def test_settings_out_of_range_are_refused():
    for settings in (
        {"clients": 0},
        {"rounds": -1},
        {"round_timeout": float("nan")},
        {"min_clients": 3},
        {"proximal_mu": -1.0},
    ):
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
    state.judge(one(0.3), 1)
    state.progress.before = one(0.2)
    state.begin()
    state.save_last()
    again = state_of(tmp_path)
    again.restore(load_run(tmp_path)[2])
    assert torch.equal(again.weights, state.weights) and torch.equal(again.average, state.average)
    assert again.progress == state.progress and again.progress.round == 2


def test_patience_needs_a_score(tmp_path):
    state = state_of(tmp_path, patience=2)
    state.progress.round = 9
    assert not state.stopped_early


def test_curves_show_the_dice_after_the_round_it_is_of(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(federation.server.history, "save_curves", lambda figure, *_: figures.append(figure))
    rows = [
        {"round": n, "site": "a", "train_loss": 1.0, "val_dice": 0.1 * n, "val_patients": 1} for n in (1, 2)
    ]
    federation.server.history.draw_curves(rows, tmp_path / "x.png", "")
    loss, dice = figures[0].axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2]]
    assert [list(line.get_xdata()) for line in dice.lines] == [[0, 1], [0, 1]]  # the hospital's, and the mean


def test_the_curves_of_64_hospitals_fit_into_the_picture(tmp_path):
    rows = [
        {
            "round": number,
            "site": f"hospital-{k}",
            "train_loss": 1.0 / number,
            "val_dice": 0.5,
            "val_patients": 3,
        }
        for number in (1, 2)
        for k in range(64)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a legend that leaves no room
        federation.server.history.draw_curves(rows, tmp_path / "x.png", "")
    assert (tmp_path / "x.png").stat().st_size > 10_000
