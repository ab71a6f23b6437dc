"""Files as readers open them, good and bad: pictures of many kinds, NIfTI scans, archives."""

import gzip
import io
import json
import struct
import warnings
import zipfile
import zlib

import nibabel
import numpy as np
from bombs import tiff_of_tags, zeros_deflated
from PIL import ExifTags, Image
from traps import tags, tiff_of_a_tile

RNG = np.random.default_rng(3)
COLOURS = RNG.integers(0, 255, (40, 52, 3), np.uint8)
GREY = COLOURS[..., 0]
TRANSPARENCY = np.where(GREY > 99, 255, 0).astype(np.uint8)
BITS = Image.fromarray(GREY).convert("1")


def turned(kind) -> bytes:
    """A picture that viewers show turned by a quarter."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return picture(COLOURS, kind, exif=exif)


def picture(pixels, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(
        file, format=kind, **options
    )
    return file.getvalue()


def palette(colours=256) -> Image.Image:
    return Image.fromarray(COLOURS).quantize(colours)


def with_alpha(mode, alpha=TRANSPARENCY) -> Image.Image:
    image = Image.fromarray(COLOURS).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    return image


PICTURES = {
    "TIFF": ("a_1.tif", picture(COLOURS, "TIFF")),
    "grey TIFF": ("a_1.tiff", picture(GREY, "TIFF")),
    "TIFF with LZW": ("a_1.tif", picture(COLOURS, "TIFF", compression="tiff_lzw")),
    "deflated TIFF": ("a_1.tif", picture(COLOURS, "TIFF", compression="tiff_adobe_deflate")),
    "TIFF with a palette": ("a_1.tif", picture(palette(), "TIFF")),
    "PNG": ("a_1.png", picture(COLOURS)),
    "grey PNG": ("a_1.png", picture(GREY)),
    "PNG of bits": ("a_1.png", picture(BITS)),
    "PNG with a palette": ("a_1.png", picture(palette())),
    "PNG with a small palette": ("a_1.png", picture(palette(13), bits=4)),
    "PNG with alpha": ("a_1.png", picture(with_alpha("RGB"))),
    "grey PNG with alpha": ("a_1.png", picture(with_alpha("L"))),
    "a PNG named .tif": ("a_1.tif", picture(COLOURS)),
}
LAS = np.array([[-0.8, 0, 0, 5], [0, 0, 0.9, 0], [0, 2.5, 0, 0], [0, 0, 0, 1.0]])
OBLIQUE = np.array([[0.9, 0.3, 0.0, 1], [-0.3, 0.9, 0.1, 2], [0.0, -0.1, 3.0, 3], [0, 0, 0, 1.0]])


def scan(
    affine=None, shape=(20, 24, 18), dtype=np.int16, forms=(1, 0), slope=None, order="<", seed=0
) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, shape).astype(dtype)
    if np.issubdtype(dtype, np.signedinteger):
        values *= 30
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine, header)
    image.set_sform(affine, forms[0])
    image.set_qform(affine, forms[1])
    if slope:
        image.header.set_slope_inter(*slope)
    return image.to_bytes()


RGB_VALUES = RNG.integers(0, 255, (20, 24, 18, 3)).astype(np.uint8)
RGB = np.ascontiguousarray(RGB_VALUES).view([("R", "u1"), ("G", "u1"), ("B", "u1")]).squeeze(-1)
# a scale of 0 says that there is none: tools other than nibabel write it
SLOPE_0 = scan(LAS)[:112] + bytes(8) + scan(LAS)[120:]
STEEP = np.array([[0.7, 0.3, 0, 1], [-0.4, -0.4, -0.9, 2], [-0.8, -0.9, -0.6, 3], [0, 0, 0, 1.0]])
_both = nibabel.Nifti1Image(np.random.default_rng(0).integers(0, 900, (20, 24, 18)).astype(np.int16), OBLIQUE)
_both.set_qform(LAS, 2)
_both.set_sform(OBLIQUE, 1)
FORMS = _both.to_bytes()
SPARSE = np.random.default_rng(0).integers(0, 900, (20, 24, 18)).astype(np.int16) * (np.arange(24) < 4)[
    :, None
].astype(np.int16)
SPARSE[:, 10] = -9
SCANS = {
    "int16": scan(LAS),
    "bytes stay as they are": scan(LAS, dtype=np.uint8),
    "float32": scan(LAS, dtype=np.float32),
    "float64": scan(LAS, dtype=np.float64),
    "uint16": scan(LAS, dtype=np.uint16),
    "int32": scan(LAS, dtype=np.int32),
    "big-endian": scan(LAS, order=">"),
    "three volumes": scan(LAS, (20, 24, 18, 3)),
    "oblique": scan(OBLIQUE),
    "colours": nibabel.Nifti1Image(RGB, LAS).to_bytes(),
    "qform alone": scan(np.diag([-1, 2, 3, 1.0]), forms=(0, 1)),
    "both forms": scan(OBLIQUE, forms=(1, 2)),
    "neither form": scan(forms=(0, 0)),
    "scaled": scan(LAS, slope=(0.5, -20)),
    "scaled bytes": scan(LAS, dtype=np.uint8, slope=(2, 0)),
    "turned": scan(np.diag([1, -1, -1, 1.0])),
    "slope 0": SLOPE_0,
    "int8": scan(LAS, dtype=np.int8),
    "forms that differ": FORMS,
    "steep": scan(STEEP),
    "mostly background": nibabel.Nifti1Image(SPARSE, LAS).to_bytes(),
}


def zipped(files, kind=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return file.getvalue()


VOLUME = [(f"anna_{k}.tif", picture((COLOURS // 13 * k).astype(np.uint8), "TIFF")) for k in range(1, 13)]
MASKS = [
    (f"anna_{k}_mask.png", picture(255 * np.greater(GREY, 20 * k).astype(np.uint8))) for k in range(1, 13)
]
TRUTH = nibabel.Nifti1Image(RNG.integers(0, 2, (20, 24, 18)).astype(np.uint8), LAS).to_bytes()
MEASURED = json.dumps(
    {"version": 1, "spacing_mm": [5.0, 0.9, 0.8], "slice_positions_mm": list(range(12))}
).encode()
READ = (
    {name: [file] for name, file in PICTURES.items()}
    | {f"NIfTI: {name}": [("scan.nii", content)] for name, content in SCANS.items()}
    | {
        "a volume in any order": VOLUME[::-1],
        "with masks": VOLUME + MASKS,
        "a ZIP": [("p.zip", zipped([*VOLUME, *MASKS]))],
        "a ZIP of folders": [
            (
                "p.zip",
                zipped([("__MACOSX/._a", b""), ("p/readme.txt", b""), *[(f"p/x/{n}", c) for n, c in VOLUME]]),
            )
        ],
        "a ZIP of a NIfTI": [("p.zip", zipped([("p/scan.nii.gz", gzip.compress(SCANS["int16"]))]))],
        "packed NIfTI": [("scan.nii.gz", gzip.compress(SCANS["int16"]))],
        "NIfTI with its mask": [("scan.nii", SCANS["int16"]), ("scan_seg.nii.gz", gzip.compress(TRUTH))],
        "without numbers": [("b.png", picture(COLOURS)), ("a.png", picture(GREY))],
        "folders with backslashes": [(f"x\\anna\\{n}", c) for n, c in VOLUME],
        "nameless": [("anna/1.png", picture(GREY)), ("anna/2.png", picture(GREY))],
        "a ZIP with hidden files": [
            (
                "p.zip",
                zipped(
                    [(".DS_Store", b""), ("p/.x/b_1.tif", b""), *[(f"p/{n}", c) for n, c in VOLUME + MASKS]]
                ),
            )
        ],
        "a prepared patient": [
            *VOLUME,
            ("volume.json", MEASURED),
            ("anna_contact_sheet.png", picture(COLOURS)),
        ],
        "glued numbers": [(f"IM{k + 1}.tif", content) for k, (_, content) in enumerate(VOLUME)],
        "numbers in brackets": [(f"scan ({k + 1}).tif", content) for k, (_, content) in enumerate(VOLUME)],
        "kinds of scans": [("t1.png", picture(COLOURS)), ("t2.png", picture(GREY))],
        "a folder without numbers": [
            ("p.zip", zipped([(f"anna/{'abc'[k]}.tif", VOLUME[k][1]) for k in range(3)]))
        ],
        "a folder with an odd name": [
            (
                "p.zip",
                zipped([*((f"p/{name}", content) for name, content in VOLUME), ("p/z.tif", VOLUME[0][1])]),
            )
        ],
        "two trees": [
            *((f"p/images/{name}", content) for name, content in VOLUME),
            *((f"p/masks/{name.replace('_mask', '')}", content) for name, content in MASKS),
        ],
        "a mask of 0 and 1": [
            VOLUME[0],
            ("anna_1_mask.png", picture(np.greater(GREY, 20).astype(np.uint8))),
        ],
        "a mask too many": [*VOLUME, ("bert_1_mask.png", MASKS[0][1])],
        "capitals": [("ANNA_1.TIF", VOLUME[0][1])],
    }
)


def with_hole(content: bytes, size: int = 200) -> bytes:
    """The same bytes with zeros in the middle, as a bad disk or a broken copy leaves them."""
    middle = len(content) // 2
    return content[:middle] + bytes(size) + content[middle + size :]


def changed(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place:][1:]


def twice(name: str) -> bytes:
    """A ZIP that holds two files of one name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zipped([(name, VOLUME[0][1]), (name, VOLUME[1][1])])


