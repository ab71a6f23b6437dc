"""Hospitals that pretrain an encoder together: what is learnt, what travels, and what the run ends with."""

import json
import shutil

import pandas as pd
import pytest
import torch
from in_process import RealHospital, federate  # noqa: F401  the fixture
from safetensors import safe_open
from test_hospital import work

from common import MedFLError
from encoders.weights import start_model
from federation.hospital.data import HospitalData
from federation.hospital.faults import HospitalError
from federation.hospital.hospital import Hospital
from federation.protocol.agreement import check_together
from federation.protocol.answers import PatientPrivacy
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack, part_mask, unpack
from training import TrainingSettings
from transunet import ARCHITECTURES, TransUNet

TOGETHER = {"training": {"encoder": "random"}, "pretraining": True}


@pytest.fixture(autouse=True)
def plain(federate, monkeypatch):  # noqa: F811
    """The smallest network with a plain ViT in the place of `tiny`."""
    monkeypatch.setitem(ARCHITECTURES, "tiny", ARCHITECTURES["mini"])


def test_an_encoder_is_pretrained_together_and_a_training_begins_with_it(federate, tmp_path):  # noqa: F811
    state, hospitals, said = federate(3, **TOGETHER)
    losses = pd.DataFrame(state.progress.rows).dropna(subset=["train_loss"])
    losses = losses.pivot(index="round", columns="site", values="train_loss")
    assert (losses.loc[3] < 0.95 * losses.loc[1]).all(), losses

    out, before = tmp_path / "out", TransUNet("tiny", 32)
    encoder = out / "encoder.safetensors"
    with safe_open(encoder, "pt") as file:
        about, weight = json.loads(file.metadata()["medfl"]), file.get_tensor("blocks.0.attn.qkv.weight")
    assert about["hospitals"] == ["hospital-0", "hospital-1"] and about["rounds_done"] == 3
    started, _, _ = start_model(TrainingSettings(image_size=32, encoder=str(encoder)))
    assert torch.equal(started.encoder.blocks[0].attn.qkv.weight, weight)
    assert not (out / "transunet_federated_best.pth").exists(), "a page would open it as a model"
    assert f"wrote {encoder}" in said

    torch.manual_seed(0)
    travels = part_mask(before, ["rest"])
    start = pack(TransUNet("tiny", 32).state_dict())
    assert torch.equal(state.weights[~travels], start[~travels]), "nobody trained the decoder"
    assert (state.weights[travels] != start[travels]).float().mean() > 0.99
    sizes = [asked["values"] for asked in hospitals[0].asked]
    assert sizes[0] == len(start) and set(sizes[1:]) == {int(travels.sum())}, "then the encoder alone"


def test_a_private_encoders_file_does_not_tell_who_took_part(federate, tmp_path):  # noqa: F811
    federate(1, dp_clip=1.0, dp_noise_multiplier=1.0, **TOGETHER)
    with safe_open(tmp_path / "out" / "encoder.safetensors", "pt") as file:
        about = json.loads(file.metadata()["medfl"])
    assert about["rounds_done"] == 1 and not {"hospitals", "volumes", "slices"} & about.keys()


def test_the_electricity_of_a_pretraining_is_written(federate, phantoms, tmp_path):  # noqa: F811
    (tmp_path / "out").mkdir()
    hospitals = [RealHospital(tmp_path / "out", cid, phantoms) for cid in (0, 1)]
    for one in hospitals:
        one.identity.model_copy(update={"energy": True}).save(one.folder)
    _, _, said = federate(1, hospitals=hospitals, energy=True, **TOGETHER)
    records = {one["what"]: one for one in json.loads((tmp_path / "out" / "energy.json").read_text())}
    assert records.keys() == {"server", "hospital hospital-0", "hospital hospital-1"}
    assert all(0 < one["kwh"][0] <= one["kwh"][1] for one in records.values())
    assert any("of the server and 2 of 2 hospitals" in line for line in said)


