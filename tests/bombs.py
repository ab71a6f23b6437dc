"""Small files that ask for a machine's memory, through every way in. Run as a script it reads each of them
and prints a line of JSON: name, what came out, the memory that it took, and the seconds.

    python tests/bombs.py FOLDER       an empty folder, for the ways that read from disk
"""

import bz2
import gzip
import io
import json
import resource
import signal
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pydicom
import torch
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    MRImageStorage,
    RLELossless,
)

from checkpoint import describe, load_checkpoint, update_metadata
from common import MedFLError
from data.prepare_task import read_nifti
from deployment.app.card import card_rows
from deployment.app.cases import add_truth, read_case
from radiology.bounds import InMemory
from radiology.nifti import find_volumes, load_volume
from radiology.segmentation import read_segmentation
from radiology.series import find_series, load_series
from radiology.unpacking import unpack
from scans.nifti_file import read_content
from scans.pictures import read_mask, read_slice, read_volume
from scans.spacing import read_spacing
from split import load_split
from tasks import read_task
from transunet import TransUNet

MIB = 2**20
LONGEST = 20  # seconds; what is refused takes one or two, most of it to make the file
Files = list[tuple[str, bytes]]


def zeros_deflated(mib: int) -> bytes:
    """So many MiB of zeros as a raw deflate stream, made without holding them: one piece, repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    piece = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * mib + b"\x03\x00"


def zeros_by_bzip2(mib: int) -> bytes:
    packer = bz2.BZ2Compressor()
    return b"".join([packer.compress(bytes(MIB)) for _ in range(mib)] + [packer.flush()])


def gzipped(head: bytes, mib: int) -> bytes:
    """A gzip file of `head` and so many MiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    return gzip.compress(b"")[:10] + start + zeros_deflated(mib) + bytes(8)


