"""What becomes of an upload: order, groups, truth, NIfTI, and one sentence for everything that is no case."""

import gzip
import json

import nibabel
import numpy as np
import pytest

from common import MedFLError
from deployment.app import archives
from deployment.app.archives import MAX_FILES
from deployment.app.cases import add_truth, read_case
from deployment.app.nifti import write_nifti
from scans.pictures import read_slice


def test_slices_are_in_numeric_order_and_one_group(slices, zipped):
    for files in (slices[::-1], [("p.zip", zipped([("p/" + name, content) for name, content in slices]))]):
        case = read_case(files)
        assert case.name == "anna" and case.volume[:, 0, 0, 0].tolist() == [10 * k for k in range(1, 13)]
        assert case.slices[1] == "anna_2.png" and case.is_volume and case.truth is None and not case.notes


def test_files_without_numbers_are_each_a_volume_of_their_own(picture):
    case = read_case([("b.png", picture(mode="RGB")), ("a.jpg", picture(mode="RGB", kind="JPEG"))])
    assert case.groups.tolist() == [0, 1] and not case.is_volume and "less reliable" in case.notes[0]


def test_masks_become_the_truth_and_may_come_later(slices, picture):
    masks = [
        (f"anna_{k}_mask.png", picture(np.full((32, 32), 255 * (k == 2), np.uint8))) for k in range(1, 13)
    ]
    case = read_case(slices + masks)
    assert case.truth.any(axis=(1, 2)).tolist() == [k == 2 for k in range(1, 13)]
    later = add_truth(read_case(slices), masks)
    assert np.array_equal(later, case.truth)
    assert add_truth(read_case(slices[:1]), [("whatever.png", masks[1][1])]).all()
    for wrong, sentence in (
        (masks[:-1], "has no mask"),
        ([("other_mask.png", masks[0][1])] * 2, "no mask has the name"),
    ):
        with pytest.raises(MedFLError, match=sentence):
            add_truth(read_case(slices), wrong)
    with pytest.raises(MedFLError, match="16×16 pixels, but its slice is 32×32"):
        add_truth(read_case(slices[:1]), [("m.png", picture(mode="L", size=(16, 16)))])


def test_volume_json_gives_mm_and_a_broken_one_is_refused(slices, zipped):
    told = {
        "version": 1,
        "spacing_mm": [5.0, 0.9, 0.8],
        "slice_positions_mm": list(range(12)),
        "manufacturer": "somebody",
    }
    measured = [*slices, ("volume.json", json.dumps(told).encode())]
    for files in (measured, [("p.zip", zipped([("anna/" + name, content) for name, content in measured]))]):
        case = read_case(files)
        assert case.spacing == (0.9, 0.8, 5.0) and case.measured and not case.notes
    plain = read_case(slices)
    assert plain.spacing is None and not plain.measured
    for files, sentence in (
        ([*slices, ("volume.json", b"{")], "is not the volume.json of a prepared patient"),
        ([*slices[:3], measured[-1]], "describes 12 slices, but the patient has 3"),
        ([*measured, ("b/volume.json", b"{}")], "2 files are called volume.json"),
    ):
        with pytest.raises(MedFLError, match=sentence):
            read_case(files)


def sixteen_bit(picture):
    return picture(np.full((32, 32), 40_000, np.uint16))


def animated(picture):
    from PIL import Image

    return picture(mode="L", kind="TIFF", save_all=True, append_images=[Image.new("L", (32, 32), 9)])


BAD = {
    "empty": ([("a_1.tif", b"")], "can't be read as a picture"),
    "truncated": (
        lambda p: [("a_1.png", p(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))[:900])],
        "be read",
    ),
    "text": ([("a_1.tif", b"Dear Dr Smith")], "can't be read as a picture"),
    "one pixel": (lambda p: [("a_1.png", p(mode="RGB", size=(1, 1)))], "too small for a slice"),
    "huge": (lambda p: [("a_1.png", p(mode="1", size=(20_000, 20_000)))], "at most 4096"),
    "CMYK": (lambda p: [("a_1.jpg", p(mode="CMYK", kind="JPEG"))], "pixels of type CMYK"),
    "16 bits": (lambda p: [("a_1.png", sixteen_bit(p))], "convert it first"),
    "animated": (lambda p: [("a_1.tif", animated(p))], "holds 2 pictures"),
    "mixed sizes": (
        lambda p: [("a_1.png", p(mode="RGB")), ("a_2.png", p(mode="RGB", size=(32, 48)))],
        "slices of one size",
    ),
    "two patients": (lambda p: [("a_1.png", p(mode="L")), ("b_1.png", p(mode="L"))], "slices of 2 patients"),
    "numbered and not": (lambda p: [("a_1.png", p(mode="L")), ("scan.png", p(mode="L"))], "no slice number"),
    "too many": (lambda p: [(f"a_{k}.png", b"") for k in range(2 * MAX_FILES)], "one patient at a time"),
    "masks alone": (lambda p: [("a_1_mask.png", p(mode="L"))], "there is no slice"),
    "a mask of another size": (
        lambda p: [("a_1.png", p(mode="L")), ("a_1_mask.png", p(mode="L", size=(16, 16)))],
        "16×16",
    ),
    "a grey mask": (
        lambda p: [("a_1.png", p(mode="L")), ("a_1_mask.png", p(np.full((32, 32), 9, np.uint8)))],
        "the value 9",
    ),
    "no mask for one": (
        lambda p: [("a_1.png", p(mode="L")), ("a_2.png", p(mode="L")), ("a_1_mask.png", p(mode="L"))],
        "no mask",
    ),
    "broken archive": ([("p.zip", b"PK\3\4 and no more")], "can't be unpacked"),
    "archive and more": (lambda p: [("p.zip", b"PK"), ("a.png", p(mode="L"))], "by itself"),
    "broken NIfTI": ([("p.nii", b"no scan")], "can't be read as NIfTI"),
    "broken gzip": ([("p.nii.gz", b"no scan")], "can't be unpacked"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_case_gets_one_sentence(picture, name):
    files, sentence = BAD[name]
    with pytest.raises(MedFLError, match=sentence) as caught:
        read_case(files(picture) if callable(files) else files)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["../../etc/a_1.png", "/a_1.png", "C:/a_1.png", "..\\a_1.png"])
