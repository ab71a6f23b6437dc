"""Flower's strategies as MedFL calls them, each against its published formula on small updates."""

import math

import pytest
import torch

from common import MedFLError
from federation.aggregation import Aggregator
from federation.screening import Update
from federation.settings import STRATEGIES, FederationSettings
from federation.state import RunState, load_run
from training import TrainingSettings
from transunet import TransUNet

SENT = torch.tensor([1.0, -2.0, 0.5, 3.0])
CHANGES = {"a": [0.1, 0.2, -0.3, 0.0], "b": [0.2, -0.1, 0.4, 0.1], "c": [0.0, 0.5, 0.1, -0.2], "d": [0.3, 0.3, 0.2, 0.1],
           "e": [9.0, -7.0, 5.0, 8.0]}
EXAMPLES = {"a": 10, "b": 30, "c": 20, "d": 40, "e": 100}
NOBODY = torch.zeros(4, dtype=torch.bool)  # is a statistic


def aggregator(strategy: str, statistics: torch.Tensor = NOBODY, **settings) -> Aggregator:
    return Aggregator(FederationSettings(clients=5, strategy=strategy, **settings), statistics)


def updates(labels: str, sent: torch.Tensor = SENT, scale: float = 1.0) -> list[Update]:
    return [Update(label, sent + scale * torch.tensor(CHANGES[label]), EXAMPLES[label]) for label in labels]


def mean_change(labels: str) -> torch.Tensor:
    whole = sum(EXAMPLES[label] for label in labels)
    return sum(EXAMPLES[label] / whole * torch.tensor(CHANGES[label], dtype=torch.float64) for label in labels)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_the_average_is_weighted_by_slices(in_a_run, strategy):
    result = aggregator(strategy)(1, updates("abc"), SENT)
    assert result.tolist() == pytest.approx((SENT + mean_change("abc")).tolist()) and result.dtype == torch.float32


def test_an_average_of_one_is_that_one_bit_for_bit(in_a_run):
    weights, sent = (torch.randn(100_000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(aggregator("fedavg", torch.zeros(100_000, dtype=torch.bool))(1, [Update("a", weights, 7)], sent), weights)


def test_momentum(in_a_run):
    """Hsu et al. 2019 (arXiv:1909.06335): v = beta v + mean change, w = w + rate v."""
    subject, weights, velocity = aggregator("fedavgm", server_lr=0.5, server_momentum=0.8), SENT, 0.0
    for number, (labels, scale) in enumerate((("abc", 1.0), ("abd", 0.5), ("abc", -1.0)), start=1):
        velocity = 0.8 * velocity + scale * mean_change(labels)
        wanted = weights + 0.5 * velocity
        weights = subject(number, updates(labels, weights, scale), weights)
        assert weights.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def moments(strategy: str, number: int, change: torch.Tensor, m: torch.Tensor, v: torch.Tensor):
    """Step, m and v of Reddi et al. 2021 (arXiv:2003.00295), algorithm 2, from m = v = 0. Flower's Adam takes Kingma and Ba's
    correction of the moments' bias besides, with the round's number plus one."""
    beta_1, beta_2, eta, tau = 0.8, 0.95, 0.05, 0.01
    m = beta_1 * m + (1 - beta_1) * change
    if strategy == "fedadam":
        v = beta_2 * v + (1 - beta_2) * change**2
        eta *= math.sqrt(1 - beta_2 ** (number + 1)) / (1 - beta_1 ** (number + 1))
    else:
        v = v - (1 - beta_2) * change**2 * torch.sign(v - change**2)
    return eta * m / (v.sqrt() + tau), m, v


@pytest.mark.parametrize("strategy", ["fedadam", "fedyogi"])
def test_adaptive_optimisers(in_a_run, strategy):
    subject, weights = aggregator(strategy, server_lr=0.05, beta_1=0.8, beta_2=0.95, tau=0.01), SENT
    m = v = torch.zeros(4, dtype=torch.float64)
    for number, (labels, scale) in enumerate((("abc", 1.0), ("abd", 0.5), ("acd", 2.0)), start=1):
        step, m, v = moments(strategy, number, scale * mean_change(labels), m, v)
        wanted = weights + step
        weights = subject(number, updates(labels, weights, scale), weights)
        assert weights.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
        assert weights.dtype == torch.float32


def test_the_median_of_each_value(in_a_run):
    result = aggregator("fedmedian")(1, updates("abcde"), SENT) - SENT
    assert result.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.1], abs=1e-6)
    result = aggregator("fedmedian")(1, updates("abcd"), SENT) - SENT  # an even number: between the middle two
    assert result.tolist() == pytest.approx([0.15, 0.25, 0.15, 0.05], abs=1e-6)