STORED = gzip.compress(
    SCANS["int16"], 0
)  # damage within does not end the unpacking: only the checksum tells it
FLIPPED = bytearray(picture(COLOURS, compress_level=0))
FLIPPED[len(FLIPPED) // 2] ^= 1
FLIPPED = bytes(FLIPPED)


def following_itself(tiff: bytes) -> bytes:
    """A TIFF whose picture is followed by itself."""
    (start,) = struct.unpack_from("<I", tiff, 4)
    end = start + 2 + 12 * struct.unpack_from("<H", tiff, start)[0]
    return tiff[:end] + struct.pack("<I", start) + tiff[end + 4 :]


def beginning_at(byte: float) -> bytes:
    """A NIfTI file that says that its voxels begin there."""
    content = bytearray(SCANS["int16"])
    struct.pack_into("<f", content, 108, byte)
    return bytes(content)


BROKEN = {
    "empty": [("a_1.tif", b"")],
    "text": [("a_1.tif", b"Dear Dr Smith, enclosed please find")],
    "truncated TIFF": [("a_1.tif", VOLUME[0][1][:3000])],
    "truncated PNG": [("a_1.png", picture(COLOURS)[:2000])],
    "one pixel": [("a_1.png", picture(GREY[:1, :1]))],
    "20,000 a side": [("a_1.png", picture(Image.new("1", (20_000, 20_000))))],
    "20,000 a side, TIFF": [
        ("a_1.tif", picture(Image.new("1", (20_000, 20_000)), "TIFF", compression="tiff_adobe_deflate"))
    ],
    "CMYK": [("a_1.tif", picture(Image.new("CMYK", (40, 40)), "TIFF"))],
    "a fourth sequence": [("a_1.png", picture(with_alpha("RGB", GREY)))],
    "a second sequence": [("a_1.png", picture(with_alpha("L", GREY)))],
    "a fourth sequence, TIFF": [("a_1.tif", picture(with_alpha("RGB", GREY), "TIFF"))],
    "16 bits": [("a_1.png", picture(np.full((40, 40), 40_000, np.uint16)))],
    "16 bits, TIFF": [("a_1.tif", picture(np.full((40, 40), 40_000, np.uint16), "TIFF"))],
    "floats, TIFF": [("a_1.tif", picture(np.full((40, 40), 0.5, np.float32), "TIFF"))],
    "animated": [
        ("a_1.png", picture(GREY, save_all=True, append_images=[Image.fromarray(GREY[::-1].copy())]))
    ],
    "two pages": [("a_1.tif", picture(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]))],
    "mixed sizes": [*VOLUME, ("anna_13.png", picture(GREY[:30]))],
    "two patients": [VOLUME[0], ("bert_1.tif", VOLUME[1][1])],
    "numbered and not": [VOLUME[0], ("scan.png", picture(GREY))],
    "two masks": [*VOLUME, *MASKS, ("anna_1_mask.tif", MASKS[0][1])],
    "one slice twice": [*VOLUME, (VOLUME[0][0].replace(".tif", ".png"), VOLUME[0][1])],
    "one name twice": [VOLUME[0], *VOLUME],
    "two patients in a folder": [("p.zip", zipped([VOLUME[0], ("bert_1.tif", VOLUME[1][1])]))],
    "too many": [(f"a_{k}.png", b"") for k in range(2000)],
    "masks alone": MASKS,
    "no mask for one": VOLUME + MASKS[:-1],
    "a grey mask": [VOLUME[0], ("anna_1_mask.png", picture(GREY))],
    "a mask of another size": [VOLUME[0], ("anna_1_mask.png", picture(np.zeros((20, 20), np.uint8)))],
    "a broken volume.json": [*VOLUME, ("volume.json", b"{")],
    "an empty volume.json": [*VOLUME, ("volume.json", b"{}")],
    "a volume.json of lists": [*VOLUME, ("volume.json", b"[1]")],
    "the volume.json of others": [*VOLUME[:3], ("volume.json", MEASURED)],
    "no sizes": [*VOLUME, ("volume.json", MEASURED.replace(b"5.0", b"0.0"))],
    "of a later version": [*VOLUME, ("volume.json", MEASURED.replace(b": 1,", b": 2,"))],
    "two volume.json": [*VOLUME, ("volume.json", MEASURED), ("b/volume.json", MEASURED)],
    "broken ZIP": [("p.zip", b"PK\3\4 and no more")],
    "empty ZIP": [("p.zip", zipped([]))],
    "ZIP and more": [("p.zip", zipped(VOLUME)), VOLUME[0]],
    "a hole in a ZIP": [("p.zip", with_hole(zipped(VOLUME)))],
    "a hole in a ZIP that packs nothing": [("p.zip", with_hole(zipped(VOLUME, zipfile.ZIP_STORED)))],
    "a hole in a gzip": [("s.nii.gz", with_hole(STORED))],
    "a checksum that is another's": [("s.nii.gz", changed(STORED, -6))],
    "a length that is another's": [("s.nii.gz", changed(STORED, -2))],
    "a hole in the second part of a gzip": [("s.nii.gz", gzip.compress(b"") + with_hole(STORED))],
    "two files of one name": [VOLUME[0], VOLUME[0]],
    "two files of one name in a ZIP": [("p.zip", twice("p/anna_1.tif"))],
    "two masks of one slice": [VOLUME[0], MASKS[0], ("anna_1_mask.tif", picture(GREY * 0, "TIFF"))],
    "a mask and its copy": [*VOLUME[:2], MASKS[0], ("anna_1_mask (1).png", MASKS[0][1])],
    "a slice and its copy": [*VOLUME[:2], ("anna_2 - Copy.png", picture(COLOURS))],
    "a turned JPEG": [("a_1.jpg", turned("JPEG"))],
    "a turned PNG": [("a_1.png", turned("PNG"))],
    "a turned TIFF": [("a_1.tif", turned("TIFF"))],
    "two slices of one number": [*VOLUME[:2], ("anna_02.png", picture(COLOURS))],
    "slices 10⁹ mm apart": [*VOLUME, ("volume.json", MEASURED.replace(b"5.0", b"1e9"))],
    "climbing ZIP": [("p.zip", zipped([("../../etc/a_1.tif", VOLUME[0][1])]))],
    "ZIP of a disk": [("p.zip", zipped([("C:/a_1.tif", b"")]))],
    "ZIP bomb": [("p.zip", zipped([("a_1.tif", bytes(300 << 20))]))],
    "gzip bomb": [("s.nii.gz", gzip.compress(bytes(300 << 20)))],
    "no NIfTI": [("s.nii", b"no scan" * 99)],
    "truncated NIfTI": [("s.nii", SCANS["int16"][:9000])],
    "no gzip": [("s.nii.gz", b"no scan")],
    "truncated gzip": [("s.nii.gz", gzip.compress(SCANS["int16"])[:-99])],
    "five volumes": [("s.nii", scan(LAS, (20, 24, 18, 5)))],
    "a flat NIfTI": [("s.nii", scan(LAS, (20, 24)))],
    "two NIfTI": [("s.nii", SCANS["int16"]), ("t.nii", SCANS["int16"])],
    "not finite": [("s.nii", nibabel.Nifti1Image(np.full((20, 24, 18), np.nan, np.float32), LAS).to_bytes())],
    "a strip": [("a_1.png", picture(GREY[:15]))],
    "too many pixels": [(f"a_{k}.png", picture(Image.new("L", (1024, 1024)))) for k in range(17)],
    "two folders": [(f"{side}/anna_{k}.tif", VOLUME[k][1]) for k, side in enumerate("xy")],
    "a colour TIFF that is none": [("a_1.tif", picture(Image.new("YCbCr", (40, 40)), "TIFF"))],
    "a PNG with a flipped bit": [("a_1.png", FLIPPED)],
    "a mask of three volumes": [("s.nii", scan(LAS)), ("s_mask.nii", scan(LAS, (20, 24, 18, 3), np.uint8))],
    "a name of 60,000 signs": [(" (conflict" * 6000 + "_1.png", VOLUME[0][1]), ("b_2.png", VOLUME[0][1])],
    "a TIFF that follows itself": [("a_1.tif", following_itself(picture(COLOURS, "TIFF")))],
    "a TIFF of 60,000 tags": [("a_1.tif", tiff_of_tags(60_000))],
    "a tile that is larger than a slice": [("a_1.tif", tiff_of_a_tile(32_768))],
    "voxels within the header": [("s.nii", beginning_at(0))],
    "voxels that begin nowhere": [("s.nii", beginning_at(float("nan")))],
    "a mask of another scan": [("s.nii", scan(LAS)), ("s_mask.nii", scan(LAS, (20, 24, 19), np.uint8))],
}


