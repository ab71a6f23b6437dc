"""Which model is the best so far, and whether one collapsed, judged by the hospitals' own scores.

Two models are compared over the hospitals that scored both, each hospital with itself. A hospital that leaves, or
misses a round, therefore neither helps nor hurts a model. No hospital decides by itself: with three or more, the
best and the worst verdict are left out of the comparison (with three, the middle one decides). Whatever one hospital
says, the outcome then lies between the verdicts of the others. Hospitals are weighted by their patients, up to a
bound. A collapse is judged with the same verdicts left out.
"""

from dataclasses import dataclass, field

from federation.server.updates import capped

LASTING = 3  # judged rounds in a row with other hospitals, after which the comparison starts again
WEIGHT = 2.0  # the largest weight of a hospital, in medians of the hospitals' patients
COLLAPSE = 0.5  # a model below this share of the mean score before it has collapsed
GOOD = 0.1  # Dice; a model below it has nothing to lose

Scores = dict[str, tuple[float, int]]  # mean volume Dice and validation patients, by the hospital's label


def difference(before: Scores, now: Scores) -> float | None:
    """How much better the second model is, in mean volume Dice over the hospitals that scored both; None if no
    hospital did."""
    both = sorted(before.keys() & now.keys())
    if not both:
        return None
    kept = _without_the_ends(before, now, both)
    weights = dict(zip(both, capped([now[label][1] for label in both], WEIGHT)))
    gain = sum(weights[label] * (now[label][0] - before[label][0]) for label in kept)
    return gain / sum(weights[label] for label in kept)


def collapsed(before: Scores, now: Scores) -> bool:
    """Whether the mean Dice of the hospitals that scored both models fell below half. With three or more hospitals
    the best and the worst verdict are left out."""
    both = sorted(before.keys() & now.keys())
    if not both:
        return False
    kept = _without_the_ends(before, now, both)
    was, is_now = (sum(scores[label][0] for label in kept) / len(kept) for scores in (before, now))
    return was >= GOOD and is_now < COLLAPSE * was


def _without_the_ends(before: Scores, now: Scores, labels: list[str]) -> list[str]:
    """These hospitals; with three or more, without the one whose Dice rose most and the one whose Dice rose least."""
    if len(labels) < 3:
        return labels
    return sorted(labels, key=lambda label: (now[label][0] - before[label][0], label))[1:-1]


@dataclass
class Judge:
    """The best model so far, among those that hospitals scored.

    scores: of the best model. number: the round that made it. since: judged rounds since then. improvements: how
    often a model was better than the best before it. other: judged rounds in a row that were scored by other
    hospitals than the best model.
    """

    scores: Scores = field(default_factory=dict)
    number: int = 0
    since: int = 0
    improvements: int = 0
    other: int = 0

    def look(self, now: Scores, number: int) -> tuple[bool, str | None]:
        """Note the scores of the model after round `number`. Returns whether it is the best so far, and a sentence to
        print, if any."""
        if not now:
            return False, None
        gain = difference(self.scores, now)
        self.other = 0 if now.keys() == self.scores.keys() else self.other + 1
        again = bool(self.scores) and self.other >= LASTING
        if self.scores and not again and not (gain is not None and gain > 0):
            self.since += gain is not None  # a model that nobody compared says nothing about the training
            return False, None
        said = None
        if self.scores and now.keys() != self.scores.keys():
            who = ", ".join(sorted(now))
            said = (
                f"for {LASTING} rounds the models were scored by other hospitals than the best model was; "
                f"the comparison starts again with {who}"
                if again
                else f"the best model so far is now the choice of {who}"
            )
        self.scores, self.number, self.since, self.other = dict(now), number, 0, 0
        self.improvements += 1
        return True, said


def mean_dice(scores: Scores) -> tuple[float | None, int]:
    """The mean over hospitals, weighted by their patients, and the number of patients; None without any."""
    patients = sum(count for _, count in scores.values())
    return (sum(dice * count for dice, count in scores.values()) / patients if patients else None), patients