def test_an_archive_whose_names_climb_out_is_refused(zipped, picture, name):
    with pytest.raises(MedFLError, match="points out of the archive"):
        read_case([("p.zip", zipped([(name, picture(mode="L"))]))])


def test_bombs_are_refused(zipped, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED", 1 << 20)
    bomb = zipped([("a_1.png", bytes(2 << 20))])
    with pytest.raises(MedFLError, match="unpacks to more than 1 MB"):
        read_case([("p.zip", bomb)])
    lying = bomb.replace((2 << 20).to_bytes(4, "little"), (9).to_bytes(4, "little"))
    with pytest.raises(MedFLError, match="unpack"):
        read_case([("p.zip", lying)])
    with pytest.raises(MedFLError, match="unpacks to more than 1 MB"):
        read_case([("p.nii.gz", gzip.compress(bytes(2 << 20)))])
    with pytest.raises(MedFLError, match="unpacks to more"):
        monkeypatch.setattr(archives, "MAX_UNPACKED", 0)
        read_case([("p.zip", bomb)])


def test_palette_and_alpha_are_read_as_predict_reads_them(picture, tmp_path):
    for mode in ("P", "LA", "RGBA"):
        content = picture(mode=mode)
        (tmp_path / "a_1.png").write_bytes(content)
        assert np.array_equal(read_case([("a_1.png", content)]).volume[0], read_slice(tmp_path / "a_1.png"))


def scan(affine, shape=(20, 24, 18), dtype=np.int16, seed=0) -> nibabel.Nifti1Image:
    values = np.random.default_rng(seed).integers(0, 900, shape).astype(dtype)
    return nibabel.Nifti1Image(values, affine)


LAS = np.array(
    [[-0.8, 0, 0, 5], [0, 0, 0.9, 0], [0, 2.5, 0, 0], [0, 0, 0, 1.0]]
)  # axes: right to left, up, to the front


def test_nifti_is_turned_to_axial_slices_and_its_mask_lies_on_the_scan(tmp_path):
    image = scan(LAS)
    case = read_case([("brain.nii.gz", gzip.compress(image.to_bytes()))])
    assert case.volume.shape == (24, 18, 20, 3) and case.spacing == pytest.approx((0.9, 0.8, 2.5))
    assert case.is_volume and any("scaled" in note for note in case.notes)
    chosen = np.zeros((20, 24, 18), np.uint8)
    chosen[3, 20, 1] = 1
    truth = add_truth(case, [("brain_mask.nii", nibabel.Nifti1Image(chosen, LAS).to_bytes())])
    (place,) = np.argwhere(truth)
    values = np.asarray(image.dataobj).astype(np.float32)
    top = np.percentile(values[values > 0], 99.9)
    assert case.volume[tuple(place)][0] == round(min(values[3, 20, 1] / top, 1) * 255)
    assert tuple(place) == (
        20,
        18 - 1 - 1,
        3,
    )  # up; the front is at the top; right to left, as the training set's slices lie
    (tmp_path / "back.nii.gz").write_bytes(write_nifti(case.nifti, truth))
    back = nibabel.load(tmp_path / "back.nii.gz")
    assert np.array_equal(np.asarray(back.dataobj), chosen) and np.allclose(back.affine, LAS)


def test_three_volumes_are_the_three_channels():
    image = scan(np.eye(4), (20, 24, 2, 3), np.uint8)
    case = read_case([("brain.nii", image.to_bytes())])
    assert (
        np.array_equal(case.volume[1, 24 - 1 - 5, 20 - 1 - 4], np.asarray(image.dataobj)[4, 5, 1])
        and not case.notes
    )
    for name in ("sub-01_ce-gd_T1w.nii", "BraTS_001_t1ce.nii", "anna_t1.nii"):
        with pytest.raises(MedFLError, match="contrast by its name, but the network needs FLAIR"):
            read_case([(name, scan(np.eye(4)).to_bytes())])
    with pytest.raises(MedFLError, match="holds 2 volumes"):
        read_case([("brain.nii", scan(np.eye(4), (20, 24, 2, 2)).to_bytes())])
    with pytest.raises(MedFLError, match="2 dimensions"):
        read_case([("brain.nii", scan(np.eye(4), (20, 24)).to_bytes())])
