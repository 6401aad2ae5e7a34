"""The tables of `Report`, and what every logged number means."""

import io
import math

from rich.box import ASCII2
from rich.console import Console
from rich.table import Table

# For each kind of logged key, without its split and ``crf/``: a name for the reader, and the definition. Counts of
# pixels are sums over the whole set.
NUMBERS = {
    "iou/": ("IoU", "hits / (true + predicted - hits), in labelled pixels of a class"),
    "miou": ("mean IoU", "mean of IoU over classes, absent ones left out"),
    "pixel_acc": ("pixel accuracy", "hits of all classes / labelled pixels"),
    "mean_acc": ("mean accuracy", "mean over classes of hits / true pixels"),
    "micro_iou": ("micro IoU", "hits of all classes / unions of all classes"),
    "image_iou": ("per-image IoU", "mean over images of each image's own mean IoU"),
    "fwiou": ("fwIoU", "mean of IoU over classes, weighted by true pixels"),
    "loss": ("loss", "mean over labelled pixels"),
    "boundary_iou": ("boundary IoU", "mean over classes of the IoU of their pixels near their own contour"),
    "boundary_iou/": ("boundary IoU", "IoU of those pixels of a class that are near its own contour"),
    "trimap_miou/": ("mean IoU within {} px", "of true contours: changes of label, edges of void"),
    "pixel_error": ("pixel error", "1 - F1 of cell pixels"),
    "rand_error": ("Rand error", "1 - F of pairs of pixels in one cell; mean over slices"),
    "warping_error": ("warping error", "pixels wrong once the truth is warped; mean over slices"),
    "_threshold": ("threshold", "of the membrane probability, at which the error is lowest"),
}
# The averages of IoU, and who reports them. smp counts a class that is absent from an image as IoU 1. torchmetrics'
# MeanIoU averages over all pairs of an image and a class that occurs in it.
AVERAGES = {
    "miou": "VOC, Cityscapes, ADE, FCN, mmseg; torchmetrics, smp macro",
    "micro_iou": "smp micro; torchmetrics JaccardIndex micro",
    "image_iou": "nearly: smp macro-imagewise, torchmetrics MeanIoU",
    "fwiou": "FCN, detectron2; torchmetrics JaccardIndex weighted",
}


def tables(title: str, class_names: list[str], values: dict[str, float]) -> str:
    """Return all tables as text of at most 100 columns.

    Args:
        title: of the first table.
        class_names: one per class.
        values: every logged number, by key without the split.
    """
    text = io.StringIO()
    console = Console(file=text, width=100, markup=False, highlight=False, emoji=False)
    for table in (class_table(title, class_names, values), average_table(values), further_table(values)):
        if table.row_count:
            console.print(table)
    return text.getvalue()


def kind(key: str) -> str:
    """Return the key of `NUMBERS` that explains a logged key: ``iou/`` for ``crf/iou/road``."""
    key = key.removeprefix("crf/")
    if key.endswith("_threshold"):
        return "_threshold"
    return key if "/" not in key else key[: key.index("/") + 1]


def number(value: float | None) -> str:
    """Return a number with three decimals, or with two digits if it is below 0.001; - for nan, empty for None."""
    if value is None or math.isnan(value):
        return "" if value is None else "-"
    return f"{value:.2g}" if 0 < value < 0.001 else f"{value:.3f}"


def class_table(title: str, class_names: list[str], values: dict[str, float]) -> Table:
    """Build the table of IoU per class with bars and means; columns for CRF and contours if they were measured."""
    columns = {"IoU": "iou/{}", "with CRF": "crf/iou/{}", "boundary": "boundary_iou/{}"}
    columns = {head: key for head, key in columns.items() if key.format(class_names[0]) in values}
    table = Table("class", *columns, "", title=title, box=ASCII2)
    for name in class_names:
        iou = values[f"iou/{name}"]
        bar = "does not occur" if math.isnan(iou) else "#" * round(40 * iou)
        table.add_row(name, *(number(values[key.format(name)]) for key in columns.values()), bar)
    table.add_section()
    means = {"IoU": "{}", "with CRF": "crf/{}", "boundary": "boundary_{}"}
    for key in ("miou", "pixel_acc", "mean_acc"):
        name, definition = NUMBERS[key]
        boundary = values.get("boundary_iou") if key == "miou" else None
        cells = [boundary if head == "boundary" else values.get(means[head].format(key)) for head in columns]
        table.add_row(name, *map(number, cells), definition)
    return table


def average_table(values: dict[str, float]) -> Table:
    """Build the table of the averages of IoU: papers and libraries call different ones mean IoU."""
    crf = ["with CRF"] if "crf/miou" in values else []
    table = Table(
        "average", "IoU", *crf, "what it is, and who reports it", title="IoU, averaged in four ways", box=ASCII2
    )
    for key, reported in AVERAGES.items():
        name, definition = NUMBERS[key]
        cells = [values[key], *([values[f"crf/{key}"]] if crf else [])]
        table.add_row(name, *map(number, cells), f"{definition}\n({reported})")
    return table


def further_table(values: dict[str, float]) -> Table:
    """Build the table of the numbers that the other tables do not show."""
    plain = dict.fromkeys(key.removeprefix("crf/") for key in values)  # in order, each once
    shown = {"iou/", "boundary_iou/", "boundary_iou", "loss", "pixel_acc", "mean_acc", "_threshold", *AVERAGES}
    rows = [key for key in plain if kind(key) not in shown]
    crf = ["with CRF"] if any(f"crf/{key}" in values for key in rows) else []
    table = Table("further", "", *crf, "", title="", box=ASCII2)
    last = ""
    for key in rows:
        name, definition = NUMBERS.get(kind(key), (key, ""))
        name = name.format(key.rpartition("/")[2])
        if f"{key}_threshold" in values:
            name += f" at {values[f'{key}_threshold']:g}"
        cells = [values.get(key), *([values.get(f"crf/{key}")] if crf else [])]
        table.add_row(name, *map(number, cells), "" if kind(key) == last else definition)
        last = kind(key)
    return table