def gzipped_lines(mib: int) -> bytes:
    """A gzip file of a NRRD header that goes on for so many MiB of comments."""
    head = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 64 64 20\nencoding: raw\n"
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    piece = packer.compress(b"#\n" * (MIB // 2)) + packer.flush(zlib.Z_FULL_FLUSH)
    text = b"#\n" * (MIB // 2 * mib)
    end = struct.pack("<II", zlib.crc32(text), len(text))
    return gzip.compress(head) + gzip.compress(b"")[:10] + piece * mib + b"\x03\x00" + end


def gzipped_text(mib: int) -> bytes:
    """A gzip file of a NRRD file whose voxels are so many MiB of text, each number of which would take eight bytes."""
    head = b"NRRD0004\ntype: double\ndimension: 3\nsizes: 64 64 20\nencoding: ascii\n\n"
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    text = b"1 " * (MIB // 2 * mib)
    piece = packer.compress(text[:MIB]) + packer.flush(zlib.Z_FULL_FLUSH)
    end = struct.pack("<II", zlib.crc32(text), len(text))
    return gzip.compress(head) + gzip.compress(b"")[:10] + piece * mib + b"\x03\x00" + end


def zipped(files: Files) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return file.getvalue()


def zip_that_lies(mib: int, claimed: int, kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A ZIP of one entry that unpacks to so many MiB and says that it has `claimed` bytes."""
    name = b"a_1.png"
    content = zeros_deflated(mib) if kind == zipfile.ZIP_DEFLATED else zeros_by_bzip2(mib)
    about = struct.pack("<HHHHHIIIHH", 20, 0, kind, 0, 33, 0, len(content), claimed, len(name), 0)
    local = b"PK\3\4" + about + name + content
    central = b"PK\1\2" + struct.pack("<H", 20) + about + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    return local + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


def picture(size: tuple[int, int], kind: str = "PNG", mode: str = "L", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def png_that_claims(columns: int, rows: int) -> bytes:
    """The start of a PNG of this size, and hardly anything of its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def png_with_text(mib: int) -> bytes:
    """A PNG whose comment unpacks to so many MiB."""
    plain = picture((64, 64))
    text = b"Comment\0\0" + b"\x78\xda" + zeros_deflated(mib) + bytes(4)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return plain[:33] + chunk + plain[33:]


def tiff_of_tags(entries: int, big: bool = False) -> bytes:
    """A TIFF whose tags all name the same 60,000 bytes."""
    start, entry, count, offset = (
        ("<Q", "<HHQQ", "<Q", b"II\x2b\0\x08\0\0\0") if big else ("<I", "<HHII", "<H", b"II*\0")
    )
    head = offset + struct.pack(start, 16 if big else 8)
    tags = b"".join(struct.pack(entry, 1000 + k, 1, 60_000, 16) for k in range(entries))
    return head + struct.pack(count, entries) + tags + bytes(8 + 60_000)


def nifti(shape: tuple[int, ...], kind: int = 4, bits: int = 16, behind: int = 64) -> bytes:
    """A NIfTI header of this shape and data type, and so many bytes behind it."""
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<hh", head, 70, kind, bits)
    struct.pack_into("<8f", head, 76, *[1.0] * 8)
    struct.pack_into("<ff", head, 108, 352.0, 2.0)  # where voxels begin, and a slope
    head[344:348] = b"n+1\0"
    return bytes(head) + bytes(behind)


def dicom(frames: int = 1, side: int = 64, syntax: str = ExplicitVRLittleEndian, **tags) -> pydicom.Dataset:
    file = pydicom.Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = syntax
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = MRImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    file.StudyInstanceUID, file.SeriesInstanceUID, file.PatientID, file.Modality = "1.2", "1.2.1", "p", "MR"
    file.SeriesDescription = "FLAIR"
    file.Rows = file.Columns = side
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    file.PixelSpacing, file.SliceThickness = [1, 1], 3
    file.ImageOrientationPatient, file.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    if frames != 1:
        file.NumberOfFrames = frames
    for name, value in tags.items():
        setattr(file, name, value)
    if "PixelData" not in file:
        file.PixelData = encapsulate([bytes(64)]) if syntax == RLELossless else bytes(64 * 64 * 2)
    return file


def stored(file: pydicom.Dataset) -> bytes:
    content = io.BytesIO()
    file.save_as(content, enforce_file_format=True)
    return content.getvalue()


def dicom_deflated(mib: int) -> bytes:
    """A deflated DICOM file with a private element of so many MiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    plain = stored(dicom())
    body = plain[plain.index(b"\x08\x00\x16\x00UI") :]
    element = struct.pack("<HH2sHI", 9, 0x1001, b"OB", 0, mib * MIB)
    start = packer.compress(body[: body.index(b"\x10\x00\x20\x00LO")] + element) + packer.flush(
        zlib.Z_FULL_FLUSH
    )
    meta = stored(dicom(syntax=DeflatedExplicitVRLittleEndian, PixelData=bytes(8)))
    return meta[: 144 + struct.unpack_from("<I", meta, 140)[0]] + start + zeros_deflated(mib)


def dicom_of_items(count: int, undefined: bool) -> bytes:
    """A DICOM file whose functional groups are so many empty items."""
    plain = stored(dicom(NumberOfFrames=4))
    end = plain.index(b"\xe0\x7f\x10\x00O")
    items = b"\xfe\xff\x00\xe0\0\0\0\0" * count
    length = 0xFFFFFFFF if undefined else len(items)
    sequence = struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, length) + items
    return plain[:end] + sequence + b"\xfe\xff\xdd\xe0\0\0\0\0" * undefined + plain[end:]


def dicom_of_elements(count: int, behind: bool) -> bytes:
    """A DICOM file with so many empty private elements, before or behind its pixels."""
    plain = stored(dicom())
    ends = len(plain) if behind else plain.index(b"\xe0\x7f\x10\x00O")
    first = 0x7FE1 if behind else 0x5201
    return plain[:ends] + empty_elements(first, count) + plain[ends:]


def empty_elements(group: int, count: int) -> bytes:
    """So many private elements from this group on."""
    return b"".join(
        struct.pack("<HH2sH", group + 2 * (k >> 15), (k & 0x7FFF) + 0x1000, b"LO", 0) for k in range(count)
    )


def dicom_of_nested_elements(number: int, count: int) -> bytes:
    """A slice with so many empty elements in one item of a sequence, whose end alone says how long it is."""
    plain = stored(dicom(FrameOfReferenceUID="1.9", SOPInstanceUID=f"1.2.3.{number}"))
    start, endless = plain.index(b"\xe0\x7f\x10\x00O"), struct.pack("<I", 0xFFFFFFFF)
    item = b"\xfe\xff\x00\xe0" + endless + empty_elements(0x5201, count) + b"\xfe\xff\x0d\xe0" + bytes(4)
    sequence = (
        struct.pack("<HH2sH", 0x5401, 0x1001, b"SQ", 0) + endless + item + b"\xfe\xff\xdd\xe0" + bytes(4)
    )
    return plain[:start] + sequence + plain[start:]


def large_j2k() -> bytes:
    return b"\xff\x4f\xff\x51" + struct.pack(">HH4I", 47, 0, 60_000, 60_000, 0, 0) + bytes(400)


def large_jpeg() -> bytes:
    return b"\xff\xd8\xff\xc3" + struct.pack(">HBHHB", 11, 16, 60_000, 60_000, 1) + bytes(400)


def checkpoint(folder: Path, name: str, change: Callable[[dict], None], packed: bool = False) -> Path:
    """A tiny model's file, with its content changed first."""
    torch.manual_seed(0)
    model = TransUNet("tiny", 32)
    content = {"model": dict(model.state_dict()), "metadata": describe(model)}
    change(content)
    if not isinstance(content["metadata"], str):
        content["metadata"] = json.dumps(content["metadata"])
    path = folder / f"{name}.pth"
    torch.save(content, path)
    if packed:
        with zipfile.ZipFile(path) as plain:
            files = [(entry.filename, plain.read(entry)) for entry in plain.infolist()]
        path.write_bytes(zipped(files))
    return path


def grown(path: Path, values: int) -> Path:
    """The same file, in which the tensor of 1,000 zeros claims so many values."""
    with zipfile.ZipFile(path) as plain:
        files = [(entry.filename, plain.read(entry)) for entry in plain.infolist()]
    claims = [(n, c.replace(b"M\xe8\x03", b"J" + struct.pack("<i", values))) for n, c in files]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in claims:
            archive.writestr(name, content)
    return path


def put(change: dict) -> Callable[[dict], None]:
    """A change of a checkpoint's architecture."""
    return lambda content: content["metadata"]["architecture"].update(change)


def with_state(value: object) -> Callable[[dict], None]:
    return lambda content: content.update(state={"weights": value})


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def prepared(path: Path) -> object:
    """What preparation makes of one DICOM file: it reads headers, then pixels."""
    found, refused = find_series([path])
    if refused:
        raise MedFLError(refused[0].why)
    return [load_series(series) for series in found]


def prepared_nifti(root: Path) -> object:
    found, refused = find_volumes(root, sorted(path for path in root.rglob("*") if path.is_file()))
    if refused:
        raise MedFLError(refused[0].why)
    return [load_volume(series) for series in found]


def small_case():
    return read_case([("a_1.png", picture((64, 64)))])


def bombs(folder: Path) -> dict[str, Callable[[], object]]:
    """Every bomb by its name: what reads it."""

    def page(*files: tuple[str, bytes]) -> Callable[[], object]:
        return lambda: read_case(list(files))

    def model(name: str, change: Callable[[dict], None], packed: bool = False) -> Callable[[], object]:
        return lambda: load_checkpoint(checkpoint(folder, name, change, packed))

    slices = [(f"a_{k}.png", picture((64, 64))) for k in (1, 2)]
    nested, long_number = b"[" * 200_000, b'{"version": 1, "spacing_mm": [1, 1, 1%s]}' % (b"0" * 4000)
    big = picture((4096, 4096), mode="RGB")
    claims = nifti((4000, 4000, 400), 64, 64)
    many = [(f"p_{k}.png", big) for k in range(60)]
    by_bzip2 = zip_that_lies(1200, 1000, zipfile.ZIP_BZIP2)
    return {
        "60 slices of 4096×4096 in a ZIP": page(("p.zip", zipped(many))),
        "60 slices of 4096×4096": page(*many),
        "a ZIP of 1.2 GiB in one entry": page(("p.zip", zip_that_lies(1200, 1200 * MIB))),
        "a ZIP that says it is small": page(("p.zip", zip_that_lies(1200, 1000))),
        "a ZIP of 1.2 GiB by bzip2": page(("p.zip", by_bzip2)),
        "the same in preparation": lambda: unpack(written(folder / "p.zip", by_bzip2), folder / "unpacked"),
        "a ZIP of 5,000 files": page(("p.zip", zipped([(f"{k}.png", b"") for k in range(5_000)]))),
        "a ZIP of 5,000 folders": page(("p.zip", zipped([(f"{k}/", b"") for k in range(5_000)]))),
        "a gzip of 1.2 GiB": page(("a.nii.gz", gzipped(nifti((64, 64, 20)), 1200))),
        "a gzip whose header asks for 6 GiB": page(("a.nii.gz", gzipped(claims, 300))),
        "a NIfTI of 6.8 GB in 416 bytes": page(("a.nii", nifti((1500, 1500, 1500)))),
        "a NIfTI of 32767³": page(("a.nii", nifti((32767,) * 3, 64, 64))),
        "a NIfTI of 30,000 volumes": page(("a.nii", nifti((64, 64, 64, 30_000)))),
        "a NIfTI of seven dimensions": page(("a.nii", nifti((200,) * 7))),
        "a NIfTI of negative sides": page(("a.nii", nifti((-64, -64, 64)))),
        "a NIfTI within the bounds, cut off": page(("a.nii", nifti((256, 256, 190), 64, 64))),
        "a NIfTI of 1024×1024×250 bytes": page(("a.nii.gz", gzipped(nifti((1024, 1024, 250), 2, 8, 0), 251))),
        "a NRRD of 60 million lines": page(("a.nii.gz", gzipped_lines(120))),
        "a NRRD of 60 million numbers as text": page(("a.nii.gz", gzipped_text(120))),
        "a mask of 6.8 GB": lambda: add_truth(small_case(), [("m.nii", nifti((1500, 1500, 1500)))]),
        "a volume.json of brackets": page(*slices, ("volume.json", nested)),
        "a volume.json of one number": page(*slices, ("volume.json", long_number)),
        "a volume.json of 200 MB": page(*slices, ("volume.json", b"[" + b"0," * (100 * MIB) + b"0]")),
        "a PNG that claims 60,000×60,000": page(("a_1.png", png_that_claims(60_000, 60_000))),
        "a PNG of 20,000×20,000": page(("a_1.png", picture((20_000, 20_000), mode="1"))),
        "a PNG whose comment is 1.2 GiB": page(("a_1.png", png_with_text(1200))),
        "a TIFF of 20,000×20,000": page(
            ("a_1.tif", picture((20_000, 20_000), "TIFF", "1", compression="tiff_adobe_deflate"))
        ),
        "a TIFF of 60,000 tags": page(("a_1.tif", tiff_of_tags(60_000))),
        "a big TIFF of 60,000 tags": page(("a_1.tif", tiff_of_tags(60_000, big=True))),
        "a TIFF of tags on disk": lambda: read_slice(written(folder / "t.tif", tiff_of_tags(60_000))),
        "a mask of tags": lambda: read_mask(written(folder / "m_mask.tif", tiff_of_tags(60_000))),
        "a folder of 8,000 slices": lambda: read_volume([written(folder / "s_1.png", picture((256, 256)))] * 8_000),
        "200 slices of 4096×4096 on disk": lambda: read_volume([written(folder / "b_1.png", big)] * 200),
        "a DICOM of 20 million frames": page(("a.dcm", stored(dicom(20_000_000)))),
        "a DICOM of 2³¹ frames": lambda: prepared(written(folder / "f.dcm", stored(dicom(2**31 - 1)))),
        "a DICOM of 65,535×65,535": page(("a.dcm", stored(dicom(side=65_535, syntax=RLELossless)))),
        "a deflated DICOM of 1.2 GiB": page(("a.dcm", dicom_deflated(1200))),
        "a deflated DICOM in preparation": lambda: prepared(written(folder / "d.dcm", dicom_deflated(1200))),
        "a DICOM of 2 million items": page(("a.dcm", dicom_of_items(2_000_000, undefined=False))),
        "the same of undefined length": page(("a.dcm", dicom_of_items(2_000_000, undefined=True))),
        "a DICOM of a million elements": page(("a.dcm", dicom_of_elements(1_100_000, behind=False))),
        "the same behind the pixels": page(("a.dcm", dicom_of_elements(1_100_000, behind=True))),
        "a DICOM of a million elements in a sequence": page(("a.dcm", dicom_of_nested_elements(1, 900_000))),
        "a ZIP of slices of 200,000 elements each": page(
            ("p.zip", zipped([(f"{k}.dcm", dicom_of_nested_elements(k, 200_000)) for k in range(1, 6)]))
        ),
        "a frame of JPEG 2000 of 60,000×60,000": lambda: prepared(
            written(folder / "j.dcm", stored(dicom(syntax=JPEG2000Lossless, PixelData=encapsulate([large_j2k()]))))
        ),
        "a frame of JPEG of 60,000×60,000": lambda: prepared(
            written(folder / "k.dcm", stored(dicom(syntax=JPEGLosslessSV1, PixelData=encapsulate([large_jpeg()]))))
        ),
        "a DICOM mask of 2³¹ frames": lambda: read_segmentation(
            InMemory("m.dcm", stored(dicom(2**31 - 1, Modality="SEG"))), None
        ),
        "a NIfTI of 32767³ in preparation": lambda: prepared_nifti(
            written(folder / "n1" / "p" / "flair.nii", nifti((32767,) * 3)).parent.parent
        ),
        "a NIfTI of 1.6 GB in preparation": lambda: prepared_nifti(
            written(folder / "n2" / "p" / "flair.nii.gz", gzipped(nifti((1000, 1000, 400)), 800)).parent.parent
        ),
        "a NIfTI that unpacks to more than it says": lambda: read_content(
            written(folder / "more.nii.gz", gzipped(nifti((64, 64, 20)), 1200))
        ),
        "a NIfTI of 6.8 GB of another task": lambda: read_nifti(
            written(folder / "task.nii", nifti((1500, 1500, 1500)))
        ),
        "a task of brackets": lambda: read_task(written(folder / "task.toml", b"a = " + nested)),
        "a task of 50,000 names within another": lambda: read_task(
            written(folder / "task.toml", b".".join([b"a"] * 50_000) + b" = 1")
        ),
        "a model of 96,000 pixels": model("side", put({"image_side": 16 * 6000})),
        "a model whose side is a word": model("word", put({"image_side": "big"})),
        "a small file that names the large network": model("base", put({"name": "base", "image_side": 1024})),
        "metadata of brackets": model("nested", lambda content: content.update(metadata="[" * 200_000)),
        "a packed model": model("packed", with_state(torch.zeros(MIB)), packed=True),
        "a value repeated 4 billion times": model("view", with_state(torch.zeros(1).expand(4_000_000_000))),
        "the same among the weights": model(
            "weights", lambda content: content["model"].update(huge=torch.zeros(1).expand(10**12))
        ),
        "a sparse tensor": model(
            "sparse",
            with_state(torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0), (10**12,))),
        ),
        "a tensor that claims 8 GB": lambda: load_checkpoint(
            grown(checkpoint(folder, "grown", with_state(torch.zeros(1000))), 2_000_000_000)
        ),
        "10,000 views of the same values": model("views", with_state(views())),
        "a changed threshold": lambda: update_metadata(
            checkpoint(folder, "threshold", lambda content: content["metadata"].update(threshold="x"))
        ),
        "a card of other types": lambda: card_rows(
            load_checkpoint(
                checkpoint(folder, "card", lambda c: c["metadata"].update(origin={"kind": "federated"}))
            ),
            "0" * 64,
        ),
        "a split of brackets": lambda: load_split(written(folder / "split.json", nested), set()),
        "millimetres of 10⁴⁰⁰": lambda: read_spacing(Path("volume.json"), 2, long_number),
    }  # fmt: skip


def views() -> list[torch.Tensor]:
    values = torch.zeros(MIB)
    return [values[k:] for k in range(10_000)]


def memory(field: str) -> int:
    """Bytes of this process: VmHWM, the most since it was last asked, or VmRSS."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error came of the limit, however it was called later."""
    return error is not None and (
        isinstance(error, MemoryError) or out_of_memory(error.__cause__ or error.__context__)
    )


class TooLongError(BaseException):
    """Which no reader takes for a fault of its file."""


def too_long(*_: object) -> None:
    raise TooLongError


def main() -> None:
    from traps import traps  # which makes its files as this does

    folder = Path(sys.argv[1])
    reads = bombs(folder) | traps(folder)
    signal.signal(signal.SIGALRM, too_long)
    small_case()  # what is loaded once is no bomb's
    _, limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 2**30 + 2**28, limit))
    for name, read in reads.items():
        Path("/proc/self/clear_refs").write_text("5")  # the most that was used is counted anew
        before, began = memory("VmRSS"), time.monotonic()
        signal.alarm(LONGEST)
        try:
            told = f"accepted: {type(read()).__name__}"
        except MedFLError as error:
            told = f"refused: {error}" if not out_of_memory(error) else "out of memory"
        except BaseException as error:  # noqa: B036  the test names what came
            told = f"{type(error).__name__}: {str(error)[:200]}"
        signal.alarm(0)
        print(json.dumps([name, told, memory("VmHWM") - before, time.monotonic() - began]), flush=True)


if __name__ == "__main__":
    main()
