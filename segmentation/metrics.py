"""The scores that papers report: confusion matrices summed over the whole data set, and IoU near contours."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from .losses import IGNORE


def scores(confusion: Tensor, class_names: Sequence[str], image_iou: Tensor | None = None) -> dict[str, Tensor]:
    """Compute the confusion-matrix family (Long et al., FCN, section 5), ignored pixels left out by the matrix.

    Args:
        confusion: ``(K, K)``, pixels of true class (row) predicted as class (column).
        class_names: one per class.
        image_iou: what `ConfusionMatrix.image_iou` gives, as no matrix of a whole set tells it; None leaves it out.

    Returns:
        ``miou``, the mean of IoU over classes that occur in prediction or truth; ``micro_iou``, all hits over all
        unions; ``image_iou``; ``pixel_acc``; ``mean_acc``, the mean of recall over classes that occur in truth;
        ``fwiou``, IoU weighted by true frequency; and ``iou/<class>``, nan for a class that occurs nowhere. Scalars in
        0..1.
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


class TrimapIoU(Metric):
    """Confusion matrices of the pixels near true contours, in bands of several widths.

    Kohli et al., "Robust higher order potentials", IJCV 2009, section 5; Figure 10 of DeepLab v2. A contour is where
    two neighbours (left and right, above and below) have different labels in the truth, ignored ones too: there the
    annotators saw an object end. Both pixels are within 1 of it, a pixel at distance d of the nearest such pixel,
    centre to centre, is within 1 + d. Ignored pixels are counted nowhere.

    Args:
        num_classes: K, at least 2.
        widths: of the bands, in pixels on either side of the contour.

    Raises:
        ValueError: if there is no width, or one below 1.
    """

    matrices: Tensor

    def __init__(self, num_classes: int, widths: Sequence[float]) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"the widths of trimaps are pixels, 1 or more, got {list(widths)}")
        self.num_classes, self.widths = num_classes, sorted(set(widths))
        zeros = torch.zeros(len(self.widths), num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrices", zeros, dist_reduce_fx="sum")

    def update(self, labels: Tensor, mask: Tensor) -> None:
        """Add predicted labels and the truth, both ``(N, H, W)``."""
        shape = (len(self.widths) + 1, self.num_classes, self.num_classes)
        for prediction, truth in zip(labels.cpu().numpy(), mask.cpu().numpy(), strict=True):
            band = np.searchsorted(self.widths, 1 + contour_distance(truth))  # of the narrowest that holds the pixel
            valid = truth != IGNORE
            cells = np.ravel_multi_index((band[valid], truth[valid], prediction[valid]), shape)
            rings = np.bincount(cells, minlength=np.prod(shape)).reshape(shape)[:-1]
            self.matrices += torch.from_numpy(rings.cumsum(axis=0)).to(self.matrices.device)

    def compute(self) -> Tensor:
        """One confusion matrix per width, narrow to wide: int64 ``(len(widths), K, K)``, for `scores`."""
        return self.matrices


def contour_distance(mask: np.ndarray) -> np.ndarray:
    """Euclidean distance of each pixel ``(H, W)`` to the nearest that has another label beside it; inf without one."""
    from scipy.ndimage import distance_transform_edt  # 0.2 s to import

    contour = np.zeros(mask.shape, dtype=bool)
    for before, after in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        changes = mask[before] != mask[after]
        contour[before] |= changes
        contour[after] |= changes
    return distance_transform_edt(~contour) if contour.any() else np.full(mask.shape, np.inf)
