"""What a run leaves for its reader: curves, tables, every number with its definition, and where everything lies."""

import io
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .report_pictures import draw_confusion, draw_curves, draw_iou

# What is logged, less its split and ``crf/``: a name for the reader, and what it means. Counts are sums over the set.
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
# The averages of IoU, and who reports them. Of one image, smp takes the IoU of absent classes for 1; torchmetrics' mean
# is over all pairs of an image and a class that occurs in it.
AVERAGES = {
    "miou": "VOC, Cityscapes, ADE, FCN, mmseg; torchmetrics, smp macro",
    "micro_iou": "smp micro; torchmetrics JaccardIndex micro",
    "image_iou": "nearly: smp macro-imagewise, torchmetrics MeanIoU",
    "fwiou": "FCN, detectron2; torchmetrics JaccardIndex weighted",
}


class Report(L.Callback):
    """After `fit` draws ``curves.png``; after `test` and `validate` prints tables of what was measured.

    The tables and the paths also go to ``report.txt`` in the run's folder, all numbers and their definitions to
    ``results.json``, and pictures to ``confusion.png`` and ``iou.png``. It must be the last callback: it shows what
    others have logged, that of ``test/crf/`` in a column beside the plain numbers.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the curves and print the paths."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        if not trainer.is_global_zero or not loggers:
            return
        loggers[0].save()
        folder = Path(loggers[0].log_dir)
        if not (folder / "metrics.csv").is_file():
            return  # a run shorter than the logging interval
        draw_curves(folder / "metrics.csv", folder / "curves.png")
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor), None)
        paths = {"checkpoint": best.best_model_path} if best and best.best_model_path else {}
        print(lines(paths | {"metrics": folder / "metrics.csv", "curves": folder / "curves.png"}))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the confusion matrix, which the module is about to reset; all processes sum it together."""
        self.confusion = pl_module.confusion.compute().cpu()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """As `on_test_epoch_end`, in `validate`."""
        if trainer.state.fn == "validate":
            self.on_test_epoch_end(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and write the results of the test."""
        self._report(trainer, pl_module, "test")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and write the results of `validate`; within `fit` the logs have the numbers."""
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, "val")

    def _report(self, trainer: Any, pl_module: Any, split: str) -> None:
        if not trainer.is_global_zero:
            return
        names, title, part = pl_module.class_names, split, split
        if split == "test" and trainer.datamodule is not None:
            part = trainer.datamodule.test_split
            title = f"test on split '{part}'"
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        values = {key.removeprefix(f"{split}/"): logged[key] for key in logged if key.startswith(f"{split}/")}
        paths: dict[str, Any] = {}
        if trainer.ckpt_path:
            run = Path(trainer.ckpt_path).parent.parent
            paths = {"checkpoint": trainer.ckpt_path, "metrics": run / "metrics.csv", "curves": run / "curves.png"}
        folder = run_folder(trainer)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_results(folder / "results.json", part, paths.get("checkpoint"), names, self.confusion, values)
            draw_confusion(self.confusion, names, folder / "confusion.png")
            draw_iou([values[f"iou/{name}"] for name in names], names, values["miou"], folder / "iou.png")
            files = ("results.json", "confusion.png", "iou.png", "panel.png", "crf.png")
            paths |= {Path(file).stem: folder / file for file in files}
        text = io.StringIO()
        console = Console(file=text, width=100, markup=False, highlight=False, emoji=False)
        for table in (class_table(title, names, values), average_table(values), further_table(values)):
            if table.row_count:
                console.print(table)
        text.write(lines({name: path for name, path in paths.items() if Path(path).is_file()}))
        print("\n" + text.getvalue())
        if folder is not None:
            (folder / "report.txt").write_text(text.getvalue() + "\n", encoding="utf-8")


def kind(key: str) -> str:
    """The key of `NUMBERS` that tells of a logged key: ``crf/iou/road`` is of kind ``iou/``."""
    key = key.removeprefix("crf/")
    if key.endswith("_threshold"):
        return "_threshold"
    return key if "/" not in key else key[: key.index("/") + 1]


def number(value: float | None) -> str:
    """Three decimals, or two digits of what is smaller than that; empty without a value."""
    if value is None or math.isnan(value):
        return "" if value is None else "-"
    return f"{value:.2g}" if 0 < value < 0.001 else f"{value:.3f}"


def class_table(title: str, class_names: list[str], values: dict[str, float]) -> Table:
    """IoU per class with a bar, with CRF and near contours where these were measured, over the means."""
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
    """The averages of IoU side by side: papers and libraries differ in which they call mean IoU."""
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
    """What other callbacks have logged."""
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


def write_results(
    file: Path, split: str, checkpoint: str | None, class_names: list[str], matrix: Tensor, values: dict[str, float]
) -> None:
    """Write all numbers and what they mean as JSON, with null for a number that does not exist."""
    results = {
        "split": split,
        "checkpoint": checkpoint,
        "class_names": class_names,
        "confusion": matrix.tolist(),
        "scores": {key: None if math.isnan(value) else value for key, value in values.items()},
        "definitions": {
            "confusion": "pixels of true class (row) predicted as class (column), 255 left out",
            "crf/": "the same of labels that DenseCRF refined",
            **{kind(key): NUMBERS[kind(key)][1] for key in values if kind(key) in NUMBERS},
        },
        "reported_by": AVERAGES,
    }
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of the run's first logger; ``trainer.log_dir`` would hang where only one process asks for it."""
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return next((Path(folder) for folder in folders if folder), None)


def lines(paths: dict[str, Any]) -> str:
    """One line per path, its name first."""
    return "\n".join(f"{name:<12} {path}" for name, path in paths.items())
