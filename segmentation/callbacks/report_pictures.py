"""The pictures of `Report`: curves of a run, a confusion matrix, and bars of IoU per class."""

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw losses and mIoU over optimizer steps from a CSV of a run.

    Args:
        metrics: Lightning's ``metrics.csv``, with columns ``step``, ``train/loss``, ``val/loss``, ``val/miou``.
        picture: PNG to write.
    """
    from matplotlib.figure import Figure  # takes 0.3 s to import; pyplot would keep global state

    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def curve(key: str) -> tuple[list[int], list[float]]:
        points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, miou = figure.subplots(1, 2)
    loss.plot(*curve("train/loss"), color="tab:blue", alpha=0.5, linewidth=1, label="train")
    loss.plot(*curve("val/loss"), color="tab:orange", marker=".", label="val")
    loss.set(title="loss", xlabel="step", ylim=(0, None))
    miou.plot(*curve("val/miou"), color="tab:orange", marker=".", label="val mIoU")
    miou.plot(*curve("val/pixel_acc"), color="tab:green", marker=".", label="val pixel accuracy")
    miou.set(title="mean IoU", xlabel="step", ylim=(0, 1))
    for axes in (loss, miou):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=110)


def draw_confusion(matrix: Tensor, class_names: Sequence[str], picture: Path) -> None:
    """Draw the confusion matrix, each row in per cent of the pixels of its true class.

    Args:
        matrix: ``(K, K)``, pixels of true class (row) predicted as class (column).
        class_names: one per class.
        picture: PNG to write.
    """
    from matplotlib.figure import Figure

    count = len(class_names)
    share = (100 * matrix.double() / matrix.sum(dim=1, keepdim=True)).numpy()  # nan without true pixels: drawn grey
    side = min(14.0, 2.5 + 0.5 * count)  # inches
    font = min(10.0, 50 * side / count)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.9")
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(count), class_names, rotation=90, fontsize=font)
    axes.set_yticks(range(count), class_names, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true", title="where 100 pixels of each true class go")
    if count <= 40:  # else too small to read
        for row in range(count):
            for column in range(count):
                if share[row, column] >= 0.5:
                    colour = "white" if share[row, column] > 60 else "black"
                    text = f"{share[row, column]:.0f}"
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=0.9 * font)
    else:
        figure.colorbar(shown, ax=axes, shrink=0.5)
    figure.savefig(picture, dpi=110)


def draw_iou(iou: Sequence[float], class_names: Sequence[str], miou: float, picture: Path) -> None:
    """Draw a bar per class, the best on top, and a line at their mean; leave out classes that do not occur.

    Args:
        iou: one number per class, nan for a class that does not occur.
        class_names: one per class.
        miou: mean IoU.
        picture: PNG to write.
    """
    from matplotlib.figure import Figure

    bars = sorted((value, name) for value, name in zip(iou, class_names, strict=True) if value == value)
    values, names = [value for value, _ in bars], [name for _, name in bars]
    height = 0.28 if len(bars) <= 40 else 0.14  # inches per bar
    figure = Figure(figsize=(7, 1 + height * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), values, color="tab:blue", height=0.75)
    font = min(10, 50 * height)
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=font)
    axes.set_yticks(range(len(bars)), names, fontsize=font)
    axes.axvline(miou, color="tab:orange", label=f"mean IoU {miou:.3f}")
    axes.set(xlim=(0, 1), ylim=(-0.7, len(bars) - 0.3), xlabel="IoU")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
