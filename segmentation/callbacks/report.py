"""The report of a run: curves, tables, every number with its definition, and the paths of all files."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from ..base import SegmentationModule
from .evaluation import EvaluationCallback, run_folder
from .report_pictures import draw_confusion, draw_curves, draw_iou
from .report_tables import AVERAGES, NUMBERS, kind, tables


class Report(EvaluationCallback):
    """Curves of training after `fit`, and tables of all logged metrics after `test` and `validate`.

    `fit` leaves ``curves.png``. `test` and `validate` print the tables and the paths of files, and write them to
    ``report.txt`` in the run's folder, all numbers with their definitions to ``results.json``, and pictures to
    ``confusion.png`` and ``iou.png``. The metrics of other callbacks are included, wherever they stand in the list; a
    column beside the plain numbers shows those under ``test/crf/``.
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
        print(path_lines(paths | {"metrics": folder / "metrics.csv", "curves": folder / "curves.png"}))

    def end(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Keep the confusion matrix, summed over all processes; the module resets it afterwards."""
        self.confusion = module.confusion.compute().cpu()

    def report(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Print the tables and the paths, and write the files."""
        if not trainer.is_global_zero:
            return
        data = getattr(trainer, "datamodule", None)
        part, title = split, split
        if split == "test" and data is not None:
            part = data.test_split
            title = f"test on split '{part}'"
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        values = {key.removeprefix(f"{split}/"): logged[key] for key in logged if key.startswith(f"{split}/")}
        checkpoint = str(trainer.ckpt_path) if trainer.ckpt_path else None
        paths: dict[str, Any] = {}
        if checkpoint is not None:
            run = Path(checkpoint).parent.parent
            paths = {"checkpoint": checkpoint, "metrics": run / "metrics.csv", "curves": run / "curves.png"}
        folder = run_folder(trainer)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_results(folder / "results.json", part, checkpoint, module.class_names, self.confusion, values)
            draw_confusion(self.confusion, module.class_names, folder / "confusion.png")
            iou = [values[f"iou/{name}"] for name in module.class_names]
            draw_iou(iou, module.class_names, values["miou"], folder / "iou.png")
            files = ("results.json", "confusion.png", "iou.png", "panel.png", "crf.png")
            paths |= {Path(file).stem: folder / file for file in files}
        text = tables(title, module.class_names, values)
        text += path_lines({name: path for name, path in paths.items() if Path(path).is_file()})
        print("\n" + text)
        if folder is not None:
            (folder / "report.txt").write_text(text + "\n", encoding="utf-8")


def write_results(
    file: Path, split: str, checkpoint: str | None, class_names: list[str], matrix: Tensor, values: dict[str, float]
) -> None:
    """Write all numbers and their definitions as JSON, with null for a number that is nan."""
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


def path_lines(paths: dict[str, Any]) -> str:
    """Return one line per path, with its name first."""
    return "\n".join(f"{name:<12} {path}" for name, path in paths.items())
