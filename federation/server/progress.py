"""A federation's progress: rounds, scores, hospitals, and the privacy and energy that were spent."""

from dataclasses import asdict, dataclass, field
from typing import Any

from federation.protocol.answers import Facts
from federation.server.history import Row
from federation.server.judging import Judge, Scores, mean_dice


@dataclass
class Progress:
    """A run's progress.

    run: a random name, kept over restarts. before: the scores of the model that the last round began with.
    collapses: rounds whose model was taken back. epsilon: of the hospitals' differential privacy, spent so far.
    started_from: in words, such as "random weights". init_split: SHA-256 of the split that a checkpoint given with
    --init was trained on. rows: the history. hospitals: the facts of each hospital that ever gave an update, by label.
    energy: the use so far of each hospital that measures it, by label.
    """

    run: str = ""
    round: int = 0
    seconds: float = 0.0
    judge: Judge = field(default_factory=Judge)
    before: Scores = field(default_factory=dict)
    collapses: int = 0
    epsilon: float | None = None
    started_from: str = ""
    init_split: str | None = None
    rows: list[Row] = field(default_factory=list)
    hospitals: dict[str, Facts] = field(default_factory=dict)
    energy: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """Mean validation Dice of the best model so far; -1 before the first."""
        dice = mean_dice(self.judge.scores)[0]
        return -1.0 if dice is None else dice

    @property
    def best_round(self) -> int:
        """The round that made the best model."""
        return self.judge.number

    @property
    def scored_patients(self) -> int:
        """The number of patients behind the best model's score."""
        return mean_dice(self.judge.scores)[1]

    def to_dict(self) -> dict[str, Any]:
        """The progress as plain values, for a file."""
        return {
            **asdict(self),
            "hospitals": {label: facts.model_dump() for label, facts in self.hospitals.items()},
        }

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> "Progress":
        """The progress from what `to_dict` returned."""
        scores = {label: tuple(score) for label, score in kept["before"].items()}
        best = {label: tuple(score) for label, score in kept["judge"]["scores"].items()}
        return cls(
            **{
                **kept,
                "before": scores,
                "judge": Judge(**{**kept["judge"], "scores": best}),
                "hospitals": {
                    label: Facts.model_validate(facts) for label, facts in kept["hospitals"].items()
                },
            }
        )
