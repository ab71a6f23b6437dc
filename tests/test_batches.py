"""batches.py: which slices an epoch draws, and that image and mask move together."""

import numpy as np
import pytest
import torch
from PIL import Image

import batches
from batches import TrainingBatches, augment
from dataset import load_dataset
from preprocessing import network_input

SIDE = 16
TUMOURS = {
    "anna": (3, 4),
    "bert": (),
    "carl": (0, 1, 2, 3, 4, 5),
    "dora": (5,),
}  # slices with a tumour, of 6 or 10
SLICES = {"anna": 10, "bert": 10, "carl": 6, "dora": 10}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """36 slices of four patients, 9 with a tumour: carl's all, bert's none."""
    root, random = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    for patient, tumours in TUMOURS.items():
        (root / patient).mkdir()
        for i in range(SLICES[patient]):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            if i in tumours:
                mask[5:10, 4:11] = 255
            image = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / patient / f"{patient}_{i + 1}.tif")
            Image.fromarray(mask).save(root / patient / f"{patient}_{i + 1}_mask.tif")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("HOME", "USERPROFILE"):
            patch.setenv(variable, str(tmp_path_factory.mktemp("home")))
        yield load_dataset(root, progress=False)


def batches_of(scans, patients=tuple(TUMOURS), side=SIDE, batch_size=4, seed=0):
    return TrainingBatches(scans, patients, side, batch_size, seed)


def tumour_slices(scans, patients=tuple(TUMOURS)):
    """Whether each of the patients' slices shows a tumour, in the order that `order` numbers them."""
    return np.array([n > 0 for patient in patients for n in scans.tumour_pixels(patient)])


def equal(first, second):
    return all(torch.equal(a, b) for one, other in zip(first, second) for a, b in zip(one, other))


