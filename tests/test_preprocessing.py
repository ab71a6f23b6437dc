"""scans/naming.py, scans/pictures.py and preprocessing.py: names and their order, files that are wrong, and what
normalisation promises."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from borders.limits import MAX_SIDE
from common import MedFLError
from preprocessing import (
    CLIP,
    DESCRIPTION,
    apply_statistics,
    description,
    network_input,
    resize,
    volume_statistics,
)
from scans.naming import is_image, is_mask, numeric_order, slice_number, volume_name
from scans.pictures import read_mask, read_slice, read_volume


def pixels(seed=0, shape=(16, 20, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, values=None, **options):
    Image.fromarray(pixels() if values is None else values).save(path, **options)
    return path


def brain(seed=0, slices=5, side=32):
    """A volume with a black surround and a noisy bright square, (S, side, side, 3) uint8, no value beyond
    CLIP."""
    volume = np.zeros((slices, side, side, 3), np.uint8)
    inside = volume[:, 6:-6, 8:-4]
    inside[:] = np.random.default_rng(seed).integers(60, 110, inside.shape)
    return torch.from_numpy(volume)


def normalised(volume):
    return apply_statistics(volume, *volume_statistics(volume))


@pytest.mark.parametrize(
    "name, number, volume",
    [
        ("TCGA_CS_4941_19960909_12.tif", 12, "TCGA_CS_4941_19960909"),
        ("scan-007.png", 7, "scan"),
        ("scan 3.tif", 3, "scan"),
        ("brain.tif", None, "brain"),
        ("t1.tif", None, "t1"),
        ("5.png", 5, "folder"),
    ],
)
def test_slice_number_and_volume_name(name, number, volume):
    path = Path("folder") / name
    assert slice_number(path) == number and volume_name(path) == volume


def test_unpadded_numbers_are_ordered_as_numbers_and_the_nameless_come_last():
    names = ["p_10.tif", "p_1.tif", "zeta.tif", "p_2.tif", "alpha.tif", "p_11.tif", "p_9.tif"]
    ordered = [p.name for p in numeric_order([Path(n) for n in names])]
    assert ordered == ["p_1.tif", "p_2.tif", "p_9.tif", "p_10.tif", "p_11.tif", "alpha.tif", "zeta.tif"]


def test_which_names_are_slices_and_which_masks():
    for name, image, mask in [
        ("a_1.tif", True, False),
        ("a_1_mask.tif", False, True),
        ("A_1_MASK.TIFF", False, True),
        ("a.JPG", True, False),
        ("._a_1.tif", False, False),
        ("data.csv", False, False),
    ]:
        assert (is_image(Path(name)), is_mask(Path(name))) == (image, mask), name


def test_compressed_and_plain_files_read_equal(tmp_path):
    for name, options in [
        ("plain.tif", {}),
        ("deflate.tif", {"compression": "tiff_deflate"}),
        ("lzw.tif", {"compression": "tiff_lzw"}),
        ("picture.png", {}),
    ]:
        read = read_slice(save(tmp_path / name, **options))
        assert read.dtype == np.uint8 and np.array_equal(read, pixels()), name


def test_grey_fills_the_three_channels(tmp_path):
    grey = pixels(shape=(16, 20))
    read = read_slice(save(tmp_path / "grey.tif", grey))
    assert read.shape == (16, 20, 3)
    assert all(np.array_equal(read[:, :, channel], grey) for channel in range(3))


def test_a_mask_is_read_as_it_is(tmp_path):
    mask = (pixels(shape=(16, 20)) > 128).astype(np.uint8) * 255
    assert np.array_equal(read_mask(save(tmp_path / "a_mask.tif", mask)), mask)
    Image.fromarray(mask).convert("1").save(tmp_path / "bits_mask.png")
    assert np.array_equal(read_mask(tmp_path / "bits_mask.png"), mask)


def missing(path):
    pass


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    save(path)
    path.write_bytes(path.read_bytes()[:600])


def truncated_deflate(path):
    save(path, compression="tiff_deflate")
    path.write_bytes(path.read_bytes()[:-200])


def text(path):
    path.write_text("patient;age\n1;50\n" * 20)


def without_a_width(path):
    data = bytearray(save(path).read_bytes())
    first_tag = int.from_bytes(data[4:8], "little") + 2
    assert data[first_tag : first_tag + 2] == b"\x00\x01"  # 256, ImageWidth
    data[first_tag] = 255
    path.write_bytes(data)


def second_frame_without_a_size(path):
    data = bytearray(save(path).read_bytes())
    start = int.from_bytes(data[4:8], "little")
    end = start + 2 + 12 * int.from_bytes(data[start : start + 2], "little")
    data[end : end + 4] = len(data).to_bytes(4, "little")  # where the next frame's tags begin
    path.write_bytes(data + bytes(6))


def folder(path):
    path.mkdir()


def sixteen_bit(path):
    save(path, pixels(shape=(16, 20)).astype(np.uint16) * 200)


def floating(path):
    save(path, pixels(shape=(16, 20)).astype(np.float32))


def cmyk(path):
    Image.fromarray(pixels()).convert("CMYK").save(path)


def two_frames(path):
    save(path, save_all=True, append_images=[Image.fromarray(pixels(1))])


def too_wide(path):
    save(path, np.zeros((1, MAX_SIDE + 1), np.uint8))


def too_high(path):
    save(path, np.zeros((MAX_SIDE + 1, 1), np.uint8))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, before it gives up
@pytest.mark.parametrize("read", [read_slice, read_mask])
@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (missing, "does not exist"),
        (empty, "can't be read"),
        (truncated, "can't be read"),
        (truncated_deflate, "can't be read"),
        (text, "can't be read"),
        (without_a_width, "can't be read"),
        (second_frame_without_a_size, "can't be read"),
        (folder, "can't be read"),
        (sixteen_bit, "pixels of type I;16"),
        (floating, "pixels of type F"),
        (cmyk, "pixels of type CMYK"),
        (two_frames, "holds 2 pictures"),
        (too_wide, "4097×1 pixels"),
        (too_high, "1×4097 pixels"),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(tmp_path, read, spoil, sentence):
    path = tmp_path / "bad_1.tif"
    spoil(path)
    with pytest.raises(MedFLError, match=sentence) as error:
        read(path)
    assert "bad_1.tif" in str(error.value) and "\n" not in str(error.value) and ";" in str(error.value)


def test_the_largest_side_is_still_read(tmp_path):
    wide = save(tmp_path / "wide.png", np.zeros((16, MAX_SIDE), np.uint8))
    assert read_slice(wide).shape == (16, MAX_SIDE, 3)


@pytest.mark.parametrize("value", [7, 2, 254])
def test_a_mask_with_another_value_is_refused(tmp_path, value):
    mask = np.zeros((16, 16), np.uint8)
    mask[3, 4] = value
    with pytest.raises(MedFLError, match=f"has the value {value},"):
        read_mask(save(tmp_path / "a_1_mask.tif", mask))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bands", [2, 4])
def test_a_fourth_sequence_is_not_taken_for_transparency(tmp_path, bands, suffix):
    path, stack = tmp_path / f"a_1.{suffix}", np.repeat(pixels(1)[..., :1], bands, axis=-1)
    for alpha in (np.full_like(stack[..., 0], 7), np.where(stack[..., 0] > 99, 255, 0).astype(np.uint8)):
        Image.fromarray(np.dstack([stack[..., :-1], alpha])).save(path)
        assert np.array_equal(read_slice(path), np.repeat(stack[..., :1], 3, axis=-1))
    Image.fromarray(stack).save(path)
    with pytest.raises(MedFLError, match="has more channels than a slice"):
        read_slice(path)
    if suffix == "tif" and bands == 4:
        Image.fromarray(stack).save(path, tiffinfo={338: 0})  # it says itself that this is no transparency
        with pytest.raises(MedFLError, match="has more channels than a slice"):
            read_slice(path)


@pytest.mark.parametrize("colour", [(1, 0, 0), (0, 0, 4), (0, 255, 0)])
def test_a_coloured_mask_is_refused_and_never_read_as_black(tmp_path, colour):
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[3, 4] = colour
    with pytest.raises(MedFLError, match="has colours, but a mask is grey"):
        read_mask(save(tmp_path / "a_1_mask.tif", mask))


@pytest.mark.parametrize(
    "palette, outlined",
    [
        ([0, 0, 0, 200, 30, 30], {1}),
        ([200, 30, 30, 0, 0, 0], {0}),
        ([0, 0, 0, 0, 0, 4], {1}),
        ([255, 255, 255, 0, 0, 0], {0}),
        ([9, 9, 9], {1}),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_what_a_palette_shows_as_black_is_not_outlined(tmp_path, palette, outlined, whole):
    numbers = np.zeros((16, 16), np.uint8)
    numbers[3, 4] = 0 if whole or len(palette) == 3 else 1
    picture = Image.fromarray(numbers, mode="P")
    picture.putpalette(palette)
    picture.save(tmp_path / "a_1_mask.png")
    wanted = np.where(np.isin(numbers, list(outlined)), 255, 0)
    assert np.array_equal(read_mask(tmp_path / "a_1_mask.png"), wanted)


def test_a_volume_has_one_size_and_keeps_the_order_given(tmp_path):
    paths = [save(tmp_path / f"a_{i}.tif", pixels(i)) for i in (1, 2, 3)]
    assert np.array_equal(read_volume(paths), np.stack([pixels(i) for i in (1, 2, 3)]))
    paths.append(save(tmp_path / "a_4.tif", pixels(4, (20, 16, 3))))
    with pytest.raises(MedFLError, match="a_4.tif is 16×20 and a_1.tif is 20×16"):
        read_volume(paths)


def test_statistics_are_those_of_the_foreground_in_float64():
    volume = torch.from_numpy(pixels(3, (4, 16, 16, 3)) // np.array([1, 2, 3], np.uint8))
    mean, deviation = volume_statistics(volume)
    assert mean.dtype == deviation.dtype == torch.float32 and mean.shape == deviation.shape == (3,)
    for channel in range(3):
        values = volume[..., channel].numpy().astype(np.float64)
        foreground = values[values > values.mean()]
        assert mean[channel] == pytest.approx(foreground.mean(), rel=1e-5)
        assert deviation[channel] == pytest.approx(foreground.std(), rel=1e-5)


def test_the_foreground_comes_out_with_mean_0_and_deviation_1():
    volume = brain()
    images = normalised(volume)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
    for channel in range(3):
        values = volume[..., channel].float()
        inside = images[:, channel][values > values.mean()]
        assert inside.abs().max() < CLIP  # so nothing here was clipped
        assert inside.mean().abs() < 1e-4 and abs(inside.std(correction=0) - 1) < 1e-4


def test_brighter_and_steeper_scans_come_out_alike():
    volume = brain()
    steeper = (volume.int() * 2 + torch.tensor([0, 10, 35])).to(torch.uint8)
    assert steeper.max() <= 255 and not torch.equal(volume, steeper)
    torch.testing.assert_close(normalised(steeper), normalised(volume), atol=1e-4, rtol=0)


def test_outliers_are_clipped():
    volume = brain()
    volume[0, 15, 15] = 255
    images = normalised(volume)
    assert torch.equal(images[0, :, 15, 15], torch.full((3,), CLIP)) and images.min() == -CLIP


@pytest.mark.parametrize("value", [0, 100, 255])
def test_a_blank_channel_is_0_and_leaves_the_others_alone(value):
    volume = brain()
    expected = normalised(volume)
    volume[..., 2] = value
    images = normalised(volume)
    assert images[:, 2].abs().max() == 0 and torch.equal(images[:, :2], expected[:, :2])


def test_a_lone_slice_is_a_volume_of_one():
    volume = brain(slices=1)
    images = normalised(volume)
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all() and images.std() > 0.5
    assert torch.equal(images[0], normalised(volume.expand(1, -1, -1, -1))[0])
    torch.testing.assert_close(normalised(volume.repeat(4, 1, 1, 1))[2], images[0], atol=1e-4, rtol=0)


def test_slices_are_normalised_by_their_volume_not_by_themselves():
    volume = brain()
    volume[4] //= 2  # a faint slice stays faint
    bright, faint = normalised(volume)[[0, 4], :, 8:24, 10:26].mean(dim=(1, 2, 3))
    assert faint < bright - 1


def test_slices_by_block_equal_the_whole_bit_for_bit():
    volume = brain(slices=7)
    mean, deviation = volume_statistics(volume)
    whole = network_input(volume, mean, deviation, 16)
    for size in (1, 2, 3):
        blocks = [network_input(block, mean, deviation, 16) for block in volume.split(size)]
        assert torch.equal(torch.cat(blocks), whole)


def test_resizing_256_to_128_is_the_mean_of_each_2_by_2_block():
    images = torch.rand(1, 2, 256, 256, generator=torch.Generator().manual_seed(0))
    blocks = images.reshape(1, 2, 128, 2, 128, 2).mean(dim=(3, 5))
    torch.testing.assert_close(resize(images, (128, 128)), blocks, atol=1e-6, rtol=0)


def former(images, size):
    return torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)


def test_halving_and_enlarging_keep_the_figures_of_former_checkpoints_bit_for_bit():
    images = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    for size in ((128, 128), (256, 256), (300, 257)):
        assert torch.equal(resize(images, size), former(images, size)), size
    assert description(128) == description(256) == DESCRIPTION
    assert description(64)["name"] != DESCRIPTION["name"] != description(96)["name"]


def test_a_stripe_of_one_pixel_in_four_does_not_vanish():
    stripes = torch.zeros(1, 1, 512, 512)
    stripes[..., ::4] = 1
    assert former(stripes, (128, 128)).max() == 0
    assert torch.equal(resize(stripes, (128, 128)), torch.full((1, 1, 128, 128), 0.25))


@pytest.mark.parametrize(
    "length, size", [(512, 128), (240, 128), (256, 64), (300, 128), (97, 64), (130, 128)]
)
def test_shrinking_averages_over_areas(length, size):
    """Against each pixel repeated `size` times and averaged over blocks of `length`, which is the same area."""
    line = torch.rand(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    wanted = line.repeat_interleave(size).reshape(size, length).mean(dim=1)
    images = line.float().expand(1, 1, size, length)
    torch.testing.assert_close(resize(images, (size, size))[0, 0, 0].double(), wanted, atol=2e-6, rtol=0)


class AnySize(torch.nn.Module):
    def forward(self, images):
        return resize(images, (64, 64))


def test_every_size_goes_the_same_way_when_it_is_exported():
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    graph = torch.export.export(AnySize(), (torch.rand(1, 2, 200, 168),), dynamic_shapes=(sizes,)).module()
    for shape in ((200, 168), (128, 128), (48, 240), (64, 64), (32, 300)):
        images = torch.rand(1, 2, *shape)
        torch.testing.assert_close(graph(images), AnySize()(images), atol=1e-6, rtol=0)


class Preprocessing(torch.nn.Module):
    def forward(self, volume):
        return network_input(volume, *volume_statistics(volume), 16)


def test_the_way_of_the_pixels_exports_with_any_number_of_slices():
    graph = torch.export.export(
        Preprocessing(), (brain(slices=3),), dynamic_shapes=({0: torch.export.Dim("slices")},)
    ).module()
    for slices in (3, 8):
        volume = brain(seed=slices, slices=slices)
        assert torch.equal(graph(volume), Preprocessing()(volume))


def test_16_bit_colours_are_not_cut_to_8(tmp_path):
    """A PNG of two by two pixels, 16 bits in each of three channels, written by hand: Pillow can't."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(2 * (1 + 12))))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(MedFLError, match="16 bits a channel"):
        read_slice(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_picture_that_viewers_turn_is_refused(tmp_path, suffix):
    exif = Image.Exif()
    for tag in (1, 6):
        exif[ExifTags.Base.Orientation] = tag
        Image.fromarray(pixels()).save(tmp_path / f"{tag}.{suffix}", exif=exif)
    assert read_slice(tmp_path / f"1.{suffix}").shape == pixels().shape
    for read in (read_slice, read_mask):
        with pytest.raises(
            MedFLError, match="shown turned or mirrored by viewers .*; save it as it is shown"
        ):
            read(tmp_path / f"6.{suffix}")
