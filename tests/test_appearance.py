"""Does a picture look like the training images: the features' definitions, and what is doubted."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from appearance.doubts import doubts
from appearance.features import (
    APPEARANCE,
    appearance,
    describe_volume,
    image_statistics,
    pool_image_statistics,
)
from dataset import load_dataset


def features(volume: np.ndarray) -> dict[str, float]:
    return dict(zip(APPEARANCE, appearance(torch.from_numpy(volume)).tolist()))


@pytest.fixture(scope="module")
def square():
    """Two slices with a bright square in the middle half: every feature is known."""
    volume = np.zeros((2, 64, 64, 3), np.uint8)
    volume[:, 16:48, 16:48] = 200
    return volume


def test_features_of_a_square_are_those_of_its_geometry(square):
    found = features(square)
    assert found["frame"] == 0 and found["foreground"] == 0.25
    assert found["symmetry"] == pytest.approx(1.0, abs=1e-3)
    spread = np.arange(16, 48).std() / 64
    assert found["height"] == pytest.approx(spread, rel=1e-4) and found["width"] == pytest.approx(
        spread, rel=1e-4
    )
    jumps = 2 * 200 * 32 / (64 * 63)  # two edges in half of the rows
    assert found["roughness"] == pytest.approx(jumps / square[..., 1].std(), rel=1e-3)


def test_features_tell_sides_apart(square):
    wide = square.copy()
    wide[:, 16:48, 8:56] = 200
    assert features(wide)["width"] > features(square)["width"] == features(wide)["height"]
    left = square.copy()
    left[:, :, 32:] = 0
    assert features(left)["symmetry"] < 0
    bright = square.copy()
    bright[:, :3] = 200
    assert features(bright)["frame"] > 0.1


def test_statistics_are_means_and_deviations_and_pool_to_the_same(phantoms):
    dataset = load_dataset(phantoms, progress=False)
    names = tuple(p.name for p in dataset.patients)
    volumes = [describe_volume(torch.from_numpy(np.array(dataset.volume(name)[0]))) for name in names]
    whole = dataset.image_statistics(names)
    for feature, figures in whole.items():
        values = np.array([volume[feature] for volume in volumes])
        assert figures["mean"] == pytest.approx(values.mean(axis=0), abs=1e-3)
        assert figures["deviation"] == pytest.approx(values.std(axis=0, ddof=1), abs=1e-3)
    groups = [(6, image_statistics(volumes[:6])), (4, image_statistics(volumes[6:]))]
    for feature, figures in pool_image_statistics(groups).items():
        for key, values in figures.items():
            assert values == pytest.approx(whole[feature][key], abs=2e-3), (feature, key)
    assert image_statistics(volumes[:2]) is None and pool_image_statistics([]) is None


@pytest.fixture
def phantom(phantoms):
    dataset = load_dataset(phantoms, progress=False)
    names = tuple(p.name for p in dataset.patients)
    intact = next(n for n in names if len({dataset.volume(n)[0][..., k].tobytes() for k in range(3)}) == 3)
    return np.array(dataset.volume(intact)[0]), dataset.image_statistics(names)


def test_a_scan_like_the_training_images_raises_no_doubt(phantom):
    assert doubts(*phantom) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: 255 - v, "inverted"),
        (lambda v: np.zeros_like(v), "same value"),
        (lambda v: v[:, :, :32], "distorted"),
        (lambda v: v[:, ::2, ::2], "32×32"),
        (lambda v: np.repeat(v[..., 1:2], 3, axis=3), "pre-contrast, post-contrast and FLAIR are"),
        (lambda v: np.random.default_rng(0).integers(0, 256, v.shape, np.uint8), "does not look like"),
        (lambda v: np.minimum(v.astype(int) * 4, 255).astype(np.uint8), "Brightness"),
    ],
    ids=["inverted", "blank", "half", "small", "one sequence", "noise", "bright"],
)
def test_what_is_doubted(phantom, change, sentence):
    volume, statistics = phantom
    assert any(sentence in doubt for doubt in doubts(np.ascontiguousarray(change(volume)), statistics))


def test_photographs_are_doubted(phantom):
    for photograph in load_sample_images().images:
        assert any("does not look like" in doubt for doubt in doubts(photograph[None], phantom[1]))


def test_a_model_without_statistics_says_so(phantom):
    for nothing in (None, {}, {"foreground_mean": {}}):
        assert ["not compared" in doubt for doubt in doubts(phantom[0], nothing)] == [True]
