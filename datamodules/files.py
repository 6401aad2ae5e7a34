"""Files of images and masks: how to find, pair and split them."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .decode import Sample, decoding, read_image, read_mask  # noqa: F401  data sets of users import them from here
from .errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif", ".npy")


def files_under(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """Find the files below a folder that have one of the suffixes; hidden files are left out.

    Returns:
        the path of each name. A name is the relative path without suffix; if two files would get the same name, all
        names keep their suffix.

    Raises:
        UserError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist: check the path")
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    names = [p.relative_to(folder).with_suffix("").as_posix() for p in paths]
    if len({name.lower() for name in names}) < len(names):
        names = [p.relative_to(folder).as_posix() for p in paths]
    return dict(zip(names, paths, strict=True))


def list_photos(folder: Path, bands: tuple[int, ...] | None = None) -> list[Sample]:
    """List a folder of unlabelled images for `predict`, or one image by itself.

    Raises:
        UserError: if the folder does not exist or holds no image.
    """
    if folder.is_file():
        return [Sample(folder.stem, folder, bands=bands)]
    photos = files_under(folder)
    if not photos:
        raise UserError(f"the folder {folder} holds no image; an image ends in one of {', '.join(SUFFIXES)}")
    return [Sample(name, path, bands=bands) for name, path in photos.items()]


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without surrounding blanks and without empty lines.

    Raises:
        UserError: if the file does not exist.
    """
    if not path.is_file():
        raise UserError(f"the list {path} does not exist: check data.root")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def folder_of(root: str | os.PathLike | None, what: str) -> Path:
    """Return a data set's root as a path.

    Args:
        root: the argument `root` of the data set.
        what: what the root should hold, for the error message.

    Raises:
        UserError: if the root is not set or does not exist.
    """
    if root is None:
        raise UserError(f"data.root is not set: set it to the folder that holds {what}")
    if not Path(root).is_dir():
        raise UserError(f"data.root {root} does not exist: it should hold {what}")
    return Path(root)


def pair(
    images: Path,
    masks: Path,
    image_suffix: str = "",
    mask_suffix: str = "",
    bands: tuple[int, ...] | None = None,
    colors: tuple[tuple[int, int, int], ...] | None = None,
) -> list[Sample]:
    """Match images and masks by relative path without suffix.

    Files without a partner are listed with a path that does not exist.

    Args:
        images: folder of images.
        masks: folder of masks; it may be the same folder if a suffix tells images and masks apart.
        image_suffix: end of the images' stems that the masks' stems lack, such as ``_leftImg8bit``.
        mask_suffix: end of the masks' stems that the images' stems lack, such as ``_mask``.
        bands: see `Sample`.
        colors: see `Sample`.

    Raises:
        UserError: if a folder is missing.
    """

    def stems(folder: Path, own: str, other: str) -> dict[str, Path]:
        files = files_under(folder)
        if images == masks and not own:
            files = {name: path for name, path in files.items() if not name.endswith(other)}
        return {name.removesuffix(own): path for name, path in files.items() if name.endswith(own)}

    image_of, mask_of = stems(images, image_suffix, mask_suffix), stems(masks, mask_suffix, image_suffix)
    return [
        Sample(
            name,
            image_of.get(name, images / f"{name}{image_suffix}.*"),
            mask_of.get(name, masks / f"{name}{mask_suffix}.*"),
            bands,
            colors,
        )
        for name in sorted(image_of.keys() | mask_of.keys())
    ]


def split_by_hash(samples: Sequence[Sample], split: str, val: float, test: float, group: str = "") -> list[Sample]:
    """Choose the samples of one split by a hash of their names, so that every machine gets the same split.

    Args:
        samples: all samples of the data set.
        split: ``train``, ``val`` or ``test``.
        val: share of the samples for validation, 0 to 1; at least one sample unless 0.
        test: share of the samples for the test, 0 to 1; at least one sample unless 0.
        group: regular expression whose first group names the samples that stay in one split, such as a scene; ""
            treats each sample by itself.
    """

    def key(sample: Sample) -> str:
        found = re.search(group, sample.name) if group else None
        return found[1] if found else sample.name

    names = sorted({key(s) for s in samples}, key=lambda name: hashlib.sha256(name.encode()).digest())
    first, second = (max(round(share * len(names)), int(share > 0)) for share in (val, test))
    bounds = {"val": (0, first), "test": (first, first + second), "train": (first + second, len(names))}
    chosen = set(names[slice(*bounds[split])])
    return sorted((s for s in samples if key(s) in chosen), key=lambda sample: sample.name)
