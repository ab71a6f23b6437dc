"""Volumes on the page: what is cut, of another place or of another range is told; channels in files of their own;
large and sagittal DICOM series; and the network is given what the preparation makes."""

import gzip
import struct
from types import SimpleNamespace

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_phantoms import image_of, write_series

from common import MedFLError
from deployment.app.cases import add_truth, read_case
from deployment.app.dicom import on_series
from deployment.app.readout import predict_case
from radiology.nifti import find_volumes, load_counted, load_volume, read_labels
from radiology.preparation import prepare
from radiology.rules import load_rules
from radiology.series import find_series
from radiology.studies import plan_studies

A = np.diag([-1.0, 1, 4, 1])
RANDOM = np.random.default_rng(0)
SCAN = RANDOM.integers(1, 900, (64, 64, 20)).astype(np.int16)
MASK = np.zeros(SCAN.shape, np.uint8)
MASK[20:30, 20:30, 5:9] = 1
SAGITTAL = np.transpose(((0, 1, 0), (0, 0, -1), (-1, 0, 0)))


def nifti(values, affine=A, **options) -> bytes:
    return nibabel.Nifti1Image(values, affine, **options).to_bytes()


def found(tmp_path, name: str, content: bytes):
    (tmp_path / "anna").mkdir(exist_ok=True)
    (tmp_path / "anna" / name).write_bytes(content)
    (series,), refused = find_volumes(tmp_path, [tmp_path / "anna" / name])
    assert not refused
    return series


@pytest.mark.parametrize("name", ["cut.nii", "cut.nii.gz"])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_truncated_volume_is_read_nowhere(tmp_path, name, share):
    whole = nifti(SCAN) if name.endswith("nii") else gzip.compress(nifti(SCAN))
    cut = whole[: int(share * len(whole))]
    with pytest.raises(MedFLError, match="is truncated"):
        load_volume(found(tmp_path, name, cut))
    with pytest.raises(MedFLError, match="is truncated|can't be unpacked"):
        read_case([(name, cut)])


def test_a_flipped_bit_in_a_gzip_stream_is_noticed(tmp_path):
    content = bytearray(gzip.compress(nifti(SCAN)))
    content[-6] ^= 1  # of the checksum at its end
    with pytest.raises(MedFLError, match="is a damaged gzip file"):
        load_volume(found(tmp_path, "a.nii.gz", bytes(content)))


@pytest.mark.parametrize(
    "name, content",
    [
        ("second.nii", nibabel.Nifti2Image(SCAN, A).to_bytes()),
        ("gzipped.nii", gzip.compress(nifti(SCAN))),
        ("plain.nii.gz", nifti(SCAN)),
    ],
)
def test_what_a_volume_is_shows_in_its_bytes_not_in_its_name(tmp_path, name, content):
    image = load_volume(found(tmp_path, name, content))
    assert np.array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), SCAN)
    assert read_case([(name, content)]).volume.shape == (20, 64, 64, 3)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.mgz", b"x", "FreeSurfer's format; convert it with"),
        ("a.hdr", nifti(SCAN)[:348], "half of a pair"),
        ("a.nii", nifti(SCAN)[:344] + bytes(4) + bytes(99), "ANALYZE 7.5, which does not say where left is"),
        ("a.nii", b"", "is empty"),
        ("a.nii", nifti((SCAN * (1 - 2j)).astype(np.complex64)), "complex numbers"),
    ],
)
def test_other_kinds_are_called_what_they_are(tmp_path, name, content, sentence):
    with pytest.raises(MedFLError, match=sentence):
        read_case([(name, content)])
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / name).write_bytes(content)
    series, refused = find_volumes(tmp_path, [tmp_path / "anna" / name])
    told = refused[0].why if refused else series[0].problems[0]
    assert sentence.split(";")[0] in told


def test_what_is_not_finite_is_counted_and_told(tmp_path):
    values = SCAN.astype(np.float32)
    values[:10], values[0, 0, 0] = np.nan, np.inf
    image, odd = load_counted(found(tmp_path, "flair.nii", nifti(values)))
    assert odd == 10 * 64 * 20 and sitk.GetArrayFromImage(image).min() == 0
    case = read_case([("flair.nii", nifti(values))])
    assert f"{odd} values were not finite" in " ".join(case.notes) and (case.volume == 0).mean() > 0.15
    values = SCAN.astype(float)
    values[:10] = 1e39  # which single precision does not hold
    assert read_case([("flair.nii", nifti(values))]).volume.any()
    assert load_counted(found(tmp_path, "large.nii", nifti(values)))[1] == 10 * 64 * 20
    with pytest.raises(MedFLError, match="no finite value"):
        load_volume(found(tmp_path, "nan.nii", nifti(np.full((9, 9, 9), np.nan, np.float32))))