@pytest.mark.parametrize("side", [SIDE, SIDE // 2, 2 * SIDE])
def test_shapes_types_and_ranges(scans, side):
    made = list(batches_of(scans, side=side).epoch(0))
    assert len(made) == len(batches_of(scans)) == 9
    for images, masks in made:
        assert images.shape == (4, 3, side, side) and masks.shape == (4, 1, side, side)
        assert images.dtype == masks.dtype == torch.float32 and images.isfinite().all()
        assert masks.min() >= 0 and masks.max() <= 1 + 1e-6
    assert torch.cat([masks for _, masks in made]).max() > 0.9


def test_an_epoch_is_as_many_slices_as_there_are_in_whole_batches(scans):
    for batch_size, number in [(1, 36), (4, 9), (5, 8), (16, 3), (100, 1)]:
        epoch = batches_of(scans, batch_size=batch_size)
        assert epoch.slices == 36 and len(epoch) == number and epoch.order(0).shape == (number, batch_size)


@pytest.mark.parametrize("batch_size", [2, 4, 16])
def test_half_of_each_batch_shows_a_tumour(scans, batch_size):
    shown = tumour_slices(scans)[batches_of(scans, batch_size=batch_size).order(0)]
    assert (shown.sum(axis=1) == batch_size // 2).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_every_slice_is_drawn_within_a_few_epochs(scans, batch_size):
    epochs = batches_of(scans, batch_size=batch_size)
    assert set(np.concatenate([epochs.order(epoch) for epoch in range(10)]).ravel()) == set(range(36))


def test_no_slice_is_drawn_again_before_all_of_its_kind_were(scans):
    order, tumour = (
        batches_of(scans).order(0),
        tumour_slices(scans),
    )  # 18 places for 9 tumour slices, 18 for 27 others
    times = np.bincount(order.ravel(), minlength=36)
    assert set(times[tumour]) == {2} and set(times[~tumour]) == {0, 1}


@pytest.mark.parametrize("patient", ["bert", "carl"])
def test_one_kind_of_slice_alone_fills_the_batches(scans, patient):
    epoch = batches_of(scans, (patient,), batch_size=2)
    assert sorted(epoch.order(0).ravel()) == list(range(SLICES[patient]))
    masks = torch.cat([masks for _, masks in epoch.epoch(0)])
    assert ((masks.flatten(1).amax(dim=1) > 0.5) == (patient == "carl")).all()


def test_an_epoch_follows_from_seed_and_number_alone(scans):
    torch.manual_seed(1)
    first = list(batches_of(scans).epoch(3))
    torch.manual_seed(2)
    used = batches_of(scans)
    list(used.epoch(0))
    before = torch.get_rng_state()
    assert equal(first, list(used.epoch(3)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed, epoch", [(0, 4), (1, 3), (3, 0)])
def test_another_seed_or_epoch_is_another_one(scans, seed, epoch):
    assert not equal(batches_of(scans).epoch(3), batches_of(scans, seed=seed).epoch(epoch))
    assert not np.array_equal(batches_of(scans).order(3), batches_of(scans, seed=seed).order(epoch))


def test_the_same_slices_are_varied_otherwise_in_another_epoch(scans, monkeypatch):
    monkeypatch.setattr(TrainingBatches, "order", lambda self, epoch: np.zeros((1, 2), int))
    (first, _), (second, _) = next(batches_of(scans).epoch(0)), next(batches_of(scans).epoch(1))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_without_augmentation_a_batch_is_the_slices_as_inference_sees_them(scans, monkeypatch):
    monkeypatch.setattr(batches, "augment", lambda images, masks, random: (images, masks))
    epoch = batches_of(scans, ("anna",))
    images, masks = next(epoch.epoch(0))
    volume, truth = (torch.from_numpy(part.copy()) for part in scans.volume("anna"))
    numbers = epoch.order(0)[0]
    assert torch.equal(images, network_input(volume, *scans.statistics("anna"), SIDE)[numbers])
    assert torch.equal(masks[:, 0], truth[numbers] / 255)


def test_masks_hold_shares_where_the_network_is_coarser(scans, monkeypatch):
    monkeypatch.setattr(batches, "augment", lambda images, masks, random: (images, masks))
    _, masks = next(batches_of(scans, ("carl",), side=SIDE // 2).epoch(0))
    assert set(masks.unique().tolist()) == {0.0, 0.25, 0.5, 1.0}
    assert torch.equal(masks.sum(dim=(1, 2, 3)) * 4, torch.full((4,), 35.0))  # 5 × 7 pixels


def an_l(count, side=32):
    """A shape without symmetry, the same in the image (3 on 0) and in the mask, within a border of zeros."""
    shape = torch.zeros(count, 1, side, side)
    shape[:, :, 6:26, 8:15] = 1
    shape[:, :, 19:26, 8:24] = 1
    return (shape * 3).repeat(1, 3, 1, 1), shape


def test_image_and_mask_stay_aligned():
    images, masks = an_l(32)
    varied, moved = augment(images, masks, torch.Generator().manual_seed(0))
    assert varied.shape == images.shape and moved.shape == masks.shape
    for channel in range(3):
        picture = varied[:, channel : channel + 1]
        middle = (picture.amax(dim=(2, 3), keepdim=True) + picture.amin(dim=(2, 3), keepdim=True)) / 2
        drawn, truth = picture > middle, moved > 0.5
        overlap = (drawn & truth).sum(dim=(1, 2, 3)) / (drawn | truth).sum(dim=(1, 2, 3))
        assert overlap.min() > 0.9
    stayed = ((moved > 0.5) & (masks > 0.5)).sum(dim=(1, 2, 3)) / ((moved > 0.5) | (masks > 0.5)).sum(
        dim=(1, 2, 3)
    )
    assert stayed.median() < 0.8  # else nothing would have been shown


def test_shapes_are_turned_scaled_and_mirrored_but_not_sheared():
    maps = batches._affine(200, torch.Generator().manual_seed(0))
    linear, shift = maps[:, :, :2], maps[:, :, 2]
    scale = torch.linalg.det(linear).abs().sqrt()
    square = linear.transpose(1, 2) @ linear
    torch.testing.assert_close(square, scale.square()[:, None, None] * torch.eye(2), atol=1e-5, rtol=0)
    assert 0.85 <= scale.min() < 0.9 and 1.1 < scale.max() <= 1.15
    assert 0.1 < shift.abs().max() <= 2 * batches.SHIFT
    assert 70 < (torch.linalg.det(linear) < 0).sum() < 130
    angle = torch.rad2deg(torch.atan2(-linear[:, 0, 1], linear[:, 1, 1]))
    assert 15 < angle.abs().max() <= batches.ROTATION


def test_intensities_vary_between_pictures_and_channels():
    images, masks = an_l(8)
    varied, _ = augment(images, masks, torch.Generator().manual_seed(0))
    levels = varied.amax(dim=(2, 3))
    assert levels.std(dim=0).min() > 0.05 and levels.std(dim=1).min() > 0.01
    assert (levels - 3).abs().max() < 1.5


@pytest.fixture
def only_missing(monkeypatch):
    """The other variations of intensity switched off; sequences are missing half of the time."""
    for name in ("CONTRAST", "BRIGHTNESS", "GAMMA", "NOISE"):
        monkeypatch.setattr(batches, name, 0.0)
    monkeypatch.setattr(batches, "MISSING", 0.5)


def test_a_missing_sequence_shows_flair_and_flair_never_misses(only_missing):
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(
        -batches.CLIP, batches.CLIP
    )
    varied = batches._vary_intensity(
        images.clone(), torch.Generator().manual_seed(0)
    )  # it writes into what it gets
    flair = images[:, 1]
    torch.testing.assert_close(varied[:, 1], flair, atol=1e-5, rtol=0)
    missing = torch.stack([(varied[:, c] - flair).abs().amax(dim=(1, 2)) < 1e-5 for c in (0, 2)], dim=1)
    kept = torch.stack([(varied[:, c] - images[:, c]).abs().amax(dim=(1, 2)) < 1e-5 for c in (0, 2)], dim=1)
    assert (missing ^ kept).all()
    pairs, counts = missing.int().unique(dim=0, return_counts=True)
    assert len(pairs) == 4 and counts.min() >= 8  # none, either and both: drawn by themselves
