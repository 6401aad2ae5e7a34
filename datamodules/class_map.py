"""The classes of masks in colour: class maps, and the colours in the masks."""

import csv
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from .decode import color_codes, decoding
from .errors import UserError
from .files import read_lines

Color = tuple[int, int, int]
CLASS_MAPS = ("class_dict.csv", "classes.csv", "label_colors.txt", "labelmap.txt")


def is_color(path: Path) -> bool:
    """Return whether a mask holds a colour that is not grey; False if it cannot be read."""
    try:
        with Image.open(path) as file:
            if file.mode not in ("RGB", "RGBA", "CMYK", "YCbCr"):
                return False
            pixels = np.array(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return False
    return bool((pixels[..., :1] != pixels).any())


def colors_found(paths: Sequence[Path]) -> list[Color]:
    """List all colours of masks, in the order of their RGB codes.

    Raises:
        UserError: for more than 256 colours, which lossy formats produce; the message names the file that passes 256.
    """

    def codes(path: Path) -> np.ndarray:
        with decoding(path, "a mask"), Image.open(path) as file:
            return np.unique(color_codes(np.array(file.convert("RGB"))))

    found: set[int] = set()
    with ThreadPoolExecutor() as pool:
        for path, some in zip(paths, pool.map(codes, paths), strict=True):
            found |= set(some.tolist())
            if len(found) > 256:
                raise UserError(
                    f"the masks up to {path} hold {len(found)} colours; more than 256 are no classes, but what JPEG or "
                    "smoothing leaves: save masks as PNG, without resizing"
                )
    return [(code >> 16, code >> 8 & 255, code & 255) for code in sorted(found)]


def read_class_map(path: Path) -> tuple[list[str], list[Color]]:
    """Read a class map: one class per line, as ``name,r,g,b``, ``r g b name`` or ``name:r,g,b::``.

    Returns:
        names and RGB colours of the classes.

    Raises:
        UserError: for a line in none of these forms; the message quotes it.
    """
    names, colors = [], []
    for line in read_lines(path):
        if line.startswith("#") or re.match(r"name\b.*\br\b", line, re.IGNORECASE):
            continue
        spaced = re.fullmatch(r"(\d+)\s+(\d+)\s+(\d+)\s+(.+)", line)
        cvat = re.match(r"([^:]+):(\d+),(\d+),(\d+)(?::|$)", line)
        if spaced:
            name, color = spaced[4], spaced.groups()[:3]
        elif cvat:
            name, color = cvat[1], cvat.groups()[1:]
        else:
            name, *color = next(csv.reader([line], skipinitialspace=True))  # type: ignore[assignment]
        if len(color) != 3 or not all(part.strip().isdigit() and int(part) < 256 for part in color):
            raise UserError(
                f"{path} has the line '{line}': write a class as 'name,r,g,b', 'r g b name' or 'name:r,g,b::'"
            )
        names.append(name.strip())
        colors.append((int(color[0]), int(color[1]), int(color[2])))
    return names, colors
