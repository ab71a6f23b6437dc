"""Differential privacy of a hospital's patients: clipping, noise, chance, accountant, budget, an attack, and
what is not told."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from federations import SMALL, Scene
from flwr.app import Message
from in_process import RealHospital
from running import ROOT, run_here
from scipy.stats import kstest
from scripted import Worker, make_fast, make_messages_outside_of_a_run
from scripted import federate as scripted_federation

from checkpoint import load_checkpoint
from common import MedFLError, __version__
from dataset import load_dataset
from federation.hospital.faults import HospitalError
from federation.hospital.hospital import Hospital
from federation.hospital.identity import Identity
from federation.privacy.accountant import Noisy, multiplier_for, spent
from federation.privacy.budget import PatientBudget
from federation.privacy.patients import CHANCE, CLIP, STEPS, PatientBatches, PrivateLearner
from federation.protocol.agreement import to_json
from federation.protocol.messages import Failure, Query, local_versions, message, read
from federation.protocol.requests import Train
from federation.protocol.settings import FederationSettings
from federation.server.state import LAST
from training import TrainingSettings, segmentation_loss
from transunet import TransUNet

CPU = torch.device("cpu")
SETTINGS = TrainingSettings(image_size=32, norm="group", precision="float32", ema_decay=0.0)
PATIENTS = 10


def learner(multiplier: float) -> PrivateLearner:
    torch.manual_seed(0)
    return PrivateLearner(TransUNet("tiny", 32, "group"), SETTINGS, CPU, multiplier, PATIENTS)


def patient(seed: int, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    masks = torch.zeros(8, 1, 32, 32)
    masks[:4, :, 8:20, 10:24] = 1
    return strength * torch.randn(8, 3, 32, 32, generator=random) + 2 * masks, masks


def gradients(subject: PrivateLearner, *batches) -> torch.Tensor:
    """The gradient that a step over these patients has, (n,), times the number that was to be expected."""
    subject.set_gradients([images for images, _ in batches], [masks for _, masks in batches])
    return torch.cat([weight.grad.flatten() for weight in subject.trained]) * subject.expected


def alone(subject: PrivateLearner, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """A patient's gradient, (n,), by torch's own backward pass."""
    subject.model.zero_grad()
    segmentation_loss(subject.model(images), masks)[0].backward()
    return torch.cat([weight.grad.flatten() for weight in subject.trained])


def test_each_patients_gradient_is_cut_to_the_clip_and_added_up():
    subject, (long, short) = learner(1e-12), (patient(0), patient(1))
    subject.model.head.weight.data.mul_(30)  # so that one is longer than the clip
    one, other = alone(subject, *long), alone(subject, *short)
    assert one.norm() > CLIP
    wanted = one * min(1, CLIP / one.norm()) + other * min(1, CLIP / other.norm())
    assert torch.allclose(gradients(subject, long, short), wanted, atol=1e-5)


def test_no_patient_moves_the_sum_by_more_than_the_clip_whatever_it_holds():
    subject, others = learner(1e-12), [patient(0), patient(1)]
    without = gradients(subject, *others)
    for odd in (patient(2, 1e4), (patient(3)[0], 1 - patient(3)[1]), patient(4, float("nan"))):
        assert (gradients(subject, *others, odd) - without).norm() <= CLIP * 1.001


def test_the_noise_has_the_deviation_of_the_theory_and_is_new_each_time():
    subject = learner(3.0)
    one, other = gradients(subject).numpy(), gradients(subject).numpy()
    assert (
        one.std() == pytest.approx(3.0 * CLIP, rel=0.03) and kstest(one / (3.0 * CLIP), "norm").pvalue > 1e-6
    )
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / len(one) ** 0.5
    assert (
        abs(np.corrcoef(one, gradients(learner(3.0)).numpy())[0, 1]) < 5 / len(one) ** 0.5
    )  # no seed of the settings


def test_nothing_but_the_last_layers_is_trained():
    subject = learner(1.0)
    before = {name: weight.clone() for name, weight in subject.model.named_parameters()}
    subject.train_epoch([([patient(0)[0]], [patient(0)[1]]), ([], [])])
    moved = {
        name for name, weight in subject.model.named_parameters() if not torch.equal(weight, before[name])
    }
    assert moved == {name for name in before if name.startswith(("head.", "decoder.2."))}
    assert sum(weight.numel() for weight in subject.trained) == 19_972  # as SECURITY.md says


def test_every_patient_takes_part_by_chance_and_not_by_the_seed(phantoms):
    dataset = load_dataset(phantoms, progress=False)
    names = tuple(p.name for p in dataset.patients)
    one, other = (PatientBatches(dataset, names, 32, seed=0) for _ in range(2))
    counts = [
        [len(images) for epoch in range(1, 9) for images, _ in subject.epoch(epoch)]
        for subject in (one, other)
    ]
    drawn = np.array(counts[0] + counts[1])  # 80 steps of 10 patients
    assert counts[0] != counts[1] and len(counts[0]) == 8 * STEPS
    assert drawn.mean() == pytest.approx(CHANCE * 10, abs=5 * (CHANCE * (1 - CHANCE) * 10 / 80) ** 0.5)
    assert drawn.var() == pytest.approx(CHANCE * (1 - CHANCE) * 10, rel=0.8)
    images, masks = next(batch for epoch in range(1, 9) for batch in one.epoch(epoch) if len(batch[0]))
    assert images[0].shape == (8, 3, 32, 32) and masks[0].shape == (8, 1, 32, 32)
    assert one.slices == dataset.table["slices"].sum()


def test_the_accountant_is_no_worse_than_published_values():
    """Abadi et al. 2016: q = 0.01, sigma = 4, 10,000 steps, delta 1e-5: epsilon 1.26; by the tighter
    conversion of today less."""
    assert 0.9 < spent([Noisy(4.0, 10_000, 0.01)], 1e-5) <= 1.26
    assert spent([Noisy(4.0, 10_000, 0.01)], 1e-5) < spent([Noisy(4.0, 10_000)], 1e-5) / 10


def test_the_accountant_prints_nothing_and_leaves_other_loggers_as_they_were(home):
    """Its library gives all loggers a handler where it finds none, and Flower's lines came twice."""
    code = (
        "import logging\nfrom federation.privacy.accountant import Noisy, multiplier_for, spent\n"
        "spent([Noisy(1.0, 5, 0.2)], 1e-5), multiplier_for(5.0, 5, 1e-5, 0.2)\nassert not "
        "logging.getLogger().handlers\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


@pytest.mark.parametrize(("epsilon", "finds"), [(0.5, False), (1e9, True)])
def test_an_attacker_that_knows_all_others_learns_whether_a_patient_took_part_only_without_noise(
    epsilon, finds
):
    """The strongest there is: it knows the model, every other patient and the patient itself, and sees the
    gradients of all steps.

    Any test's rate of finds is at most e^epsilon times its rate of false alarms plus delta; for 0.5 at most
    0.25 apart."""
    multiplier = multiplier_for(
        epsilon, STEPS, 1e-5
    )  # as if the patient were in every step: more than the chance allows
    subject, target = learner(multiplier), patient(5)
    wanted = alone(subject, *target)
    wanted, length = wanted / wanted.norm(), min(CLIP, float(wanted.norm()))
    rounds = 60
    seen = np.array(
        [
            [
                sum(float(gradients(subject, *[target] * there) @ wanted) for _ in range(STEPS))
                for there in (True, False)
            ]
            for _ in range(rounds)
        ]
    )
    guesses = seen > STEPS * length / 2
    advantage = guesses[:, 0].mean() - guesses[:, 1].mean()
    assert advantage == 1 if finds else advantage < 0.25 + 3 * (0.5 / rounds) ** 0.5


@pytest.fixture
def hospital(phantoms, tmp_path):
    def make(promise: dict | None, norm: str = "group", **federation) -> Hospital:
        who = Identity(
            label="hospital-0",
            cid=0,
            data=phantoms,
            device="cpu",
            medfl=__version__,
            models=tmp_path,
            code="0" * 64,
            patient_privacy=promise,
        )
        training = TrainingSettings(image_size=32, batch_size=8, norm=norm)
        return Hospital(
            who,
            training,
            FederationSettings(clients=1, rounds=3, val_fraction=0.3, **federation),
            tmp_path / "m.pt",
        )

    return make


def train(subject: Hospital, number: int = 1, run: str = "this") -> float:
    torch.manual_seed(0)
    task = Train(
        settings="",
        run=run,
        without=[],
        round=number,
        rate=None,
        seconds=600.0,
        partition=subject.data.partition_sha256,
    )
    return subject.train(TransUNet("tiny", 32, "group"), task)[0].patient_epsilon


def test_rounds_restarts_and_repeats_together_keep_the_promise(hospital, tmp_path):
    promise = {"epsilon": 5.0, "delta": 1e-3}
    first = train(hospital(promise))
    second = train(hospital(promise), 2)  # another process of the same hospital
    again = train(hospital(promise), 2)  # the server asks once more
    last = train(hospital(promise), 3)
    assert 0 < first < second < again < last <= 5.0 and last > 4.9
    with pytest.raises(
        HospitalError, match="too little is left"
    ):  # so much noise for one more would do harm alone
        train(hospital(promise), 3)
    kept = json.loads((tmp_path / "hospital-0_privacy.json").read_text())
    assert [entry["round"] for entry in kept] == [1, 2, 2, 3] and {entry["times"] for entry in kept} == {
        STEPS
    }
    noise = [entry["multiplier"] for entry in kept]
    assert noise[1] == pytest.approx(noise[0], abs=0.002) and noise[3] == pytest.approx(noise[2], abs=0.002)
    assert noise[2] > noise[1] + 0.02  # more, because of a round that was not planned
    with pytest.raises(
        HospitalError, match="too little is left.*epsilon 5 of 5 is spent, in 4 rounds"
    ) as caught:
        train(hospital(promise), 1, "another")
    assert caught.value.failure == Failure.PRIVACY
    assert train(hospital({**promise, "epsilon": 9.0}), 1, "another") > 5.0


def test_who_has_nothing_left_does_not_join(hospital, tmp_path, phantoms, monkeypatch, capsys):
    make_messages_outside_of_a_run(monkeypatch)
    promise = {"epsilon": 5.0, "delta": 1e-3}
    node = RealHospital(tmp_path, 0, phantoms, promise)
    settings = to_json(TrainingSettings(image_size=32, norm="group"), FederationSettings(rounds=3, clients=1))
    asked = {
        "query": Query.JOIN,
        "settings": settings,
        "versions": local_versions(__version__),
        "hospitals": 1,
        "run": "another",
    }
    assert read(node.answer(Message(message(asked), 1, "query")).content)["patient_privacy"] == promise
    assert "epsilon 5 at delta 0.001, of which 0 is spent" in capsys.readouterr().out
    PatientBudget(**promise, ledger=tmp_path / "models" / "hospital-0_privacy.json").reserve(
        "a run", 1, 15, 15, CHANCE
    )
    assert read(node.answer(Message(message(asked), 1, "query")).content)["failure"] == Failure.PRIVACY
    assert "too little is left of the patients' privacy" in capsys.readouterr().out
    asked["run"] = "a run"  # it comes back to the one that it was in
    assert read(node.answer(Message(message(asked), 1, "query")).content)["patient_privacy"] == promise
    assert "of which 4.99 is spent; only the last" in capsys.readouterr().out


def test_a_round_is_in_the_ledger_before_it_begins_whatever_becomes_of_it(hospital, tmp_path, monkeypatch):
    """That a training fails, or when, may tell something of the patients as well."""
    ledger = tmp_path / "hospital-0_privacy.json"
    monkeypatch.setattr(
        PrivateLearner, "train_epoch", lambda *_: (_ for _ in ()).throw(MedFLError("not finite"))
    )
    for count in (1, 2):
        with pytest.raises(MedFLError, match="not finite"):
            train(hospital({"epsilon": 5.0, "delta": 1e-3}))
        assert len(json.loads(ledger.read_text())) == count
    monkeypatch.setattr(
        "federation.privacy.budget.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(HospitalError, match="No space left.*no round may begin") as caught:
        train(hospital({"epsilon": 5.0, "delta": 1e-3}))
    assert caught.value.failure == Failure.PRIVACY


def test_two_processes_of_one_label_share_one_promise(tmp_path):
    one, other = (PatientBudget(5.0, 1e-3, tmp_path / "ledger.json") for _ in range(2))
    one.reserve("a", 1, 15, 15, CHANCE)
    with pytest.raises(MedFLError, match="too little is left"):
        other.reserve("b", 1, 15, 15, CHANCE)


def test_a_long_run_has_noise_for_its_last_round(tmp_path):
    promise = PatientBudget(8.0, 1e-5, tmp_path / "ledger.json")
    planned = promise.multiplier("long", 100 * STEPS, CHANCE)
    promise.rounds = [
        {"run": "long", "round": 1, "multiplier": planned, "times": 99 * STEPS, "chance": CHANCE}
    ]
    assert (
        promise.multiplier("long", STEPS, CHANCE) == pytest.approx(planned, rel=0.1) and promise.spent > 7.92
    )
    with pytest.raises(MedFLError, match="too little is left"):
        promise.multiplier("another", STEPS, CHANCE)


def test_layers_that_were_trained_without_noise_are_not_taken_up(hospital, tmp_path):
    plain, private = (
        hospital(promise, keep_norm_local=True) for promise in (None, {"epsilon": 5.0, "delta": 1e-3})
    )
    train(plain)
    assert plain._norms("this").before(None) is not None and private._norms("this").before(None) is None
    train(private)
    assert private._norms("this").before(None).rounds == 1


def test_a_card_claims_no_privacy_for_who_also_gave_updates_without(federate, tmp_path, phantoms):
    promise = {"epsilon": 8.0, "delta": 1e-3}
    for name, (first, second) in {"to": (None, promise), "from": (promise, None)}.items():
        for resume, kept in ((False, first), (True, second)):
            hospitals = [RealHospital(tmp_path / name, 0, phantoms, kept)]
            state, _, _ = federate(
                1 + resume,
                training={"norm": "group"},
                hospitals=hospitals,
                out=name,
                clients=1,
                resume=resume,
            )
        assert load_checkpoint(state.last).metadata["origin"]["privacy"]["patients"] == {}


class Boaster(Worker):
    """Says that it spent something, and promised nothing at joining."""

    def answer(self, incoming: Message) -> Message:
        reply = super().answer(incoming)
        about = read(reply.content)
        if "train_loss" in about:
            reply.content["about"] = message({**about, "patient_epsilon": 1.0})["about"]
        return reply


def test_who_promised_nothing_at_joining_claims_nothing_on_the_card(monkeypatch, tmp_path):
    make_fast(monkeypatch)
    code, state, _ = scripted_federation([Boaster("hospital-0", [0.5] * 2)], 1, tmp_path)
    assert code == 0 and state.progress.rows[0]["patient_epsilon"] == 1.0
    assert load_checkpoint(state.last).metadata["origin"]["privacy"]["patients"] == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--dp-sgd-delta", 0.001), "goes with --dp-sgd-epsilon"),
        (("--dp-sgd-epsilon", 0), "choose an epsilon above 0"),
        (("--dp-sgd-epsilon", 8, "--dp-sgd-delta", 0), "a delta between 0 and 1"),
        ((), "promised its patients privacy"),
    ],
    ids=str,
)
def test_a_start_that_would_break_the_promise_is_refused(home, phantoms, tmp_path, options, sentence):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "hospital-0_privacy.json").write_text("[]")
    done = run_here("run_client.py", "--cid", 0, "--data-dir", phantoms, "--check", *options, cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("promise", "norm", "sentence"),
    [
        ({"epsilon": 1.0, "delta": 1e-3}, "batch", "has to start with --norm group"),
        ({"epsilon": 1.0, "delta": 0.5}, "group", "choose one far below 1 / patients"),
    ],
    ids=str,
)
def test_a_promise_that_can_not_be_kept_is_refused(hospital, promise, norm, sentence):
    with pytest.raises(HospitalError, match=sentence) as caught:
        hospital(promise, norm)
    assert caught.value.failure == Failure.PRIVACY


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '""',
        "[{}]",
        *(
            f'[{{"run": "a", "multiplier": {multiplier}, "times": {times}, "chance": 0.2}}]'
            for multiplier, times in ((-1, 5), ("Infinity", 5), (1, 1.5), (1e-200, 5), ('"1"', 5))
        ),
    ],
)
def test_a_spoiled_ledger_is_no_new_budget(tmp_path, content):
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(MedFLError, match="put it back from a backup"):
        PatientBudget(1.0, 1e-5, tmp_path / "ledger.json")


