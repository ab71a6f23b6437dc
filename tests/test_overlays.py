"""evaluation/overlays.py: the letters of the sides stand where they are known."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_cohort import patient

from dataset import load_dataset
from evaluation.overlays import draw_outlines


@pytest.mark.parametrize("oriented", [True, False])
def test_letters_stand_on_every_slice_or_it_is_said_that_they_are_unknown(tmp_path, monkeypatch, oriented):
    drawn: list[list[str]] = []
    save = Figure.savefig

    def remember(figure, *args, **more):
        drawn.extend([text.get_text() for text in axes.texts] for axes in figure.axes if axes.images)
        drawn.append([figure.get_suptitle()])
        return save(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", remember)
    volume = np.zeros((2, 32, 32, 3), np.uint8)
    truth = np.zeros((2, 32, 32), np.uint8)
    truth[:, 4:9, 4:9] = 255
    draw_outlines(volume, truth, truth, "best", tmp_path / "o.png", oriented)
    *slices, (title,) = drawn
    assert slices == [["R", "L", "A", "P"] if oriented else ["orientation unknown"]] * 2
    assert ("from I (feet) to S (head)" in title) == oriented


def test_sides_are_known_of_the_public_set_and_of_what_was_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for k, name in enumerate(("TCGA_CS_4941_19960909", "anna", "bert")):
        patient(tmp_path / "scans" / name, k)
    (tmp_path / "scans" / "bert" / "volume.json").write_text("{}")
    dataset = load_dataset(tmp_path / "scans", progress=False)
    assert [dataset.is_oriented(p.name) for p in dataset.patients] == [True, False, True]
