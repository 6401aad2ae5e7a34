"""Fields as pictures: of a chain of layers, and of a network over an image."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .fields import Field, ways_to_pixels
from .tables import side_holding


def draw_layers(layers: Sequence[str], fields: Sequence[Field], picture: Path) -> None:
    """Draw which pixels the first unit of each layer sees, and the squares of this and of the next unit."""
    from matplotlib.figure import Figure  # 0.3 s to import, and needed only here; no pyplot: no global state
    from matplotlib.patches import Rectangle

    columns = min(len(layers), 5)
    lines = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(2.6 * max(columns, 2), 2.9 * lines + 0.3), layout="constrained")
    figure.supxlabel("Dark pixels are seen in more ways. The dashed square is that of the next unit.", fontsize=9)
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
    """Draw the squares of the stages over an image, and beside it how much each pixel counts in effect.

    Args:
        image: stored pixels ``(C, H, W)``.
        fields: of the stages; those that cannot be told apart are left out.
        effects: effective fields ``(H, W)`` by the titles of their panels; the last stage's square is drawn there too.
        title: stands above the panels.
        picture: the file to write.
    """
    height, width = image.shape[1:]
    shown = distinct(fields)
    reach = min(shown[-1].size / 2 + 12, max(height, width))
    left, right = min(-0.5, width // 2 - reach), max(width - 0.5, width // 2 + reach)
    top, bottom = min(-0.5, height // 2 - reach), max(height - 0.5, height // 2 + reach)
    figure, panels = figure_with_panels(title, 1 + len(effects), (bottom - top) / (right - left), len(shown))
    pixels = image[[0, 1, 2] if len(image) > 2 else [0, 0, 0]].permute(1, 2, 0).numpy()
    draw_theory(panels[0], pixels, shown, reach)
    for axes, effect in zip(panels[1:], effects.values(), strict=True):
        draw_effect(axes, pixels, effect, shown[-1], reach)
    for axes, name in zip(panels, ["in theory", *effects], strict=True):
        axes.set_title(name, fontsize=10)
        axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], facecolor="#e4e4e4")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False, fontsize=9, labelspacing=0.2)
    draw_scale(figure, panels[-1])
    figure.savefig(picture, dpi=110)


def figure_with_panels(title: str, count: int, ratio: float, entries: int) -> tuple[Any, Sequence[Any]]:
    """Build a figure of panels side by side, with room for a title above, legends below and a scale to the right.

    Args:
        title: stands above the panels.
        count: number of panels.
        ratio: height of a panel over its width.
        entries: number of entries in the longest legend.

    Returns:
        the figure and its panels.
    """
    from matplotlib.figure import Figure

    across, panel, legend = 4.5 * count, 4.4 * ratio, 0.17 * entries + 0.3  # inches
    size = across + 0.8, legend + panel + 0.65
    figure = Figure(figsize=size)
    figure.text(0.05 / size[0], 1 - 0.08 / size[1], title, va="top", fontsize=11, weight="bold")
    left_bottom_right_top = 0.05 / size[0], legend / size[1], across / size[0], (legend + panel) / size[1]
    figure.subplots_adjust(*left_bottom_right_top, wspace=0.03)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def draw_theory(axes: Any, pixels: np.ndarray, shown: Sequence[Field], reach: float) -> None:
    """Draw a square per field around the middle of an image ``(H, W, 3)``."""
    from matplotlib import colormaps

    axes.imshow(pixels)
    for number, field in enumerate(shown):
        shade = colormaps["plasma"](0.1 + 0.85 * number / max(1, len(shown) - 1))
        label = f"{field.stage}: {field.size} px, stride {field.stride:.4g}"
        label += f", rate {', '.join(map(str, field.rates))}" if field.rates else ""
        draw_square(axes, pixels, field.size, reach, label, edgecolor=shade, linewidth=2)


def draw_effect(axes: Any, pixels: np.ndarray, effect: Tensor, theory: Field, reach: float) -> None:
    """Draw an effective field ``(H, W)`` over an image ``(H, W, 3)``, and the squares that hold most of it."""
    from matplotlib import colormaps
    from scipy.ndimage import gaussian_filter

    heat = gaussian_filter(effect.numpy(), 0.006 * max(pixels.shape[:2]), mode="constant", truncate=3)
    strength = np.asarray(strength_scale()((heat / heat.max()).clip(1e-3, 1)))
    axes.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=400)
    axes.imshow(colormaps["inferno"](strength), alpha=strength)
    label = f"in theory: {theory.size} px" + (" + whole image" if theory.bins else "")
    draw_square(axes, pixels, theory.size, reach, label, edgecolor="#999999", linestyle="--")
    for share, colour in ((0.95, "#3f9fff"), (0.5, "#7fffdf")):
        side = side_holding(effect, share)
        label = f"{share:.0%} of the gradient: {side} px"
        draw_square(axes, pixels, side, reach, label, edgecolor=colour, linewidth=2)


def draw_square(axes: Any, pixels: np.ndarray, side: float, reach: float, label: str, **style: Any) -> None:
    """Draw a square around the middle of an image ``(H, W, 3)``; the label tells if it ends beyond `reach`."""
    from matplotlib.patches import Rectangle

    label += ", beyond this picture" if side / 2 > reach else ""
    corner = pixels.shape[1] // 2 - side / 2, pixels.shape[0] // 2 - side / 2
    axes.add_patch(Rectangle(corner, side, side, fill=False, label=label, **style))


def draw_scale(figure: Any, axes: Any) -> None:
    """Draw the scale of effective fields to the right of a panel."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(strength_scale(), "inferno"), cax=axes.inset_axes((1.02, 0, 0.02, 1)))
    bar.set_label("gradient over its largest value, mean over shifts of the image", fontsize=8)


def strength_scale() -> Any:
    """Return the logarithmic scale of effective fields: a thousandth of the largest value to 1."""
    from matplotlib.colors import LogNorm

    return LogNorm(1e-3, 1)


def distinct(fields: Sequence[Field]) -> list[Field]:
    """Return at most eight fields, the last one among them, whose squares can be told apart in a picture."""
    *others, last = (field for field in fields if field.size and field.stride)
    kept: list[Field] = []
    for field in others:
        if field.size < 0.8 * last.size and (not kept or field.size > 1.25 * kept[-1].size):
            kept.append(field)
    return [*kept[-7:], last]
