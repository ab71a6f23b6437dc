"""What TensorBoard draws of a folder that held a run before."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runs.tracking import open_trackers


def curve(out) -> list[tuple[int, float]]:
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("val_dice")]


@pytest.mark.parametrize(
    "resume, drawn", [(False, [(1, 0.75)]), (True, [(1, 0.25), (2, 0.5), (3, 0.75)])], ids=["new", "resumed"]
)
def test_a_new_run_is_not_drawn_with_the_one_that_it_overwrote(tmp_path, resume, drawn):
    for again, points in (False, {1: 0.25, 2: 0.5}), (resume, {3 if resume else 1: 0.75}):
        (tracker,) = open_trackers(tmp_path, True, None, again)
        tracker.settings({"seed": 0})
        for epoch, dice in points.items():
            tracker.scalars({"val_dice": dice}, epoch)
        tracker.close()
    assert curve(tmp_path) == drawn
