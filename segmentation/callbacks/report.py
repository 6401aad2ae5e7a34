"""What a run leaves for its reader: curves, the table of classes, and where everything lies."""

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table


class Report(L.Callback):
    """After `fit` draws ``curves.png`` from ``metrics.csv``; after `test` and `validate` prints IoU per class.

    The table and the paths also go to ``report.txt`` in the run's folder.
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

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and write the table of the test."""
        self._table(trainer, pl_module, "test")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and write the table of `validate`; within `fit` the logs have the numbers."""
        if trainer.state.fn == "validate":
            self._table(trainer, pl_module, "val")

    def _table(self, trainer: L.Trainer, pl_module: Any, split: str) -> None:
        if not trainer.is_global_zero:
            return
        values = {key.removeprefix(f"{split}/"): float(value) for key, value in trainer.callback_metrics.items()}
        title = split
        if split == "test" and trainer.datamodule is not None:  # type: ignore[attr-defined]
            title = f"test on split '{trainer.datamodule.test_split}'"  # type: ignore[attr-defined]
        table = Table("class", "IoU", title=title, box=ASCII2)
        for name in pl_module.class_names:
            iou = values[f"iou/{name}"]
            table.add_row(name, "does not occur" if iou != iou else f"{iou:.3f}")
        table.add_section()
        names = {"miou": "mean IoU", "pixel_acc": "pixel accuracy", "mean_acc": "mean accuracy", "fwiou": "fwIoU"}
        for key, name in names.items():
            table.add_row(name, f"{values[key]:.3f}")
        paths: dict[str, Any] = {}
        if trainer.ckpt_path:
            run = Path(trainer.ckpt_path).parent.parent
            paths = {"checkpoint": trainer.ckpt_path, "metrics": run / "metrics.csv", "curves": run / "curves.png"}
        folder = run_folder(trainer)
        if folder is not None:
            paths["panel"] = folder / "panel.png"
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        text.write(lines({name: path for name, path in paths.items() if Path(path).is_file()}))
        print("\n" + text.getvalue())
        if folder is not None:
            (folder / "report.txt").write_text(text.getvalue() + "\n", encoding="utf-8")


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of the run's first logger; ``trainer.log_dir`` would hang where only one process asks for it."""
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return next((Path(folder) for folder in folders if folder), None)


def lines(paths: dict[str, Any]) -> str:
    """One line per path, its name first."""
    return "\n".join(f"{name:<12} {path}" for name, path in paths.items())


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw losses and mIoU over optimizer steps from a CSV of a run.

    Args:
        metrics: Lightning's ``metrics.csv``, with columns ``step``, ``train/loss``, ``val/loss``, ``val/miou``.
        picture: PNG to write.
    """
    from matplotlib.figure import Figure  # 0.3 s to import, and needed only here; no pyplot: no global state

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
