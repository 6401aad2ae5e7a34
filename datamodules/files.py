"""Files of pictures and labels: finding, pairing and decoding them."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif", ".npy")


@dataclass(frozen=True)
class Sample:
    """One picture and its labels, as files. A subclass overrides `read` where they come from elsewhere.

    Args:
        name: unique within its split, and a relative path without suffix: predictions are written under it.
        image: the picture's file.
        mask: the labels' file; None where nothing is labelled.
        bands: which bands of the picture to read as stored, counted from 0; None reads it as RGB with 8 bits.
        colors: the colour of each label, where masks are colours.
    """

    name: str
    image: Path | None = None
    mask: Path | None = None
    bands: tuple[int, ...] | None = None
    colors: tuple[tuple[int, int, int], ...] | None = None

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Decode both files: image ``(C, H, W)`` in its storage type, mask ``(H, W)`` with the values as stored."""
        if self.image is None:
            raise UserError(f"sample {self.name} has no image file")
        image = read_image(self.image) if self.bands is None else read_bands(self.image, self.bands)
        return image, None if self.mask is None else read_mask(self.mask, self.colors)

    def instances(self) -> Tensor | None:
        """A number for each object, 0 for the rest: int32 ``(H, W)``; None where objects are not told apart."""
        return None

    def missing(self) -> str | None:
        """Say which of the two files is not there, without opening them."""
        for what, path, other in (("image", self.image, self.mask), ("mask", self.mask, self.image)):
            if path is not None and not path.is_file():
                return f"the {'mask' if what == 'image' else 'image'} {other} has no partner: there is no {what} {path}"
        return None


@contextmanager
def decoding(path: Path, what: str) -> Iterator[None]:
    """Turn what a decoder raises into one sentence that names the file."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, Image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read as {what} ({reason}): replace it or take it out") from error


def read_image(path: Path, upright: bool = True) -> Tensor:
    """Decode a picture of any mode as RGB, turned upright by its EXIF orientation unless told not to.

    Returns:
        ``(3, H, W)`` uint8; a palette, grey, alpha or CMYK picture is converted, deeper grey as `to_8_bits` says.

    Raises:
        UserError: if the file cannot be decoded or has other than 1, 3 or 4 bands; the message names it.
    """
    with decoding(path, "an image"):
        if path.suffix.lower() == ".npy":
            pixels = to_8_bits(read_array(path))
            if pixels.shape[0] not in (1, 3):
                raise UserError(f"it has {pixels.shape[0]} bands: name some in data.bands")
            return torch.from_numpy(np.broadcast_to(pixels, (3, *pixels.shape[1:])).copy())
        try:
            with Image.open(path) as file:
                if file.format == "TIFF" and (pages := getattr(file, "n_frames", 1)) > 1:
                    raise UserError(f"its {pages} pages are bands: name some in data.bands")
                picture = ImageOps.exif_transpose(file) if upright else file
                if picture.mode[0] in "IF":  # more than 8 bits
                    picture = Image.fromarray(to_8_bits(np.asarray(picture)))
                pixels = np.array(picture.convert("RGB"))
        except Image.UnidentifiedImageError:
            if path.suffix.lower() in (".tif", ".tiff"):
                count = len(read_array(path))
                raise UserError(f"its {count} bands are no RGB: name some in data.bands") from None
            raise
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_bands(path: Path, bands: Sequence[int]) -> Tensor:
    """Read some bands of a TIFF, ``.npy`` or picture as stored, without passing through RGB.

    Returns:
        ``(len(bands), H, W)`` uint8, uint16, int16, int32 or float32.

    Raises:
        UserError: if the file cannot be decoded or lacks a band; the message names it.
    """
    with decoding(path, "an image of bands"):
        pixels = read_array(path)
        if max(bands) >= len(pixels) or min(bands) < 0:
            raise UserError(f"it has {len(pixels)} bands, counted from 0, and data.bands asks for {max(bands)}")
        pixels = pixels[list(bands)]
        if pixels.dtype.kind == "f":
            pixels = pixels.astype(np.float32)
        elif pixels.dtype.kind == "b":
            pixels = pixels.astype(np.uint8)
        elif pixels.dtype.name not in ("uint8", "uint16", "int16", "int32"):
            pixels = pixels.astype(np.int32)
    return torch.from_numpy(np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("="))))


def read_array(path: Path) -> np.ndarray:
    """All bands of a file as stored, ``(C, H, W)``.

    Where a file does not say which axis is the bands', it is the shortest. A TIFF that holds its bands as pages or
    interleaved is read by tifffile, and by Pillow where tifffile lacks its compression.
    """
    suffix = path.suffix.lower()
    pixels, axes = None, ""
    if suffix == ".npy":
        pixels = np.load(path, allow_pickle=False)
    elif suffix in (".tif", ".tiff"):
        import tifffile  # only this kind of file needs it

        try:
            with tifffile.TiffFile(path) as file:
                pixels, axes = file.series[0].asarray(), file.series[0].axes
        except (tifffile.TiffFileError, ValueError):
            pixels = None  # Pillow may know the compression, or say what is wrong
    if pixels is None:
        with Image.open(path) as picture:
            pixels = np.array(picture)
            axes = "YXS"[: pixels.ndim]
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise UserError(f"its array is {pixels.shape}: two sides and one axis of bands are needed")
    named = [i for i, axis in enumerate(axes) if axis in "SC"]  # samples or channels
    band = named[0] if named else int(np.argmin(pixels.shape))
    return np.moveaxis(pixels, band, 0)


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Bring deep grey to uint8: floats of at most 1 times 255, integers above 255 by their upper byte of 16 bits."""
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = pixels * 255 if pixels.max(initial=0) <= 1 else pixels
    elif pixels.dtype == np.uint16 or pixels.max(initial=0) > 255:
        pixels = pixels >> 8
    return pixels.clip(0, 255).round().astype(np.uint8)