def test_a_volume_of_two_sizes_has_no_millimetres(tmp_path):
    content = bytearray(nifti(SCAN))
    struct.pack_into(
        "<h", content, 252, 0
    )  # of the two records of its place, one that the pixel size is not part of
    struct.pack_into("<3f", content, 80, 9, 9, 9)
    case = read_case([("flair.nii", bytes(content))])
    assert case.spacing is None and "flair.nii says that voxels measure 9 × 9 × 9 mm" in " ".join(case.notes)
    assert "places them" in found(tmp_path, "flair.nii", bytes(content)).problems[0]


def test_a_sequence_around_0_is_brought_into_range():
    y, x = np.indices((64, 64)) - 32
    brain = (np.hypot(y, x) < 25)[..., None] & np.ones(20, bool)
    scaled = np.where(brain, (SCAN - SCAN[brain].mean()) / SCAN[brain].std(), 0).astype(np.float32)
    raw, z = (read_case([("f.nii", nifti(values))]) for values in (np.where(brain, SCAN, 0), scaled))
    assert "scaled from the lowest" in " ".join(z.notes) and "lowest" not in " ".join(raw.notes)
    assert abs((z.volume == 0).mean() - (raw.volume == 0).mean()) < 0.02
    shown = raw.volume[..., 1] > 0
    assert np.corrcoef(z.volume[..., 1][shown], raw.volume[..., 1][shown])[0, 1] > 0.99


def test_a_mask_of_another_place_is_no_truth():
    moved, thicker = A.copy(), np.diag([-1.0, 1, 8, 1])
    moved[:3, 3] = 60, -40, 30
    for affine in (moved, thicker):
        with pytest.raises(MedFLError, match="another position than the scan"):
            read_case([("flair.nii", nifti(SCAN)), ("flair_seg.nii", nifti(MASK, affine))])
        with pytest.raises(MedFLError, match="another position than the scan"):
            add_truth(read_case([("flair.nii", nifti(SCAN))]), [("m.nii", nifti(MASK, affine))])
    turned = A @ np.diag([-1.0, 1, 1, 1])
    turned[0, 3] = A[0, 0] * 63
    same = read_case([("flair.nii", nifti(SCAN)), ("flair_seg.nii", nifti(MASK[::-1].copy(), turned))])
    assert np.array_equal(same.truth, read_case([("f.nii", nifti(SCAN)), ("f_seg.nii", nifti(MASK))]).truth)


def test_labels_that_a_scale_makes_almost_whole_are_read(tmp_path):
    image = nibabel.Nifti1Image(MASK * 255, A)
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([0.00392157, 0], "<f4").tobytes()
    flair = load_volume(found(tmp_path, "flair.nii", nifti(SCAN)))
    labels, _ = read_labels(found(tmp_path, "seg.nii", bytes(content)), (1,), [flair])
    assert int(sitk.GetArrayFromImage(labels).sum()) == int(MASK.sum())


@pytest.mark.parametrize(
    "other", ["BraTS-GLI-00002-000-seg", "BraTS-GLI-00001-001-seg", "BraTS-GLI-00002-000-t1c"]
)
def test_files_that_name_other_numbers_are_doubted(other):
    """All patients of a research set have one grid, so it does not show a mask or a channel of another."""
    first = "BraTS-GLI-00001-000-t2f.nii"
    content = nifti(MASK if "seg" in other else SCAN)
    doubted = read_case([(first, nifti(SCAN)), (f"{other}.nii", content)])
    assert doubted.notes[-1].startswith(f"{other}.nii names other numbers than {first}")
    for same in ("BraTS-GLI-00001-000-seg.nii", "seg.nii"):
        assert "names other" not in read_case([(first, nifti(SCAN)), (same, nifti(MASK))]).notes[-1]


def test_files_of_one_grid_are_the_channels_as_brats_has_them():
    values = {"t1n": SCAN, "t2f": SCAN[::-1].copy(), "t1c": SCAN[:, ::-1].copy(), "t2w": SCAN}
    files = [(f"BraTS-GLI-1-{kind}.nii", nifti(v)) for kind, v in values.items()]
    case = read_case([*files, ("BraTS-GLI-1-seg.nii", nifti(MASK)), ("BraTS-GLI-1-t1n.json", b"{}")])
    alone = [read_case([("scan.nii", nifti(values[k]))]).volume[..., 0] for k in ("t1n", "t2f", "t1c")]
    assert np.array_equal(case.volume, np.stack(alone, axis=-1)) and case.truth.any() and case.oriented
    assert "1 NIfTI files were ignored" in " ".join(case.notes)
    two = read_case([files[1], files[0]])
    assert np.array_equal(two.volume[..., 2], two.volume[..., 1])
    assert "FLAIR stands in for post-contrast" in " ".join(two.notes)
    with pytest.raises(MedFLError, match="lies on another grid"):
        read_case([files[1], ("t1c.nii", nifti(SCAN, np.diag([-1.0, 1, 5, 1])))])
    with pytest.raises(MedFLError, match="two of the files say that they are FLAIR"):
        read_case([files[1], ("flair.nii", nifti(SCAN))])


