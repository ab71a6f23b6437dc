"""Small files and folders that make a reader wait, compute or allocate without end, beside those of bombs.py."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bombs import (
    MIB,
    dicom,
    nifti,
    picture,
    prepared,
    prepared_nifti,
    stored,
    with_state,
    written,
    zeros_deflated,
    zipped,
)
from bombs import checkpoint as checkpoint_of
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)
from traps_of_masks import frame_of_precincts, jpeg_of_passes, traps_of_masks

from checkpoint import load_checkpoint
from dataset import load_dataset
from deployment.app.cases import read_case
from scans.cache import choose_cache
from scans.folders import walk
from scans.pictures import read_slice, read_volume
from tasks import read_task
from transunet import TransUNet

POSITION, PIXELS = b"\x20\x00\x32\x00DS", b"\xe0\x7f\x10\x00O"


class ManyBytes:
    """What a pickle of a few bytes makes gigabytes of."""

    def __reduce__(self):
        return bytearray, (2 * 2**30,)


def tags(*entries: tuple[int, int, int, int], follows: int = 0) -> bytes:
    """The tags of one picture of a TIFF (number, type, count, value), and the place of the next picture's."""
    return (
        struct.pack("<H", len(entries))
        + b"".join(struct.pack("<HHII", *e) for e in entries)
        + struct.pack("<I", follows)
    )


def tiff_of_pictures(count: int) -> bytes:
    """A TIFF of so many pictures, each of the same strip."""
    size = len(tags(*[(0, 0, 0, 0)] * 9))
    strip = 8 + count * size
    one = [
        (256, 4, 1, 64),
        (257, 4, 1, 64),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, strip),
    ]
    one += [(277, 3, 1, 1), (278, 4, 1, 64), (279, 4, 1, 4096)]
    places = [8 + k * size for k in range(1, count)] + [0]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(tags(*one, follows=p) for p in places) + bytes(4096)


