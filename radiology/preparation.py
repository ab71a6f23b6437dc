"""One study's series as a volume in the dataset's layout: channels aligned with FLAIR, 8 bits, mask, and notes for a
reader."""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image

from common import MedFLError
from radiology.contours import read_structure_set
from radiology.geometry import POOR, agreement, register, resample, resample_mask, to_axial, to_uint8
from radiology.nifti import load_counted, read_labels
from radiology.rules import CHANNELS, FLAIR, Rules
from radiology.segmentation import MANUFACTURER, read_segmentation
from radiology.series import Series, load_series
from radiology.studies import Study
from storage.files import write_json

LOST = 0.1  # share of a mask's volume; a larger change is reported
TEXT_SHARE, TEXT_PIXELS, TEXT_LEVEL = (
    0.5,
    20,
    0.2,
)  # share of slices with the same value at a pixel; number of such pixels; share of the 99.9th percentile


@dataclass(frozen=True)
class Prepared:
    """A study in the dataset's layout.

    volume: (S, 256, 256, 3) uint8. mask: (S, 256, 256) uint8 0 or 255, or None. about: the content of volume.json.
    notes: what a person should know, in sentences that quote nothing from the source. failures: why a chosen series
    could not be used, by its uid; these may name files. grid: an empty image with the geometry of the slices.
    """

    volume: np.ndarray
    mask: np.ndarray | None
    about: dict
    notes: tuple[str, ...]
    failures: dict[str, str]
    grid: sitk.Image


def prepare(study: Study, rules: Rules) -> Prepared:
    """A study's series, read, aligned and in 8 bits. Raises MedFLError if the FLAIR can't be read or is blank."""
    flair, notes = _load(FLAIR, study.channels[FLAIR])
    notes += [
        f"{line.used_as} was taken {line.why}"
        for line in study.lines
        if line.used_as and ", though" in line.why
    ]
    fixed, told = to_axial(flair)
    notes += ([f"FLAIR was {told}"] if told else []) + _text_notes(FLAIR, study.channels[FLAIR], flair)
    grids, transforms, failures = {FLAIR: _grid_of(flair)}, {FLAIR: sitk.Transform()}, {}
    planes = {FLAIR: to_uint8(sitk.GetArrayViewFromImage(fixed))}
    del flair
    if not planes[FLAIR].any():
        raise MedFLError("its FLAIR is blank: every pixel has the same value; export it again")
    for channel in CHANNELS:
        series = study.channels.get(channel)
        if channel != FLAIR and series is not None:
            try:
                image, told_of_values = _load(channel, series)
                transform = register(image, fixed, _same_frame(series, study.channels[FLAIR]))
                moved = resample(image, fixed, transform)
                planes[channel] = _not_blank(to_uint8(sitk.GetArrayViewFromImage(moved)))
            except MedFLError as error:
                failures[series.uid] = str(error)
            else:
                grids[channel], transforms[channel] = _grid_of(image), transform
                notes += (
                    told_of_values
                    + _text_notes(channel, series, image)
                    + _alignment_notes(channel, agreement(moved, fixed))
                )
        if channel not in planes:
            planes[channel] = planes[FLAIR]
            notes.append(f"{channel} is missing or can't be used, so FLAIR stands in")
    mask = None
    if study.mask is not None:
        try:
            mask = _read_mask(study.mask, study.mask_of, rules, grids, transforms, fixed, notes)
        except MedFLError as error:
            failures[study.mask.uid] = str(error)
            notes.append("its mask can't be used; the report says why")
    volume = np.stack([planes[channel] for channel in CHANNELS], axis=-1)
    return Prepared(
        volume, mask, _about(study.channels[FLAIR], fixed), tuple(notes), failures, _grid_of(fixed)
    )


def _load(channel: str, series: Series) -> tuple[sitk.Image, list[str]]:
    """A series' pixels, and notes about its values."""
    if series.modality != "NIfTI":
        return load_series(series), []
    image, odd = load_counted(series)
    return image, [f"{odd:,} values of {channel} were not finite and became background"] * bool(odd)


def _grid_of(image: sitk.Image) -> sitk.Image:
    """An empty image on the same grid, with a quarter of the memory."""
    grid = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    grid.CopyInformation(image)
    return grid


def _same_frame(one: Series, other: Series) -> bool:
    """Whether two series were measured in the same coordinates. NIfTI does not say; the files of a study are assumed
    to be."""
    return one.frame_of_reference == other.frame_of_reference and (
        bool(one.frame_of_reference) or one.modality == "NIfTI"
    )


def _not_blank(plane: np.ndarray) -> np.ndarray:
    if not plane.any():
        raise MedFLError("it does not overlap with FLAIR, or every pixel has the same value")
    return plane


def _alignment_notes(channel: str, found: float) -> list[str]:
    if found >= POOR:
        return []
    return [
        f"{channel} may be poorly aligned with FLAIR (agreement of edges {found:.2f}, usually above "
        f"{POOR}): look at its contact sheet"
    ]


