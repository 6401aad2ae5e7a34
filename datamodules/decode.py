"""The pixels of images and masks: how files are decoded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class Sample:
    """An image and its mask, as files. A subclass for another file format overrides `read`.

    Args:
        name: a relative path without suffix, unique within its split; predictions are written under this name.
        image: the image's file; None where a subclass draws the image.
        mask: the mask's file; None without a mask.
        bands: which bands of the image to read as stored, counted from 0; None reads RGB with 8 bits.
        colors: the colour of each label, for masks in colour; None reads the stored values.
    """

    name: str
    image: Path | None = None
    mask: Path | None = None
    bands: tuple[int, ...] | None = None
    colors: tuple[tuple[int, int, int], ...] | None = None

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Decode both files.

        Returns:
            image ``(C, H, W)`` in its storage type, and mask ``(H, W)`` with its stored values, or None without one.

        Raises:
            UserError: if a file cannot be decoded; the message names it.
        """
        if self.image is None:
            raise UserError(f"the sample {self.name} has no image file: set `image`, or override `read`")
        image = read_image(self.image) if self.bands is None else read_bands(self.image, self.bands)
        return image, None if self.mask is None else read_mask(self.mask, self.colors)

    def instances(self) -> Tensor | None:
        """Return the number of each pixel's object, int32 ``(H, W)``, 0 for none; None if objects have no numbers."""
        return None

    def missing(self) -> str | None:
        """Return a sentence that names the missing one of the two files, or None if both exist."""
        if self.image is not None and not self.image.is_file():
            return f"the mask {self.mask} has no partner: there is no image {self.image}; add it or remove the mask"
        if self.mask is not None and not self.mask.is_file():
            return f"the image {self.image} has no partner: there is no mask {self.mask}; add it or remove the image"
        return None


@contextmanager
def decoding(path: Path, what: str) -> Iterator[None]:
    """Raise a decoder's errors as a `UserError` that names the file.

    Args:
        path: the file that is decoded.
        what: what the file should be, such as ``an image``.

    Raises:
        UserError: for an error of a decoder, with the advice to replace the file; for a `UserError`, with its advice.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} cannot be read as {what}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, Image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read as {what} ({reason}): replace or remove it") from error


def read_image(path: Path, upright: bool = True) -> Tensor:
    """Decode an image of any mode as RGB.

    Args:
        path: a picture, or ``.npy`` of 1 or 3 bands.
        upright: whether to turn the image by its EXIF orientation.

    Returns:
        ``(3, H, W)`` uint8. Palette, grey, alpha and CMYK images are converted to RGB, and more than 8 bits by
        `to_8_bits`.

    Raises:
        UserError: if the file cannot be decoded as RGB; the message names it.
    """
    with decoding(path, "an image"):
        if path.suffix.lower() == ".npy":
            pixels = to_8_bits(read_array(path))
            if pixels.shape[0] not in (1, 3):
                raise UserError(f"it has {pixels.shape[0]} bands, so choose some in data.bands")
            return torch.from_numpy(np.broadcast_to(pixels, (3, *pixels.shape[1:])).copy())
        try:
            with Image.open(path) as file:
                if file.format == "TIFF" and (pages := getattr(file, "n_frames", 1)) > 1:
                    raise UserError(f"its {pages} pages are bands, so choose some in data.bands")
                picture = ImageOps.exif_transpose(file) if upright else file
                if picture.mode[0] in "IF":  # more than 8 bits
                    picture = Image.fromarray(to_8_bits(np.asarray(picture)))
                pixels = np.array(picture.convert("RGB"))
        except Image.UnidentifiedImageError:
            if path.suffix.lower() in (".tif", ".tiff"):
                count = len(read_array(path))
                raise UserError(f"its {count} bands are not RGB, so choose some in data.bands") from None
            raise
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_bands(path: Path, bands: Sequence[int]) -> Tensor:
    """Read some bands of a TIFF, ``.npy`` or picture as stored, without a conversion to RGB.

    Args:
        path: the file.
        bands: which bands to read, counted from 0.

    Returns:
        ``(len(bands), H, W)`` uint8, uint16, int16, int32 or float32.

    Raises:
        UserError: if the file cannot be decoded or lacks a band; the message names it.
    """
    with decoding(path, "an image of bands"):
        pixels = read_array(path)
        if max(bands) >= len(pixels) or min(bands) < 0:
            wrong = max(bands) if max(bands) >= len(pixels) else min(bands)
            raise UserError(f"it has the bands 0 to {len(pixels) - 1}, but data.bands names {wrong}")
        pixels = pixels[list(bands)]
        if pixels.dtype.kind == "f":
            pixels = pixels.astype(np.float32)
        elif pixels.dtype.kind == "b":
            pixels = pixels.astype(np.uint8)
        elif pixels.dtype.name not in ("uint8", "uint16", "int16", "int32"):
            pixels = pixels.astype(np.int32)
    return torch.from_numpy(np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("="))))


def read_array(path: Path) -> np.ndarray:
    """Read all bands of a file as stored, ``(C, H, W)``.

    If the file does not state the axis of its bands, the shortest axis is taken. A TIFF may hold its bands as pages or
    interleaved. It is read by tifffile, or by Pillow if tifffile does not know its compression.

    Raises:
        UserError: if the array has other than 2 or 3 axes.
    """
    suffix = path.suffix.lower()
    pixels, axes = None, ""
    if suffix == ".npy":
        pixels = np.load(path, allow_pickle=False)
    elif suffix in (".tif", ".tiff"):
        import tifffile  # only TIFFs need it

        try:
            with tifffile.TiffFile(path) as file:
                pixels, axes = file.series[0].asarray(), file.series[0].axes
        except (tifffile.TiffFileError, ValueError):
            pixels = None  # Pillow may know the compression, or name the error
    if pixels is None:
        with Image.open(path) as picture:
            pixels = np.array(picture)
            axes = "YXS"[: pixels.ndim]
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise UserError(f"its array is {pixels.shape}, but an image has two sides and at most one axis of bands")
    named = [i for i, axis in enumerate(axes) if axis in "SC"]  # samples or channels
    band = named[0] if named else int(np.argmin(pixels.shape))
    return np.moveaxis(pixels, band, 0)


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Convert grey to uint8, ``(H, W)`` to ``(H, W)``.

    Floats of at most 1 are multiplied by 255. 16 bits, and any integers with values above 255, keep their upper byte.
    """
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = pixels * 255 if pixels.max(initial=0) <= 1 else pixels
    elif pixels.dtype == np.uint16 or pixels.max(initial=0) > 255:
        pixels = pixels >> 8
    return pixels.clip(0, 255).round().astype(np.uint8)


