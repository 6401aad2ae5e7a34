"""IoU near contours: in bands around true contours (trimaps), and of the boundary regions of classes (boundary IoU)."""

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

    P. Kohli et al., "Robust higher order potentials", IJCV 2009, and Figure 10 of DeepLab v2. A contour is where two
    neighbours (left and right, or above and below) have different labels in the truth. The label of ignored pixels
    counts here, because an object ends there, too. Both neighbours are within 1 pixel of the contour. A pixel whose
    centre is at distance d from the centre of the nearest of them is within 1 + d. Ignored pixels are not counted.

    Args:
        num_classes: K, at least 2.
        widths: widths of the bands, in pixels on either side of the contour.

    Raises:
        UserError: if there is no width, or one below 1.
    """

    matrices: Tensor

    def __init__(self, num_classes: int, widths: Sequence[float]) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise UserError(f"trimaps need one width or more, each of 1 or more pixels, got {list(widths)}")
        self.num_classes, self.widths = num_classes, sorted(set(widths))
        zeros = torch.zeros(len(self.widths), num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrices", zeros, dist_reduce_fx="sum")

    def update(self, labels: Tensor, mask: Tensor) -> None:
        """Count predicted and true labels, both ``(N, H, W)``."""
        shape = (len(self.widths) + 1, self.num_classes, self.num_classes)
        for prediction, truth in zip(labels.cpu().numpy(), mask.cpu().numpy(), strict=True):
            band = np.searchsorted(self.widths, 1 + contour_distance(truth))  # the narrowest band around the pixel
            valid = truth != IGNORE
            cells = np.ravel_multi_index((band[valid], truth[valid], prediction[valid]), shape)
            rings = np.bincount(cells, minlength=np.prod(shape)).reshape(shape)[:-1]
            self.matrices += torch.from_numpy(rings.cumsum(axis=0)).to(self.matrices.device)

    def compute(self) -> Tensor:
        """Return one confusion matrix per width, from narrow to wide: int64 ``(len(widths), K, K)``."""
        return self.matrices


class BoundaryIoU(Metric):
    """IoU of the boundary regions of each class, in prediction and in truth.

    B. Cheng et al., "Boundary IoU: improving object-centric image segmentation evaluation", CVPR 2021, arXiv
    2103.16562. The boundary region of a class contains the pixels that d erosions with a 3x3 square remove. As in the
    authors' code, the image's border is a contour. d is a share of the image's diagonal, rounded, and at least 1.
    Intersections and unions are summed over the data set.

    Pixels that are ignored in the truth are ignored in the prediction, too. They belong to no class, so the classes
    beside them have a contour there, and they are not counted.

    Args:
        num_classes: K, at least 2.
        distance: d over the length of the image's diagonal, 0.02 in the paper.

    Raises:
        UserError: if `distance` is not between 0 and 1.
    """

    intersection: Tensor
    union: Tensor

    def __init__(self, num_classes: int, distance: float = 0.02) -> None:
        super().__init__()
        if not 0 < distance < 1:
            raise UserError(f"boundary IoU: distance must be a share of the diagonal, such as 0.02, got {distance}")
        self.num_classes, self.distance = num_classes, distance
        for name in ("intersection", "union"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, mask: Tensor) -> None:
        """Count predicted and true labels, both ``(N, H, W)``."""
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
        """Return boundary IoU per class, nan for a class that does not occur: float64 ``(K,)`` on the CPU."""
        return self.intersection.cpu().double() / self.union.cpu()


def boundary(labels: np.ndarray, width: int) -> np.ndarray:
    """Return the boundary regions of all classes, bool ``(H, W)``.

    A pixel is in one if another label or the outside is in the square of ``2 * width + 1`` pixels around it.
    """
    from scipy.ndimage import maximum_filter, minimum_filter  # their cost does not depend on the width

    size, outside = 2 * width + 1, {"mode": "constant", "cval": -1}
    return minimum_filter(labels, size, **outside) != maximum_filter(labels, size, **outside)


def contour_distance(mask: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel ``(H, W)`` to the nearest pixel beside a contour; inf without a contour."""
    from scipy.ndimage import distance_transform_edt  # takes 0.2 s to import

    contour = np.zeros(mask.shape, dtype=bool)
    for before, after in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        changes = mask[before] != mask[after]
        contour[before] |= changes
        contour[after] |= changes
    return distance_transform_edt(~contour) if contour.any() else np.full(mask.shape, np.inf)
