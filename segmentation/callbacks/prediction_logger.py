"""Pictures of the same few images at every validation, on disk and in Weights & Biases."""

from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from ..base import SegmentationModule
from ..errors import UserError
from ..pictures import error_map, index_mask, panel, rgb
from .evaluation import EvaluationCallback, evenly_spread, run_folder


class PredictionLogger(EvaluationCallback):
    """Panels of image, truth, prediction and error of a few evaluated images.

    Validation writes ``pictures/step_<n>.png`` in the run's folder, test writes ``panel.png``; a W&B logger gets the
    images with their masks as layers. The first process draws, from its share of the images.

    Args:
        num_images: how many images to draw, spread evenly over the split; they are the same each time.
        every_n_epochs: in `fit`, draw at validations of every n-th training epoch.

    Raises:
        UserError: if a number is below 1.
    """

    phases = ("fit", "validate", "test")

    def __init__(self, num_images: int = 4, every_n_epochs: int = 1) -> None:
        if num_images < 1 or every_n_epochs < 1:
            raise UserError(
                f"PredictionLogger: num_images and every_n_epochs must be 1 or more, got {num_images} and "
                f"{every_n_epochs}"
            )
        self.num_images, self.every_n_epochs = num_images, every_n_epochs

    def begin(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Choose the images."""
        self.wanted = evenly_spread(trainer, split, self.num_images) if trainer.is_global_zero else set()
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []  # image, truth, prediction
        self.names: list[str] = []
        self.seen = 0

    def update(self, trainer: L.Trainer, module: SegmentationModule, outputs: Any, batch: Any) -> None:
        """Keep the wanted images of this batch."""
        positions = range(self.seen, self.seen + len(batch["name"]))
        self.seen += len(batch["name"])
        if self.wanted.isdisjoint(positions):
            return
        labels = module.labels(module.probabilities(outputs["logits"]))
        for i, position in enumerate(positions):
            if position in self.wanted:
                self.rows.append((batch["image"][i].cpu(), batch["mask"][i].cpu(), labels[i].cpu()))
                self.names.append(batch["name"][i])

    def end(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Draw the kept images."""
        if not self.rows:
            return
        folder = run_folder(trainer)
        if folder is not None:
            file = folder / ("panel.png" if split == "test" else f"pictures/step_{trainer.global_step:06d}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            self._panel(module).save(file)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._to_wandb(logger, module, split)

    def _panel(self, module: SegmentationModule) -> Image.Image:
        rows = []
        for image, truth, prediction in self.rows:
            pixels = rgb(image)
            labels = [index_mask(mask, module.palette).convert("RGB") for mask in (truth, prediction)]
            rows.append([Image.fromarray(pixels), *labels, error_map(pixels, truth, prediction)])
        return panel(("image", "truth", "prediction", "error"), rows, module.palette, module.class_names)

    def _to_wandb(self, logger: WandbLogger, module: SegmentationModule, split: str) -> None:
        labels = dict(enumerate(module.class_names))
        masks = [
            {
                "prediction": {"mask_data": prediction.byte().numpy(), "class_labels": labels},
                "truth": {"mask_data": truth.byte().numpy(), "class_labels": labels},
            }
            for _, truth, prediction in self.rows
        ]
        images = [rgb(image) for image, _, _ in self.rows]
        logger.log_image(f"{split}/pictures", images, caption=self.names, masks=masks)
