"""Pictures of labels: in colours, as overlays, as maps of errors and changes, and panels of these."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .losses import IGNORE

Palette = Sequence[Sequence[int]]


def rgb(image: Tensor) -> np.ndarray:
    """Convert stored pixels for display: ``(C, H, W)`` of any type to uint8 ``(H, W, 3)``.

    An image of one or two channels becomes grey, and of more than three channels the first three are shown. Types
    other than uint8 are stretched from their lowest to their highest value.
    """
    pixels = image.detach().float().cpu().numpy()
    pixels = pixels[[0, 0, 0]] if len(pixels) < 3 else pixels[:3]
    if str(image.dtype) != "torch.uint8":
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / max(high - low, 1e-12) * 255
    return pixels.transpose(1, 2, 0).round().astype(np.uint8)


def palette_bytes(palette: Palette) -> bytes:
    """Return a PNG palette of 256 colours: those of the classes, black for unused labels, white for 255."""
    colours = np.zeros((256, 3), np.uint8)
    colours[IGNORE] = 255
    colours[: len(palette)] = palette
    return colours.tobytes()


def index_mask(labels: Tensor, palette: Palette) -> Image.Image:
    """Build a palette picture whose pixel values are the labels ``(H, W)``."""
    picture = Image.fromarray(labels.byte().cpu().numpy())
    picture.putpalette(palette_bytes(palette))
    return picture


def overlay(image: np.ndarray, labels: Tensor, palette: Palette, opacity: float = 0.5) -> Image.Image:
    """Blend labels ``(H, W)`` in their colours over an image uint8 ``(H, W, 3)``."""
    colours = np.asarray(index_mask(labels, palette).convert("RGB"))
    return Image.fromarray((image * (1 - opacity) + colours * opacity).round().astype(np.uint8))


def error_map(image: np.ndarray, truth: Tensor, prediction: Tensor) -> Image.Image:
    """Draw wrong pixels in red and ignored ones in white over the faded image."""
    grey = faded(image)
    valid = (truth != IGNORE).cpu().numpy()
    grey[(truth != prediction).cpu().numpy() & valid] = (220, 20, 30)
    grey[~valid] = 255
    return Image.fromarray(grey.astype(np.uint8))


def changes(image: np.ndarray, truth: Tensor, before: Tensor, after: Tensor) -> Image.Image:
    """Draw the pixels that a refinement changed over the faded image, and ignored pixels in white.

    Pixels that became right are green, those that became wrong red, and those that changed from one wrong label to
    another yellow.
    """
    grey = faded(image)
    valid, changed = truth != IGNORE, before != after
    for pixels, colour in (
        (changed & (after == truth), (0, 160, 60)),
        (changed & (before == truth), (220, 20, 30)),
        (changed & (before != truth) & (after != truth), (250, 200, 0)),
    ):
        grey[(pixels & valid).cpu().numpy()] = colour
    grey[~valid.cpu().numpy()] = 255
    return Image.fromarray(grey.astype(np.uint8))


def faded(image: np.ndarray) -> np.ndarray:
    """Return an image uint8 ``(H, W, 3)`` as light grey floats of the same shape."""
    return image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.35 + 120


def panel(
    titles: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    palette: Palette,
    class_names: Sequence[str],
    width: int = 240,
) -> Image.Image:
    """Draw pictures side by side, a row per sample, above a legend of the classes.

    Args:
        titles: titles of the columns.
        rows: pictures, one per column; those of a row have one size.
        palette: one RGB colour per class.
        class_names: one name per class.
        width: width of each picture in pixels.
    """
    font, gap = ImageFont.load_default(size=13), 6
    strips = []
    for cells in rows:
        height = max(1, round(width * cells[0].height / cells[0].width))
        resampling = [Image.Resampling.LANCZOS] + (len(cells) - 1) * [Image.Resampling.NEAREST]
        strips.append([cell.resize((width, height), how) for cell, how in zip(cells, resampling, strict=True)])
    total = len(titles) * width + (len(titles) + 1) * gap
    entries, x, y = [], gap, 0  # legend: where each swatch is, wrapped at the panel's width
    for name in class_names:
        length = 28 + int(font.getlength(name))
        if x + length > total:
            x, y = gap, y + 20
        entries.append((x, y, name))
        x += length
    body = sum(strip[0].height + gap for strip in strips)
    sheet = Image.new("RGB", (total, 24 + body + y + 24), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), 4), title, fill="black", font=font)
    top = 24
    for strip in strips:
        for column, cell in enumerate(strip):
            sheet.paste(cell, (gap + column * (width + gap), top))
        top += strip[0].height + gap
    for (x, y, name), colour in zip(entries, palette, strict=True):
        draw.rectangle((x, top + y + 2, x + 13, top + y + 15), fill=tuple(colour), outline="black")
        draw.text((x + 18, top + y), name, fill="black", font=font)
    return sheet