def strip_that_unpacks() -> bytes:
    """A TIFF of 64×64 pixels whose strip unpacks to 300 MiB."""
    data = b"\x78\xda" + zeros_deflated(300) + bytes(4)
    one = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)]
    one += [(273, 4, 1, 8 + 2 + 12 * 9 + 4), (277, 3, 1, 1), (278, 4, 1, 64), (279, 4, 1, len(data))]
    return b"II*\0" + struct.pack("<I", 8) + tags(*one) + data


def pixels_that_unpack() -> bytes:
    """A PNG of 64×64 pixels whose pixels unpack to 300 MiB."""
    plain, data = picture(Image.new("L", (64, 64))), b"\x78\xda" + zeros_deflated(300) + bytes(4)
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return plain[: plain.index(b"IDAT") - 4] + chunk + plain[-12:]


def tiled_tiff() -> bytes:
    """An RGB TIFF of one tile: its strip's tags become a tile's."""
    content = picture(COLOURS[:32, :32], "TIFF")
    image = Image.open(io.BytesIO(content))
    tags = {322: 32, 323: 32, 324: image.tag_v2[273], 325: image.tag_v2[279]}
    start = int.from_bytes(content[4:8], "little")
    entries = [
        content[start + 2 + 12 * k :][:12]
        for k in range(int.from_bytes(content[start : start + 2], "little"))
    ]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], "little") not in (273, 278, 279)]
    for tag, value in tags.items():
        value = value[0] if isinstance(value, tuple) else value
        kept.append(
            tag.to_bytes(2, "little")
            + (4).to_bytes(2, "little")
            + (1).to_bytes(4, "little")
            + value.to_bytes(4, "little")
        )
    directory = len(kept).to_bytes(2, "little") + b"".join(kept) + bytes(4)
    return content[:4] + len(content).to_bytes(4, "little") + content[8:] + directory
