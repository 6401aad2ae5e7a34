"""What the data doctor keeps of one sample: decoded to its end, numbers only, safe to run in threads."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import Sample, color_codes

Color = tuple[int, int, int]
MANY = 1024  # values or colours kept per mask, the most common ones: a mask of more holds no labels


@dataclass
class Facts:
    """What is kept of one sample: numbers, no pixels.

    Args:
        split: where it belongs.
        sample: how to read it again.
        problem: ``unpaired``, ``unreadable`` or ``colour`` (a mask whose colours stand for nothing); "" for none.
        reason: the sentence that goes with it.
        mode: of the image's file, as Pillow names it; else its bands and type.
        mask_mode: likewise.
        turned: the image's EXIF orientation, 1 for upright.
        shape: of the image as read, ``(C, H, W)``.
        mask_shape: ``(H, W)``.
        dtype: of the image as read.
        size: bytes of both, decoded.
        content: hash of the image's pixels.
        labels: hash of the mask's pixels.
        values: stored mask value -> pixels.
        colors: colour -> pixels, of those that stand for nothing.
        palette: stored value -> colour, in a palette mask.
        sums: per band, of pixels scaled to 0..1.
        squares: likewise, of their squares.
        counts: pixels per class, ignored and without a class, once the classes are known.
    """

    split: str
    sample: Sample
    problem: str = ""
    reason: str = ""
    mode: str = ""
    mask_mode: str = ""
    turned: int = 1
    shape: tuple[int, ...] = ()
    mask_shape: tuple[int, ...] = ()
    dtype: str = ""
    size: int = 0
    content: str = ""
    labels: str = ""
    values: dict[int, int] = field(default_factory=dict)
    colors: dict[Color, int] = field(default_factory=dict)
    palette: dict[int, Color] = field(default_factory=dict)
    sums: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))

    def file(self, mask: bool = False) -> str:
        """The path of the image or mask, with the sample's name where many share the file."""
        image, name = self.sample.image, self.sample.name
        if self.problem == "unreadable":
            mask = str(self.sample.mask) in self.reason
        path = self.sample.mask if mask and self.sample.mask else image
        if path is not None and not path.is_file():
            path = self.sample.mask if path == image else image
        if path is None:
            return name
        own = image is not None and (image.stem in name or name.rpartition("/")[2] in image.stem)
        return str(path) if own else f"{path} ({name})"


def look_at(split: str, sample: Sample) -> Facts:
    """Decode a sample to its end and keep its facts; what is wrong with it is one of them."""
    facts = Facts(split, sample)
    if (missing := sample.missing()) is not None:
        facts.problem, facts.reason = "unpaired", missing
        return facts
    facts.mode, facts.turned, _ = header(sample.image)
    facts.mask_mode, _, palette = header(sample.mask)
    palette = [] if sample.colors else palette  # read by colour then
    try:
        image, mask = (None if part is None else part.numpy() for part in sample.read())
        assert image is not None
    except Exception as error:  # whatever it is, it would end training too
        plain = isinstance(error, ValueError)
        facts.reason = str(error) if plain else f"{facts.file()} cannot be read ({type(error).__name__}: {error})"
        facts.colors, facts.mask_shape = unknown_colors(sample) if str(sample.mask) in facts.reason else ({}, ())
        facts.problem = "colour" if facts.colors else "unreadable"
        return facts
    facts.shape, facts.dtype, facts.content = image.shape, image.dtype.name, digest(image)
    facts.mode = facts.mode or f"{len(image)} x {image.dtype.name}"
    facts.sums, facts.squares = moments(image)
    facts.size = image.nbytes
    if mask is not None:
        facts.mask_shape, facts.labels, facts.size = mask.shape, digest(mask), image.nbytes + mask.nbytes
        facts.mask_mode = facts.mask_mode or mask.dtype.name
        values, counts = count_values(mask)
        facts.values = dict(zip(values.tolist(), counts.tolist(), strict=True))
        facts.palette = {value: palette[value] for value in facts.values if 0 <= value < len(palette)}
    return facts


def header(path: Path | None) -> tuple[str, int, list[Color]]:
    """A file's mode, EXIF orientation and palette as Pillow sees them; an empty mode where it does not."""
    if path is None:
        return "", 1, []
    try:
        with Image.open(path) as file:
            flat = (file.getpalette("RGB") or []) if file.mode == "P" else []
            colors = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
            has_exif = file.format != "PNG" or "exif" in file.info  # a PNG would be decoded to its end to look for it
            return file.mode, file.getexif().get(0x0112, 1) if has_exif else 1, colors
    except Exception:  # reading it says what is wrong
        return "", 1, []


def digest(pixels: np.ndarray) -> str:
    """Hash decoded pixels: the same for a file that was renamed or stored in another lossless way."""
    digest = hashlib.blake2b(f"{pixels.shape} {pixels.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def count_values(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values that occur and how often, the most common ones."""
    if pixels.dtype == np.uint8:
        counts = np.bincount(pixels.ravel())
        values = counts.nonzero()[0]
        return values, counts[values]
    values, counts = np.unique(pixels, return_counts=True)
    kept = np.argsort(-counts, kind="stable")[:MANY]
    return values[kept], counts[kept]


def unknown_colors(sample: Sample) -> tuple[dict[Color, int], tuple[int, ...]]:
    """The colours of a mask that stand for nothing and its shape; no colours where it is grey or cannot be decoded."""
    try:
        with Image.open(sample.mask) as file:  # type: ignore[arg-type]
            pixels = np.array(file.convert("RGB"))
    except Exception:
        return {}, ()
    if sample.colors is None and (pixels == pixels[..., :1]).all():
        return {}, ()
    codes, counts = (part.tolist() for part in count_values(color_codes(pixels)))
    colors = {(code >> 16, code >> 8 & 255, code & 255): n for code, n in zip(codes, counts, strict=True)}
    return {color: n for color, n in colors.items() if color not in (sample.colors or ())}, pixels.shape[:2]


def moments(image: np.ndarray, block: int = 1 << 20) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per band the sum of pixels scaled to 0..1, and of their squares: exact for 8 and 16 bits."""
    whole = image.dtype.kind in "iu"
    full, number = (int(np.iinfo(image.dtype).max), int) if whole else (1, float)
    sums, squares = [], []
    for band in image.reshape(len(image), -1):
        total = square = number(0)
        for start in range(0, band.size, block):
            pixels = band[start : start + block].astype(np.float64)
            total, square = total + number(pixels.sum()), square + number(pixels @ pixels)
        sums.append(total / full)
        squares.append(square / full**2)
    return tuple(sums), tuple(squares)