def test_a_federation_learns_nothing_of_the_patients_but_by_the_update(federate, tmp_path, phantoms):
    hospitals = [
        RealHospital(tmp_path / "both", 0, phantoms, {"epsilon": 8.0, "delta": 1e-3}),
        RealHospital(tmp_path / "both", 1, phantoms),
    ]
    state, _, said = federate(
        2,
        training={"norm": "group"},
        hospitals=hospitals,
        out="both",
        partition="iid",
        val_fraction=0.4,
        test_fraction=0.0,
    )
    private, open_ = (state.progress.hospitals[f"hospital-{cid}"] for cid in (0, 1))
    assert private.images is None and private.patient_privacy.model_dump() == {"epsilon": 8.0, "delta": 1e-3}
    assert open_.images is not None and open_.patient_privacy is None
    rows = {(row["round"], row["site"]): row for row in state.progress.rows}
    assert len(rows) == 6
    for (number, site), row in rows.items():
        assert (row["val_dice"] is None) == (site == "hospital-0"), (
            "a score left the hospital that protects its patients"
        )
        assert (row["train_loss"] is None) == (site == "hospital-0" or number == 3)
    spent_at = [rows[number, "hospital-0"]["patient_epsilon"] for number in (1, 2)]
    assert 0 < spent_at[0] < spent_at[1] <= 8.0 and rows[1, "hospital-1"]["patient_epsilon"] is None
    assert any("it promises them epsilon 8 at delta 0.001" in line for line in said)
    assert load_checkpoint(state.last).metadata["origin"]["privacy"]["patients"] == {
        "hospital-0": {"epsilon": pytest.approx(spent_at[1]), "delta": 1e-3}
    }


