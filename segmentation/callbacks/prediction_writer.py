"""The files of `predict`: index masks, overlays and a line of JSON per image."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from ..errors import UserError
from ..pictures import index_mask, overlay, rgb


class PredictionWriter(BasePredictionWriter):
    """A writer of ``masks/NAME.png``, ``overlays/NAME.jpg`` and a line of ``predictions.jsonl`` per image ``NAME``.

    A mask is an 8-bit palette PNG at the image's size. Its values are the labels, and its colours are the data set's. A
    line holds the name, the size and each class's share of the pixels. The writer writes image by image, and keeps no
    results in memory. With several processes, each writes the images that it predicts.

    Args:
        output_dir: folder for the results.
        overwrite: replace the files of an earlier run; by default, `predict` stops before it starts if there are any.
        opacity: opacity of the colours in overlays, 0 to 1.

    Raises:
        UserError: at the start, if a file to be written exists and `overwrite` is false.
    """

    def __init__(self, output_dir: str = "predictions", overwrite: bool = False, opacity: float = 0.5) -> None:
        super().__init__(write_interval="batch")
        self.output_dir, self.overwrite, self.opacity = Path(output_dir), overwrite, opacity

    def files(self, name: str) -> tuple[Path, Path]:
        """Return the paths of an image's mask and overlay."""
        return self.output_dir / "masks" / f"{name}.png", self.output_dir / "overlays" / f"{name}.jpg"

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for files that would be overwritten, and start an empty list."""
        listing = self.output_dir / "predictions.jsonl"
        loader: Any = trainer.predict_dataloaders
        names = [sample.name for sample in loader.dataset.samples]
        existing = [file for file in (listing, *(f for name in names for f in self.files(name))) if file.exists()]
        if existing and not self.overwrite:
            raise UserError(
                f"{existing[0]} exists already: give another --writer.output_dir, or --writer.overwrite true"
            )
        trainer.strategy.barrier("every process has looked")
        if trainer.is_global_zero:
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text("", encoding="utf-8")
        trainer.strategy.barrier("the list is empty")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's files."""
        all_labels = pl_module.labels(prediction["probs"]).cpu()  # (N, H, W)
        for image, labels, name in zip(batch["image"], all_labels, prediction["name"], strict=True):
            mask_file, overlay_file = self.files(name)
            mask_file.parent.mkdir(parents=True, exist_ok=True)
            overlay_file.parent.mkdir(parents=True, exist_ok=True)
            index_mask(labels, pl_module.palette).save(mask_file)
            overlay(rgb(image), labels, pl_module.palette, self.opacity).save(overlay_file, quality=90)
            counts = torch.bincount(labels.flatten(), minlength=len(pl_module.class_names))
            parts = (round(count / labels.numel(), 6) for count in counts.tolist())
            shares = dict(zip(pl_module.class_names, parts, strict=True))
            line = {"name": name, "height": labels.shape[0], "width": labels.shape[1], "shares": shares}
            with (self.output_dir / "predictions.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the folder of the results."""
        if trainer.is_global_zero:
            print(f"predictions  {self.output_dir}/masks, overlays, predictions.jsonl")
