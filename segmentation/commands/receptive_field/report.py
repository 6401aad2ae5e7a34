"""Receptive fields as tables and pictures: the command ``lightning receptive_field``."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ...base import SegmentationModule
from ...checkpoints import load_trained
from .fields import Field, effective_field, layer_fields, network_fields, read_layer, ways_to_pixels
from ...errors import UserError

ROWS = 15  # of a table that is read at a glance


# The command


def analyse_layers(layers: Sequence[str], size: int | Sequence[int] | None, output_dir: Path) -> None:
    """Print and draw the fields of a chain of layers.

    Args:
        layers: see `layer_fields`.
        size: side of an image in pixels, to say how many units each layer gives of it; None does not.
        output_dir: for ``layers.png``.

    Raises:
        UserError: for no layer, one that is not written as it should be, or a size of two sides.
    """
    if not layers or (size is not None and not isinstance(size, int)):
        raise UserError(f"--layers takes one layer or more, and then --size one side, got {layers} and {size}")
    fields, units = layer_fields(layers), []
    if size is not None:
        for layer in layers:
            kernel, stride, dilation, padding = read_layer(layer)
            size = max(0, (size + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1)
            units.append(str(size))
    Console(width=100).print(field_table("What one unit sees", fields, "units", units))
    output_dir.mkdir(parents=True, exist_ok=True)
    draw_layers(layers, fields, output_dir / "layers.png")
    print(f"picture      {output_dir / 'layers.png'}")


def analyse_network(
    network: SegmentationModule,
    checkpoint: str | None,
    image: str | None,
    size: int | Sequence[int] | None,
    stages: Sequence[str],
    device: torch.device,
    output_dir: Path,
) -> None:
    """Print and draw the fields of a network, the effective one before and after training.

    Args:
        network: as it is before training.
        checkpoint: of the same network after training; None leaves that out.
        image: a file; None takes noise.
        size: to which the image is resized, a side or height and width; None keeps its own, and makes noise 512.
        stages: see `network_fields`; if none are named, the table is cut to what is read at a glance.
        device: where the effective field is measured.
        output_dir: for a picture named as the network.
    """
    name = type(network).__name__
    pixels = read_image(image, size, network.in_channels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # strips are too thin to share: more threads would wait for each other
    try:
        fields = network_fields(network, stages)
    finally:
        torch.set_num_threads(threads)
    fields = fields if stages else main_rows(fields)
    height, width = pixels.shape[1:]
    taps = [live_taps(network, field, (height, width)) for field in fields]
    console = Console(width=100)
    title = f"What one unit of {name} sees, of {height} x {width} px"
    console.print(field_table(title, fields, "live taps", taps if any(taps) else ()))

    network.to(device)
    effects = {"in effect, before training" if checkpoint else "in effect": effective_field(network, pixels)}
    if checkpoint is not None:
        load_trained(network, checkpoint)
        effects["in effect, after training"] = effective_field(network, pixels)
    console.print(effect_table(effects))

    output_dir.mkdir(parents=True, exist_ok=True)
    picture = output_dir / f"{name}.png"
    draw_network(pixels, fields, effects, f"What one output pixel of {name} sees", picture)
    print(f"picture      {picture}")


def read_image(path: str | None, size: int | Sequence[int] | None, in_channels: int) -> Tensor:
    """Read an image as uint8 ``(in_channels, H, W)``, resized; without a path, noise.

    Raises:
        UserError: if the file cannot be read, the channels are not 1 or 3, or the size is not one or two sides.
        UserError: if there is no such file.
    """
    sides = [size, size] if isinstance(size, int) else list(size or ())
    if len(sides) not in (0, 2) or min(sides, default=1) < 1:
        raise UserError(f"--size is one side, or height and width as [360, 480], got {size}")
    if path is None:
        height, width = sides or (512, 512)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(256, (in_channels, height, width), dtype=torch.uint8, generator=generator)
    if in_channels not in (1, 3):
        raise UserError(f"--image has 1 or 3 channels, but the model in_channels {in_channels}: leave --image out")
    if not Path(path).is_file():
        raise UserError(f"the image {path} does not exist")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB" if in_channels == 3 else "L")
    except OSError as error:
        raise UserError(f"the image {path} cannot be read: {error}") from error
    if sides:
        picture = picture.resize((sides[1], sides[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).view(picture.height, picture.width, in_channels).permute(2, 0, 1)


# Tables and pictures


def main_rows(fields: Sequence[Field]) -> list[Field]:
    """Leave out repetitions; of more than `ROWS`, all but the last of neighbours that work alike, and second runs."""
    kept: list[Field] = []
    for field in fields:
        same = kept and replace(field, stage=kept[-1].stage, rates=field.rates or kept[-1].rates) == kept[-1]
        if not same or field.stage == "logits":
            kept.append(field)
    if len(kept) > ROWS:
        ways = [(field.stride, field.rates, field.bins) for field in kept]
        kept = [field for field, way, following in zip(kept, ways, [*ways[1:], None], strict=True) if way != following]
    if len(kept) > ROWS:
        kept = [field for field in kept if not field.stage.endswith(")")]
    return kept


def field_table(title: str, fields: Sequence[Field], heading: str, words: Sequence[str]) -> Table:
    """A row per field, with a last column of the caller's words, if any."""
    table = Table("stage", title=title, box=ASCII2)
    for text in ("stride", "rates", "sees, px", "middle of unit j, px", *([heading] if words else [])):
        table.add_column(text, justify="right")
    for row, field in enumerate(fields):
        pooled = {0: "", 1: "whole image"}.get(field.bins, f"1/{field.bins} of the image")
        sees = " + ".join(part for part in (str(field.size or ""), pooled) if part)
        stride = "" if field.stride is None else f"{field.stride:.4g}"
        place = f"{stride if stride != '1' else ''} j".strip() if stride and field.size else ""
        if place and field.centre:
            place += f" {'-' if field.centre < 0 else '+'} {abs(field.centre):.4g}"
        table.add_row(field.stage, stride, ", ".join(map(str, field.rates)), sees, place, *words[row : row + 1])
    return table


