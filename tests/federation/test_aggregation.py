"""The strategies: each against Flower's own class, and against the published formula where that is short."""

import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, FedTrimmedAvg, FedYogi, Krum

import federation.server.updates
from common import MedFLError
from federation.protocol.settings import STRATEGIES, FederationSettings
from federation.server.aggregation import Aggregator
from federation.server.state import RunState, load_run
from federation.server.updates import Updates
from training import TrainingSettings
from transunet import TransUNet

SENT = torch.tensor([1.0, -2.0, 0.5, 3.0])
CHANGES = {
    "a": [0.1, 0.2, -0.3, 0.0],
    "b": [0.2, -0.1, 0.4, 0.1],
    "c": [0.0, 0.5, 0.1, -0.2],
    "d": [0.3, 0.3, 0.2, 0.1],
    "e": [9.0, -7.0, 5.0, 8.0],
}
EXAMPLES = {"a": 10, "b": 30, "c": 20, "d": 40, "e": 55}
OPTIMISERS = ("fedavgm", "fedadam", "fedyogi")
MOMENTS = {"server_lr": 0.05, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}


@pytest.fixture
def made(tmp_path):
    """Updates of these labels to `sent`, each scaled."""

    def make(
        labels: str, sent: torch.Tensor = SENT, scale: float = 1.0, statistics: torch.Tensor | None = None
    ) -> Updates:
        nobody = torch.zeros(len(sent), dtype=torch.bool)
        updates = Updates(sent, nobody if statistics is None else statistics, tmp_path)
        for label in labels:
            updates.add(label, sent + scale * torch.tensor(CHANGES[label]), EXAMPLES[label])
        return updates

    return make


def aggregator(strategy: str, statistics: torch.Tensor | None = None, **settings) -> Aggregator:
    nobody = torch.zeros(4, dtype=torch.bool)
    return Aggregator(
        FederationSettings(clients=5, strategy=strategy, **settings),
        nobody if statistics is None else statistics,
    )


def mean_change(labels: str) -> torch.Tensor:
    whole = sum(EXAMPLES[label] for label in labels)
    return sum(
        EXAMPLES[label] / whole * torch.tensor(CHANGES[label], dtype=torch.float64) for label in labels
    )


class Flowers:
    """Flower's class of a strategy, fed with changes in float64."""

    def __init__(self, strategy):
        logging.getLogger("flwr").setLevel(logging.ERROR)
        self.strategy = strategy

    def __call__(self, number: int, labels: str, scale: float) -> torch.Tensor:
        start = np.zeros(len(SENT))
        self.strategy.current_arrays = (
            ArrayRecord({"w": Array(start)}) if isinstance(self.strategy, FedAvgM) else {"w": start}
        )
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord({"w": Array(scale * np.array(CHANGES[label]))}),
                        "metrics": MetricRecord({"num-examples": EXAMPLES[label]}),
                    }
                ),
                0,
                "train",
            )
            for label in labels
        ]
        arrays, _ = self.strategy.aggregate_train(number, replies)
        return torch.from_numpy(np.array(arrays["w"].numpy(), np.float64))


ADAPTIVE = {"eta": 0.05, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}
ORACLES = {
    "fedavg": (FedAvg, {}, {}),
    "fedprox": (FedProx, {}, {}),
    "fedmedian": (FedMedian, {}, {}),
    "krum": (Krum, {"num_malicious_nodes": 1}, {}),
    "fedtrimmedavg": (FedTrimmedAvg, {"beta": 0.2}, {}),
    "fedavgm": (
        FedAvgM,
        {"server_learning_rate": 0.5, "server_momentum": 0.8},
        {"server_lr": 0.5, "server_momentum": 0.8},
    ),
    "fedadam": (FedAdam, ADAPTIVE, MOMENTS),
    "fedyogi": (FedYogi, ADAPTIVE, MOMENTS),
}