def test_the_trimmed_mean_of_each_value(in_a_run):
    result = aggregator("fedtrimmedavg", trim=0.2)(1, updates("abcde"), SENT) - SENT
    assert result.tolist() == pytest.approx([0.2, 0.4 / 3, 0.7 / 3, 0.2 / 3], abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_krum_takes_the_update_nearest_to_its_neighbours(in_a_run, scale):
    """Blanchard et al. 2017: the least sum of squared distances to the n - f - 2 nearest, by brute force. Small changes of
    large weights must not drown in rounding."""
    sent = torch.full((20_000,), 100.0)
    changed = {label: (1 + k / 10) * torch.randn(20_000, generator=torch.Generator().manual_seed(k))
               for k, label in enumerate("bcade")}
    given = [Update(label, sent + scale * change, 10) for label, change in changed.items()]
    score = {one.label: sum(sorted(float((one.weights.double() - other.weights.double()).square().sum()) for other in given
                                   if other is not one)[:2]) for one in given}
    best = min(score, key=score.get)
    result = aggregator("krum", torch.zeros(20_000, dtype=torch.bool))(1, given, sent)
    assert best == "b" and torch.equal(result, next(u.weights for u in given if u.label == best))


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "fedyogi"])
def test_statistics_are_averaged_whatever_the_optimiser(in_a_run, strategy):
    """Momentum would carry a running variance below 0, and the model's output would not be finite."""
    subject = aggregator(strategy, torch.tensor([False, True, False, True]), server_lr=5.0)
    weights = subject(1, updates("abc"), SENT)
    plain = SENT + mean_change("abc")
    assert weights[[1, 3]].tolist() == pytest.approx(plain[[1, 3]].tolist()) and abs(weights[0] - plain[0]) > 0.1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_the_answers_does_not_matter(in_a_run, strategy):
    one, other = (aggregator(strategy)(1, order, SENT) for order in (updates("abcde"), updates("edcba")))
    assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "fedyogi"])
def test_a_resumed_run_goes_on_with_what_the_strategy_remembers(in_a_run, tmp_path, strategy):
    def state() -> RunState:
        settings = FederationSettings(strategy=strategy)
        return RunState(TransUNet("tiny", 32), TrainingSettings(image_size=32), settings, tmp_path, None)

    def step(subject: RunState, number: int) -> torch.Tensor:
        shift = torch.randn(len(subject.weights), generator=torch.Generator().manual_seed(number)) * 0.01
        subject.take(subject.aggregator(number, [Update("a", subject.weights + shift, 5)], subject.weights))
        return subject.weights

    whole = state()
    step(whole, 1)
    whole.save_last()
    resumed = state()
    resumed.restore(load_run(tmp_path)[2])
    assert torch.equal(step(resumed, 2), step(whole, 2))
    forgetful = state()
    forgetful.restore({**load_run(tmp_path)[2], "strategy": {}})
    assert not torch.equal(step(forgetful, 2), whole.weights)


@pytest.mark.parametrize(("strategy", "options", "needed"), [
    ("krum", {"malicious": 1}, 5), ("krum", {"malicious": 2}, 7), ("krum", {"malicious": 0}, 3),
    ("fedtrimmedavg", {"trim": 0.2}, 5), ("fedtrimmedavg", {"trim": 0.1}, 10), ("fedtrimmedavg", {"trim": 0.45}, 3),
    ("fedmedian", {}, 3)])
def test_too_few_hospitals_are_refused_with_the_number_that_is_needed(strategy, options, needed):
    with pytest.raises(MedFLError, match=f"needs {needed} hospitals"):
        FederationSettings(strategy=strategy, clients=needed - 1, **options)
    with pytest.raises(MedFLError, match=f"needs {needed} hospitals in every round"):
        FederationSettings(strategy=strategy, clients=needed + 4, min_clients=needed - 1, **options)
    assert FederationSettings(strategy=strategy, clients=needed, **options).quorum == needed


def test_a_share_that_cuts_nobody_is_refused_at_once():
    with pytest.raises(MedFLError, match="needs 1000000000000 hospitals"):
        FederationSettings(strategy="fedtrimmedavg", clients=5, trim=1e-12)


@pytest.mark.parametrize("wrong", [{"server_lr": 0.0}, {"tau": 0.0}, {"server_momentum": 1.0}, {"beta_1": -0.1}, {"beta_2": 1.0},
                                   {"trim": 0.5}, {"trim": 0.0}, {"malicious": -1}], ids=str)
def test_options_of_strategies_out_of_range_are_refused(wrong):
    with pytest.raises(MedFLError, match="--" + next(iter(wrong)).replace("_", "-")):
        FederationSettings(**wrong)


def test_a_tie_goes_by_the_label_and_not_by_who_answered_first(in_a_run):
    """Three in a row at equal distances: Krum likes each as much as the others."""
    row = [Update(label, SENT + place * torch.tensor([1.0, 0.0, 0.0, 0.0]), 10) for label, place in (("a", -1), ("b", 1), ("c", 0))]
    subject = Aggregator(FederationSettings(clients=3, strategy="krum", malicious=0), NOBODY)
    for order in (row, row[::-1]):
        assert torch.equal(subject(1, order, SENT), row[0].weights)


def test_a_robust_strategy_is_not_moved_by_one_hostile_hospital(in_a_run):
    honest = updates("abcd")
    moved = {name: max((aggregator(name)(1, [*honest, *updates("e", scale=factor)], SENT) - SENT).abs().max()
                       for factor in (1.0, 1e6)) for name in ("fedavg", "fedmedian", "fedtrimmedavg", "krum")}
    assert moved["fedavg"] > 1e5 and all(moved[name] <= 0.5 for name in ("fedmedian", "fedtrimmedavg", "krum"))
