"""The page in the browser shows the volume of tests/test_orientation.py as every other way does."""

import numpy as np
import pytest
from test_orientation import CODES, DOUBTFUL, WANTED, spot, stored_as


def test_every_order_of_storage_is_shown_alike(ask):
    images = [stored_as(code) for code in CODES]
    for code, answer in zip(CODES, ask(*[([("flair.nii", i.to_bytes())], {}) for i in images])):
        pixels = np.fromfile(answer["out"], np.uint8).reshape(*answer["shape"], 3)
        assert spot(pixels[..., 1]) == pytest.approx(WANTED), code


def test_what_does_not_say_is_told(ask):
    for (_, sentence), answer in zip(
        DOUBTFUL.values(), ask(*[([("flair.nii", content)], {}) for content, _ in DOUBTFUL.values()])
    ):
        notes = " ".join(answer["notes"])
        assert "Orientation unknown" in notes and sentence in notes
