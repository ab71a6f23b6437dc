"""Which model is the best so far, and whether one collapsed: judged by the hospitals' own scores.

Two models are compared over the hospitals that scored both, each hospital with itself, so that one that
leaves, or is missing for a round, neither helps a model nor hurts it. No hospital decides by itself: of three
or more, the best and the worst verdict take no part in the comparison (of three the middle one decides), so that
whatever one hospital says, the outcome lies between the verdicts of the others; and patients count as weights up
to a bound. A collapse is judged in the same way.
"""

from dataclasses import dataclass, field

from federation.server.updates import capped

LASTING = 3  # judged rounds in a row with other hospitals, after which the comparison begins again
WEIGHT = 2.0  # medians of the patients: the most that a hospital counts
COLLAPSE = 0.5  # of the mean score before: a model below it collapsed
GOOD = 0.1  # Dice: below it there is nothing to lose

Scores = dict[str, tuple[float, int]]  # mean volume Dice and validation patients, by the hospital's label


def difference(before: Scores, now: Scores) -> float | None:
    """How much better the second model is, by mean volume Dice over the hospitals that scored both; None
    without any."""
    both = sorted(before.keys() & now.keys())
    if not both:
        return None
    kept = _without_the_ends(before, now, both)
    weights = dict(zip(both, capped([now[label][1] for label in both], WEIGHT)))
    gain = sum(weights[label] * (now[label][0] - before[label][0]) for label in kept)
    return gain / sum(weights[label] for label in kept)


def collapsed(before: Scores, now: Scores) -> bool:
    """Whether the mean Dice of the hospitals that scored both models fell below half, the best and the worst
    verdict of three or more left out."""
    both = sorted(before.keys() & now.keys())
    if not both:
        return False
    kept = _without_the_ends(before, now, both)
    was, is_now = (sum(scores[label][0] for label in kept) / len(kept) for scores in (before, now))
    return was >= GOOD and is_now < COLLAPSE * was


def _without_the_ends(before: Scores, now: Scores, labels: list[str]) -> list[str]:
    """These hospitals, of three or more without the one whose Dice rose most and the one whose Dice rose least."""
    if len(labels) < 3:
        return labels
    return sorted(labels, key=lambda label: (now[label][0] - before[label][0], label))[1:-1]


@dataclass
class Judge:
    """The best model so far, of those that hospitals scored.

    scores: of the best; number: the round after which it was made; since: judged rounds since then;
    improvements: how often there was a better one; other: judged rounds in a row that other hospitals scored
    than the best's.
    """

    scores: Scores = field(default_factory=dict)
    number: int = 0
    since: int = 0
    improvements: int = 0
    other: int = 0

    def look(self, now: Scores, number: int) -> tuple[bool, str | None]:
        """Note the scores of the model after round `number`: whether it is the best so far, and what is to be
        said besides."""
        if not now:
            return False, None
        gain = difference(self.scores, now)
        self.other = 0 if now.keys() == self.scores.keys() else self.other + 1
        again = bool(self.scores) and self.other >= LASTING
        if self.scores and not again and not (gain is not None and gain > 0):
            self.since += gain is not None  # a model that nobody compared says nothing of the training
            return False, None
        said = None
        if self.scores and now.keys() != self.scores.keys():
            who = ", ".join(sorted(now))
            said = (
                f"for {LASTING} rounds other hospitals have scored than those that scored the best model; "
                f"the comparison begins again with {who}"
                if again
                else f"the best model so far is now the choice of {who}"
            )
        self.scores, self.number, self.since, self.other = dict(now), number, 0, 0
        self.improvements += 1
        return True, said


def mean_dice(scores: Scores) -> tuple[float | None, int]:
    """The mean over hospitals, by their patients, and how many these are; None over none."""
    patients = sum(count for _, count in scores.values())
    return (sum(dice * count for dice, count in scores.values()) / patients if patients else None), patients
