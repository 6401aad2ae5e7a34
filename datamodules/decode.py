"""The pixels of images and masks: how files are decoded."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import UserError

Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is for pictures of strangers, and these are the user's own
ORIENTATION = 0x0112  # EXIF
LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF", "HEIF")  # Pillow's names; a lossless WebP is told apart
LOSSY_TIFF = (6, 7, 22610, 33003, 33004, 33005, 34712, 34892, 34934, 50001, 50002, 52546)
PHOTOMETRICS = {0: "white", 1: "grey", 2: "rgb", 3: "palette", 5: "cmyk", 6: "rgb"}
# Pillow's mode: what the bands mean, whether the last one is transparency, the largest value
MODES = {
    "1": ("grey", False, 1),
    "L": ("grey", False, 255),
    "LA": ("grey", True, 255),
    "P": ("palette", False, 255),
    "PA": ("palette", True, 255),
    "RGB": ("rgb", False, 255),
    "RGBA": ("rgb", True, 255),
    "CMYK": ("cmyk", False, 255),
    "I;16": ("grey", False, 65535),
    "I": ("grey", False, 2**31 - 1),
    "F": ("grey", False, 1),
}


@dataclass(frozen=True)
class Sample:
    """An image and its mask, as files. A subclass for another file format overrides `read`.

    Args:
        name: a relative path without suffix, unique within its split; predictions are written under this name.
        image: the image's file; None where a subclass draws the image.
        mask: the mask's file; None without a mask.
        bands: which bands of the image to read as stored, counted from 0; None reads RGB.
        colors: the colour of each label, for masks in colour; None reads the stored values.
        threshold: value from which a grey mask's label is 1, and 0 below; None reads the stored values.
    """

    name: str
    image: Path | None = None
    mask: Path | None = None
    bands: tuple[int, ...] | None = None
    colors: tuple[tuple[int, int, int], ...] | None = None
    threshold: float | None = None

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
        return image, None if self.mask is None else read_mask(self.mask, self.colors, self.threshold)

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


@dataclass
class Stored:
    """The pixels of a file as stored, before anything is converted; only turned upright.

    Args:
        values: ``(C, H, W)`` in the file's type.
        space: what the bands mean: ``grey``, ``white`` (grey in which 0 is white), ``palette``, ``rgb``, ``cmyk``, or
            anything else, such as ``pages``.
        alpha: whether the last band is transparency.
        table: the colours of a palette, uint8 ``(n, 3)``.
        top: the largest value that the bits of an integer file can hold.
        lossy: the name of a format that changes values; "" for the others.
    """

    values: np.ndarray
    space: str
    alpha: bool = False
    table: np.ndarray | None = None
    top: int = 255
    lossy: str = ""


def read_stored(path: Path, upright: bool = True) -> Stored:
    """Decode a file by the format that its first bytes say, whatever its suffix.

    Args:
        path: a picture, a TIFF or ``.npy``.
        upright: whether to turn the pixels by the file's EXIF orientation.

    Raises:
        UserError: if the file's pixels would not come out as stored.
    """
    with path.open("rb") as file:
        head = file.read(26)
        file.seek(0)
        if head.startswith(b"\x93NUMPY"):
            return stored_array(np.load(file, allow_pickle=False))
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            stored, turn = stored_tiff(path)
        elif head[:2] in (b"P2", b"P3", b"P5", b"P6"):
            return stored_netpbm(file.read())
        elif head.startswith(b"\x89PNG") and head[24] == 16 and head[25] != 0:
            import imagecodecs  # Pillow narrows the 16 bits of all but grey PNGs to 8

            pixels = np.moveaxis(imagecodecs.png_decode(file.read()), -1, 0)
            stored = Stored(pixels, "rgb" if len(pixels) > 2 else "grey", len(pixels) in (2, 4), top=65535)
            with Image.open(path) as picture:
                turn = picture.getexif().get(ORIENTATION, 1) if "exif" in picture.info else 1
        else:
            with Image.open(file) as picture:
                stored, turn = stored_picture(picture, head), picture.getexif().get(ORIENTATION, 1)
            if picture.format == "WEBP" and is_lossless_webp(file):
                stored.lossy = ""
    stored.values = turned(stored.values, turn) if upright else stored.values
    return stored


def stored_picture(picture: Image.Image, head: bytes) -> Stored:
    """Read what Pillow opened. Its modes of other colours than RGB and CMYK become RGB."""
    lossy = "" if picture.format not in LOSSY else str(picture.format)
    space, alpha, top = MODES.get(picture.mode, ("rgb", False, 255))
    table = np.array(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3) if space == "palette" else None
    pixels = np.array(picture if picture.mode in MODES else picture.convert("RGB"))
    values = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if head.startswith(b"\x89PNG") and picture.mode == "L" and head[24] < 8:
        top = 2 ** head[24] - 1
        values = values // (255 // top)  # Pillow has spread 2 or 4 bits over 8
    return Stored(values, space, alpha, table, top, lossy)


def is_lossless_webp(file: BinaryIO) -> bool:
    """Return whether the first picture of an opened WebP file is lossless."""
    file.seek(12)
    while (kind := file.read(4)) and kind not in (b"VP8 ", b"VP8L", b"ANMF"):
        size = int.from_bytes(file.read(4), "little")
        file.seek(size + size % 2, 1)
    return kind == b"VP8L"


def stored_array(pixels: np.ndarray) -> Stored:
    """Take an array of one band, or of several along its shortest axis.

    Raises:
        UserError: if the array has other than 2 or 3 axes, or holds no numbers.
    """
    if pixels.dtype.kind not in "biuf":
        raise UserError(f"its array holds {pixels.dtype}, so save it as integers or floats")
    values = bands_first(pixels, "")
    top = 1 if pixels.dtype.kind == "b" else int(np.iinfo(pixels.dtype).max) if pixels.dtype.kind in "iu" else 1
    return Stored(values, {1: "grey", 3: "rgb"}.get(len(values), "bands"), top=top)


def stored_netpbm(content: bytes) -> Stored:
    """Read PGM and PPM with any largest value, which Pillow would spread over 8 or 16 bits."""
    found = re.match(rb"P([2356])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"(?:\s|#[^\n]*\n)", content)
    if found is None:
        raise UserError("its header is not complete, so replace or remove it")
    kind, width, height, top = map(int, found.groups())
    bands, dtype = (3 if kind in (3, 6) else 1), np.dtype(np.uint8 if top < 256 else ">u2")
    body = content[found.end() :]
    if kind in (2, 3):
        pixels = np.array(body.split()[: height * width * bands], int).astype(dtype)
    else:
        pixels = np.frombuffer(body, dtype, height * width * bands)
    values = pixels.reshape(height, width, bands).transpose(2, 0, 1).astype(dtype.newbyteorder("="))
    return Stored(values, "rgb" if bands == 3 else "grey", top=top)


def stored_tiff(path: Path) -> tuple[Stored, int]:
    """Read the first picture of a TIFF, and its EXIF orientation. Its reduced copies are left out.

    Raises:
        UserError: if the file holds pictures of different sizes, or a package for its compression is missing.
    """
    import tifffile  # only TIFFs need it

    try:
        with tifffile.TiffFile(path) as file:
            series: Any = file.series[0]
            page = series.keyframe
            for other in file.series[1:]:
                if not is_copy(other.keyframe, page):
                    raise UserError(
                        f"it holds pictures of the shapes {series.shape} and {other.shape}: save each in its own file"
                    )
            space, lossy = PHOTOMETRICS.get(int(page.photometric), "bands"), lossy_tiff(page, path)
            if int(page.photometric) in (6, 8, 9, 10) and not lossy:  # colours which Pillow converts to RGB
                with Image.open(path) as picture:
                    return stored_picture(picture, b""), 1  # turned by Pillow
            values = bands_first(series.asarray(), series.axes)
            turn = page.tags.valueof(274, 1)
            table = None if page.colormap is None else (page.colormap.T >> 8).astype(np.uint8)
    except UserError:
        raise
    except Exception as error:  # damaged files and compressions raise exceptions of many classes
        reason = " ".join(str(error).split()) or type(error).__name__
        cure = "pip install imagecodecs, or convert the file to deflate" if "imagecodecs" in reason else "replace it"
        raise UserError(f"{reason}: {cure}") from error
    count = page.samplesperpixel
    if len(values) != count:
        space = "pages"
    elif space == "rgb":
        space = "rgb" if count >= 3 else "bands"
    elif count > 1 and space in ("grey", "white", "palette"):
        space = space if count == 2 and page.extrasamples and int(page.extrasamples[0]) in (1, 2) else "bands"
    elif space == "cmyk" and count != 4:
        space = "bands"
    known = {"grey": 1, "white": 1, "palette": 1, "rgb": 3}.get(space, count)
    bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return Stored(values, space, count == known + 1, table, 2**bits - 1, lossy), int(turn)


def is_copy(page: Any, first: Any) -> bool:
    """Return whether a page of a TIFF is a mask of transparency or a smaller copy of the first one."""
    if int(page.subfiletype) & 5:  # 1: reduced, 4: transparency
        return True
    scale = page.imagewidth / first.imagewidth
    return scale < 1 and abs(page.imagelength - scale * first.imagelength) <= 2


def lossy_tiff(page: Any, path: Path) -> str:
    """Return the name of a TIFF page's compression if it changes values, else ""."""
    import tifffile

    code = int(page.compression)
    if code not in LOSSY_TIFF:
        return ""
    if code == 50001:  # WebP
        with path.open("rb") as file:
            file.seek(page.dataoffsets[0])
            if b"VP8L" in file.read(min(page.databytecounts[0], 64)):
                return ""
    return f"TIFF with {tifffile.COMPRESSION(code).name}"


