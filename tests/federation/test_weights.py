"""What travels: parts of the weights, half precision, and what a hospital keeps for itself; real hospitals,
real rounds."""

import json
from unittest import mock

import pytest
import torch
from flwr.app import Array, ArrayRecord
from in_process import RealHospital
from scripted import TINIER
from torch import nn

from checkpoint import load_checkpoint
from common import MedFLError
from federation.hospital.hospital import Hospital
from federation.protocol.messages import message, read
from federation.protocol.requests import Score
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import (
    ENCODER,
    NORM,
    from_record,
    in_precision,
    norm_mask,
    pack,
    part_mask,
    payload,
    statistics_mask,
    to_record,
)
from federation.server.state import BEST, SHARED
from training import TrainingSettings
from transunet import ARCHITECTURES, TransUNet

with mock.patch.dict(ARCHITECTURES, tiny=TINIER):  # the network of these federations
    MODEL = TransUNet("tiny", 32)
ENCODER_VALUES = sum(p.numel() for p in MODEL.encoder.parameters())
ALL_VALUES = len(pack(MODEL.state_dict()))
NORM_VALUES = 4 * sum(m.num_features for m in MODEL.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.fixture(autouse=True)
def tinier(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINIER)


def test_masks_name_the_parts_of_a_model():
    for name, norm in (("tiny", "batch"), ("tiny", "group")):
        model = TransUNet(name, 32, norm)
        norms, without = norm_mask(model), part_mask(model, [ENCODER])
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        assert (
            norms.sum()
            == sum(t.numel() for m in layers for t in m.state_dict().values() if t.is_floating_point())
            > 0
        )
        assert without.sum() == ALL_VALUES - ENCODER_VALUES - (0 if norm == "batch" else NORM_VALUES // 2)
        vector = pack(model.state_dict())
        assert torch.equal(vector[~without], pack(model.encoder.state_dict()))
        assert torch.equal(part_mask(model, [ENCODER, NORM]), without & ~norms) and part_mask(model, []).all()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_halves_the_bytes_and_rounds_to_nearest(precision):
    vector = torch.randn(1000)
    arrays = to_record(vector, precision)
    assert payload(arrays) == 2000 and torch.equal(
        from_record(arrays, precision), vector.to(getattr(torch, precision)).float()
    )
    for other in {"float32", "float16", "bfloat16"} - {precision}:
        with pytest.raises(MedFLError, match="shape or type"):
            from_record(arrays, other)


@pytest.mark.parametrize("said", [{"shape": (2**40,)}, {"shape": (2, 5)}, {"dtype": "float64"}], ids=str)
def test_an_array_is_what_it_is_said_to_be(said):
    """What is said is signed, and counted as bytes."""
    sent = to_record(torch.zeros(10))["weights"]
    about = {"dtype": sent.dtype, "shape": tuple(sent.shape), "stype": sent.stype, "data": sent.data}
    assert len(from_record(ArrayRecord({"weights": Array(**about)}))) == 10
    with pytest.raises(MedFLError, match="shape or type"):
        from_record(ArrayRecord({"weights": Array(**about | said)}))


def test_a_text_of_too_many_entries_is_not_looked_through():
    """To say of 400,000 entries what is wrong with each took 4 s and 900 MB."""
    with pytest.raises(MedFLError, match="without its text"):
        read(message({f"k{number}": 1 for number in range(30_000)}))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_updates_in_half_precision_cost_half_and_lose_little(federate, precision):
    """The server keeps float32: rounding touches a round's change, and doesn't add up over the rounds."""
    full, _, _ = federate(2, {"ema_decay": 0.0}, out="full")
    half, hospitals, _ = federate(2, {"ema_decay": 0.0}, out="half", update_dtype=precision)
    for before, after in zip(full.progress.rows[:4], half.progress.rows[:4]):
        assert 2 * after["bytes_sent"] == before["bytes_sent"] == 4 * ALL_VALUES
        assert 2 * after["bytes_received"] == before["bytes_received"] == 4 * ALL_VALUES
    assert half.weights.dtype == torch.float32 and not torch.equal(
        half.weights, in_precision(half.weights, precision)
    )
    torch.manual_seed(0)
    start = pack(TransUNet("tiny", 32).state_dict())
    moved = (full.weights - start).norm()
    assert (
        0 < (half.weights - full.weights).norm() < 0.5 * moved
    )  # trainings from rounded weights part, and stay near


def test_a_frozen_encoder_does_not_travel(federate, monkeypatch):
    """The first message brings it; while it is frozen nobody sends it again, and the result is that of
    sending all."""
    state, hospitals, _ = federate(3, {"freeze_encoder_epochs": 2}, out="part")
    for hospital in hospitals:
        assert [asked["values"] for asked in hospital.asked] == [
            ALL_VALUES,
            ALL_VALUES - ENCODER_VALUES,
            ALL_VALUES,
            ALL_VALUES,
        ]
    received = [row["bytes_received"] for row in state.progress.rows if row["site"] == "hospital-0"]
    assert received == [4 * (ALL_VALUES - ENCODER_VALUES)] * 2 + [4 * ALL_VALUES, 0]
    monkeypatch.setattr(FederationSettings, "left_out", lambda self, frozen: [])
    assert torch.equal(federate(3, {"freeze_encoder_epochs": 2}, out="all")[0].weights, state.weights)


class Sender(RealHospital):
    """Sends a whole model where a part is asked for, and has changed a little of all that is trained."""

    def answer(self, incoming):
        reply = super().answer(incoming)
        if "rate" not in json.loads(incoming.content["about"]["json"]):
            return reply
        whole = torch.load(self.folder / "model.pt", weights_only=True)
        whole[~statistics_mask(MODEL)] += 5e-4
        return type(incoming)(message(read(reply.content), to_record(whole)), reply_to=incoming)


@pytest.mark.parametrize("settings", [({"freeze_encoder_epochs": 1}, {}), ({}, {"keep_norm_local": True})])
def test_nobody_changes_what_is_frozen_or_stays_at_the_hospitals(federate, phantoms, tmp_path, settings):
    training, federation = settings
    hospitals = [RealHospital(tmp_path / "out", cid, phantoms) for cid in range(2)]
    hospitals.append(Sender(tmp_path / "out", 2, phantoms))
    state, _, said = federate(1, training, hospitals=hospitals, clients=3, partition="iid", **federation)
    torch.manual_seed(0)
    model = TransUNet("tiny", 32)
    still = ~part_mask(model, state.federation.left_out(frozen=bool(training)))
    assert torch.equal(state.weights[still], pack(model.state_dict())[still])
    assert any("round 1 without hospital-2: its update has" in line for line in said), said


def test_a_hospital_that_was_started_anew_gets_everything(federate, phantoms, tmp_path):
    _, hospitals, _ = federate(1, {"freeze_encoder_epochs": 2})
    hospitals[0] = RealHospital(tmp_path / "out", 0, phantoms)
    (hospitals[0].folder / "model.pt").unlink()
    hospitals[1].asked.clear()
    federate(2, {"freeze_encoder_epochs": 2}, resume=True, hospitals=hospitals)
    assert [asked["values"] for asked in hospitals[0].asked] == [ALL_VALUES, ALL_VALUES]


def test_normalisation_layers_stay_and_each_hospital_gets_a_model_of_its_own(federate, tmp_path):
    state, hospitals, _ = federate(2, keep_norm_local=True)
    for hospital in hospitals:
        assert [asked["values"] for asked in hospital.asked] == [
            ALL_VALUES,
            ALL_VALUES - NORM_VALUES,
            ALL_VALUES - NORM_VALUES,
        ]
    models = [
        load_checkpoint(tmp_path / "out" / "models" / f"hospital-{k}_federated_best.pth") for k in (0, 1)
    ]
    one, other = (pack(checkpoint.model.state_dict()) for checkpoint in models)
    norms = norm_mask(models[0].model)
    assert torch.equal(one[~norms], other[~norms]) and torch.equal(one[~norms], state.final_weights[~norms])
    assert not torch.equal(one[norms], other[norms]) and not torch.equal(
        one[norms], state.final_weights[norms]
    )
    torch.manual_seed(0)
    assert torch.equal(
        state.weights[norms], pack(TransUNet("tiny", 32).state_dict())[norms]
    )  # nobody sent any
    assert (
        models[0].metadata["origin"]["hospital"] == "hospital-0"
        and models[0].metadata["scores"]["val"]["patients"] > 0
    )
    assert not (tmp_path / "out" / BEST).exists()  # which the pages would take for a model
    with pytest.raises(MedFLError, match="NAME_federated_best.pth that a hospital wrote"):
        load_checkpoint(tmp_path / "out" / SHARED)


def test_a_killed_hospital_finds_its_layers_again_and_a_new_run_does_not_take_them(
    federate, phantoms, tmp_path
):
    _, hospitals, _ = federate(1, keep_norm_local=True)
    kept = torch.load(tmp_path / "out" / "models" / "hospital-0_norms.pt", weights_only=True)
    assert kept["rounds"] == 1
    hospital = Hospital(
        hospitals[0].identity,
        TrainingSettings(image_size=32),
        FederationSettings(keep_norm_local=True),
        tmp_path / "model.pt",
    )
    for run, own in ((kept["run"], kept["last"]), ("another", torch.zeros(NORM_VALUES))):
        model = hospital.received(Score(settings="", without=[], run=run), to_record(torch.zeros(ALL_VALUES)))
        assert torch.equal(pack(model.state_dict())[norm_mask(model)], own)
    assert hospital._norms(kept["run"]).before(1) is None  # round 1 once more begins where it began
    hospitals[0] = RealHospital(tmp_path / "out", 0, phantoms)
    federate(2, keep_norm_local=True, resume=True, hospitals=hospitals)
    assert torch.load(tmp_path / "out" / "models" / "hospital-0_norms.pt", weights_only=True)["rounds"] == 2
    hospitals = [RealHospital(tmp_path / "out", cid, phantoms) for cid in (0, 1)]
    federate(1, keep_norm_local=True, hospitals=hospitals)
    assert torch.load(tmp_path / "out" / "models" / "hospital-0_norms.pt", weights_only=True)["rounds"] == 1


def test_a_half_precision_update_out_of_range_is_the_hospitals_fault(federate):
    with pytest.raises(AssertionError, match="its training failed"):
        federate(1, {"lr": 1e6, "clip": 1e9, "warmup": 0.0}, update_dtype="float16")
