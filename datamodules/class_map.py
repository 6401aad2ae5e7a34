"""The classes of masks in colour: class maps, and the colours in the masks."""

import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from .decode import color_codes, color_pixels, decoding, read_stored
from .errors import UserError
from .files import cells, read_lines

Color = tuple[int, int, int]
CLASS_MAPS = ("class_dict.csv", "classes.csv", "label_colors.txt", "labelmap.txt")


def shown_in_color(
    masks: Sequence[Path], given: Sequence[Color], labels: Collection[int], all_files: bool = True
) -> tuple[Path, str] | None:
    """Find out from the headers of all masks, and from as few pixels as possible, whether to read masks by colour.

    Args:
        masks: the masks of the whole set.
        given: the colours of the classes in the order of their labels, then those to ignore; empty if unknown.
        labels: stored values that have a class or are ignored, if the masks hold labels.
        all_files: whether to look for a colour in every RGB mask if no colours are given, and not in 50 of them.

    Returns:
        the mask that shows it, and a sentence's beginning about it; None if the masks hold labels.
    """
    with ThreadPoolExecutor() as pool:
        headers = dict(zip(masks, pool.map(header, masks), strict=True))
    rgb_masks = [path for path, (mode, _) in headers.items() if mode in ("RGB", "RGBA", "CMYK", "YCbCr")]
    if differ := palettes_differ({path: table for path, (_, table) in headers.items() if table}, given):
        return differ
    if not given:
        some = rgb_masks if all_files else rgb_masks[:: -(-len(rgb_masks) // 50) or 1]
        shown = next((path for path in some if any(not is_grey(color) for color in colors_of(path))), None)
        return None if shown is None else (shown, f"{shown} is a mask in colour")
    grey = [path for path, (mode, _) in headers.items() if mode in ("L", "LA", "1")] if all(map(is_grey, given)) else []
    holds_labels = False
    for path in rgb_masks + grey:
        colors = colors_of(path)
        if any(not is_grey(color) for color in colors):
            return path, f"{path} is a mask in colour"
        if any(color not in given and color[0] in labels for color in colors):
            holds_labels = True  # in bands of grey, and `given` colours pictures alone, if no other mask is in colour
        elif not holds_labels and any(color in given and color[0] not in labels for color in colors):
            return path, f"{path} is a mask in colour"
    return (rgb_masks[0], f"{rgb_masks[0]} is a mask in colour") if rgb_masks and not holds_labels else None


def header(path: Path) -> tuple[str, list[Color]]:
    """Return Pillow's mode of a mask, and its palette; ("", []) if Pillow cannot read it."""
    try:
        with Image.open(path) as file:
            flat = (file.getpalette("RGB") or []) if file.mode in ("P", "PA") else []
            return file.mode, [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
    except (OSError, SyntaxError, ValueError):
        return "", []


def palettes_differ(tables: dict[Path, list[Color]], given: Sequence[Color]) -> tuple[Path, str] | None:
    """Find a mask whose palette gives a colour to another value than the other masks or the given colours do.

    Pixels are decoded only where the tables differ, since colours that no pixel has do not count.

    Args:
        tables: the palette of each mask that has one.
        given: the colours of the classes in the order of their labels; empty if unknown.

    Returns:
        the mask, and a sentence's beginning about it; None if the palettes agree.
    """
    if not tables:
        return None
    longest = max(tables.values(), key=len)
    if given:
        longest = [*given, *longest[len(given) :]]
    if all(table[: len(longest)] == longest[: len(table)] for table in tables.values()):
        return None
    first: dict[int, tuple[Color, Path]] = {}
    for path, table in tables.items():
        for value in used_values(path):
            color = table[value] if value < len(table) else None
            if color is None:
                continue
            if color in given and given.index(color) != value:
                return (
                    path,
                    f"the palette of {path} gives the value {value} the colour of the label {given.index(color)}",
                )
            other, where = first.setdefault(value, (color, path))
            if other != color:
                return path, f"the palettes of {where} and {path} give the value {value} different colours"
    return None


def used_values(path: Path) -> list[int]:
    """Return the stored values of a mask; none if it cannot be read, which its reader will say."""
    try:
        return np.unique(read_stored(path).values[0]).tolist()
    except (UserError, OSError, SyntaxError, ValueError):
        return []


def colors_of(path: Path) -> list[Color]:
    """Return the colours of a mask; none if it cannot be read, which its reader will say."""
    try:
        codes = np.unique(color_codes(color_pixels(read_stored(path))))
    except (UserError, OSError, SyntaxError, ValueError):
        return []
    return [(code >> 16, code >> 8 & 255, code & 255) for code in codes.tolist()]


def is_grey(color: Color) -> bool:
    """Return whether a colour is grey."""
    return color[0] == color[1] == color[2]


def colors_found(paths: Sequence[Path]) -> list[Color]:
    """List all colours of masks, in the order of their RGB codes.

    Raises:
        UserError: for more than 255 colours, which lossy formats produce; the message names the file that passes 255.
    """

    def codes(path: Path) -> np.ndarray:
        with decoding(path, "a mask"):
            return np.unique(color_codes(color_pixels(read_stored(path))))

    found: set[int] = set()
    with ThreadPoolExecutor() as pool:
        for path, some in zip(paths, pool.map(codes, paths), strict=True):
            found |= set(some.tolist())
            if len(found) > 255:
                raise UserError(
                    f"the masks up to {path} hold {len(found)} colours; more than 255 are no classes, but what JPEG or "
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
        if line.startswith("#") or re.match(r"\W*name\b.*\br\b", line, re.IGNORECASE):
            continue
        spaced = re.fullmatch(r"(\d+)\s+(\d+)\s+(\d+)\s+(.+)", line)
        cvat = re.match(r"([^:]+):(\d+),(\d+),(\d+)(?::|$)", line)
        if spaced:
            name, color = spaced[4], spaced.groups()[:3]
        elif cvat:
            name, color = cvat[1], cvat.groups()[1:]
        else:
            name, *color = cells(line)  # type: ignore[assignment]
        if len(color) != 3 or not all(part.strip().isdigit() and int(part) < 256 for part in color):
            raise UserError(
                f"{path} has the line '{line}': write a class as 'name,r,g,b', 'r g b name' or 'name:r,g,b::'"
            )
        names.append(name.strip())
        colors.append((int(color[0]), int(color[1]), int(color[2])))
    return names, colors


def read_class_values(path: Path) -> tuple[list[str], list[int]]:
    """Read Roboflow's ``_classes.csv``: lines of a stored value and the name of its class.

    Returns:
        names and stored values of the classes.

    Raises:
        UserError: for a line of another form, but for the first, which is a header.
    """
    names, values = [], []
    for number, line in enumerate(read_lines(path)):
        value, *name = cells(line)
        if len(name) == 1 and value.isdigit():
            names.append(name[0])
            values.append(int(value))
        elif number > 0:
            raise UserError(f"{path} has the line '{line}': write a class as 'stored value, name'")
    return names, values