def bands_first(pixels: np.ndarray, axes: str) -> np.ndarray:
    """Move the bands of an array to the front: ``(C, H, W)``.

    Args:
        pixels: of two or three axes, besides axes of length 1.
        axes: letters of the axes, S or C for bands; without one, the bands are the shortest axis.

    Raises:
        UserError: if the array has other than 2 or 3 axes.
    """
    while pixels.ndim > 3 and 1 in pixels.shape:
        axis = next((i for i, n in enumerate(pixels.shape) if n == 1 and axes[i : i + 1] not in ("Y", "X")), None)
        if axis is None:
            break
        pixels, axes = pixels.squeeze(axis), axes[:axis] + axes[axis + 1 :]
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise UserError(f"its array is {pixels.shape}, but an image has two sides and at most one axis of bands")
    named = [i for i, axis in enumerate(axes) if axis in "SC"]  # samples or channels; pages may be rows
    return np.moveaxis(pixels, named[0] if named else int(np.argmin(pixels.shape)), 0)


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels ``(C, H, W)`` upright by their EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        values = values[:, ::-1]
    return values[:, :, ::-1] if orientation in (2, 3, 6, 7) else values


def rgb(stored: Stored) -> np.ndarray:
    """Return red, green and blue ``(3, H, W)``: uint8, or the file's type if this is deeper.

    Grey becomes three equal bands, transparency is left out, and less than 8 bits are spread over 8.

    Raises:
        UserError: if the bands are not RGB, or a pixel has no colour in the palette.
    """
    values = stored.values
    if stored.space == "palette":
        table = np.empty((0, 3), np.uint8) if stored.table is None else stored.table
        if (largest := int(values[0].max(initial=0))) >= len(table):
            raise UserError(f"its palette has {len(table)} colours, and none for the value {largest}: save it again")
        return table[values[0]].transpose(2, 0, 1)
    if stored.space == "cmyk" and values.dtype == np.uint8:
        picture = Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)), "CMYK")
        return np.array(picture.convert("RGB")).transpose(2, 0, 1)
    if stored.space not in ("grey", "white", "rgb"):
        what = f"{len(values)} pages are bands" if stored.space == "pages" else f"{len(values)} bands are not RGB"
        raise UserError(f"its {what}, so choose some in data.bands")
    if stored.space == "white":
        values = ~values if values.dtype.kind == "b" else values.dtype.type(stored.top) - values
    if stored.top < 255 and values.dtype.kind in "bu":
        values = (values.astype(np.float32) * (255 / stored.top)).round().astype(np.uint8)
    if stored.space == "rgb":
        return values[:3]
    return np.broadcast_to(values[:1], (3, *values.shape[1:]))