def tiff_of_a_tile(side: int) -> bytes:
    """A TIFF of 64×64 pixels in a tile of `side`, zeros."""
    data = b"\x78\xda" + zeros_deflated(side * side // MIB) + bytes(4)
    one = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    one += [(322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8 + 2 + 12 * 10 + 4), (325, 4, 1, len(data))]
    return b"II*\0" + struct.pack("<I", 8) + tags(*one) + data


def dicom_of_passes() -> bytes:
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    frame = encapsulate([jpeg_of_passes(3_000, 2048)])
    return stored(dicom(side=2048, syntax=JPEGBaseline8Bit, PixelData=frame, **bits))


def deflated(change: Callable[[bytes], bytes], **about) -> bytes:
    """A deflated DICOM file with its data set changed before."""
    plain = stored(dicom(**about))
    body = plain[plain.index(b"\x08\x00\x16\x00UI") :]
    meta = stored(dicom(syntax=DeflatedExplicitVRLittleEndian, PixelData=bytes(8)))
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return (
        meta[: 144 + struct.unpack_from("<I", meta, 140)[0]] + packer.compress(change(body)) + packer.flush()
    )


def dicom_of_pieces() -> bytes:
    """A DICOM file whose pixels, which claim 4096², lie in 15 million empty pieces behind a first one."""
    plain = stored(dicom(side=4096, syntax=RLELossless, PixelData=encapsulate([bytes(9 * MIB)])))
    return plain[:-8] + b"\xfe\xff\x00\xe0\0\0\0\0" * 15_000_000 + plain[-8:]


def dicom_of_small_elements() -> bytes:
    """A DICOM file whose header has a million empty elements."""
    plain = stored(dicom())
    start = plain.index(PIXELS)
    return plain[:start] + of_elements(PIXELS, 1_000_000)[: -len(PIXELS)] + plain[start:]


def element(group: int, number: int, kind: bytes, content: bytes) -> bytes:
    return struct.pack("<HH2sHI", group, number, kind, 0, len(content)) + content


def of_numbers(mib: int) -> Callable[[bytes], bytes]:
    """A position of so many MiB of numbers, each of which becomes an object."""

    def change(body: bytes) -> bytes:
        start = body.index(POSITION)
        after = start + 8 + struct.unpack_from("<H", body, start + 6)[0]
        return body[:start] + element(0x20, 0x32, b"UN", b"1\\" * (mib << 19)) + body[after:]

    return change


def of_items(body: bytes) -> bytes:
    """Three million items behind as many bytes as are looked through for such."""
    start = body.index(PIXELS)
    padding, items = element(0x51, 0x1001, b"OB", bytes(9 * MIB)), b"\xfe\xff\x00\xe0\0\0\0\0" * 3_000_000
    return body[:start] + padding + element(0x5200, 0x9230, b"SQ", items) + body[start:]


def of_elements(body: bytes, count: int = 1_200_000) -> bytes:
    """So many empty elements, each with a number of its own."""
    start, k = body.index(PIXELS), np.arange(count)
    each = np.zeros(len(k), [("group", "<u2"), ("number", "<u2"), ("kind", "S2"), ("length", "<u2")])
    each["group"], each["number"], each["kind"] = 0x5201 + 2 * (k >> 15), (k & 0x7FFF) + 0x1000, b"LO"
    return body[:start] + each.tobytes() + body[start:]


def big_endian_items() -> bytes:
    file = io.BytesIO()
    dicom(syntax=ExplicitVRBigEndian).save_as(
        file, enforce_file_format=True, little_endian=False, implicit_vr=False
    )
    plain, items = file.getvalue(), b"\xff\xfe\xe0\x00\0\0\0\0" * 900_000
    start = plain.index(b"\x7f\xe0\x00\x10O")
    return (
        plain[:start] + struct.pack(">HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(items)) + items + plain[start:]
    )


def patient(root: Path, side: int = 64, slices: int = 2) -> Path:
    """The folder of a patient in a dataset, with slices and masks."""
    image, mask = picture((side, side), mode="RGB"), picture((side, side))
    for k in range(1, slices + 1):
        written(root / "p" / f"p_{k}.png", image)
        written(root / "p" / f"p_{k}_mask.png", mask)
    return root / "p"


def with_pipe(root: Path) -> Path:
    os.mkfifo(patient(root) / "p_3.png")
    written(root / "p" / "p_3_mask.png", picture((64, 64)))
    return root


def with_link(root: Path, name: str) -> Path:
    place = patient(root) / name
    place.unlink(missing_ok=True)
    place.symlink_to("/dev/zero")
    return root


def with_mesh(root: Path) -> Path:
    """Forty folders, each with two links to the next."""
    for k in range(40):
        (root / f"f{k}").mkdir(parents=True)
        for link in "ab":
            (root / f"f{k}" / link).symlink_to(f"../f{k + 1}")
    (root / "f40").mkdir()
    return root


def scan_with_link(root: Path) -> Path:
    written(root / "p" / "flair.nii", nifti((64, 64, 20), behind=64 * 64 * 40))
    (root / "p" / "flair.json").symlink_to("/dev/zero")
    return root


def encoder(path: Path, value: object) -> TransUNet:
    torch.save({"cls_token": value}, path)
    return TransUNet("tiny", 32, "batch", path)


def under_other_names(path: Path, old: str, new: str) -> Path:
    """The same file of torch, whose entries are called otherwise."""
    return written(path, stored_zip([(name.replace(old, new), content) for name, content in entries(path)]))


def of_two_lists(path: Path, shown: Path) -> Path:
    """A file of torch with what another holds behind it: its end tells the place of its own list of entries, and the
    other's list lies before the end."""
    own, others = entries(path), dict(entries(shown))
    same = [(name, others.get(name.replace(path.stem, shown.stem, 1), b"")) for name, _ in own]
    first, second = stored_zip(own)[:-22], bytearray(stored_zip(same))
    length, at = struct.unpack_from("<II", second, len(second) - 10)
    start = len(first) - length
    moved = start - at
    for _ in own:
        lengths = struct.unpack_from("<HHH", second, at + 28)
        (place,) = struct.unpack_from("<I", second, at + 42)
        struct.pack_into("<I", second, at + 42, (place + moved) % 2**32)
        at += 46 + sum(lengths)
    struct.pack_into("<I", second, len(second) - 6, start)
    return written(path, first + second)


def entries(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def stored_zip(files: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
    return file.getvalue()


def task(folder: Path, site: str) -> object:
    about = {"name": "x", "title": "t", "region": "r", "channels": ["a"], "labels": [1], "site": site}
    about["normalisation"] = "volume-foreground-v1"
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in about.items())
    return read_task(written(folder / "pattern.toml", text.encode())).site_of("a" * 70)


def of_two_sizes(folder: Path) -> object:
    small = written(folder / "two" / "a_1.png", picture((64, 64), mode="RGB"))
    return read_volume([small] + [written(folder / "two" / "b.png", picture((4096, 4096), mode="RGB"))] * 60)


def traps(folder: Path) -> dict[str, Callable[[], object]]:
    """Every trap by its name: what reads it."""
    choose_cache(folder / "cache")

    def page(*files: tuple[str, bytes]) -> Callable[[], object]:
        return lambda: read_case(list(files))

    def dicom_of(name: str, content: Callable[[], bytes]) -> Callable[[], object]:
        return lambda: prepared(written(folder / f"{name}.dcm", content()))

    small = picture((64, 64))
    return {
        "a ZIP of a name that looks like many copies": page(
            ("p.zip", zipped([(" (conflict" * 6000 + "_1.png", small), ("b_2.png", small)]))
        ),
        "a name of 60,000 underscores": page(("_" * 60_000 + "x.png", small), ("b_2.png", small)),
        "a TIFF of 60,000 pictures": page(("a_1.tif", tiff_of_pictures(60_000))),
        "a TIFF of a tile of 32,768²": page(("a_1.tif", tiff_of_a_tile(32_768))),
        "a big TIFF that begins behind everything": page(
            ("a_1.tif", b"II\x2b\0\x08\0\0\0" + b"\xff" * 8 + bytes(100))
        ),
        "a JPEG of 3,000 passes": page(("a_1.jpg", jpeg_of_passes(3_000, 2048))),
        "the same on disk": lambda: read_slice(written(folder / "j_1.jpg", jpeg_of_passes(3_000, 2048))),
        "the same in a DICOM file": dicom_of("passes", dicom_of_passes),
        "a frame of 4 million precincts": dicom_of(
            "precincts",
            lambda: stored(
                dicom(side=2048, syntax=JPEG2000Lossless, PixelData=encapsulate([frame_of_precincts(2048)]))
            ),
        ),
        "a deflated position of 50 MiB": dicom_of("numbers", lambda: deflated(of_numbers(50))),
        "a deflated header of 3 million items": dicom_of("items", lambda: deflated(of_items)),
        "a deflated header of 1.2 million elements": dicom_of("elements", lambda: deflated(of_elements)),
        "a header of a million elements in preparation": dicom_of("small", dicom_of_small_elements),
        "pixels in 15 million pieces": dicom_of("pieces", dicom_of_pieces),
        "900,000 items in the other order of bytes": dicom_of("order", big_endian_items),
        "a model with a bytearray of 2 GiB": lambda: load_checkpoint(
            checkpoint_of(folder, "bytes", with_state(ManyBytes()))
        ),
        "the same under a name in capitals": lambda: load_checkpoint(
            under_other_names(
                checkpoint_of(folder, "capitals", with_state(ManyBytes())), "data.pkl", "DATA.PKL"
            )
        ),
        "the same in a list that torch alone sees": lambda: load_checkpoint(
            of_two_lists(
                checkpoint_of(folder, "lists", with_state(ManyBytes())),
                checkpoint_of(folder, "plain", lambda content: None),
            )
        ),
        "an encoder with a bytearray of 2 GiB": lambda: encoder(folder / "encoder.pth", ManyBytes()),
        "a pipe among the slices": lambda: load_dataset(with_pipe(folder / "pipe")),
        "a device among the slices": lambda: load_dataset(with_link(folder / "device", "p_2_mask.png")),
        "a volume.json that never ends": lambda: load_dataset(with_link(folder / "json", "volume.json")),
        "a dcm2niix file that never ends": lambda: prepared_nifti(scan_with_link(folder / "n3")),
        "links that name a folder 2⁴⁰ times": lambda: list(walk(with_mesh(folder / "mesh"))),
        "a small slice before 60 of 4096×4096": lambda: of_two_sizes(folder),
        "a patient of 30 slices of 4096×4096": lambda: load_dataset(patient(folder / "large", 4096, 30).parent),
        "a pattern of 40 choices": lambda: task(folder, "(?:a|aa)" * 40 + "(b)"),
    } | traps_of_masks()  # fmt: skip