def _text_notes(channel: str, series: Series, image: sitk.Image) -> list[str]:
    """A warning if a series says that it has burnt-in text, is a secondary capture, or has the same bright pixels in
    the corners of many slices."""
    volume = sitk.GetArrayViewFromImage(image)
    rows, columns = (np.linspace(-1, 1, n) for n in volume.shape[1:])
    corners = volume[:, np.hypot(rows[:, None], columns[None, :]) > 1]
    usual = np.median(corners, axis=0)
    level = volume.min() + TEXT_LEVEL * (np.percentile(volume[::4, ::4, ::4], 99.9) - volume.min())
    fixed = ((corners == usual).mean(axis=0) >= TEXT_SHARE) & (usual > level)
    if not series.burnt_in and fixed.sum() < TEXT_PIXELS:
        return []
    return [
        f"{channel} may carry burnt-in text, which can name the patient: look at its contact sheet before "
        f"anything leaves"
    ]


def _read_mask(
    series: Series,
    of: str | None,
    rules: Rules,
    grids: dict,
    transforms: dict,
    fixed: sitk.Image,
    notes: list[str],
) -> np.ndarray:
    """A study's mask on the grid of `fixed`, (S, H, W) uint8 0 or 255. of: the channel that it was drawn on, None for
    NIfTI. Raises MedFLError for a mask that can't be used."""
    if series.modality == "NIfTI":
        channels = [FLAIR, *(c for c in grids if c != FLAIR)]
        labels, place = read_labels(series, rules.labels, [grids[c] for c in channels])
        channel = channels[place]
    else:
        channel = of
        if channel not in grids:
            raise MedFLError(f"it is a segmentation of the {channel} series, which can't be used")
        file, grid = series.files[0], grids[channel]
        if series.modality == "RTSTRUCT":
            labels = read_structure_set(file, grid)
        else:
            labels = read_segmentation(file, grid, rules.labels)
        if series.manufacturer == MANUFACTURER:
            notes.append("its mask was drawn by a network of MedFL, not by a person")
    mask = resample_mask(labels, fixed, transforms[channel])
    before = np.count_nonzero(sitk.GetArrayViewFromImage(labels)) * np.prod(labels.GetSpacing())
    after = np.count_nonzero(mask) * np.prod(fixed.GetSpacing())
    if not after:
        raise MedFLError("it marks nothing within FLAIR")
    if abs(after - before) > LOST * before:
        notes.append(
            f"the mask's volume changed from {before / 1000:.1f} to {after / 1000:.1f} cm³ on FLAIR's slices"
        )
    return mask


def _about(flair: Series, fixed: sitk.Image) -> dict:
    """The content of volume.json: from the source only field strength, manufacturer and model."""
    column, row, between = fixed.GetSpacing()
    normal = np.array(fixed.GetDirection()).reshape(3, 3)[:, 2]
    positions = float(np.dot(fixed.GetOrigin(), normal)) + between * np.arange(fixed.GetSize()[2])
    return {
        "version": 1,
        "spacing_mm": [round(v, 4) for v in (between, row, column)],
        "slice_positions_mm": positions.round(3).tolist(),
        "field_strength_t": flair.field_strength,
        "manufacturer": _without_patient(flair.manufacturer, flair),
        "model": _without_patient(flair.model, flair),
    }


def _without_patient(text: str, series: Series) -> str | None:
    """A tag's text about the scanner. None if it is empty, or if somebody typed patient data there: a word of the
    patient's data, or the patient's number, name or dates in any spelling."""
    name, born, _, number = (*series.person, *[""] * 4)[:4]
    texts = series.patient_id, *series.person, series.when[:8]
    names = [word for word in _words_of(name) if not word.isdigit()]
    whole = {_together(series.patient_id), _together(number), "".join(names), "".join(reversed(names))}
    whole |= set(
        map(_together, re.split(r"[\^=]", name) + name.split("="))
    )  # O'Brien; one of several scripts
    for day in map(_together, (born, series.when[:8])):
        for year in (day[:4], day[2:4]):
            whole |= {year + day[4:], day[6:] + day[4:6] + year, day[4:] + year}  # year, day or month first
    typed = _together(text)
    stands = any(len(one) >= (4 if one.isascii() else 2) and one in typed for one in whole)
    return None if not text or stands or set(_words_of(text)) & set(_words_of(*texts)) else text


def _words_of(*texts: str) -> list[str]:
    """Words of three or more letters or digits, or of two letters (short names), in lower case without accents."""
    words = [word for text in texts for word in re.split(r"[\W_]+", _folded(text))]
    return [word for word in words if len(word) >= 3 or (len(word) == 2 and word.isalpha())]


def _together(text: str) -> str:
    """Only the letters and digits of a text."""
    return re.sub(r"[\W_]+", "", _folded(text))


def _folded(text: str) -> str:
    """A text in lower case without accents."""
    apart = unicodedata.normalize("NFKD", text)
    return "".join(sign for sign in apart if not unicodedata.combining(sign)).casefold()


def write_study(prepared: Prepared, folder: Path, name: str) -> None:
    """Write slices, masks and volume.json into an existing folder. Raises MedFLError if that fails."""
    try:
        for index, pixels in enumerate(prepared.volume):
            Image.fromarray(pixels).save(folder / f"{name}_{index + 1}.tif")
            if prepared.mask is not None:
                Image.fromarray(prepared.mask[index]).save(folder / f"{name}_{index + 1}_mask.tif")
    except OSError as error:
        raise MedFLError(
            f"{folder} can't be written ({error.strerror or error}); free the space or change --out"
        ) from error
    write_json(folder / "volume.json", prepared.about)