def read_image(path: Path, upright: bool = True) -> Tensor:
    """Decode an image of any mode as RGB.

    Args:
        path: a picture, a TIFF, or ``.npy`` of 1 or 3 bands.
        upright: whether to turn the image by its EXIF orientation.

    Returns:
        ``(3, H, W)``: uint8 for files of at most 8 bits, else the file's type, see `numbers`. Palette, grey, alpha and
        CMYK images are converted to RGB.

    Raises:
        UserError: if the file cannot be decoded as RGB; the message names it.
    """
    with decoding(path, "an image"):
        return numbers(rgb(read_stored(path, upright)))


def read_bands(path: Path, bands: Sequence[int]) -> Tensor:
    """Read some bands of a TIFF, ``.npy`` or picture as stored, without a conversion to RGB.

    Args:
        path: the file.
        bands: which bands to read, counted from 0.

    Returns:
        ``(len(bands), H, W)``, see `numbers`.

    Raises:
        UserError: if the file cannot be decoded or lacks a band; the message names it.
    """
    with decoding(path, "an image of bands"):
        pixels = read_stored(path).values
        if max(bands) >= len(pixels) or min(bands) < 0:
            wrong = max(bands) if max(bands) >= len(pixels) else min(bands)
            raise UserError(f"it has the bands 0 to {len(pixels) - 1}, but data.bands names {wrong}")
        return numbers(pixels[list(bands)])