def test_it_goes_on_after_a_stop(federate, tmp_path):  # noqa: F811
    federate(2, **TOGETHER)
    state, _, _ = federate(3, resume=True, **TOGETHER)
    assert state.progress.round == 3 and (tmp_path / "out" / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    "more",
    [{"dp_clip": 1.0, "dp_noise_multiplier": 0.01}, {"secure_aggregation": True}],
    ids=["privacy of hospitals", "secure aggregation"],
)
def test_defences_leave_the_rest_as_it_is(federate, phantoms, tmp_path, more):  # noqa: F811
    (tmp_path / "out").mkdir()
    hospitals = [RealHospital(tmp_path / "out", cid, phantoms) for cid in range(3)]
    state, _, _ = federate(1, clients=3, partition="quantity", hospitals=hospitals, **TOGETHER, **more)
    torch.manual_seed(0)
    start = pack(TransUNet("tiny", 32).state_dict())
    travels = part_mask(state.model, ["rest"])
    assert torch.equal(state.weights[~travels], start[~travels])
    assert (state.weights[travels] != start[travels]).float().mean() > 0.9


def hospital(folder, data, name: str | None = "mercy", **about) -> Hospital:
    one = RealHospital(folder, 0, data)
    own = {} if name is None else {"cid": None, "label": name}
    who = one.identity.model_copy(update={**own, **about})
    settings = FederationSettings(pretraining=True, clients=1)
    return Hospital(who, TrainingSettings(image_size=32), settings, folder / "model.pt")


def test_what_is_thrown_away_in_the_end_is_kept_from_round_to_round(phantoms, home, tmp_path):
    """Trained in the second round with the painter of the first, an encoder's loss is lower than with a new one."""
    torch.manual_seed(0)
    subject, model = hospital(tmp_path, phantoms, None), TransUNet("tiny", 32)
    work(subject, model)
    state = pack(model.state_dict())

    def second() -> float:
        again = TransUNet("tiny", 32)
        again.load_state_dict(unpack(state, again.state_dict()))
        return work(subject, again, round=2)[0].train_loss

    kept = second()
    for file in (tmp_path / "models").glob("*painter*"):
        file.unlink()
    for file in (tmp_path / "models").glob("*optimiser*"):
        file.unlink()
    for file in tmp_path.rglob("*_scored.json"):  # else what was told of this training is told again
        file.unlink()
    assert kept < second()


def test_scans_without_masks_count_at_a_hospital_and_only_its_own(phantoms, home, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    (one,) = sorted((data / "kaggle_3m").iterdir())[:1]
    for number in (1, 2, 3):
        (data / "without_masks" / "x").mkdir(parents=True, exist_ok=True)
        image = next(path for path in sorted(one.glob(f"*_{number}.tif")))
        shutil.copy(image, data / "without_masks" / "x" / f"x_{number}.tif")
    mine = hospital(tmp_path, data).data
    slices = mine.dataset.table.set_index("patient")["slices"]
    labelled = int(slices[list(mine.split.train)].sum())
    assert mine.parts()["train"].slices == labelled + 3
    assert mine.parts()["test"].patients == 0, "nothing is scored"
    shared = HospitalData(RealHospital(tmp_path, 0, data).identity, FederationSettings(pretraining=True), 0)
    train = int(slices[list(shared.split.train)].sum())
    assert shared.parts()["train"].slices == train


def test_what_does_not_go_with_pretraining_is_refused(phantoms, home, tmp_path):
    for training, federation in (
        ({"patience": 3}, {}),
        ({"schedule": "plateau"}, {}),
        ({"freeze_encoder_epochs": 2}, {}),
        ({}, {"keep_norm_local": True}),
    ):
        with pytest.raises(MedFLError, match="trains the encoder alone"):
            check_together(TrainingSettings(**training), FederationSettings(pretraining=True, **federation))
    promise = PatientPrivacy(epsilon=8.0, delta=1e-3)
    with pytest.raises(HospitalError, match="covers the last layers only"):
        hospital(tmp_path, phantoms, patient_privacy=promise)
