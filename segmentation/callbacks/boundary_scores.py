"""How well a prediction keeps to the borders of things: boundary IoU and IoU in trimaps."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from ..metrics import BoundaryIoU, TrimapIoU, confusion_metrics


class BoundaryScores(L.Callback):
    """Logs boundary IoU and mean IoU in trimaps of several widths, on `validate` and `test` but not within `fit`.

    The names are ``test/boundary_iou``, its mean over classes, ``test/boundary_iou/<class>`` and
    ``test/trimap_miou/<width>``, or ``val/...``. See `BoundaryIoU` and `TrimapIoU`.

    Args:
        widths: of the trimaps, in pixels on either side of a true border.
        distance: of boundary IoU, over the image's diagonal.
    """

    def __init__(self, widths: Sequence[float] = (1, 2, 5, 10, 20, 40), distance: float = 0.02) -> None:
        self.widths, self.distance = widths, distance

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew."""
        if trainer.state.fn == "fit":
            return
        classes = max(2, pl_module.num_classes)
        self.boundary = BoundaryIoU(classes, self.distance).to(pl_module.device)
        self.trimaps = TrimapIoU(classes, self.widths).to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        if trainer.state.fn == "fit":
            return
        labels = pl_module.labels(pl_module.probabilities(outputs["logits"]))
        self.boundary.update(labels, batch["mask"])
        self.trimaps.update(labels, batch["mask"])

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the scores."""
        if trainer.state.fn == "fit":
            return
        iou = self.boundary.compute()
        values = {"boundary_iou": iou.nanmean()}
        values |= {f"boundary_iou/{name}": value for name, value in zip(pl_module.class_names, iou, strict=True)}
        for width, matrix in zip(self.trimaps.widths, self.trimaps.compute(), strict=True):
            values[f"trimap_miou/{width:g}"] = confusion_metrics(matrix, pl_module.class_names)["miou"]
        split = "test" if trainer.testing else "val"
        pl_module.log_dict({f"{split}/{k}": v.float().to(pl_module.device) for k, v in values.items()}, sync_dist=True)

    # `test` is evaluated as `validate` is.
    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
