"""What callbacks of `validate` and `test` share: plain methods in place of Lightning's hooks, and further metrics."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torchmetrics import Metric, MetricCollection

from ..base import SegmentationModule


class EvaluationCallback(L.Callback):
    """A callback that follows the evaluation of a split, ``val`` or ``test``, in four methods.

    `begin` runs before the first batch, `update` after each batch, `end` after the last batch, and `report` when the
    module and all callbacks have logged their values. A subclass overrides those that it needs. None of them runs in
    the sanity check before training.

    Attributes:
        phases: the commands in which the callback works, of ``fit``, ``validate`` and ``test``. With ``fit`` it follows
            the validations within a training run.
        every_n_epochs: in ``fit``, the callback follows the validations of every n-th training epoch.
    """

    phases: tuple[str, ...] = ("validate", "test")
    every_n_epochs = 1

    def begin(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Prepare for the first batch."""

    def update(self, trainer: L.Trainer, module: SegmentationModule, outputs: Any, batch: Any) -> None:
        """Take a batch and the step's outputs: ``loss`` and ``logits`` ``(N, K, H, W)``."""

    def end(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Log values after the last batch; the module logs its metrics and resets them afterwards."""

    def report(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Read all logged values of the split in ``trainer.callback_metrics``."""

    def log_values(self, module: SegmentationModule, split: str, values: dict[str, Any]) -> None:
        """Log numbers as ``<split>/<key>``, averaged over processes; for `end`."""
        numbers = {key: torch.as_tensor(value, dtype=torch.float32) for key, value in values.items()}
        module.log_dict({f"{split}/{key}": n.to(module.device) for key, n in numbers.items()}, sync_dist=True)

    # Lightning's hooks

    def _works(self, trainer: L.Trainer) -> bool:
        if trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs:
            return False
        return trainer.state.fn in self.phases and not trainer.sanity_checking

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._works(trainer):
            self.begin(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._works(trainer):
            self.begin(trainer, pl_module, "test")

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *indices: int) -> None:
        if self._works(trainer):
            self.update(trainer, pl_module, outputs, batch)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *indices: int) -> None:
        if self._works(trainer):
            self.update(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._works(trainer):
            self.end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._works(trainer):
            self.end(trainer, pl_module, "test")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._works(trainer):
            self.report(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._works(trainer):
            self.report(trainer, pl_module, "test")


class EvaluationMetric(EvaluationCallback):
    """A further metric of `validate` and `test`, logged as ``val/<key>`` and ``test/<key>``.

    A subclass states the metric in `build` and the numbers to log in `values`. `Report` shows them, too. A metric that
    needs more than labels also overrides `update`.

    Example:
        A file ``kappa.py`` in a folder of ``PYTHONPATH``; ``--trainer.callbacks+=kappa.Kappa`` adds it to a run::

            from torchmetrics.classification import MulticlassCohenKappa

            from segmentation.callbacks import EvaluationMetric


            class Kappa(EvaluationMetric):
                '''Cohen's kappa: how much better prediction and truth agree than by chance.'''

                def build(self, module):
                    return MulticlassCohenKappa(len(module.class_names), ignore_index=255)

                def values(self, module):
                    return {"kappa": self.metric.compute()}
    """

    metric: Any  # what `build` returns

    def build(self, module: SegmentationModule) -> Metric | MetricCollection:
        """Return the metric; it is moved to the module's device and reset before the first batch."""
        raise NotImplementedError

    def values(self, module: SegmentationModule) -> dict[str, Any]:
        """Return the numbers to log, by key without the split, computed from ``self.metric``."""
        raise NotImplementedError

    def begin(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Build the metric."""
        self.metric = self.build(module).to(module.device)
        self.metric.reset()

    def update(self, trainer: L.Trainer, module: SegmentationModule, outputs: Any, batch: Any) -> None:
        """Give the metric predicted and true labels, both int64 ``(N, H, W)``; ignored pixels are 255 in the truth."""
        labels = module.labels(module.probabilities(outputs["logits"]))
        self.metric.update(labels.to(batch["mask"].device), batch["mask"])

    def end(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Log the values."""
        self.log_values(module, split, self.values(module))


def evenly_spread(trainer: L.Trainer, split: str, num_images: int) -> set[int]:
    """Return the positions of a few images, spread evenly over the images that this process evaluates."""
    loader: Any = trainer.test_dataloaders if split == "test" else trainer.val_dataloaders
    last = len(loader.sampler) - 1
    return {round(i * last / max(1, num_images - 1)) for i in range(num_images)}


def run_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder of the run's first logger, or None without a logger that has one.

    ``trainer.log_dir`` waits for the other processes, so it hangs where only one process asks for it.
    """
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return next((Path(folder) for folder in folders if folder), None)
