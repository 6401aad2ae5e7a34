"""Pictures of the same few images at every validation, on disk and in Weights & Biases."""

from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from ..base import SegmentationModule
from ..errors import UserError
from ..pictures import error_map, index_mask, panel, rgb
from .report import run_folder


class PredictionLogger(L.Callback):
    """Draws image, truth, prediction and error of a few evaluated images.

    Validation leaves ``pictures/step_<n>.png`` in the run's folder, test ``panel.png``; a W&B logger gets the images
    with their masks as layers. The first process draws, from its share of the images.

    Args:
        num_images: how many, spread evenly over the split, the same ones each time.
        every_n_epochs: in `fit`, draw at validations of every n-th training epoch.

    Raises:
        UserError: if a number is below 1.
    """

    def __init__(self, num_images: int = 4, every_n_epochs: int = 1) -> None:
        if num_images < 1 or every_n_epochs < 1:
            raise UserError(f"num_images and every_n_epochs must be 1 or more, got {num_images}, {every_n_epochs}")
        self.num_images, self.every_n_epochs = num_images, every_n_epochs
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.names: list[str] = []
        self.seen = 0

    def _keep(self, trainer: L.Trainer, module: SegmentationModule, outputs: Any, batch: Any, loader: Any) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        if trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        count = len(loader.sampler)
        wanted = {round(i * (count - 1) / max(1, self.num_images - 1)) for i in range(self.num_images)}
        labels = None
        for i, name in enumerate(batch["name"]):
            if self.seen + i in wanted:
                labels = module.labels(module.probabilities(outputs["logits"])) if labels is None else labels
                self.rows.append((batch["image"][i].cpu(), batch["mask"][i].cpu(), labels[i].cpu()))
                self.names.append(name)
        self.seen += len(batch["name"])

    def _draw(self, trainer: L.Trainer, module: SegmentationModule, path: str) -> None:
        if self.rows:
            folder = run_folder(trainer)
            if folder is not None:
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                self._panel(module).save(file)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    self._to_wandb(logger, trainer, module)
        self.rows, self.names, self.seen = [], [], 0

    def _panel(self, module: SegmentationModule) -> Image.Image:
        rows = []
        for image, truth, prediction in self.rows:
            pixels = rgb(image)
            labels = [index_mask(mask, module.palette).convert("RGB") for mask in (truth, prediction)]
            rows.append([Image.fromarray(pixels), *labels, error_map(pixels, truth, prediction)])
        return panel(("image", "truth", "prediction", "error"), rows, module.palette, module.class_names)

    def _to_wandb(self, logger: WandbLogger, trainer: L.Trainer, module: SegmentationModule) -> None:
        labels = dict(enumerate(module.class_names))
        masks = [
            {
                "prediction": {"mask_data": prediction.byte().numpy(), "class_labels": labels},
                "truth": {"mask_data": truth.byte().numpy(), "class_labels": labels},
            }
            for _, truth, prediction in self.rows
        ]
        images = [rgb(image) for image, _, _ in self.rows]
        split = "test" if trainer.testing else "val"
        logger.log_image(f"{split}/pictures", images, caption=self.names, masks=masks)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Keep a wanted image of this batch."""
        self._keep(trainer, pl_module, outputs, batch, trainer.val_dataloaders)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Keep a wanted image of this batch."""
        self._keep(trainer, pl_module, outputs, batch, trainer.test_dataloaders)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw what was kept."""
        self._draw(trainer, pl_module, f"pictures/step_{trainer.global_step:06d}.png")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw what was kept."""
        self._draw(trainer, pl_module, "panel.png")
