"""The metrics that most papers report, computed from a confusion matrix that is summed over the whole data set."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from ..losses import IGNORE


def confusion_metrics(
    confusion: Tensor, class_names: Sequence[str], image_iou: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute IoU and accuracy in several averages (Long et al., FCN, section 5).

    Args:
        confusion: ``(K, K)``, pixels of true class (row) predicted as class (column), without ignored pixels.
        class_names: one name per class.
        image_iou: the result of `ConfusionMatrix.image_iou`, which a matrix of the whole set does not contain; None
            leaves it out.

    Returns:
        scalars in 0..1: ``miou``, the mean of IoU over classes that occur in prediction or truth; ``micro_iou``, all
        hits over all unions; ``image_iou``; ``pixel_acc``; ``mean_acc``, the mean of recall over classes that occur in
        the truth; ``fwiou``, the mean of IoU weighted by true pixels; and ``iou/<class>``, which is nan for a class
        that does not occur.
    """
    matrix = confusion.cpu().double()  # exact up to 2 ** 53 pixels
    hit, truth, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    union = truth + predicted - hit
    iou = hit / union  # (K,), 0/0 is nan
    values = {
        "miou": iou.nanmean(),
        "micro_iou": hit.sum() / union.sum(),
        "pixel_acc": hit.sum() / matrix.sum(),
        "mean_acc": (hit / truth).nanmean(),
        "fwiou": (truth * iou).nansum() / matrix.sum(),
    }
    if image_iou is not None:
        values["image_iou"] = image_iou
    return values | {f"iou/{name}": value for name, value in zip(class_names, iou, strict=True)}


class ConfusionMatrix(Metric):
    """Counts of pixels by true class (row) and predicted class (column), over a data set and all processes.

    The counts are 64-bit integers, so they are exact for any data set. Pixels with label 255 are left out. The metric
    also averages mean IoU over images, because a matrix of the whole set does not contain it.

    Args:
        num_classes: K, at least 2.
    """

    matrix: Tensor
    iou_sum: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("iou_sum", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, labels: Tensor, mask: Tensor) -> None:
        """Count predicted and true labels, both int64 ``(N, H, W)``."""
        size = self.num_classes
        cells = mask.masked_fill(mask == IGNORE, size)  # ignored pixels make a last row, which is cut off below
        cells = cells.mul_(size).add_(labels.to(mask.device)).flatten(start_dim=1)
        counts = cells.new_zeros(len(mask), (size + 1) * size)
        counts.scatter_add_(1, cells, cells.new_ones(()).expand_as(cells))  # bincount would wait for the GPU
        matrices = counts.view(-1, size + 1, size)[:, :size]  # (N, K, K)
        self.matrix += matrices.sum(dim=0)
        hit = matrices.diagonal(dim1=1, dim2=2)
        union = matrices.sum(dim=1) + matrices.sum(dim=2) - hit  # (N, K), 0 for a class that does not occur in an image
        present = (union > 0).sum(dim=1)  # (N,), 0 for an image without labelled pixels, which is left out
        self.iou_sum += ((hit / union.clamp(min=1)).sum(dim=1) / present.clamp(min=1)).sum()
        self.images += (present > 0).sum()

    def compute(self) -> Tensor:
        """Return the matrix, int64 ``(K, K)``."""
        return self.matrix

    def image_iou(self) -> Tensor:
        """Return the mean over images of each image's mean IoU, a scalar.

        The mean IoU of an image is over classes that occur in its prediction or truth.
        """
        with self.sync_context():
            return self.iou_sum / self.images
