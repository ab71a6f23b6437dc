"""The page's modules beside the app's, on the same files: pixels, truth, order, refusals, figures,
masks."""

import csv
import gzip
import io
import struct
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
from heads import head_in, nifti
from PIL import Image
from running import ROOT
from scipy.ndimage import gaussian_filter
from traps import tags
from uploads import (
    BITS,
    BROKEN,
    MASKS,
    READ,
    SCANS,
    VOLUME,
    picture,
    pixels_that_unpack,
    strip_that_unpacks,
    tiled_tiff,
)

from common import MedFLError
from deployment.app.cases import add_truth, read_case
from deployment.app.nifti import write_nifti
from deployment.app.readout import Prediction, component_rows, csv_text, mask_name, slice_rows, summary
from evaluation.components import find_components
from inference import to_mask


def test_pure_functions_by_nodes_own_runner(node):
    tests = sorted(map(str, (ROOT / "tests" / "browser").glob("*.test.mjs")))
    done = subprocess.run([node, "--test", *tests], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(tests) == 2, done.stdout


def pixels(answer: dict, suffix: str = "", channels: tuple = (3,)) -> np.ndarray:
    return np.fromfile(answer["out"] + suffix, np.uint8).reshape(*answer["shape"], *channels)


@pytest.mark.parametrize("name", READ)
def test_files_become_the_same_case(ask, name):
    (answer,), case = ask((READ[name], {})), read_case(READ[name])
    assert "error" not in answer, answer
    assert (answer["name"], answer["slices"]) == (case.name, case.slices)
    assert answer["together"] == case.is_volume or len(case.slices) == 1
    found = pixels(answer)
    assert found.shape == case.volume.shape
    apart = np.abs(found.astype(int) - case.volume)
    scaled = any("scaled" in note for note in case.notes)
    # a scaled voxel that lies between two values may be rounded either way
    assert apart.max() <= (1 if scaled else 0) and (apart > 0).mean() < 1e-3, (
        apart.max(),
        (apart > 0).mean(),
    )
    assert (answer["spacing"] is None) == (case.spacing is None)
    if case.spacing:
        assert answer["spacing"] == pytest.approx(case.spacing, rel=1e-5)
    assert len(answer["notes"]) == len(case.notes)
    assert answer["maskNames"] == [mask_name(slice_name) for slice_name in case.slices]
    assert (case.truth is not None) == Path(answer["out"] + ".truth").exists()
    assert [[word for word in note.split() if word.isdigit()] for note in answer["notes"]] == [
        [word for word in note.split() if word.isdigit()] for note in case.notes
    ]
    if case.truth is not None:
        assert np.array_equal(pixels(answer, ".truth", ()), case.truth)


@pytest.mark.parametrize(
    "shape, middle, spacing, order, code",
    [
        ((512, 400, 12), (200, 190, 40), (1.0, 1.0, 6.0), (0, 1, 2), 1),  # wide: cropped
        ((208, 256, 10), (80, 128, 25), (0.8, 1.0, 5.0), (0, 1, 2), 1),  # oblong: made square
        ((100, 161, 158), (75, 122, 150), (1.5, 1.5, 1.5), (1, 2, 0), 1),  # sagittal: thick slices, no neck
        ((300, 300, 60), (200, 260, 150), (1.5, 1.5, 5.0), (2, 0, 1), 0),  # coronal, of unknown side
        ((230, 230, 10), (115, 115, 25), (1.0, 1.0, 5.0), (0, 1, 2), 1),  # as it should be
    ],
)
def test_the_network_is_given_the_same(ask, shape, middle, spacing, order, code):
    files = [
        ("flair.nii", nifti(head_in(shape, middle, (80, 100, 80), spacing), spacing, order, code).to_bytes())
    ]
    (answer,), case = ask((files, {})), read_case(files)
    assert answer["fed"] == list(case.fed.shape[:3]) and answer["notes"] == case.notes
    assert (
        (case.feed is None)
        == (not Path(answer["out"] + ".fed").exists())
        == (spacing[2] == 5 and shape[0] == 230)
    )
    if case.feed is not None:
        fed = np.fromfile(answer["out"] + ".fed", np.uint8).reshape(case.fed.shape)
        assert np.abs(fed.astype(int) - case.fed).max() <= 1  # a scaled voxel may be rounded either way
        back = np.fromfile(answer["out"] + ".back", np.float32).reshape(case.volume.shape[:3])
        assert np.array_equal(back, case.feed.onto_page(fed[..., 1].astype(np.float32)))


def test_what_is_no_case_gets_one_sentence_in_both(ask):
    answers = ask(*[(files, {}) for files in BROKEN.values()])
    for (name, files), answer in zip(BROKEN.items(), answers):
        with pytest.raises(MedFLError):
            read_case(files)
        assert answer.get("kind") == "UserError", (name, answer)
        assert "\n" not in answer["error"] and len(answer["error"]) < 300 and ";" in answer["error"], (
            name,
            answer,
        )
        assert TOLD.get(name, "") in answer["error"], (name, answer)


@pytest.mark.parametrize("length", [32, -32, 24, 0])
def test_extensions_of_a_scan_are_passed_over(ask, length):
    """The second is said to be so many bytes long: with fewer than none a reader would begin again and again."""
    plain = SCANS["int16"]
    extensions = struct.pack("<ii24x", 32, 4) + struct.pack("<ii24x", length, 4)
    extended = bytearray(plain[:352] + extensions + plain[352:])
    struct.pack_into("<f", extended, 108, 352.0 + len(extensions))
    extended[348] = 1
    one, other = ask(([("s.nii", plain)], {}), ([("s.nii", bytes(extended))], {}))
    assert "error" not in other and np.array_equal(pixels(one), pixels(other))


def test_a_mask_that_can_not_be_laid_or_holds_no_labels_is_refused_by_both(ask):
    """Shares of tumour would all be tumour, and a mask without an orientation could be mirrored."""
    labels = (np.arange(12 * 52 * 40).reshape(52, 40, 12) % 5 == 0).astype(np.float32)
    whole = nibabel.Nifti1Image(labels, np.diag([-1.0, -1.0, 3.0, 1.0]))
    nowhere = nibabel.Nifti1Image(labels, np.diag([-1.0, -1.0, 3.0, 1.0]))
    nowhere.set_sform(None, 0)
    shares = nibabel.Nifti1Image(labels * 0.3, whole.affine)
    below = nibabel.Nifti1Image(-labels, whole.affine)
    nearly = nibabel.Nifti1Image(labels * 1.00001 + 1e-6, whole.affine)
    told = ("does not give", "are not labels", "are not labels")
    given = [("m.nii", image.to_bytes()) for image in (nowhere, shares, below, whole, nearly)]
    answers = ask(*[(VOLUME, {"masks": [mask]}) for mask in given])
    for sentence, mask, answer in zip(told, given, answers):
        assert answer["kind"] == "UserError" and sentence in answer["error"], answer
        with pytest.raises(MedFLError, match=sentence):
            add_truth(read_case(VOLUME), [mask])
    for mask, answer in zip(given[3:], answers[3:]):
        truth = add_truth(read_case(VOLUME), [mask])
        assert np.count_nonzero(truth) == np.count_nonzero(labels)
        assert np.array_equal(pixels(answer, ".truth", ()), truth)


@pytest.mark.parametrize(
    ("tag", "sentence"), [((339, 3, 1, 2), "signed"), ((266, 3, 1, 2), "the other way round")]
)
def test_samples_that_the_decoder_of_tiff_does_not_look_at_are_refused(ask, tag, sentence):
    one = [(256, 3, 1, 40), (257, 3, 1, 40), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    one += [(273, 4, 1, 8 + 2 + 12 * 9 + 4), (279, 4, 1, 1600), tag]
    content = b"II*\0" + struct.pack("<I", 8) + tags(*sorted(one)) + bytes(range(40)) * 40
    (answer,) = ask(([("a_1.tif", content)], {}))
    assert answer["kind"] == "UserError" and sentence in answer["error"], answer


TOLD = {
    "ZIP bomb": "unpacks to more than 256 MB",
    "a hole in a ZIP that packs nothing": "can't be unpacked",
    "a hole in a gzip": "can't be unpacked",
    "a checksum that is another's": "can't be unpacked",
    "two files of one name in a ZIP": "more than once",
    "two masks of one slice": "masks of one slice",
    "a mask and its copy": "masks of one slice",
    "a slice and its copy": "the same slice twice",
    "a turned JPEG": "orientation tag is 6",
    "a turned PNG": "orientation tag is 6",
    "a turned TIFF": "orientation tag is 6",
    "a name of 60,000 signs": "longer than 255 letters",
    "a TIFF that follows itself": "tags, tiles or pictures",
    "a TIFF of 60,000 tags": "tags, tiles or pictures",
    "a tile that is larger than a slice": "tags, tiles or pictures",
    "voxels within the header": "within its header",
    "voxels that begin nowhere": "within its header",
    "two slices of one number": "the same slice twice",
    "slices 10⁹ mm apart": "0.01 to 100 mm",
    "gzip bomb": "unpacks to more than 256 MB",
    "too many": "2000 files are more",
    "too many pixels": "more than this page can hold",
    "two folders": "2 patients",
    "a strip": "too small",
}


def test_what_the_app_reads_and_the_page_can_not_is_told(ask):
    tiles = [("a_1.tif", tiled_tiff())]
    strip, pixels = [("a_1.tif", strip_that_unpacks())], [("a_1.png", pixels_that_unpack())]
    for files, sentence in (
        ([("a_1.tif", picture(BITS, "TIFF"))], "1 bit a pixel"),
        (tiles, "in tiles"),
        (strip, "can't be read as a picture"),  # the app's decoder stops where the picture is whole
        (pixels, "can't be read as a picture"),
    ):
        assert read_case(files)
        assert sentence in ask((files, {}))[0]["error"]


def test_masks_that_come_later_are_the_same_truth(ask):
    case = read_case(VOLUME)
    good, wrong, spare, other = ask(
        (VOLUME, {"masks": MASKS}),
        (VOLUME, {"masks": MASKS[:-1]}),
        (VOLUME[:1], {"masks": [("x.png", MASKS[3][1])]}),
        (VOLUME, {"masks": [("x_mask.png", MASKS[0][1])] * 2}),
    )
    (capitals,) = ask((VOLUME, {"masks": [(name.upper(), content) for name, content in MASKS]}))
    assert np.array_equal(pixels(capitals, ".truth", ()), add_truth(case, MASKS))
    assert np.array_equal(pixels(good, ".truth", ()), add_truth(case, MASKS))
    assert "has no mask" in wrong["error"] and "no mask has the name" in other["error"]
    assert np.array_equal(
        pixels(spare, ".truth", ()), add_truth(read_case(VOLUME[:1]), [("x.png", MASKS[3][1])])
    )


def with_a_name(scan: bytes) -> bytes:
    """A NIfTI whose texts all name a patient: data_type, db_name, descrip, aux_file and intent_name."""
    head = bytearray(scan)
    for place in (4, 14, 148, 228, 328):
        head[place : place + 7] = b"MUELLER"
    return bytes(head)


@pytest.mark.parametrize("kind", ["oblique", "scaled", "three volumes", "big-endian"])
def test_figures_csv_and_masks_are_the_apps(ask, tmp_path, kind):
    files = [("scan.nii", with_a_name(SCANS[kind]))]
    case = read_case(files)
    smooth = np.random.default_rng(1).random(case.volume.shape[:3]).astype(np.float32)
    smooth[2] = 0
    case.truth = np.where(np.random.default_rng(2).random(smooth.shape) > 0.6, 255, 0).astype(np.uint8)
    truth = [("scan_mask.nii", write_nifti(case.nifti, case.truth))]
    (tmp_path / "p").write_bytes(smooth.tobytes())
    (answer,) = ask(
        (
            files,
            {
                "masks": [("scan_mask.nii.gz", truth[0][1])],
                "probability": str(tmp_path / "p"),
                "threshold": 0.7,
            },
        )
    )
    rows = slice_rows(case, Prediction(smooth), 0.7)
    names = {
        "pixels": "tumour_pixels",
        "share": "share_of_slice",
        "diameter": "largest_diameter_px",
        "mean": "mean_probability",
        "squareMm": "tumour_mm2",
        "diameterMm": "largest_diameter_mm",
    }
    for found, expected in zip(answer["rows"], rows):
        for name, key in names.items():
            assert found[name] == (
                None if expected[key] is None else pytest.approx(expected[key], rel=1e-5)
            ), key
    mask = to_mask(smooth, 0.7)
    expected = summary(case, rows, mask)
    for name, key in {
        "pixels": "tumour_pixels",
        "share": "foreground_share",
        "slices": "slices_with_tumour",
        "cm3": "volume_cm3",
        "diameter": "largest_diameter_px",
        "diameterMm": "largest_diameter_mm",
        "dice": "dice",
        "iou": "iou",
    }.items():
        assert answer["summary"][name] == pytest.approx(expected[key], rel=1e-5), key
    lines, ours = (
        [line.split(",") for line in text.splitlines()] for text in (answer["csv"], csv_text(rows))
    )
    spread = ours[0].index("flip_spread")  # which the page doesn't compute
    assert [line[:spread] + line[spread + 1 :] for line in ours][0] == lines[0] and len(lines) == len(ours)
    assert [line[:3] for line in lines] == [line[:3] for line in ours]
    assert np.array_equal(np.asarray(Image.open(answer["out"] + ".png")), mask[0])
    unpacked = [
        gzip.decompress(content)
        for content in (Path(answer["out"] + ".nii.gz").read_bytes(), write_nifti(case.nifti, mask))
    ]
    assert [content.count(b"MUELLER") for content in unpacked] == [0, 0]
    written, reference = map(nibabel.Nifti1Image.from_bytes, unpacked)
    assert np.array_equal(np.asarray(written.dataobj), np.asarray(reference.dataobj))
    assert np.allclose(written.affine, reference.affine) and written.get_data_dtype() == np.uint8


@pytest.mark.parametrize("drawn", [False, True])
def test_components_are_the_apps(ask, tmp_path, drawn):
    files = [("scan.nii", SCANS["three volumes"])]
    case = read_case(files)
    noise = np.random.default_rng(3).random(case.volume.shape[:3])
    soft = gaussian_filter(
        noise, (0.7, 1.5, 1.5)
    )  # parts that touch where the model is less sure, and lone ones
    probability = ((soft - soft.min()) / np.ptp(soft)).astype(np.float32) ** 2
    (tmp_path / "p").write_bytes(probability.tobytes())
    (answer,) = ask((files, {"probability": str(tmp_path / "p"), "threshold": 0.5, "drawn": drawn}))
    found = find_components(to_mask(probability, 0.5), case.spacing, None if drawn else probability)
    assert len(found.parts) > 5 and found.parts[-1].pieces > 1, "many enough for the last line"
    expected, lines = (
        list(csv.DictReader(io.StringIO(text)))
        for text in (csv_text(component_rows(found.parts)), answer["components"])
    )
    assert len(lines) == len(expected)
    for line, ours in zip(lines, expected):
        for name, value in ours.items():
            # voxels as near to one part as to another go to either
            slack = 0.02 if name == "volume_high_cm3" else 1e-5
            known = pytest.approx(float(value), rel=slack) if value else None
            assert (float(line[name]) if line[name] else None) == known, name
    assert drawn == (expected[0]["volume_low_cm3"] == "")