def read_mask(path: Path, colors: Sequence[tuple[int, int, int]] | None = None) -> Tensor:
    """Decode a mask: labels as stored, palette indices, or colours by their place in a list.

    Args:
        path: a picture of one band, a palette picture, ``.npy``, or, three times the same band, a grey RGB.
        colors: what the colours of an RGB mask stand for: label i is ``colors[i]``.

    Returns:
        ``(H, W)`` uint8, or int32 where the file holds more than 8 bits.

    Raises:
        UserError: if the file cannot be decoded, holds colours and none are known, or one that is not among them.
    """
    with decoding(path, "a mask"):
        if colors is None and path.suffix.lower() in (".npy", ".tif", ".tiff"):
            mode, values = f"{path.suffix[1:]} of several bands", np.moveaxis(read_array(path), 0, -1)
            values = values[..., 0] if values.shape[2] == 1 else values
        else:
            with Image.open(path) as file:
                mode, values = file.mode, np.array(file if colors is None else file.convert("RGB"))
    if colors is not None:
        return labels_of_colors(path, values, colors)
    if values.ndim == 3 and values.shape[2] >= 3 and (values[..., :1] == values[..., :3]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise UserError(
            f"{path} is a mask in colour (mode {mode}), not in labels: name the colours of the classes "
            "(README, 'Masks in colour')"
        )
    return torch.from_numpy(values if values.dtype == np.uint8 else values.astype(np.int32))


def color_codes(pixels: np.ndarray) -> np.ndarray:
    """One number per colour: ``(..., 3)`` uint8 to int32 ``(...)``."""
    red, green, blue = (pixels[..., i].astype(np.int32) for i in range(3))
    return red << 16 | green << 8 | blue


def labels_of_colors(path: Path, pixels: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> Tensor:
    """Labels ``(H, W)`` of a mask in colour ``(H, W, 3)``.

    Raises:
        UserError: for a colour that is not in the list.
    """
    codes, known = color_codes(pixels), color_codes(np.array(colors, np.uint8))
    order = np.argsort(known)
    place = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    strange = known[order][place] != codes
    if strange.any():
        colour = tuple(int(value) for value in pixels[strange][0])
        raise UserError(
            f"{path} holds the colour {colour} in {strange.mean():.2%} of its pixels, which stands for none of the "
            f"{len(known)} known: add it to the classes, or to data.void_colors to ignore it"
        )
    labels = order[place]
    return torch.from_numpy(labels.astype(np.uint8 if len(known) <= 256 else np.int32))


def files_under(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """Find the pictures below a folder by name: relative path without suffix, or with it for all if two would collide.

    Raises:
        UserError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist")
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    names = [p.relative_to(folder).with_suffix("").as_posix() for p in paths]
    if len({name.lower() for name in names}) < len(names):
        names = [p.relative_to(folder).as_posix() for p in paths]
    return dict(zip(names, paths, strict=True))


def list_photos(folder: Path, bands: tuple[int, ...] | None = None) -> list[Sample]:
    """List a folder of unlabelled images for `predict`.

    Raises:
        UserError: if the folder does not exist.
        UserError: if it holds no image.
    """
    photos = files_under(folder)
    if not photos:
        raise UserError(f"the folder {folder} holds no image ({', '.join(SUFFIXES)})")
    return [Sample(name, path, bands=bands) for name, path in photos.items()]


def read_lines(path: Path) -> list[str]:
    """The lines of a list, without blanks and empty ones.

    Raises:
        UserError: if it does not exist.
    """
    if not path.is_file():
        raise UserError(f"the list {path} does not exist")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def folder_of(root: str | os.PathLike | None, what: str) -> Path:
    """A data set's root as a path.

    Raises:
        UserError: if it is not set.
        UserError: if it does not exist.
    """
    if root is None:
        raise UserError(f"data.root is not set: it names the folder that holds {what}")
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
    """Match images and masks by relative path without suffix; what has no partner is listed beside its absence.

    Args:
        images: folder of pictures.
        masks: folder of labels; the same folder, if one of the suffixes tells them apart.
        image_suffix: end of an image's stem that its mask's lacks, as ``_leftImg8bit``.
        mask_suffix: end of a mask's stem that its image's lacks, as ``_mask``.
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
    """Share samples out by a hash of their names: the same files give the same split on every machine.

    Args:
        samples: all of them.
        split: ``train``, ``val`` or ``test``.
        val: share of the samples for validation, at least one unless 0.
        test: likewise for the test.
        group: a pattern whose first group names what must not be torn apart, such as a scene; "" takes each sample.
    """

    def key(sample: Sample) -> str:
        found = re.search(group, sample.name) if group else None
        return found[1] if found else sample.name

    names = sorted({key(s) for s in samples}, key=lambda name: hashlib.sha256(name.encode()).digest())
    first, second = (max(round(share * len(names)), int(share > 0)) for share in (val, test))
    bounds = {"val": (0, first), "test": (first, first + second), "train": (first + second, len(names))}
    chosen = set(names[slice(*bounds[split])])
    return sorted((s for s in samples if key(s) in chosen), key=lambda sample: sample.name)
