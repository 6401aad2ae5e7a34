"""Work out from a folder alone where images, masks and annotations are, and which class reads them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .annotations import read_annotations
from .errors import UserError
from .files import NAME_WORDS, SUFFIXES, WORDS, folder_of, walk
from .folder import Folder

MASK = re.compile(r"mask|label|annot|segm|truth|target|(?<![a-z])(gt|seg|msk|lbl)(?![a-z])")
IMAGE = re.compile(r"image|img|photo|pic|jpeg|frame|input|rgb|(?<![a-z])sat(?![a-z])")
SPLIT_WORDS = {word for words in WORDS.values() for word in words}
LOOK = 5  # files that are decoded where names do not tell images from masks
FEW = 64  # most colours in a mask


@dataclass
class Layout:
    """How to read a data set.

    Args:
        class_path: the class of the data.
        init_args: its arguments, without the root.
        said: lines that say what was taken.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def work_out(root: Path) -> Layout:
    """Work out the layout of a data set.

    Args:
        root: the folder of the data set.

    Raises:
        UserError: if the folder does not exist, or what it holds cannot be told; the message says what was found.
    """
    folder_of(root, "images, with masks or annotations")
    files = [path.relative_to(root) for path in walk(root)]
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if (root / "train").is_dir() and (root / "trainannot").is_dir():
        return Layout("CamVid", {}, [f"taken as CamVid: train/ and trainannot/ in {root}"])
    tried = [*in_two_folders(root, pictures), *side_by_side(pictures)]
    for arguments in tried:
        if paired := count_pairs(root, arguments):
            text = ", ".join(f"{key} {value}" for key, value in arguments.items())
            return Layout("Folder", arguments, [f"taken as Folder: {text}; {paired} pairs of image and mask in train"])
    annotations = [path for path in files if path.suffix.lower() in (".json", ".xml")]
    if pictures and any(read_annotations(root / path, required=False) is not None for path in annotations[:100]):
        return Layout("Polygons", {}, [f"taken as Polygons: {len(pictures)} images and annotations in {root}"])
    places = sorted({path.parent.as_posix() for path in pictures})
    found = f"{len(pictures)} images in {', '.join(places[:4])}" if pictures else "no image"
    raise UserError(
        f"{root} holds {found}, but it cannot be told which are images and which are masks: add --data Folder with "
        "--data.image_dir and --data.mask_dir, and --data.mask_suffix if both lie in one folder"
    )


def in_two_folders(root: Path, pictures: Sequence[Path]) -> list[dict[str, Any]]:
    """List arguments of `Folder` for a folder of images and a folder of masks, the likeliest first."""
    folders: dict[str, list[Path]] = {}
    for path in pictures:
        folders.setdefault(folder_named(path), []).append(path)
    masks = [name for name in folders if MASK.search(name.lower())]
    images = [name for name in folders if name not in masks and IMAGE.search(name.lower())]
    others = [name for name in folders if name not in (*masks, *images)]
    if not masks:
        masks = [name for name in others if look_like_masks([root / path for path in folders[name]])]
        others = [name for name in others if name not in masks]
    choices = [(image, mask) for mask in masks for image in images or others]
    choices.sort(key=lambda pair: -len(folders[pair[1]]))
    return [{"image_dir": image, "mask_dir": mask} | endings(folders[image], folders[mask]) for image, mask in choices]


def folder_named(path: Path) -> str:
    """Return the folder of a picture below the root up to a name that says images or masks, without words of splits."""
    parts = [part for part in path.parent.parts if part.lower() not in SPLIT_WORDS]
    telling = [i for i, part in enumerate(parts) if MASK.search(part.lower()) or IMAGE.search(part.lower())]
    return "/".join(parts[: telling[0] + 1 if telling else 1]) or "."


def endings(images: Sequence[Path], masks: Sequence[Path]) -> dict[str, str]:
    """Return the endings that all images and all masks have, as ``_image``, if they are words that say so."""
    found = {}
    for key, paths in (("image_suffix", images), ("mask_suffix", masks)):
        ends = {(re.search(r"[_\-. ][A-Za-z]+$", path.stem) or [""])[0] for path in paths}
        end = ends.pop() if len(ends) == 1 else ""
        if end[1:].lower() in NAME_WORDS:
            found[key] = end
    return found


def side_by_side(pictures: Sequence[Path]) -> list[dict[str, Any]]:
    """List arguments of `Folder` for images and masks in one folder, told apart by an ending."""
    folder = folder_named(pictures[0]) if pictures else "."
    stems = {path.with_suffix("").as_posix() for path in pictures}
    found = {}
    for path in pictures:
        end = re.search(r"[_\-. ][A-Za-z]+$", path.stem)
        if end and MASK.search(end[0].lower()) and path.with_suffix("").as_posix()[: -len(end[0])] in stems:
            found[end[0]] = {"image_dir": folder, "mask_dir": folder, "mask_suffix": end[0]}
    photos = {path.with_suffix("") for path in pictures if path.suffix.lower() in (".jpg", ".jpeg")}
    if photos and photos == {path.with_suffix("") for path in pictures if path.suffix == ".png"}:
        found[".png"] = {"image_dir": folder, "mask_dir": folder, "mask_suffix": ".png"}
    return [*found.values()]


def look_like_masks(paths: Sequence[Path]) -> bool:
    """Return whether some of the files hold few colours, in a format that keeps values."""
    some = paths[:: -(-len(paths) // LOOK) or 1]
    if any(path.suffix.lower() not in (".png", ".bmp", ".gif", ".tif", ".tiff") for path in some):
        return False
    try:
        return all(len(np.unique(np.asarray(Image.open(path)).reshape(-1))) <= FEW for path in some)
    except (OSError, SyntaxError, ValueError):
        return False


def count_pairs(root: Path, arguments: dict[str, Any]) -> int:
    """Count the training images that have a mask by these arguments; an error that names its files is passed on."""
    data = Folder(root, **arguments, val_fraction=0, test_fraction=0)
    data.looked = True  # colours do not matter here
    try:
        samples = data.samples("train")
    except UserError as error:
        if any(words in str(error) for words in ("of one name", "several masks per image", "are both the split")):
            raise
        return 0
    return sum(sample.missing() is None for sample in samples)
