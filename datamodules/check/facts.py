"""The facts of one sample: its files are decoded completely, and only numbers are kept. It runs in threads."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..decode import Sample, color_codes
from ..errors import UserError

Color = tuple[int, int, int]
Pair = tuple[Tensor, Tensor | None]  # an image and its mask
MANY = 1024  # most common values or colours that are kept per mask; a mask with more holds no labels


@dataclass
class Facts:
    """Numbers that describe one sample, without its pixels.

    Args:
        split: the split of the sample.
        sample: the sample, to read it again.
        problem: ``unmatched``, ``unreadable`` or ``colour`` (a mask in colours without a class); "" for none.
        reason: a sentence about the problem.
        mode: Pillow's mode of the image's file; for files that Pillow cannot read, bands and type.
        mask_mode: Pillow's mode of the mask's file; for files that Pillow cannot read, the type.
        turned: the image's EXIF orientation, 1 for upright.
        shape: shape of the image as read, ``(C, H, W)``.
        mask_shape: shape of the mask as read, ``(H, W)``.
        dtype: type of the image as read.
        size: bytes of the decoded image and mask.
        finite: whether all pixels of the image are numbers.
        limits: lowest and highest value of an image of more than 8 bits, without nan; None of others.
        constant: whether each band of the image has one single value.
        content: hash of the image's pixels; "" after a quick look.
        mask_content: hash of the mask's pixels.
        values: stored mask value -> number of pixels.
        colors: colour without a class -> number of pixels.
        palette: stored mask value -> colour, for a mask with a palette.
        sums: sum of the pixels per band, scaled to 0..1; empty after a quick look.
        squares: sum of the squared pixels per band, scaled to 0..1.
        counts: pixels of each class, ignored, and without a class, ``(K + 2,)``; set when the classes are known.
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
    finite: bool = True
    limits: tuple[float, float] | None = None
    constant: bool = False
    content: str = ""
    mask_content: str = ""
    values: dict[int, int] = field(default_factory=dict)
    colors: dict[Color, int] = field(default_factory=dict)
    palette: dict[int, Color] = field(default_factory=dict)
    sums: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))

    def file(self, mask: bool = False) -> str:
        """Return the path of the image or mask, with the sample's name if several samples share the file."""
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


def look_at(split: str, sample: Sample, read: Callable[[], Pair] | None = None, quick: bool = False) -> Facts:
    """Decode a sample completely and return its facts; an error is one of them.

    Args:
        split: the split of the sample.
        sample: the sample.
        read: decodes the sample, if it should come from a cache.
        quick: whether to leave out hashes and sums, and to pass on errors that are no `UserError`.
    """
    facts = Facts(split, sample)
    if (missing := sample.missing()) is not None:
        facts.problem, facts.reason = "unmatched", missing
        return facts
    facts.mode, facts.turned, _ = header(sample.image)
    facts.mask_mode, _, palette = header(sample.mask)
    palette = [] if sample.colors else palette  # such a mask is read by colour
    try:
        image, mask = (None if part is None else part.numpy() for part in (read or sample.read)())
        assert image is not None
    except Exception as error:  # any error would end training too
        is_plain = isinstance(error, UserError)
        if quick and not is_plain:
            raise
        facts.reason = str(error) if is_plain else f"{facts.file()} cannot be read ({type(error).__name__}: {error})"
        facts.colors, facts.mask_shape = unknown_colors(sample) if str(sample.mask) in facts.reason else ({}, ())
        facts.problem = "colour" if facts.colors else "unreadable"
        return facts
    facts.shape, facts.dtype, facts.size = image.shape, image.dtype.name, image.nbytes
    facts.mode = facts.mode or f"{len(image)} x {image.dtype.name}"
    facts.finite = image.dtype.kind != "f" or bool(np.isfinite(image).all())
    facts.limits = None if image.dtype == np.uint8 else limits_of(image)
    facts.constant = bool((image[:, :1] == image[:, :1, :1]).all() and (image == image[:, :1, :1]).all())
    if mask is not None:
        facts.mask_shape, facts.size = mask.shape, image.nbytes + mask.nbytes
        facts.mask_mode = facts.mask_mode or mask.dtype.name
        values, counts = count_values(mask)
        facts.values = dict(zip(values.tolist(), counts.tolist(), strict=True))
        facts.palette = {value: palette[value] for value in facts.values if 0 <= value < len(palette)}
    if not quick:
        facts.sums, facts.squares = moments(image)
        facts.content, facts.mask_content = digest(image), "" if mask is None else digest(mask)
    return facts


def limits_of(image: np.ndarray) -> tuple[float, float] | None:
    """Return the lowest and the highest number in an image; None if it holds none."""
    numbers = image[np.isfinite(image)] if image.dtype.kind == "f" else image
    return (float(numbers.min()), float(numbers.max())) if numbers.size else None


def header(path: Path | None) -> tuple[str, int, list[Color]]:
    """Read mode, EXIF orientation and palette of a file with Pillow; the mode is "" if Pillow cannot read it."""
    if path is None:
        return "", 1, []
    try:
        with Image.open(path) as file:
            flat = (file.getpalette("RGB") or []) if file.mode == "P" else []
            colors = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
            has_exif = file.format != "PNG" or "exif" in file.info  # Pillow would decode a whole PNG to look for it
            return file.mode, file.getexif().get(0x0112, 1) if has_exif else 1, colors
    except Exception:  # `Sample.read` names the error
        return "", 1, []


def digest(pixels: np.ndarray) -> str:
    """Hash decoded pixels; the hash stays the same if the file is renamed or saved in another lossless format."""
    digest = hashlib.blake2b(f"{pixels.shape} {pixels.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def count_values(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur and their numbers of pixels, at most the `MANY` most common ones."""
    if pixels.dtype == np.uint8:
        counts = np.bincount(pixels.ravel())
        values = counts.nonzero()[0]
        return values, counts[values]
    values, counts = np.unique(pixels, return_counts=True)
    kept = np.argsort(-counts, kind="stable")[:MANY]
    return values[kept], counts[kept]


def unknown_colors(sample: Sample) -> tuple[dict[Color, int], tuple[int, ...]]:
    """Count the pixels of each colour without a class in a mask.

    Returns:
        colour -> number of pixels, and the shape ``(H, W)``. There are no colours if the mask is grey or unreadable.
    """
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
    """Sum the pixels of each band, scaled to 0..1, and their squares; the sums are exact for 8 and 16 bits."""
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