def effect_table(effects: dict[str, Tensor]) -> Table:
    """A row per effective field."""
    table = Table("", title="Where the gradient of the logits in the middle comes from", box=ASCII2)
    for heading in ("half of it, px", "95 % of it, px", "above 4.55 % of its largest, px"):
        table.add_column(heading, justify="right")
    for when, effect in effects.items():
        table.add_row(when, *map(str, (side_holding(effect, 0.5), side_holding(effect, 0.95), side_above(effect))))
    return table


def side_holding(effect: Tensor, share: float) -> int:
    """Side of the square around the middle that holds a share of an effective field ``(H, W)``."""
    height, width = effect.shape
    rows, columns = torch.arange(height)[:, None] - height // 2, torch.arange(width) - width // 2
    distance = torch.maximum(rows.abs(), columns.abs())  # of the square on whose border a pixel lies
    held = torch.bincount(distance.flatten(), effect.flatten()).cumsum(0)
    return 2 * int((held < share).sum()) + 1


def side_above(effect: Tensor) -> int:
    """Root of the number of pixels above 1 - 95.45 % of the largest (Luo et al., section 4)."""
    return round(int((effect > 0.0455 * effect.max()).sum()) ** 0.5)


def live_taps(network: nn.Module, field: Field, image_size: Sequence[int]) -> str:
    """Of the taps of a stage's dilated convolution, how many lie on the map on average, not on its padding.

    Empty unless the stage has exactly one rate.
    """
    if len(field.rates) != 1 or field.stride is None:
        return ""
    modules = network.get_submodule(field.stage.partition(" ")[0]).modules()
    kernel = next(m.kernel_size for m in modules if isinstance(m, nn.Conv2d) and max(m.dilation) > 1)
    live = 1.0
    for side, taps in zip(image_size, kernel, strict=True):
        units = math.ceil(side / field.stride)
        offsets = (abs(tap - (taps - 1) / 2) * field.rates[0] for tap in range(taps))
        live *= sum(max(0.0, units - offset) for offset in offsets) / units
    return f"{live:.1f} of {math.prod(kernel)}"


def draw_layers(layers: Sequence[str], fields: Sequence[Field], picture: Path) -> None:
    """Draw which pixels the first unit of each layer sees, and the squares of this and of the next unit."""
    from matplotlib.figure import Figure  # 0.3 s to import, and needed only here; no pyplot: no global state
    from matplotlib.patches import Rectangle

    columns = min(len(layers), 5)
    lines = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(2.6 * max(columns, 2), 2.9 * lines + 0.3), layout="constrained")
    figure.supxlabel("What one unit sees: darker, in more ways; dashed, the next unit", fontsize=9)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    side = max(field.size + int(field.stride or 0) for field in fields)
    for axes in panels:
        axes.set_axis_off()
    for number, (axes, field) in enumerate(zip(panels, fields, strict=False), start=1):
        ways = np.zeros(side)
        ways[: field.size] = ways_to_pixels(layers[:number])
        seen = np.ma.masked_equal(np.outer(ways, ways), 0)
        axes.pcolormesh(seen, cmap="YlOrRd", vmin=0, vmax=1.2 * seen.max())
        if side <= 40:
            axes.hlines(range(side + 1), 0, side, color="#bbbbbb", linewidth=0.5)
            axes.vlines(range(side + 1), 0, side, color="#bbbbbb", linewidth=0.5)
        for start, line in ((int(field.stride or 0), "--"), (0, "-")):
            axes.add_patch(Rectangle((start, 0), field.size, field.size, fill=False, linestyle=line, linewidth=1.5))
        axes.set_title(f"{field.stage}: {field.size} px, stride {field.stride}", fontsize=10)
        axes.set(xlim=(-0.1, side + 0.1), ylim=(side + 0.1, -0.1), aspect="equal")
    figure.savefig(picture, dpi=110)


