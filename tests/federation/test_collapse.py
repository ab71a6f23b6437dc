"""A round that ruined the model is taken back: by the median of its updates, or without it; one hospital
alone can not say so."""

import json

import pytest
from flwr.app import Message
from in_process import RealHospital
from scripted import Worker, federate, make_fast

from checkpoint import load_checkpoint
from federation.protocol.messages import message, read
from federation.protocol.weights import from_record, pack
from federation.server.state import load_run

FACTORS = (
    1.0,
    1.1,
    1.5,
)  # what each hospital's weights are, times the round: the mean is 1.2, the median 1.1


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A federation whose hospitals score the models as listed, one after the other: state, lines, events of
    the audit log."""
    make_fast(monkeypatch)

    def go(
        scores: list[float],
        rounds: int,
        liar: list[float] | None = None,
        hospitals: int = 3,
        resume: bool = False,
        **settings,
    ):
        lists = [list(scores) for _ in range(hospitals - 1)] + [liar or list(scores)]
        workers = [
            Worker(f"hospital-{k}", given, factor) for k, (given, factor) in enumerate(zip(lists, FACTORS))
        ]
        bounds = {"max_update_norm_ratio": 1e9, "cut_update_norm_ratio": 1e9}
        code, state, said = federate(
            workers, rounds, tmp_path, federation={**bounds, **settings}, resume=resume, ema_decay=0.0
        )
        assert code == 0, said
        events = [
            json.loads(line) for line in (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return state, said, [event for event in events if event["event"] == "collapse"], workers

    return go


def sent(worker: Worker) -> list[float]:
    """The first value of each model that a hospital got after the first."""
    return [round(weights[0].item(), 4) for weights in worker.got[1:]]


def test_a_ruined_model_is_made_again_of_the_median(run):
    state, said, events, workers = run([0.0, 0.6, 0.1, 0.62, 0.7], 3)
    assert sent(workers[0]) == [1.2, 2.4, 2.2, 3.6], (
        "round 2's mean was sent, then its median, then round 3's mean"
    )
    assert (
        state.progress.round == 3
        and state.progress.best_round == 3
        and state.progress.best == pytest.approx(0.7)
    )
    assert [(event["round"], event["dice_before"], event["dice_after"]) for event in events] == [
        (2, 0.6, 0.1)
    ]
    assert any(
        "round 2 ruined the model (mean Dice 0.600 before it, 0.100 after it)" in line for line in said
    )
    assert [row["val_dice"] for row in state.progress.rows if row["site"] == "hospital-0"] == [
        0.0,
        0.6,
        0.62,
        0.7,
    ]


def test_where_the_median_is_ruined_as_well_the_round_is_left_out(run):
    state, said, events, workers = run([0.0, 0.6, 0.1, 0.1, 0.6, 0.7], 3)
    assert sent(workers[0])[:4] == [1.2, 2.4, 2.2, 1.2] and state.progress.round == 3
    assert [event["then"] for event in events] == [
        "its updates are combined by their median instead",
        "the model stays as it was before it",
    ]


def test_two_hospitals_have_no_median(run):
    _, _, events, workers = run([0.0, 0.6, 0.1, 0.6, 0.7], 3, hospitals=2)
    assert sent(workers[0])[:3] == [1.05, 2.1, 1.05] and [event["round"] for event in events] == [2]


def test_the_last_round_is_looked_at_before_it_becomes_the_result(run):
    state, _, events, workers = run([0.0, 0.6, 0.1, 0.65], 2)
    assert [event["round"] for event in events] == [2] and sent(workers[0]) == [1.2, 2.4, 2.2]
    assert pack(load_checkpoint(state.last).model.state_dict())[0].item() == pytest.approx(2.2)
    assert state.progress.best == pytest.approx(0.65) and state.progress.best_round == 2


def test_after_some_collapses_every_round_is_summed_by_the_median(run):
    state, said, events, workers = run([0.0, 0.6, 0.1, 0.6, 0.1, 0.6, 0.6], 4)
    assert len(events) == 2 and "from now on every round is combined by the median" in "".join(said)
    assert sent(workers[0])[-1] == 4.4


@pytest.mark.parametrize("liar", [[0.0, 0.6, 0.0, 0.0], [0.0, 0.6, 0.0, 0.7]])
def test_one_hospital_can_not_fake_a_collapse(run, liar):
    _, _, events, workers = run([0.0, 0.6, 0.61, 0.7], 3, liar)
    assert events == [] and sent(workers[0]) == [1.2, 2.4, 3.6]


def test_one_hospital_can_not_hide_a_collapse(run):
    _, _, events, _ = run([0.0, 0.6, 0.1, 0.6, 0.7], 3, [0.0, 0.6, 0.9, 0.6, 0.7])
    assert [event["round"] for event in events] == [2]


def test_it_gives_up_where_no_model_is_better(run):
    """Scores that stay low after all that can be tried: the round goes on, and the run ends."""
    state, _, events, _ = run([0.0, 0.6, 0.1, 0.1, 0.1, 0.1], 3)
    assert state.progress.round == 3 and len(events) == 2


def test_a_server_that_was_killed_still_knows_the_way_back(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("federation.server.rounds.Federation._final_score", lambda self: None)
        run([0.0, 0.6], 2)
    kept = load_run(tmp_path)[2]
    assert kept["before"]["weights"][0].item() == pytest.approx(1.2) and kept["weights"][
        0
    ].item() == pytest.approx(2.4)
    state, _, events, workers = run([0.1, 0.6, 0.7], 3, resume=True)
    assert sent(workers[0])[0] == 1.2 and [event["then"] for event in events] == [
        "the model stays as it was before it"
    ]


def test_under_privacy_no_score_decides(monkeypatch, tmp_path):
    make_fast(monkeypatch)
    workers = [Worker(f"hospital-{k}", [0.0, 0.6, 0.0, 0.0]) for k in range(3)]
    code, state, _ = federate(
        workers, 3, tmp_path, federation={"dp_clip": 1.0, "dp_noise_multiplier": 1e-9}, norm="group"
    )
    assert code == 0 and state.progress.round == 3 and state.progress.collapses == 0


def test_nothing_of_the_updates_is_left_on_the_disk(run, tmp_path):
    run([0.0, 0.6, 0.1, 0.6, 0.7], 3)
    assert not list(tmp_path.glob(".updates-*"))


class Overflowing(Worker):
    """Fails as a hospital of ours does where the weights that came are too large to train; or sends such weights
    itself, in round `poison`."""

    def __init__(self, number: int, poison: int | None = None):
        super().__init__(f"hospital-{number}", [0.5] * 9)
        self.poison = poison

    def answer(self, incoming):
        number = read(incoming.content).get("round")
        if number and self.poison is None and from_record(incoming.content["arrays"]).abs().max() > 1e20:
            return Message(message({"failure": "training"}), reply_to=incoming)
        self.factor = 1e30 if number == self.poison else 1.0
        return super().answer(incoming)


def test_a_model_that_half_of_the_hospitals_cant_train_is_taken_back(monkeypatch, tmp_path):
    """Of two hospitals one sent weights beyond what the other can compute with; that one failed from then on, and
    the hostile one trained alone."""
    make_fast(monkeypatch)
    code, state, said = federate([Overflowing(0), Overflowing(1, poison=2)], 4, tmp_path)
    assert code == 0 and any("ruined the model (half or more of the hospitals" in line for line in said), said
    later = [row["site"] for row in state.progress.rows if row["round"] in (3, 4)]
    assert later == ["hospital-0", "hospital-1"] * 2 and state.weights.abs().max() < 1e20


class OnlyScoring(Worker):
    """An observer whose data can't be read any more, or that says so."""

    def __init__(self, label: str):
        super().__init__(label, [])
        self.introduction["role"] = "observe"

    def answer(self, incoming):
        if "query" in read(incoming.content) or read(incoming.content).get("part") == "test":
            return super().answer(incoming)
        return Message(message({"failure": "training"}), reply_to=incoming)


