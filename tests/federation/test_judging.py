"""Which model is the best: hospitals that come and go, one that lies, and what counts as a collapse."""

import pytest

from federation.server.judging import LASTING, Judge, collapsed, difference, mean_dice


def scores(**dice: float) -> dict[str, tuple[float, int]]:
    return {label: (value, 4) for label, value in dice.items()}


def looked(judge: Judge, *rounds: dict) -> list[bool]:
    return [judge.look(now, number)[0] for number, now in enumerate(rounds, 1)]


def test_a_mean_is_weighted_by_patients():
    assert mean_dice({"a": (0.5, 1), "b": (0.8, 3)}) == (pytest.approx(0.725), 4) and mean_dice({}) == (
        None,
        0,
    )


def test_models_are_compared_over_the_hospitals_that_scored_both():
    assert difference(scores(a=0.5, b=0.9), scores(a=0.6)) == pytest.approx(0.1)
    assert difference(scores(a=0.5), scores(b=0.6)) is None
    assert difference({"a": (0.5, 1), "b": (0.5, 3)}, {"a": (0.9, 1), "b": (0.4, 3)}) == pytest.approx(
        0.4 / 4 - 0.3 / 4
    )


def test_a_hospital_that_leaves_does_not_freeze_the_best():
    judge = Judge()
    both, one = (scores(a=k / 10, b=k / 10 + 0.3) for k in (1, 2)), (scores(a=k / 10) for k in (3, 4, 5))
    assert looked(judge, *both, *one) == [True] * 5 and judge.number == 5 and judge.since == 0


def test_one_that_is_missing_for_a_round_makes_no_model_better():
    """The mean rises because the hospital with the low score is not there."""
    judge = Judge()
    assert looked(judge, scores(a=0.8, b=0.2), scores(a=0.7), scores(a=0.7, b=0.1)) == [True, False, False]


def test_rounds_that_nobody_compared_are_not_counted():
    judge = Judge()
    assert (
        looked(judge, scores(a=0.5), {}, scores(b=0.9), {}) == [True, False, False, False]
        and judge.since == 0
    )
    assert looked(judge, scores(a=0.4), scores(a=0.3)) == [False, False] and judge.since == 2


@pytest.mark.parametrize("now", [scores(a=0.4, b=0.4, c=0.2), scores(a=0.4)], ids=["one more", "one less"])
def test_a_lasting_change_begins_a_new_comparison_and_is_said(now):
    judge = Judge()
    judge.look(scores(a=0.5, b=0.5), 1)
    told = [judge.look(now, number) for number in range(2, 2 + LASTING)]
    assert [better for better, _ in told] == [False] * (LASTING - 1) + [True]
    assert "the comparison starts again with a" in told[-1][1] and judge.number == 1 + LASTING


def test_one_liar_of_three_can_neither_choose_nor_prevent():
    judge = Judge()
    assert looked(
        judge,
        scores(a=0.1, b=0.1, c=0.1),
        scores(a=0.2, b=0.2, c=1.0),
        scores(a=0.3, b=0.3, c=0.0),
        scores(a=0.4, b=0.4, c=0.0),
        scores(a=0.35, b=0.35, c=1.0),
    ) == [True, True, True, True, False]
    assert judge.number == 4


@pytest.mark.parametrize("lie", [-1.0, -0.13, -0.1, -0.05, -0.01])
def test_a_small_lie_does_not_turn_what_all_others_say(lie):
    """Leaving out the one verdict most unlike the others' let a lie through that was less unlike than an honest one."""
    before = scores(a=0.6, b=0.6, c=0.6)
    assert difference(before, scores(a=0.7, b=0.62, c=0.6 + lie)) > 0
    assert difference(before, scores(a=0.5, b=0.58, c=0.6 - lie)) < 0


def test_a_claim_of_many_patients_does_not_rule():
    before, now = (
        {label: (0.5, 4) for label in "abcd"},
        {"a": (0.49, 10**6), "b": (0.52, 4), "c": (0.52, 4), "d": (0.52, 4)},
    )
    assert difference(before, now) > 0
    now["b"] = (0.48, 4)
    assert abs(difference(before, now)) < 0.02


@pytest.mark.parametrize(
    ("before", "now", "fell"),
    [
        ((0.7, 0.7, 0.7), (0.1, 0.1, 0.7), True),
        ((0.7, 0.7, 0.7), (0.1, 0.5, 0.7), False),
        ((0.7, 0.7), (0.1, 0.7), False),
        ((0.7, 0.7), (0.1, 0.1), True),
        ((0.7,), (0.1,), True),
        ((0.05, 0.05, 0.05), (0.0, 0.0, 0.0), False),
        ((0.7,) * 4, (0.0, 0.0, 0.7, 0.7), False),
        ((0.6,) * 5, (0.0, 0.0, 0.35, 0.35, 1.0), True),
        ((0.7,) * 4, (0.0, 0.0, 0.0, 0.7), True),
        ((), (), False),
    ],
)
def test_what_a_collapse_is(before, now, fell):
    given = [{f"h{k}": (dice, 4) for k, dice in enumerate(values)} for values in (before, now)]
    assert collapsed(*given) == fell


def test_a_liar_can_neither_fake_nor_hide_a_collapse():
    assert not collapsed(scores(a=0.2, b=0.1, c=0.29), scores(a=0.2, b=0.4, c=0.0))
    fine, ruined = scores(a=0.7, b=0.7, c=0.7), scores(a=0.0, b=0.0, c=0.9)
    assert not collapsed(fine, scores(a=0.7, b=0.7, c=0.0)) and collapsed(fine, ruined)