def draw_network(image: Tensor, fields: Sequence[Field], effects: dict[str, Tensor], title: str, picture: Path) -> None:
    """Draw the squares of the stages over an image ``(C, H, W)``, and beside it how much each pixel counts in effect.

    Effective fields ``(H, W)`` come by the titles of their panels, where the last stage's square is drawn too.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from scipy.ndimage import gaussian_filter

    height, width = image.shape[1:]
    row, column = height // 2, width // 2
    shown = distinct(fields)
    theory = f"in theory: {shown[-1].size} px" + (" + whole image" if shown[-1].bins else "")
    reach = min(shown[-1].size / 2 + 12, max(height, width))
    left, right = min(-0.5, column - reach), max(width - 0.5, column + reach)
    top, bottom = min(-0.5, row - reach), max(height - 0.5, row + reach)

    # Inches: a line of title, a row of panels, their legends below, and a scale to the right.
    across, panel, legend = 4.5 * (1 + len(effects)), 4.4 * (bottom - top) / (right - left), 0.17 * len(shown) + 0.3
    size = across + 0.8, legend + panel + 0.65
    figure = Figure(figsize=size)
    figure.text(0.05 / size[0], 1 - 0.08 / size[1], title, va="top", fontsize=11, weight="bold")
    left_bottom_right_top = 0.05 / size[0], legend / size[1], across / size[0], (legend + panel) / size[1]
    figure.subplots_adjust(*left_bottom_right_top, wspace=0.03)
    panels = figure.subplots(1, 1 + len(effects), squeeze=False)[0]

    def square(axes: Any, side: float, label: str, **style: Any) -> None:
        label += ", beyond this picture" if side / 2 > reach else ""
        corner = column - side / 2, row - side / 2
        axes.add_patch(Rectangle(corner, side, side, fill=False, label=label, **style))

    pixels = image[[0, 1, 2] if len(image) > 2 else [0, 0, 0]].permute(1, 2, 0).numpy()
    panels[0].imshow(pixels)
    for number, field in enumerate(shown):
        shade = colormaps["plasma"](0.1 + 0.85 * number / max(1, len(shown) - 1))
        label = f"{field.stage}: {field.size} px, stride {field.stride:.4g}"
        label += f", rate {', '.join(map(str, field.rates))}" if field.rates else ""
        square(panels[0], field.size, label, edgecolor=shade, linewidth=2)
    scale, colours = LogNorm(1e-3, 1), colormaps["inferno"]
    for axes, effect in zip(panels[1:], effects.values(), strict=True):
        heat = gaussian_filter(effect.numpy(), 0.006 * max(height, width), mode="constant", truncate=3)
        strength = np.asarray(scale((heat / heat.max()).clip(1e-3, 1)))
        axes.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=400)
        axes.imshow(colours(strength), alpha=strength)
        square(axes, shown[-1].size, theory, edgecolor="#999999", linestyle="--")
        for share, colour in ((0.95, "#3f9fff"), (0.5, "#7fffdf")):
            side = side_holding(effect, share)
            square(axes, side, f"{share:.0%} of the gradient: {side} px", edgecolor=colour, linewidth=2)
    for axes, name in zip(panels, ["in theory", *effects], strict=True):
        axes.set_title(name, fontsize=10)
        axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], facecolor="#e4e4e4")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False, fontsize=9, labelspacing=0.2)
    bar = figure.colorbar(ScalarMappable(scale, colours), cax=panels[-1].inset_axes((1.02, 0, 0.02, 1)))
    bar.set_label("gradient over its largest value, mean over shifts of the image", fontsize=8)
    figure.savefig(picture, dpi=110)


def distinct(fields: Sequence[Field]) -> list[Field]:
    """At most eight of the fields, the last among them, whose squares can be told apart in a picture."""
    *others, last = (field for field in fields if field.size and field.stride)
    kept: list[Field] = []
    for field in others:
        if field.size < 0.8 * last.size and (not kept or field.size > 1.25 * kept[-1].size):
            kept.append(field)
    return [*kept[-7:], last]
