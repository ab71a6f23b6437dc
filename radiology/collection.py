"""Collections of volumes in trees of images and labels, in the layouts of nnU-Net and the Medical Segmentation
Decathlon: the case of each file, and what each channel shows.

    dataset.json
    imagesTr/CASE.nii.gz (Decathlon: all channels in one file), or imagesTr/CASE_0000.nii.gz, CASE_0001.nii.gz ...
    labelsTr/CASE.nii.gz
    imagesTs/...                                                                    cases without a label
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from borders.limits import read_json_file
from common import MedFLError
from scans.folders import TREES_OF_IMAGES, TREES_OF_MASKS
from scans.nifti_file import stem

NAME = "dataset.json"
IMAGES, LABELS = TREES_OF_IMAGES | {"imagests"}, TREES_OF_MASKS | {"labelsts"}
OF_NNUNET = {"imagestr", "imagests", "labelstr", "labelsts"}
CHANNEL = re.compile(r"^(.+)_(\d{4})$")  # nnU-Net: the case and the channel's number
TUMOUR = re.compile(r"tumou?r|glioma|edema|necro|enhanc|lesion|metasta|cancer", re.IGNORECASE)
NOTHING = re.compile(r"^(background|ignore|unlabell?ed)$", re.IGNORECASE)


class Part(NamedTuple):
    """A file, or one volume of it: the case, what it shows in words that the rules know, and the number of the
    volume if the file holds several."""

    case: str
    shows: str
    volume: int | None = None


@dataclass(frozen=True)
class Collection:
    """The content of a `dataset.json`. channels: what each shows, by number; labels: names by value."""

    channels: dict[int, str]
    labels: dict[int, str]

    def parts(self, path: Path, volumes: int) -> list[Part]:
        """The parts of one image file. volumes: how many the file holds. Raises MedFLError, in words that follow
        the file's name, if that number does not fit the channels."""
        name = stem(path.name)
        if volumes == 1 and (found := CHANNEL.match(name)) and int(found[2]) in self.channels:
            return [Part(found[1], self.channels[int(found[2])])]
        if volumes != len(self.channels):
            raise MedFLError(
                f"holds {volumes} volumes, but {NAME} names {len(self.channels)} channels; correct one of "
                "the two"
            )
        return [Part(name, shows, k if volumes > 1 else None) for k, shows in sorted(self.channels.items())]

    def tumour_labels(self) -> tuple[int, ...] | None:
        """The labels that mean tumour, if every name means tumour or background; otherwise None."""
        named = {value: name for value, name in self.labels.items() if value and not NOTHING.match(name)}
        return tuple(sorted(named)) if named and all(map(TUMOUR.search, named.values())) else None


def collection_in(root: Path) -> Collection | None:
    """The collection in a folder, or None if it has no `dataset.json`. Raises MedFLError if that file can't be
    understood."""
    path = root / NAME
    if not path.is_file():
        return None
    try:
        told = read_json_file(path)
        channels = told.get("channel_names") or told["modality"]
        return Collection(
            {int(number): str(name) for number, name in channels.items()}, _labels(told.get("labels", {}))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MedFLError(
            f'{path} does not say what the channels show; write it in the form of nnU-Net, with "channel_names": '
            '{"0": "FLAIR"}'
        ) from error


def trees_in(root: Path) -> set[str]:
    """The folders in `root` that are trees of images or of labels, not patients: they have nnU-Net's names, a
    `dataset.json` beside them, or there is a tree of each kind."""
    names = {folder.name for folder in root.iterdir() if folder.is_dir()}
    images, labels = ({n for n in names if n.lower() in kind} for kind in (IMAGES, LABELS))
    plain = (root / NAME).is_file() or (images and labels)
    return {name for name in images | labels if plain or name.lower() in OF_NNUNET}


def _labels(told: dict) -> dict[int, str]:
    """Names by value, from either notation: {"1": "edema"} or {"edema": 1}."""
    if all(str(key).isdigit() for key in told):
        return {int(value): str(name) for value, name in told.items()}
    single = {name: value for name, value in told.items() if isinstance(value, int)}
    if len(single) != len(told):
        return {}  # regions of several values: it is not clear which are tumour
    return {value: str(name) for name, value in single.items()}