def read_mask(path: Path, colors: Sequence[tuple[int, int, int]] | None = None) -> Tensor:
    """Decode a mask: stored values, palette indices, or the labels of its colours.

    Args:
        path: a picture of one band or with a palette, an RGB picture of three equal bands, or ``.npy``.
        colors: the colour of each label, for a mask in colour; None reads stored values.

    Returns:
        ``(H, W)`` uint8, or int32 if the file holds more than 8 bits.

    Raises:
        UserError: if the file cannot be decoded, is in colour without `colors`, or holds a colour that is not listed.
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
            f"{path} is a mask in colour (mode {mode}) and holds no labels: save it as labels, or, if all masks are in "
            "colour, name the colours of the classes (README, 'Masks in colour')"
        )
    return torch.from_numpy(values if values.dtype == np.uint8 else values.astype(np.int32))


def color_codes(pixels: np.ndarray) -> np.ndarray:
    """Pack each colour into one number: ``(..., 3)`` uint8 to int32 ``(...)``."""
    red, green, blue = (pixels[..., i].astype(np.int32) for i in range(3))
    return red << 16 | green << 8 | blue


def labels_of_colors(path: Path, pixels: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> Tensor:
    """Replace each colour of a mask by its label.

    Args:
        path: the mask's file, for the error message.
        pixels: uint8 ``(H, W, 3)``.
        colors: the colour of each label.

    Returns:
        ``(H, W)`` uint8, or int32 for more than 256 colours.

    Raises:
        UserError: for a colour that is not in `colors`.
    """
    codes, known = color_codes(pixels), color_codes(np.array(colors, np.uint8))
    order = np.argsort(known)
    place = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    unknown = known[order][place] != codes
    if unknown.any():
        colour = tuple(int(value) for value in pixels[unknown][0])
        raise UserError(
            f"{path} holds the colour {colour} in {unknown.mean():.2%} of its pixels, which is none of the "
            f"{len(known)} known colours: add it to the classes, or to data.void_colors to ignore it"
        )
    labels = order[place]
    return torch.from_numpy(labels.astype(np.uint8 if len(known) <= 256 else np.int32))