def numbers(pixels: np.ndarray) -> Tensor:
    """Return an image's pixels in a type that PyTorch computes with: uint8, uint16, int16, int32 or float32.

    Other integers become int32 if their values fit, and other floats float32.

    Raises:
        UserError: if a value is beyond 32 bits.
    """
    if pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float32)
    elif pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8)
    elif pixels.dtype.kind not in "iu":
        raise UserError(f"it holds {pixels.dtype}, so save it as integers or floats")
    elif pixels.dtype.name not in ("uint8", "uint16", "int16", "int32"):
        if pixels.size and not (int(pixels.min()) >= -(2**31) and int(pixels.max()) < 2**31):
            raise UserError(f"it holds {pixels.dtype} up to {pixels.max()}, beyond 32 bits, so save it as floats")
        pixels = pixels.astype(np.int32)
    if not pixels.flags.writeable or any(step < 0 for step in pixels.strides) or not pixels.dtype.isnative:
        pixels = np.array(pixels, pixels.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(pixels)


def read_mask(
    path: Path, colors: Sequence[tuple[int, int, int]] | None = None, threshold: float | None = None
) -> Tensor:
    """Decode a mask: stored values, palette indices, or the labels of its colours.

    Args:
        path: a picture of one band or with a palette, an RGB picture of three equal bands, a TIFF or ``.npy``.
        colors: the colour of each label, for a mask in colour; None reads stored values.
        threshold: 0 for smaller values of a grey mask, 1 for the others; None reads stored values.

    Returns:
        ``(H, W)`` uint8, or int32 or int64 if the file holds more than 8 bits.

    Raises:
        UserError: if the file cannot be decoded, its format changes values, it holds fractions or bands that would be
            left out, it is in colour without `colors`, or it holds a colour that is not listed.
    """
    with decoding(path, "a mask"):
        stored = read_stored(path)
    if stored.lossy and threshold is None:
        raise UserError(
            f"{path} is a mask in {stored.lossy}, a format that changes values: save masks as PNG, from the original "
            "labels; masks of two classes can be read by data.mask_threshold: 128"
        )
    if colors is not None:
        with decoding(path, "a mask in colour"):
            pixels = color_pixels(stored)
        return labels_of_colors(path, pixels, colors)
    values = one_band(path, stored, loose=8 if stored.lossy else 0)
    if threshold is not None:
        return torch.from_numpy((values >= threshold).astype(np.uint8))
    return whole_numbers(path, values)


def color_pixels(stored: Stored) -> np.ndarray:
    """Return the colours of a mask, uint8 ``(H, W, 3)``.

    Raises:
        UserError: if transparency tells apart what colours do not, or the colours have more than 8 bits.
    """
    if stored.alpha:
        check_alpha(stored)
    pixels = rgb(stored)
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "u" or (pixels % 257).any():
            raise UserError(f"its colours are {pixels.dtype} and have no equals in 8 bits, so save it with 8 bits")
        pixels = (pixels // 257).astype(np.uint8)
    return pixels.transpose(1, 2, 0)


def check_alpha(stored: Stored) -> None:
    """Check that leaving out transparency joins no pixels that differ.

    Raises:
        UserError: if pixels of one colour differ in their transparency.
    """
    *shown, alpha = stored.values
    if alpha.size == 0 or (alpha == alpha.flat[0]).all():
        return
    codes = np.zeros(alpha.shape, np.uint64)
    for band in shown:
        codes = codes << np.uint64(16) | band.astype(np.uint64)
    _, colour = np.unique(codes, return_inverse=True)
    both = colour.astype(np.int64).ravel() << 16 | alpha.astype(np.int64).ravel()
    if len(np.unique(both)) > colour.max() + 1:
        some = ", ".join(str(value) for value in np.unique(alpha)[[0, -1]])
        raise UserError(
            f"its alpha band holds values such as {some} where the other bands are equal, and alpha is not read: save "
            "the mask as labels in one band"
        )


def one_band(path: Path, stored: Stored, loose: int = 0) -> np.ndarray:
    """Return the one band of a mask that holds its labels, ``(H, W)``.

    Args:
        path: the file, for the error message.
        stored: its pixels.
        loose: by how much bands of grey may differ.

    Raises:
        UserError: if the other bands hold something else.
    """
    values = stored.values
    if stored.alpha:
        with decoding(path, "a mask"):
            check_alpha(stored)
        values = values[:-1]
    first, shape = values[0], "mode RGB" if stored.space == "rgb" else f"{len(values)} bands"
    for k, band in enumerate(values[1:], 1):
        apart = np.abs(band.astype(float) - first).max(initial=0) > loose if loose else (band != first).any()
        if apart and k < 3 and stored.space in ("rgb", "cmyk"):
            raise UserError(
                f"{path} is a mask in colour ({shape}) and holds no labels: save it as labels, or, if all masks are in "
                "colour, name the colours of the classes (docs/your_data.md)"
            )
        if apart and (band != band.flat[0]).any():
            some = ", ".join(str(value) for value in np.unique(band)[:3])
            raise UserError(
                f"{path} is a mask of {len(values)} bands, and band {k} holds other values than band 0, such as "
                f"{some}: save the mask as labels in one band"
            )
    return first


def whole_numbers(path: Path, values: np.ndarray) -> Tensor:
    """Return a mask's values without any change: uint8, or int32 or int64 for more than 8 bits.

    Raises:
        UserError: for a fraction or a value that is no number; names it.
    """
    if values.dtype.kind == "f":
        odd = ~np.isfinite(values) | (values != np.trunc(values)) | (np.abs(values) > 2**53)
        if odd.any():
            raise UserError(
                f"{path} is a mask of {values.dtype} and holds the value {values[odd][0]}, but labels are whole "
                "numbers: save the mask as integers, one per class"
            )
        values = values.astype(np.int64)
    if values.dtype == np.uint64 and values.max(initial=0) >= 2**63:
        raise UserError(f"{path} holds the value {values.max()}, which is too large for a label: save the mask again")
    if values.dtype.kind == "b" or values.dtype == np.uint8:
        return torch.from_numpy(np.require(values, np.uint8, ["C", "W"]))
    fits = values.size == 0 or (int(values.min()) >= -(2**31) and int(values.max()) < 2**31)
    return torch.from_numpy(np.require(values, np.int32 if fits else np.int64, ["C", "W"]))


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
