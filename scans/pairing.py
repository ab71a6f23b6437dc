"""Tells slices from masks and assigns each mask to its slice, by their names, on disk or in an upload.

A mask lies beside its slice as `<name>_mask.<suffix>` (`--mask-suffix` replaces `_mask`), or has the slice's
name in a separate tree: `images/anna/1.png` and `masks/anna/1.png` (or `labels`, nnU-Net's `imagesTr` and
`labelsTr`).
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Generic

from common import MedFLError
from scans.folders import TREES_OF_IMAGES, TREES_OF_MASKS
from scans.naming import MASK_SUFFIX, AnyPath, is_image, is_mask, masked_stem


@dataclass
class Pairing(Generic[AnyPath]):
    """Slices in the order given; the masks by slice; masks without a slice, by the name that the slice would
    have."""

    images: list[AnyPath]
    masks: dict[AnyPath, AnyPath]
    alone: dict[PurePath, AnyPath]


def pair(paths: Iterable[AnyPath], mask_suffix: str = MASK_SUFFIX) -> Pairing[AnyPath]:
    """The pictures among `paths` as slices and their masks. Raises MedFLError for two masks of one slice."""
    pictures = [path for path in paths if is_image(path, mask_suffix) or is_mask(path, mask_suffix)]
    trees = {folder for path in pictures for folder in path.parents if folder.name.lower() in TREES_OF_IMAGES}
    first: dict[PurePath, PurePath] = {tree.parent: tree for tree in sorted(trees, reverse=True)}
    images: list[AnyPath] = []
    masks: dict[PurePath, AnyPath] = {}
    for path in pictures:
        tree = _tree_of(path, first)
        if tree is None and is_image(path, mask_suffix):
            images.append(path)
            continue
        stem = path.stem if (bare := masked_stem(path, mask_suffix)) is None else bare
        if tree is None:
            wanted = path.parent / stem
        else:
            mask_tree, image_tree = tree
            wanted = image_tree / path.relative_to(mask_tree).parent / stem
        key = _in_one_form(wanted)
        if key in masks:
            raise MedFLError(f"{masks[key]} and {path} are two masks of one slice; remove one of them")
        masks[key] = path
    keys = {image: _in_one_form(image.parent / image.stem) for image in images}
    own = {image: masks[key] for image, key in keys.items() if key in masks}
    found = {keys[image] for image in own}
    return Pairing(images, own, {key: path for key, path in masks.items() if key not in found})


def _in_one_form(path: PurePath) -> PurePath:
    """A name with its accents in one encoding: macOS encodes them differently from Linux and Windows,
    although both look alike."""
    return type(path)(unicodedata.normalize("NFC", str(path)))


def _tree_of(path: PurePath, trees: dict[PurePath, PurePath]) -> tuple[PurePath, PurePath] | None:
    """The tree of masks that a picture lies in and the tree of images beside it, or None. trees: the trees of
    images, by their parent folder."""
    for folder in path.parents:
        if folder.name.lower() in TREES_OF_MASKS and (tree := trees.get(folder.parent)):
            return folder, tree
    return None
