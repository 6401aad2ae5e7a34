"""Fields as tables: a row per stage, or per effective field."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from rich.box import ASCII2
from rich.table import Table
from torch import Tensor, nn

from ...base import SegmentationModule
from .fields import Field, map_sizes

ROWS = 15  # of a table that can be read at a glance


def main_rows(fields: Sequence[Field]) -> list[Field]:
    """Leave out fields equal to the field before.

    If more than `ROWS` are left, leave out all but the last of neighbours with the same stride, rates and bins. If
    there are still more, leave out every later run of a module.
    """
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


def network_table(network: SegmentationModule, fields: Sequence[Field], image_size: Sequence[int]) -> Table:
    """Build the table of a network: its fields, the sizes of its feature maps, and the live taps of dilated stages.

    Args:
        network: holds the stages.
        fields: the rows.
        image_size: height and width in pixels.
    """
    sizes = map_sizes(network, image_size)
    columns = {
        "map": [" x ".join(map(str, sizes.get(field.stage, ()))) for field in fields],
        "live taps": [live_taps(network, field, image_size) for field in fields],
    }
    height, width = image_size
    return field_table(f"What one unit of {type(network).__name__} sees, of {height} x {width} px", fields, columns)


def field_table(title: str, fields: Sequence[Field], columns: Mapping[str, Sequence[str]]) -> Table:
    """Build a table with a row per field.

    Args:
        title: stands above the table.
        fields: the rows.
        columns: further columns, a cell per field by heading; a column of empty cells is left out.
    """
    further = {heading: cells for heading, cells in columns.items() if any(cells)}
    table = Table("stage", title=title, box=ASCII2)
    for heading in ("stride", "rates", "sees, px", "middle of unit j, px", *further):
        table.add_column(heading, justify="right")
    for row, field in enumerate(fields):
        pooled = {0: "", 1: "whole image"}.get(field.bins, f"1/{field.bins} of the image")
        sees = " + ".join(part for part in (str(field.size or ""), pooled) if part)
        stride = "" if field.stride is None else f"{field.stride:.4g}"
        place = f"{stride if stride != '1' else ''} j".strip() if stride and field.size else ""
        if place and field.centre:
            place += f" {'-' if field.centre < 0 else '+'} {abs(field.centre):.4g}"
        cells = (cells[row] for cells in further.values())
        table.add_row(field.stage, stride, ", ".join(map(str, field.rates)), sees, place, *cells)
    return table


def effect_table(effects: Mapping[str, Tensor]) -> Table:
    """Build a table with a row per effective field ``(H, W)``."""
    table = Table("", title="Where the gradient of the logits in the middle comes from", box=ASCII2)
    for heading in ("half of it, px", "95 % of it, px", "above 4.55 % of its largest, px"):
        table.add_column(heading, justify="right")
    for when, effect in effects.items():
        table.add_row(when, *map(str, (side_holding(effect, 0.5), side_holding(effect, 0.95), side_above(effect))))
    return table


def side_holding(effect: Tensor, share: float) -> int:
    """Return the side of the square around the middle that holds a share of an effective field ``(H, W)``."""
    height, width = effect.shape
    rows, columns = torch.arange(height)[:, None] - height // 2, torch.arange(width) - width // 2
    distance = torch.maximum(rows.abs(), columns.abs())  # of the square on whose border a pixel lies
    held = torch.bincount(distance.flatten(), effect.flatten()).cumsum(0)
    return 2 * int((held < share).sum()) + 1


def side_above(effect: Tensor) -> int:
    """Return the root of the number of pixels above 1 - 95.45 % of the largest (Luo et al., section 4)."""
    return round(int((effect > 0.0455 * effect.max()).sum()) ** 0.5)


def live_taps(network: nn.Module, field: Field, image_size: Sequence[int]) -> str:
    """Count the taps of a stage's dilated convolution that lie on the map and not on its padding, on average.

    Args:
        network: holds the stage.
        field: the stage's.
        image_size: height and width in pixels.

    Returns:
        such as ``2.6 of 9``; empty unless the stage has exactly one rate.
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
