"""IoU near contours: in bands around the true ones (trimaps), and of the pixels near either contour (boundary IoU)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from ..errors import UserError
from ..losses import IGNORE


class TrimapIoU(Metric):
    """Confusion matrices of the pixels near true contours, in bands of several widths.

    Kohli et al., "Robust higher order potentials", IJCV 2009, and Figure 10 of DeepLab v2. A contour is where two
    neighbours (left and right, above and below) have different labels in the truth, ignored ones too: there the
    annotators saw an object end. Both pixels are within 1 of it; a pixel at distance d of the nearest such pixel,
    centre to centre, is within 1 + d. Ignored pixels are counted nowhere.

    Args:
        num_classes: K, at least 2.
        widths: of the bands, in pixels on either side of the contour.

    Raises:
        UserError: if there is no width, or one below 1.
    """

    matrices: Tensor

    def __init__(self, num_classes: int, widths: Sequence[float]) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise UserError(f"the widths of trimaps are pixels, 1 or more, got {list(widths)}")
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


class BoundaryIoU(Metric):
    """IoU of the pixels of each class near its contour, in prediction and in truth.

    Cheng et al., "Boundary IoU: improving object-centric image segmentation evaluation", CVPR 2021
    (arXiv:2103.16562). The boundary region of a class is what d erosions with a 3x3 square take from it, the image's
    border taken for a contour, as in the authors' code; d is a share of the image's diagonal, rounded and at least 1.
    Intersections and unions are summed over the data set.

    Ignored pixels are ignored in the prediction too: they belong to no class, so classes of prediction and truth have
    a contour along them, and they are counted in neither.

    Args:
        num_classes: K, at least 2.
        distance: d over the image's diagonal, 0.02 in the paper.

    Raises:
        UserError: if `distance` is not between 0 and 1.
    """

    intersection: Tensor
    union: Tensor

    def __init__(self, num_classes: int, distance: float = 0.02) -> None:
        super().__init__()
        if not 0 < distance < 1:
            raise UserError(f"the distance of boundary IoU is a share of the diagonal, such as 0.02, got {distance}")
        self.num_classes, self.distance = num_classes, distance
        for name in ("intersection", "union"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, mask: Tensor) -> None:
        """Add predicted labels and the truth, both ``(N, H, W)``."""
        for prediction, truth in zip(labels.cpu().numpy(), mask.cpu().numpy(), strict=True):
            prediction = np.where(truth == IGNORE, IGNORE, prediction)
            width = max(1, round(self.distance * math.hypot(*truth.shape)))
            near = [boundary(label, width) & (label != IGNORE) for label in (truth, prediction)]
            both = near[0] & near[1] & (truth == prediction)
            of_truth, of_prediction, intersection = (
                torch.from_numpy(np.bincount(label[chosen], minlength=self.num_classes)).to(self.union.device)
                for label, chosen in ((truth, near[0]), (prediction, near[1]), (truth, both))
            )
            self.intersection += intersection
            self.union += of_truth + of_prediction - intersection

    def compute(self) -> Tensor:
        """Boundary IoU per class, nan for one that occurs nowhere: float64 ``(K,)`` on the CPU."""
        return self.intersection.cpu().double() / self.union.cpu()


def boundary(labels: np.ndarray, width: int) -> np.ndarray:
    """Which pixels ``(H, W)`` see another label or the outside in the square of ``2 * width + 1`` around them."""
    from scipy.ndimage import maximum_filter, minimum_filter  # both cost the same for any width

    size, outside = 2 * width + 1, {"mode": "constant", "cval": -1}
    return minimum_filter(labels, size, **outside) != maximum_filter(labels, size, **outside)


def contour_distance(mask: np.ndarray) -> np.ndarray:
    """Euclidean distance of each pixel ``(H, W)`` to the nearest that has another label beside it; inf without one."""
    from scipy.ndimage import distance_transform_edt  # 0.2 s to import

    contour = np.zeros(mask.shape, dtype=bool)
    for before, after in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        changes = mask[before] != mask[after]
        contour[before] |= changes
        contour[after] |= changes
    return distance_transform_edt(~contour) if contour.any() else np.full(mask.shape, np.inf)