def test_a_segmentation_of_slicer_lies_on_its_scan(tmp_path):
    def write(name, values, at):
        directions = np.diag([1.0, -1, 4])
        origin = directions @ np.array(at, float)
        about = {"space": "left-posterior-superior", "space directions": directions, "space origin": origin}
        nrrd.write(str(tmp_path / "anna" / name), values, about)
        return (tmp_path / "anna" / name).read_bytes()

    (tmp_path / "anna").mkdir()
    write("flair.nrrd", SCAN, (0, 0, 0))
    write("Segmentation.seg.nrrd", MASK[18:40, 19:41, 4:12].copy(), (18, 19, 4))
    flair, seg = sorted(
        find_volumes(tmp_path, sorted((tmp_path / "anna").iterdir()))[0],
        key=lambda s: s.description != "flair",
    )
    labels, _ = read_labels(seg, (1,), [load_volume(flair)])
    assert np.array_equal(sitk.GetArrayFromImage(labels).transpose(2, 1, 0), MASK)


def head(slices: int, side: int, spacing, direction=None) -> sitk.Image:
    rows, columns = (np.indices((side, side)) - side / 2 + 0.5) / side
    inside = np.hypot(rows, columns) < 0.4
    values = [
        inside * (300 + 400 * np.exp(-200 * ((rows - 0.1) ** 2 + columns**2)) + k) for k in range(slices)
    ]
    return image_of(np.stack(values), spacing, direction=direction)


@pytest.mark.parametrize(
    "slices, side, spacing, direction",
    [
        (6, 512, (3.0, 0.45, 0.45), None),
        (24, 48, (1.0, 1.0, 1.0), SAGITTAL),
        (6, 200, (5.0, 1.1, 1.1), None),
    ],
    ids=["512", "sagittal", "small"],
)
def test_the_network_is_given_what_the_preparation_makes(
    tmp_path, monkeypatch, slices, side, spacing, direction
):
    monkeypatch.setattr("deployment.app.dicom.MAX_PIXELS", 2**20)
    files = write_series(tmp_path, head(slices, side, spacing, direction), SeriesDescription="FLAIR")
    case = read_case([(f.name, f.read_bytes()) for f in files])
    assert ("resampled" in " ".join(case.notes)) == (side == 512)
    (study,) = plan_studies(find_series(files)[0], load_rules())
    prepared = prepare(study, load_rules())
    assert np.array_equal(case.dicom.fed, prepared.volume)
    seen = []

    def network(_, volume, turn):
        seen.append(volume)
        return volume[..., 1] / np.float32(255), np.ones(volume.shape[:3], np.uint8)

    monkeypatch.setattr("deployment.app.readout.predict_classes", network)
    probability = predict_case(SimpleNamespace(classes=1), case).probability
    assert np.array_equal(seen[0], prepared.volume) and probability.shape == case.volume.shape[:3]
    shown = case.dicom.within(case.volume)[..., 1] / 255
    assert np.corrcoef(shown.ravel(), case.dicom.within(probability).ravel())[0, 1] > 0.97
    bright = case.volume[..., 1] > 1.4 * case.volume[case.volume > 60].min()
    onto = on_series(case.dicom, np.where(bright, np.uint8(255), np.uint8(0)))
    assert onto.shape == (slices, side, side) and onto.any()


def test_a_sagittal_3d_flair_of_256_is_shown_and_its_mask_goes_back(tmp_path):
    files = write_series(
        tmp_path, head(176, 256, (1.0, 1.0, 1.0), SAGITTAL), SeriesDescription="sag 3D FLAIR"
    )
    case = read_case([(f.name, f.read_bytes()) for f in files])
    assert case.volume.shape == (60, 256, 256, 3) and "resampled" in " ".join(case.notes)
    mask = np.zeros(case.volume.shape[:3], np.uint8)
    mask[40:44, 100:120, 110:130] = 255
    onto = on_series(case.dicom, mask)
    volume = mask.astype(bool).sum() * np.prod(case.spacing)
    assert onto.sum() == pytest.approx(volume, rel=0.05)  # the series has 1 mm³ a voxel
