"""IoU near the borders of objects: boundary IoU, and mean IoU in trimaps."""

from collections.abc import Sequence
from typing import Any

from torchmetrics import MetricCollection

from ..base import SegmentationModule
from ..metrics import BoundaryIoU, TrimapIoU, confusion_metrics
from .evaluation import EvaluationMetric


class BoundaryScores(EvaluationMetric):
    """Boundary IoU and mean IoU in trimaps of several widths, in `validate` and `test`.

    It logs ``test/boundary_iou``, the mean over classes, ``test/boundary_iou/<class>`` and
    ``test/trimap_miou/<width>``, or the same under ``val/``. See `BoundaryIoU` and `TrimapIoU`.

    Args:
        widths: of the trimaps, in pixels on either side of a true contour.
        distance: width of the boundary region of boundary IoU, as a share of the image's diagonal.
    """

    def __init__(self, widths: Sequence[float] = (1, 2, 5, 10, 20, 40), distance: float = 0.02) -> None:
        self.widths, self.distance = widths, distance

    def build(self, module: SegmentationModule) -> MetricCollection:
        """Return both metrics."""
        classes = max(2, module.num_classes)
        boundary, trimaps = BoundaryIoU(classes, self.distance), TrimapIoU(classes, self.widths)
        return MetricCollection({"boundary": boundary, "trimaps": trimaps}, compute_groups=False)

    def values(self, module: SegmentationModule) -> dict[str, Any]:
        """Return boundary IoU per class, its mean, and mean IoU per width."""
        iou = self.metric["boundary"].compute()
        per_class = {f"boundary_iou/{name}": value for name, value in zip(module.class_names, iou, strict=True)}
        return {"boundary_iou": iou.nanmean()} | per_class | trimap_miou(self.metric["trimaps"], module.class_names)


def trimap_miou(trimaps: TrimapIoU, class_names: Sequence[str]) -> dict[str, Any]:
    """Return mean IoU by the key ``trimap_miou/<width>``."""
    matrices = zip(trimaps.widths, trimaps.compute(), strict=True)
    return {f"trimap_miou/{width:g}": confusion_metrics(matrix, class_names)["miou"] for width, matrix in matrices}
