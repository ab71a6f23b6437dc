"""Differential privacy of hospitals: clipping, noise, accountant, budget, what goes with it and what not."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import kstest, norm
from scripted import Worker, federate, make_fast

from checkpoint import load_checkpoint
from common import MedFLError
from deployment.app.card import card_rows
from federation.privacy.accountant import Noisy, check_accountant, multiplier_for, spent
from federation.privacy.hospitals import HospitalPrivacy
from federation.privacy.noise import GRID, noised
from federation.protocol.agreement import check_together
from federation.protocol.settings import FederationSettings
from federation.runtime.job import announce_privacy
from federation.server.state import BEST, LAST
from federation.server.updates import Updates
from tasks import LGG, Task
from training import TrainingSettings
from transunet import TransUNet

N = 20_000
SENT = torch.randn(N, generator=torch.Generator().manual_seed(0))
EVERYTHING = torch.ones(N, dtype=torch.bool)


def settings(**given) -> FederationSettings:
    return FederationSettings(**{"clients": 4, "dp_clip": 2.0, "dp_noise_multiplier": 1.0, **given})


def change(label: str, length: float) -> torch.Tensor:
    way = torch.randn(N, generator=torch.Generator().manual_seed(ord(label)), dtype=torch.float64)
    return length * way / way.norm()


@pytest.fixture
def updates(tmp_path):
    """Updates of these changes to `sent`, by label, with so many slices each."""

    def make(changes: dict[str, torch.Tensor], sent: torch.Tensor = SENT, examples: int = 1) -> Updates:
        made = Updates(sent, ~EVERYTHING, tmp_path)
        for number, (label, one) in enumerate(changes.items()):
            made.add(label, (sent.double() + one).float(), examples * 1_000**number)
        return made

    return make


def private_mean(subject: HospitalPrivacy, made: Updates, travels: torch.Tensor = EVERYTHING) -> torch.Tensor:
    return subject.private_mean(made.sent, made.blocks, travels)


def exact_epsilon(multiplier: float, rounds: int, delta: float) -> float:
    """Balle and Wang 2018 (arXiv:1805.06530), theorem 8, for the one Gaussian that so many are."""
    s = multiplier / math.sqrt(rounds)
    return brentq(
        lambda e: norm.cdf(1 / (2 * s) - e * s) - math.exp(e) * norm.cdf(-1 / (2 * s) - e * s) - delta, 0, 300
    )


@pytest.mark.parametrize("block", [1_000, 10**9])
def test_changes_are_clipped_and_count_alike(monkeypatch, updates, block):
    """Without noise: (0.5 u + 2 v) / 4, whatever the slices, and with a missing hospital as no change."""
    monkeypatch.setattr("federation.server.updates.BLOCK", block)
    subject = HospitalPrivacy(settings(dp_noise_multiplier=1e-12))
    small, large = change("s", 0.5), change("l", 50.0)
    result = private_mean(subject, updates({"s": small, "l": large})) - SENT
    assert torch.allclose(result.double(), (small + large * 2 / 50) / 4, atol=1e-6)


def test_the_noise_has_the_deviation_of_the_theory_and_is_gaussian(updates):
    result = private_mean(
        HospitalPrivacy(settings(dp_noise_multiplier=3.0)), updates({}, torch.zeros(N))
    ).numpy()
    deviation = 3.0 * 2.0 / 4
    assert result.std() == pytest.approx(deviation, rel=0.03) and abs(
        result.mean()
    ) < 5 * deviation / math.sqrt(N)
    # the noise can't be seeded: true noise fails this once in 10^9 runs, and uniform noise of this deviation
    # has 1e-62
    assert kstest(result / deviation, "norm").pvalue > 1e-9
    assert abs(np.corrcoef(result[:-1], result[1:])[0, 1]) < 5 / math.sqrt(N)


def test_no_two_rounds_have_the_same_noise(updates):
    subject = HospitalPrivacy(settings())
    one, other = (private_mean(subject, updates({}, torch.zeros(N))) for _ in range(2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(N)


def test_noise_is_of_the_systems_generator_and_on_a_grid(monkeypatch, updates):
    """numpy's generator is no cryptographic one, and the last digits of a sum with noise can tell what the noise was
    added to."""
    monkeypatch.setattr(np.random, "default_rng", lambda *_: pytest.fail("another generator"))
    monkeypatch.setattr(
        "federation.privacy.hospitals.noised", lambda *given: kept.append(noised(*given)) or kept[-1].clone()
    )
    kept: list[torch.Tensor] = []
    for length in (0.0, 1.7, 1e-7):
        private_mean(HospitalPrivacy(settings()), updates({"a": change("a", length)}))
        steps = kept[-1] / (GRID * 2.0)
        assert torch.equal(steps, steps.round()) and len(set(steps.tolist())) > 0.9 * N


def test_what_is_not_trained_stays_as_it_was_and_no_change_is_no_error(updates):
    travels = torch.arange(N) % 2 == 0
    result = private_mean(HospitalPrivacy(settings()), updates({"a": torch.zeros(N)}), travels)
    assert torch.equal(result[~travels], SENT[~travels]) and not torch.equal(result[travels], SENT[travels])


@pytest.mark.parametrize(("multiplier", "rounds"), [(1.0, 1), (2.0, 10), (0.8, 5), (5.0, 100)])
def test_the_accountant_is_near_the_exact_value_and_never_below(multiplier, rounds):
    exact = exact_epsilon(multiplier, rounds, 1e-5)
    assert exact <= spent([Noisy(multiplier, rounds)], 1e-5) < 1.15 * exact


def test_the_accountant_gives_published_values():
    """Mironov 2017 (arXiv:1702.07476), proposition 3 with corollary 3: the Gaussian's Renyi divergence of
    order a is a / (2 z^2); its conversion gives at most min over a of a / (2 z^2) + log(1 / delta) / (a -
    1)."""
    for multiplier in (0.7, 1.0, 4.0):
        published = min(
            a / (2 * multiplier**2) + math.log(1e5) / (a - 1) for a in np.linspace(1.01, 200, 20_000)
        )
        assert 0.75 * published < spent([Noisy(multiplier, 1)], 1e-5) <= published * 1.001


@pytest.mark.parametrize(("epsilon", "rounds"), [(1.0, 5), (8.0, 12), (100.0, 3)])
def test_the_noise_that_is_derived_spends_what_was_asked_for(epsilon, rounds):
    multiplier = multiplier_for(epsilon, rounds, 1e-5)
    assert 0.99 * epsilon < spent([Noisy(multiplier, rounds)], 1e-5) <= epsilon * 1.0001


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"dp_epsilon": 1.0}, "give both or none"),
        ({"dp_clip": 1.0}, "give both or none"),
        ({"dp_clip": 0.0, "dp_epsilon": 1.0}, "--dp-clip is 0"),
        ({"dp_clip": 1.0, "dp_epsilon": -1.0}, "--dp-epsilon is -1"),
        ({"dp_clip": 1.0, "dp_epsilon": 1.0, "dp_delta": 1.0}, "--dp-delta"),
        (
            {"dp_clip": 1.0, "dp_epsilon": 1.0, "strategy": "fedmedian", "clients": 3},
            "looks at each hospital's update",
        ),
    ],
    ids=str,
)
def test_options_that_can_not_be(wrong, sentence):
    with pytest.raises(MedFLError, match=sentence):
        FederationSettings(**wrong)


@pytest.mark.parametrize(
    ("training", "more", "sentence"),
    [
        ({}, {}, "--norm group, or --keep-norm-local"),
        ({"norm": "group", "patience": 3}, {}, "no --patience"),
        ({"norm": "group", "schedule": "plateau"}, {}, "--schedule cosine"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_training(training, more, sentence):
    with pytest.raises(MedFLError, match=sentence):
        check_together(TrainingSettings(**training), settings(**more))
    check_together(TrainingSettings(), settings(keep_norm_local=True))
    check_together(TrainingSettings(norm="group"), settings())


def test_without_the_accountant_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MedFLError, match="requirements-privacy.txt"):
        check_accountant()


def run(tmp_path, rounds: int, workers: int = 2, resume: bool = False, **given):
    return federate(
        [Worker(f"hospital-{k}", [0.1 * (10 - n) for n in range(9)]) for k in range(workers)],
        rounds,
        tmp_path,
        federation={"dp_clip": 1.0, "dp_noise_multiplier": 2.0, **given},
        resume=resume,
        norm="group",
    )


def test_a_run_ends_when_the_budget_is_spent_and_keeps_its_last_model(monkeypatch, tmp_path):
    make_fast(monkeypatch)
    budget = spent([Noisy(2.0, 3)], 1e-5) + 0.01
    code, state, said = run(tmp_path, 8, dp_epsilon=budget)
    assert code == 0 and state.progress.round == 3 and any("stopped" in line for line in said)
    assert sum("of a hospital is spent" in line for line in said) == 3
    told = load_checkpoint(tmp_path / BEST).metadata
    assert told["origin"]["privacy"] == {
        "secure_aggregation": False,
        "epsilon": pytest.approx(spent([Noisy(2.0, 3)], 1e-5)),
        "delta": 1e-5,
        "patients": {},
    }
    assert (
        told["training"]["selected_by"].startswith("nothing")
        and told["preprocessing"]["training_images"] is None
    )
    assert told["scores"] == {}  # the Dice fell from round to round, and yet the last model was kept
    best, last = (load_checkpoint(tmp_path / name).model.head.weight for name in (BEST, LAST))
    assert torch.equal(best, last)


def mercys_task(name: str, title: str = "Gliomas of Mercy", site: str | None = "^(MERCY)_") -> Task:
    return LGG.model_copy(update={"name": name, "title": title, "site": site, "region": "glioma"})


def test_a_private_models_file_is_the_same_whoever_took_part(monkeypatch, tmp_path):
    """Noise on the weights hid who took part, and the file beside them named the hospitals."""
    make_fast(monkeypatch)
    _, state, _ = run(tmp_path, 1)
    with_both = state.metadata({}, 1)
    hospitals = state.progress.hospitals
    other = hospitals.pop("hospital-1")
    without = state.metadata({}, 1)
    assert {**with_both, "created": None} == {**without, "created": None}
    own = {"cid": None, "own_data": True}
    hospitals["hospital-0"] = hospitals["hospital-0"].model_copy(update={**own, "data": "own data"})
    without = state.metadata({}, 1)
    title = "Prostates of Mercy"
    task = LGG.model_copy(update={"title": title})
    hospitals["hospital-1"] = other.model_copy(update={**own, "data": title, "task": task})
    assert {**state.metadata({}, 1), "created": None} == {**without, "created": None}
    tasks = {"hospital-1": mercys_task("mercy"), "hospital-0": mercys_task("gliomas", "Gliomas", None)}
    for label, task in tasks.items():  # the first that came names its dataset and how its patients are called
        hospitals[label] = hospitals.pop(label).model_copy(update={"task": task})
    told = state.metadata({}, 1)
    del hospitals["hospital-1"]
    assert {**state.metadata({}, 1), "created": None} == {**told, "created": None}
    assert told["task"]["region"] == "glioma" and "ercy" not in str(told)
    hospitals["hospital-0"] = hospitals["hospital-0"].model_copy(update={"task": LGG})
    assert state.metadata({}, 1)["task"] is None  # as of who has no file of a task
    rows = dict(card_rows(load_checkpoint(tmp_path / BEST), "0" * 64))
    assert rows["Trained"].startswith("federated, 2 hospitals, 1 rounds") and "hospital-" not in str(rows)
    assert "patients" not in rows["Data"]


def test_a_resumed_run_spends_nothing_twice(monkeypatch, tmp_path):
    make_fast(monkeypatch)
    monkeypatch.setattr("federation.server.rounds.Federation._final_score", lambda self: None)
    run(tmp_path, 2)
    assert not (tmp_path / BEST).exists()  # nothing was chosen by scores
    _, state, _ = run(tmp_path, 4, resume=True)
    assert state.progress.epsilon == pytest.approx(spent([Noisy(2.0, 4)], 1e-5))


def test_under_privacy_no_update_is_left_out_for_being_unlike(monkeypatch, tmp_path):
    make_fast(monkeypatch)
    odd = Worker("hospital-3", [0.5] * 4, factor=-1e6)
    workers = [*(Worker(f"hospital-{k}", [0.5] * 4) for k in range(3)), odd]
    for given, left_out in (({"dp_clip": 1.0, "dp_noise_multiplier": 1.0}, False), ({}, True)):
        for worker in workers:
            worker.scores = [0.5] * 4
        _, _, said = federate(workers, 1, tmp_path / str(left_out), federation=given, norm="group")
        assert any("left out" in line for line in said) == left_out


def test_a_budget_that_no_round_fits_is_refused_and_how_many_fit_is_told(capsys):
    model, training = TransUNet("tiny", 32, "group"), TrainingSettings(image_size=32, norm="group")
    with pytest.raises(MedFLError, match="the first round would already spend"):
        announce_privacy(HospitalPrivacy(settings(dp_epsilon=1.0, dp_noise_multiplier=0.1)), model, training)
    budget = spent([Noisy(2.0, 3)], 1e-5) + 0.01
    announce_privacy(
        HospitalPrivacy(settings(dp_epsilon=budget, dp_noise_multiplier=2.0, rounds=8)), model, training
    )
    assert "after 3 rounds" in capsys.readouterr().out


def test_few_hospitals_are_warned_and_many_are_not():
    assert "needs about" in HospitalPrivacy(settings(clients=8)).warning(6_000_000)
    assert HospitalPrivacy(settings(clients=8)).warning(64) is None


def test_the_server_says_what_is_protected(monkeypatch, tmp_path, capsys):
    make_fast(monkeypatch)
    privacy = {"clients": 2, "dp_epsilon": 8.0, "dp_clip": 1.0, "dp_delta": 1e-4}
    model, training = TransUNet("tiny", 32, "group"), TrainingSettings(image_size=32, norm="group")
    announce_privacy(HospitalPrivacy(FederationSettings(rounds=1, **privacy)), model, training)
    said = capsys.readouterr().out
    assert "the protected unit is the hospital, not the patient" in said
    assert "note: with 2 hospitals" in said
    workers = [Worker(f"hospital-{k}", [0.5] * 2) for k in (0, 1)]
    _, _, lines = federate(workers, 1, tmp_path, federation=privacy, norm="group")
    assert any("epsilon 8 of a hospital is spent" in line for line in lines)
