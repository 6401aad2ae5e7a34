"""A corrected copy of a data set: what can be mended without a guess is mended, and the rest is left out and named."""

import shutil
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..base import IGNORE
from ..dataset import LabelTable, resize_nearest, same_proportions
from ..decode import Sample
from ..errors import UserError
from .facts import Facts
from .findings import Examination, and_more, count, printable

WHITE = (255, 255, 255)  # of ignored pixels in the masks' palette
# How Pillow turns pixels upright that have an EXIF orientation; a mask drawn on the stored pixels is turned alike.
UPRIGHT = {
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def fix(found: Examination, folder: Path) -> list[str]:
    """Write a corrected copy of a data set into a new folder, for `Folder` to read.

    Masks become labels in 8-bit PNGs with one palette, 255 for ignored pixels. A mask of another size than its image
    is scaled to it if both have the same shape, and turned if the image is turned by its EXIF orientation. Images are
    copied; those that are turned, or share a file, are written again without loss.

    Args:
        found: the result of `examine`.
        folder: a folder that does not exist or is empty, outside the data.

    Returns:
        lines that say what was written, mended and left out.

    Raises:
        UserError: if the folder holds files or lies inside the data, nothing names the classes, or nothing is left.
    """
    refuse_folder(folder, found.given.root)
    if not found.data.class_names:
        raise UserError("the copy needs classes: name them in data.class_names, and try --fix again")
    mended, left_out, written = Counter[str](), [], 0
    shared = Counter(f.sample.image for f in found.facts)
    table = found.data.label_table()
    for f in found.facts:
        reason = unmendable(f)
        if reason:
            left_out.append(f"{f.file()}: {reason}")
            continue
        copy_sample(found, f, folder, table, shared[f.sample.image] > 1, mended)
        written += 1
    if not written:
        raise UserError(f"--fix can mend none of the {count(len(left_out), 'sample')}, such as {left_out[0]}")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in found.data.class_names), encoding="utf-8")
    said = [f"{count(written, 'pair')} written into {folder}"]
    said += [f"{what}: {number:,}" for what, number in mended.items()]
    said += [f"left out: {and_more(left_out[0], len(left_out))}"] if left_out else []
    bands = f" --data.bands '{[*found.given.bands]}'" if found.given.bands else ""
    said += [f"To check the copy: lightning check_data --data Folder --data.root {folder}{bands}"]
    return [printable(line) for line in said]


def refuse_folder(folder: Path, root: Path | None) -> None:
    """Refuse to write into the data, or over anything.

    Raises:
        UserError: if the folder lies inside `root` or is not empty.
    """
    if root is not None and folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{folder} lies inside the data in {root}, which check_data never changes: name another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty, and --fix overwrites nothing: name a new folder")


def unmendable(facts: Facts) -> str:
    """Return why a sample cannot be copied without a guess; "" if it can."""
    if facts.problem:
        return facts.reason
    if not facts.values:
        return "it has no mask"
    if not facts.finite:
        return "its image holds values that are no numbers"
    if facts.counts[-1]:
        return "its mask holds values that belong to no class"
    if (
        facts.mask_shape != facts.shape[1:]
        and not is_turned(facts)
        and not same_proportions(facts.mask_shape, facts.shape[1:])
    ):
        (height, width), (_, rows, columns) = facts.mask_shape, facts.shape
        return f"its mask is {width} x {height} pixels, its image {columns} x {rows}"
    return ""


def is_turned(facts: Facts) -> bool:
    """Return whether the mask has the size of the image's stored pixels, before its EXIF orientation turned them."""
    return facts.turned in UPRIGHT and facts.mask_shape[::-1] == facts.shape[1:] != facts.mask_shape


def copy_sample(
    found: Examination, facts: Facts, folder: Path, table: LabelTable, shares: bool, mended: Counter[str]
) -> None:
    """Write the image and the mask of one sample.

    Args:
        found: the result of `examine`.
        facts: of the sample.
        folder: the copy's root.
        table: label of each stored mask value.
        shares: whether other samples have the same image file.
        mended: how many samples were mended, by what was done; it is updated.
    """
    sample = facts.sample
    pixels, values = sample.read()
    assert values is not None  # see `unmendable`
    image, stored = pixels.numpy(), table(values).byte()
    is_resized = facts.mask_shape != facts.shape[1:] and not is_turned(facts)
    labels = Image.fromarray((resize_nearest(stored, facts.shape[1:]) if is_resized else stored).numpy())
    if is_turned(facts):
        labels = labels.transpose(UPRIGHT[facts.turned])
        mended["masks turned by the EXIF orientation of their image"] += 1
    elif is_resized:
        mended["masks scaled to the size of their image"] += 1
    if sample.colors:
        mended["masks in colour written as labels"] += 1
    colors = [*found.data.palette, *[WHITE] * (IGNORE + 1 - len(found.data.palette))]
    labels.putpalette([int(value) for color in colors for value in color])
    labels.save(place(folder, "masks", facts, ".png"), format="png")
    is_plain = type(sample).read is Sample.read and not shares and sample.image is not None
    if is_plain and (facts.turned == 1 or sample.bands):
        shutil.copyfile(sample.image, place(folder, "images", facts, sample.image.suffix.lower()))  # type: ignore[arg-type, union-attr]
        return
    mended["images turned upright and written again"] += facts.turned > 1
    if image.dtype == np.uint8 and len(image) == 3:
        Image.fromarray(image.transpose(1, 2, 0)).save(place(folder, "images", facts, ".png"), format="png")
    else:
        np.save(place(folder, "images", facts, ".npy"), image)


def place(folder: Path, kind: str, facts: Facts, suffix: str) -> Path:
    """Return the new file of a sample below ``images/`` or ``masks/``, whatever path its name spells.

    Raises:
        UserError: if another sample has the same place.
    """
    parts = [part for part in PurePosixPath(facts.sample.name).parts if part.strip("./\\")]
    path = folder.joinpath(kind, facts.split, *parts[:-1], f"{parts[-1] if parts else 'image'}{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise UserError(f"two samples would be written as {path}: give their files different names")
    return path
