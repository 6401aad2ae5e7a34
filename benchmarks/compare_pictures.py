"""Pictures of `compare.py`: costs, confusions and predictions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # no pyplot: no global state
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from PIL import Image

FCN, DILATED, DECODER, MASKS = "strides and skips", "dilation and pyramids", "encoder and decoder", "queries and masks"
COLOURS = {FCN: "tab:green", DILATED: "tab:orange", DECODER: "tab:blue", MASKS: "tab:purple"}
DPI = 110


def draw_costs(results: dict[str, Any], minutes: float, picture: Path) -> None:
    """Draw mIoU against parameters, MACs, step time and memory.

    Args:
        results: one per architecture, with ``family``, ``mious`` (near edges, inside, all) and the costs.
        minutes: length of the training, for the title.
        picture: PNG to write.
    """
    figure = Figure(figsize=(10, 8.4), dpi=DPI, layout="constrained")
    figure.suptitle(f"mIoU after {minutes:g} minutes of training, against four costs")
    panels = [("parameters", 1e6, "million parameters"), ("macs", 1e9, "billion multiply-accumulates per image")]
    panels += [("step_seconds", 1, "seconds per training step"), ("memory_mib", 1, "MiB of memory in training")]
    grid = figure.subplots(2, 2, sharey=True)
    for axes, (key, unit, title) in zip(grid.flat, panels, strict=True):
        for result in results.values():
            axes.scatter(result[key] / unit, result["mious"][2], color=COLOURS[result["family"]], s=45, zorder=3)
        axes.set(xscale="log", xlabel=title)
        axes.margins(0.15, 0.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.set_ylabel("mIoU" if axes in grid[:, 0] else "")
    families = [family for family in COLOURS if family in {result["family"] for result in results.values()}]
    dots = [grid[0, 0].scatter([], [], color=COLOURS[family], s=45, label=family) for family in families]
    figure.legend(handles=dots, loc="outside lower center", ncols=4, frameon=False)
    figure.draw_without_rendering()  # places the axes; names are placed in pixels
    for axes, (key, unit, _) in zip(grid.flat, panels, strict=True):
        write_names(axes, {name: (result[key] / unit, result["mious"][2]) for name, result in results.items()})
    figure.savefig(picture)


def write_names(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Write each name near its point, at a place where it covers no point and no other name."""
    spots = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in spots]
    ways = [(distance, math.radians(a)) for distance in (0, 12, 26, 42, 60, 80, 105, 130) for a in range(0, 360, 30)]
    for (name, point), (x, y) in zip(points.items(), spots, strict=True):
        width, height = 10 * len(name), 18  # in pixels, for letters of 10 points
        for distance, angle in ways:
            dx = (9 + distance + width / 2) * math.cos(angle)
            dy = (9 + distance + height / 2) * math.sin(angle)
            box = Bbox.from_bounds(x + dx - width / 2, y + dy - height / 2, width, height)
            if axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and not box.count_overlaps(taken):
                break
        taken.append(box)
        axes.annotate(
            name, point, (dx, dy), textcoords="offset pixels", ha="center", va="center",
            arrowprops={"arrowstyle": "-", "color": "gray", "lw": 0.6} if distance else None,
        )  # fmt: skip


def draw_confusions(results: dict[str, Any], titles: Sequence[str], picture: Path) -> None:
    """Draw shares of confused pixels, and mIoU near edges and inside, as coloured tables.

    Args:
        results: one per architecture, with ``shares`` in percent, one per title, and ``mious`` (near edges, inside,
            all).
        titles: titles of the shares.
        picture: PNG to write.
    """
    figure = Figure(figsize=(10, 1 + 0.36 * len(results)), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[len(titles), 3])
    for axes, key, form, colours, top in (
        (left, "shares", "{:.0f} %", "Reds", 60),
        (right, "mious", "{:.2f}", "Greens", 1),
    ):
        values = np.array([result[key] for result in results.values()])
        axes.imshow(values, cmap=colours, vmin=0, vmax=top, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            colour = "white" if value > 0.6 * top else "black"
            axes.text(x, y, form.format(value), ha="center", va="center", color=colour)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.set_frame_on(False)
    left.set_xticks(range(len(titles)), [title.replace(" ", "\n") for title in titles])
    left.set_yticks(range(len(results)), list(results))
    right.set_xticks(range(3), ["mIoU\nnear\nedges", "mIoU\ninside", "mIoU"])
    right.set_yticks([])
    figure.savefig(picture)


def draw_predictions(
    architectures: Sequence[str], names: Sequence[str], palette: Sequence[Sequence[int]], folder: Path, picture: Path
) -> None:
    """Draw test images, their masks and all predictions.

    Args:
        architectures: names of the architectures, in the order of the picture.
        names: names of the classes.
        palette: RGB colours of the classes.
        folder: holds ``<scene>_image.png``, ``<scene>_truth.png`` and ``<scene>_<architecture>.png``.
        picture: PNG to write.
    """
    scenes, cells = sorted(folder.glob("*_image.png")), ["image", "truth", *architectures]
    columns = min(len(cells), 7)
    lines = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(10, 11.3 / columns * lines * len(scenes) + 0.4), dpi=DPI, layout="constrained")
    for number, scene in enumerate(scenes):
        for place, cell in enumerate(cells, 1 + number * lines * columns):
            axes = figure.add_subplot(lines * len(scenes), columns, place)
            file = scene.with_name(scene.name.replace("image", cell))
            axes.imshow(Image.open(file).convert("RGB"), interpolation="nearest")
            axes.set_title(cell, fontsize=10)
            axes.axis("off")
    swatches = [Patch(color=np.divide(palette[i], 255).tolist(), label=name) for i, name in enumerate(names)]
    style = {"frameon": False, "handlelength": 1, "columnspacing": 1}
    figure.legend(handles=swatches, loc="outside lower center", ncols=11, **style)
    figure.savefig(picture)