def test_it_goes_with_secure_aggregation_and_with_privacy_of_hospitals(federate, tmp_path, phantoms):
    for name, more in (
        ("sum", {"secure_aggregation": True}),
        ("noise", {"dp_clip": 1.0, "dp_noise_multiplier": 0.5}),
    ):
        hospitals = [
            RealHospital(tmp_path / name, cid, phantoms, {"epsilon": 8.0, "delta": 1e-3}) for cid in range(3)
        ]
        state, _, _ = federate(
            1, training={"norm": "group"}, hospitals=hospitals, out=name, clients=3, partition="iid", **more
        )
        assert all(0 < row["patient_epsilon"] <= 8.0 for row in state.progress.rows if row["round"] == 1)
        assert state.progress.round == 1 and (state.progress.epsilon is None) == (name == "sum")


@pytest.mark.slow
def test_as_a_user_starts_it(scene: Scene, phantoms, tmp_path):
    begin = scene.folder / "begin"
    done = run_here(
        "train_centralized.py",
        "--data-dir",
        phantoms,
        "--out",
        begin,
        "--steps",
        4,
        "--model",
        "mini",
        "--norm",
        "group",
        "--image-size",
        32,
        "--batch-size",
        8,
        "--seed",
        3,
    )
    assert done.returncode == 0, done.stderr
    options = ("--cid", 0, "--data-dir", phantoms, "--dp-sgd-epsilon", 6, "--dp-sgd-delta", 0.001)
    server = scene.server(
        "--clients",
        1,
        "--rounds",
        2,
        *SMALL,
        "--norm",
        "group",
        "--init",
        begin / "transunet_centralized_best.pth",
    )
    hospital = scene.hospital("hospital-0", *options)
    assert (server.end(), hospital.end()) == (0, 0), hospital.output
    assert "promised to the patients: epsilon 6 at delta 0.001, of which 0 is spent" in hospital.output
    assert "of the 6 promised to the patients is spent" in hospital.output
    with open(scene.out / "federated_history.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["patient_epsilon"]) for row in rows] == [True, True, False] and not any(
        row["val_dice"] for row in rows
    )
    assert (
        5.5
        < load_checkpoint(scene.out / LAST).metadata["origin"]["privacy"]["patients"]["hospital-0"]["epsilon"]
        <= 6
    )