def test_who_only_scores_takes_no_round_back(monkeypatch, tmp_path):
    """With two hospitals that train it was half of them, and had each round taken back."""
    make_fast(monkeypatch)
    workers = [Worker(label, [0.5, 0.6, 0.7, 0.8]) for label in ("grace", "hope")]
    federation = {"clients": 2}
    code, state, said = federate([*workers, OnlyScoring("zoe")], 3, tmp_path, federation=federation)
    assert code == 0 and "round 1 without zoe" in "".join(said) and state.progress.collapses == 0


class Falling(RealHospital):
    """Says that the model was good before round 1 and bad before round 2; unfit: or that its update of round 2
    does not fit into the secure aggregation, as what a ruined model teaches does not."""

    unfit = False

    def answer(self, incoming):
        reply = super().answer(incoming)
        if self.unfit and read(incoming.content).get("round") == 2 and "query" not in read(incoming.content):
            return Message(message({"failure": "protocol"}), reply_to=incoming)
        number, told = read(incoming.content).get("round"), read(reply.content)
        if not told.get("val_patients"):
            return reply
        told["val_dice"] = 0.1 if number == 2 else 0.6
        return Message(message(told, reply.content.get("arrays")), reply_to=incoming)


@pytest.mark.parametrize("unfit", [False, True])
def test_under_masks_the_round_of_the_ruined_model_is_not_summed_again(
    federate, phantoms, tmp_path, monkeypatch, unfit
):
    """Its shares were given: where one hospital left meanwhile, all others would refuse, and so after --resume.
    And where no honest update fitted any more, the run ended, and again after --resume."""
    monkeypatch.setattr(Falling, "unfit", unfit)
    three = [Falling(tmp_path / "out", cid, phantoms) for cid in range(3)]
    settings = {"clients": 3, "partition": "iid", "secure_aggregation": True}
    state, _, said = federate(3, hospitals=three, **settings)
    assert any("round 1 ruined the model" in line for line in said) and state.progress.collapses == 1
    assert [about["round"] for about in three[0].asked if "round" in about] == [1, 2, 3]
    assert any("round 2 is lost" in line for line in said)
