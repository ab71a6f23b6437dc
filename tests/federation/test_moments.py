"""One schedule for all hospitals, steps of a round, and the optimiser that outlives a round."""

import pytest
import torch
from scripted import TINIER

from batches import TrainingBatches
from common import __version__
from federation.hospital.hospital import Hospital
from federation.hospital.identity import Identity
from federation.hospital.moments import Moments
from federation.hospital.training import seed_of
from federation.protocol.requests import Score, Train
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack, unpack
from training import Learner, TrainingSettings, rate_scale
from transunet import ARCHITECTURES, TransUNet

ROUNDS = 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """`tiny` of a twentieth of its size."""
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINIER)


@pytest.fixture
def hospital(phantoms, tmp_path):
    def make(cid: int = 0, folder: str = "models", **federation) -> Hospital:
        who = Identity(
            label=f"hospital-{cid}",
            cid=cid,
            data=phantoms,
            device="cpu",
            medfl=__version__,
            models=tmp_path / folder,
            code="0" * 64,
        )
        settings = {
            "clients": 3,
            "rounds": ROUNDS,
            "partition": "quantity",
            "val_fraction": 0.0,
            "test_fraction": 0.0,
            **federation,
        }
        return Hospital(
            who,
            TrainingSettings(image_size=32, warmup=0.3),
            FederationSettings(**settings),
            tmp_path / "model.pt",
        )

    return make


def work(
    subject: Hospital, number: int, weights: torch.Tensor | None = None, run: str = "this"
) -> torch.Tensor:
    """The weights that a round gives."""
    torch.manual_seed(0)
    model = TransUNet("tiny", 32)
    if weights is not None:
        model.load_state_dict(unpack(weights, model.state_dict()))
    task = Train(
        settings="",
        run=run,
        without=[],
        round=number,
        rate=None,
        seconds=600.0,
        partition=subject.data.partition_sha256,
    )
    return subject.train(model, task)[1]


@pytest.fixture
def rates(monkeypatch):
    """The share of the learning rate that each step took, and how many slices it had."""
    seen = []

    class Watched(Learner):
        def _step(self, images, masks):
            seen.append((self.optimiser.param_groups[0]["lr"] / 1e-3, len(images)))
            return super()._step(images, masks)

    monkeypatch.setattr("federation.hospital.hospital.Learner", Watched)
    return seen


def test_the_rate_is_the_same_at_all_hospitals_whatever_their_size(hospital, rates):
    first, most = {}, {}
    for cid in range(3):
        subject = hospital(cid)
        for number in range(1, ROUNDS + 1):
            rates.clear()
            work(subject, number)
            first.setdefault(number, set()).add(round(rates[0][0], 6))
            steps = len(rates)
            most.setdefault(cid, []).append(steps)
            assert [rate for rate, _ in rates] == pytest.approx(
                [3**0.5 * rate_scale((number - 1 + step / steps) / ROUNDS, 0.3) for step in range(steps)]
            )
    assert len(set(map(tuple, most.values()))) > 1, "hospitals of one size show nothing"
    assert all(len(values) == 1 for values in first.values())


@pytest.mark.parametrize(("clients", "wanted"), [(1, 16), (2, 8), (3, 5), (4, 4), (64, 4)])
def test_a_batch_is_of_all_hospitals_together(clients, wanted):
    assert FederationSettings(clients=clients).batch_of_one(16) == wanted


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"clients": 1}, 1.0),
        ({"clients": 2}, 2**0.5),
        ({"clients": 4}, 2.0),
        ({"clients": 64}, 2.0),
        ({"clients": 4, "lr_factor": 0.5}, 0.5),
    ],
)
def test_the_rate_of_more_hospitals_is_higher_up_to_a_bound(settings, wanted):
    assert FederationSettings(**settings).rate_factor == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "steps"), [({"local_steps": 3}, 3), ({"local_steps": 40}, 40), ({"local_epochs": 2}, None)]
)
def test_steps_of_a_round(hospital, rates, options, steps):
    subject = hospital(0, **options)
    work(subject, 1)
    batches = len(TrainingBatches(subject.data.dataset, subject.data.split.train, 32, 5, 0))
    assert len(rates) == (steps or 2 * batches)
    assert {size for _, size in rates} == {5}


def test_rounds_with_moments_are_one_training(hospital, phantoms):
    """A hospital by itself, whose weights come back as they were sent: what the optimiser learnt goes on, so
    that all rounds together are bit for bit a training that was never interrupted."""
    subject = hospital(0, clients=1, partition="iid")
    weights = None
    for number in range(1, ROUNDS + 1):
        weights = work(subject, number, weights)
    torch.manual_seed(0)
    learner = Learner(
        TransUNet("tiny", 32), TrainingSettings(image_size=32, ema_decay=0.0), torch.device("cpu")
    )
    batches = TrainingBatches(
        subject.data.dataset, subject.data.split.train, 32, 16, seed_of(0, subject.identity.label)
    )
    total = ROUNDS * len(batches)

    def before_step(step: int) -> bool:
        learner.set_rate(rate_scale(step / total, 0.3))
        return True

    for epoch in range(1, ROUNDS + 1):
        learner.train_epoch(batches.epoch(epoch), before_step)
    assert torch.allclose(pack(learner.model.state_dict()), weights, atol=1e-6)
    forgetful = hospital(0, "others", clients=1, partition="iid", moments="reset")
    other = None
    for number in range(1, ROUNDS + 1):
        other = work(forgetful, number, other)
    assert not torch.allclose(other, weights, atol=1e-4)


def test_a_restarted_hospital_goes_on_with_its_moments(hospital):
    weights = work(hospital(0), 1)
    after = work(hospital(0), 2, weights)
    assert torch.equal(work(hospital(0), 2, weights), after), (
        "a round that is asked for again begins where it began"
    )
    assert not torch.equal(work(hospital(0, "elsewhere"), 2, weights), after), (
        "the moments made no difference"
    )


def test_moments_of_another_run_or_of_later_rounds_are_not_taken(tmp_path):
    mine = Moments(tmp_path / "a.pt", "this", False)
    for number in (1, 2, 3):
        mine.keep(number, {"round": number})
    assert [mine.before(number) for number in (2, 3, 4, 9)] == [
        None,
        {"round": 2},
        {"round": 3},
        {"round": 3},
    ]
    assert Moments(tmp_path / "a.pt", "another", False).before(4) is None
    mine.forget()
    assert not list(tmp_path.iterdir())


def test_a_promise_to_patients_takes_no_moments_of_gradients_without_noise(tmp_path):
    Moments(tmp_path / "a.pt", "this", False).keep(1, {"bare": 1})
    promised = Moments(tmp_path / "a.pt", "this", True)
    assert promised.before(2) is None
    promised.keep(2, {"noised": 1})
    assert promised.before(3) == {"noised": 1} == Moments(tmp_path / "a.pt", "this", False).before(3)


def test_moments_are_the_owners_only_and_go_at_the_end(hospital, tmp_path):
    subject = hospital(0)
    work(subject, 1)
    kept = list((tmp_path / "models").iterdir())
    assert len(kept) == 1 and kept[0].stat().st_mode & 0o077 == 0
    subject.finish(TransUNet("tiny", 32), Score(settings="", run="this", without=[]))
    assert not list((tmp_path / "models").iterdir())