@pytest.mark.parametrize("block", [3, 1_000])
@pytest.mark.parametrize("strategy", ORACLES)
def test_each_strategy_does_what_flowers_does(in_a_run, monkeypatch, made, strategy, block):
    """Three rounds, so that what a server's optimiser remembers takes part; in blocks of one value of five hospitals
    (3 divided by 5, but at least one) and of all values."""
    monkeypatch.setattr(federation.server.updates, "BLOCK", block)
    kind, theirs, ours = ORACLES[strategy]
    subject, oracle, weights = aggregator(strategy, **ours), Flowers(kind(**theirs)), SENT
    for number, (labels, scale) in enumerate((("abcde", 1.0), ("bcdea", 0.5), ("abcde", -1.0)), start=1):
        wanted = weights.double() + oracle(number, labels, scale)
        weights = subject(number, made(labels, weights, scale))
        assert weights.tolist() == pytest.approx(wanted.tolist(), abs=2e-6) and weights.dtype == torch.float32


def test_an_average_of_one_is_that_one_bit_for_bit(tmp_path):
    weights, sent = (torch.randn(100_000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    updates = Updates(sent, torch.zeros(100_000, dtype=torch.bool), tmp_path)
    updates.add("a", weights, 7)
    assert torch.equal(aggregator("fedavg", updates.is_statistic)(1, updates), weights)


def test_momentum(made):
    """Hsu et al. 2019 (arXiv:1909.06335): v = beta v + mean change, w = w + rate v."""
    subject, weights, velocity = aggregator("fedavgm", server_lr=0.5, server_momentum=0.8), SENT, 0.0
    for number, (labels, scale) in enumerate((("abc", 1.0), ("abd", 0.5), ("abc", -1.0)), start=1):
        velocity = 0.8 * velocity + scale * mean_change(labels)
        wanted = weights + 0.5 * velocity
        weights = subject(number, made(labels, weights, scale))
        assert weights.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_the_median_of_an_even_number_lies_between_the_middle_two(made):
    change = aggregator("fedmedian")(1, made("abcd")) - SENT
    assert change.tolist() == pytest.approx([0.15, 0.25, 0.15, 0.05], abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_krum_takes_the_update_nearest_to_its_neighbours(tmp_path, scale):
    """Blanchard et al. 2017: the least sum of squared distances to the n - f - 2 nearest, by brute force.
    Small changes of large weights must not drown in rounding."""
    sent = torch.full((20_000,), 100.0)
    changed = {
        label: (1 + k / 10) * torch.randn(20_000, generator=torch.Generator().manual_seed(k))
        for k, label in enumerate("bcade")
    }
    given = {label: sent + scale * change for label, change in changed.items()}
    score = {
        one: sum(
            sorted(
                float((given[one].double() - given[other].double()).square().sum())
                for other in given
                if other != one
            )[:2]
        )
        for one in given
    }
    best = min(score, key=score.get)
    updates = Updates(sent, torch.zeros(20_000, dtype=torch.bool), tmp_path)
    for label, weights in given.items():
        updates.add(label, weights, 10)
    assert best == "b" and torch.equal(aggregator("krum", updates.is_statistic)(1, updates), given[best])


@pytest.mark.parametrize("strategy", OPTIMISERS)
def test_statistics_are_averaged_whatever_the_optimiser(made, strategy):
    """Momentum would carry a running variance below 0, and the model's output would not be finite."""
    statistics = torch.tensor([False, True, False, True])
    subject = aggregator(strategy, statistics, server_lr=5.0)
    weights = subject(1, made("abc", statistics=statistics))
    plain = SENT + mean_change("abc")
    assert (
        weights[[1, 3]].tolist() == pytest.approx(plain[[1, 3]].tolist()) and abs(weights[0] - plain[0]) > 0.1
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_the_answers_does_not_matter(made, strategy):
    one, other = (aggregator(strategy)(1, made(order)) for order in ("abcde", "edcba"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", OPTIMISERS)
def test_a_resumed_run_goes_on_with_what_the_strategy_remembers(tmp_path, strategy):
    def state() -> RunState:
        settings = FederationSettings(strategy=strategy)
        return RunState(TransUNet("tiny", 32), TrainingSettings(image_size=32), settings, tmp_path, None)

    def step(subject: RunState, number: int) -> torch.Tensor:
        shift = torch.randn(len(subject.weights), generator=torch.Generator().manual_seed(number)) * 0.01
        updates = Updates(subject.weights, subject.is_statistic, tmp_path)
        updates.add("a", subject.weights + shift, 5)
        subject.take(subject.aggregator(number, updates))
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


@pytest.mark.parametrize(
    ("strategy", "options", "needed"),
    [
        ("krum", {"malicious": 1}, 5),
        ("krum", {"malicious": 2}, 7),
        ("krum", {"malicious": 0}, 3),
        ("fedtrimmedavg", {"trim": 0.2}, 5),
        ("fedtrimmedavg", {"trim": 0.1}, 10),
        ("fedtrimmedavg", {"trim": 0.45}, 3),
        ("fedmedian", {}, 3),
    ],
)
def test_too_few_hospitals_are_refused_with_the_number_that_is_needed(strategy, options, needed):
    with pytest.raises(MedFLError, match=f"needs {needed} hospitals"):
        FederationSettings(strategy=strategy, clients=needed - 1, **options)
    with pytest.raises(MedFLError, match=f"needs {needed} hospitals in every round"):
        FederationSettings(strategy=strategy, clients=needed + 4, min_clients=needed - 1, **options)
    assert FederationSettings(strategy=strategy, clients=needed, **options).quorum == needed


def test_a_share_that_cuts_nobody_is_refused_at_once():
    with pytest.raises(MedFLError, match="needs 1000000000000 hospitals"):
        FederationSettings(strategy="fedtrimmedavg", clients=5, trim=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"server_lr": 0.0},
        {"tau": 0.0},
        {"server_momentum": 1.0},
        {"beta_1": -0.1},
        {"beta_2": 1.0},
        {"trim": 0.5},
        {"trim": 0.0},
        {"malicious": -1},
    ],
    ids=str,
)
def test_options_of_strategies_out_of_range_are_refused(wrong):
    with pytest.raises(MedFLError, match="--" + next(iter(wrong)).replace("_", "-")):
        FederationSettings(**wrong)


def test_a_tie_goes_by_the_label_and_not_by_who_answered_first(tmp_path):
    """Three in a row at equal distances: Krum likes each as much as the others."""
    row = {
        label: SENT + place * torch.tensor([1.0, 0.0, 0.0, 0.0])
        for label, place in (("a", -1), ("b", 1), ("c", 0))
    }
    subject = Aggregator(
        FederationSettings(clients=3, strategy="krum", malicious=0), torch.zeros(4, dtype=torch.bool)
    )
    for order in ("abc", "cba"):
        updates = Updates(SENT, subject.is_statistic, tmp_path)
        for label in order:
            updates.add(label, row[label], 10)
        assert torch.equal(subject(1, updates), row["a"])


def test_a_robust_strategy_is_not_moved_by_one_hostile_hospital(made):
    def moved(strategy: str, factor: float) -> float:
        updates = made("abcd")
        updates.add("e", SENT + factor * torch.tensor(CHANGES["e"]), EXAMPLES["e"])
        return float((aggregator(strategy)(1, updates) - SENT).abs().max())

    assert moved("fedavg", 1e6) > 1e5
    assert all(
        moved(name, factor) <= 0.5 for name in ("fedmedian", "fedtrimmedavg", "krum") for factor in (1.0, 1e6)
    )


def test_the_mean_becomes_the_median_where_a_round_is_to_be_robust(made):
    assert torch.equal(
        aggregator("fedavg")(1, made("abcde"), robust=True), aggregator("fedmedian")(1, made("abcde"))
    )
