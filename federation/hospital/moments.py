"""What a hospital's optimiser learnt of the gradients, kept on the hospital's own disk from round to round.

AdamW's moments never leave the hospital: secure aggregation has nothing to hide of them, and a hospital's
consent covers them with the other settings. With a promise to patients they come of noised gradients only;
moments of rounds without the promise are not taken up.
"""

from pathlib import Path

import torch

from storage.files import atomic_write


class Moments:
    """The optimiser's state of one run. Two files take turns, so that a round that is asked for again begins
    where it began.

    path: of both, without their endings. run: the run's random name. private: whether every gradient was
    noised.
    """

    def __init__(self, path: Path, run: str, private: bool):
        self._files = [path.with_name(f"{path.name}.{turn}") for turn in (0, 1)]
        self._run, self._private = run, private

    def before(self, number: int) -> dict | None:
        """The state that the last round before `number` left; None where there is none of this run."""
        kept = [torch.load(file, weights_only=True) for file in self._files if file.exists()]
        usable = [
            one
            for one in kept
            if one["run"] == self._run and one["round"] < number and (one["private"] or not self._private)
        ]
        return max(usable, key=lambda one: one["round"])["state"] if usable else None

    def keep(self, number: int, state: dict) -> None:
        """Keep the state after round `number`, and that of the round before."""
        with atomic_write(self._files[number % 2], private=True) as file:
            torch.save({"run": self._run, "round": number, "private": self._private, "state": state}, file)

    def forget(self) -> None:
        """The run is over."""
        for file in self._files:
            file.unlink(missing_ok=True)
