"""The errors of the ISBI 2012 challenge: cells in electron microscopy, separated by membranes.

I. Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for connectomics", Frontiers
in Neuroanatomy 2015. If a single pixel of membrane is missing, two cells become one. The pixel error hardly changes
then; the other errors do.

In a slice, a pixel is cell or membrane. Cells are 4-connected and membranes 8-connected, as in the program of the
challenge (Fiji's Trainable_Segmentation), so a diagonal membrane separates cells. Outside the picture is membrane.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from ..errors import UserError

ERRORS = ("pixel_error", "rand_error", "warping_error")


class EMErrors(Metric):
    """Pixel, Rand and warping error at several thresholds of the membrane probability.

    The pixel error is 1 - F1 of cell pixels, counted over all slices. The other errors are means over slices.

    Args:
        thresholds: a pixel is cell if its membrane probability is below the threshold; the challenge used 0.1, 0.2,
            ... 1.

    Raises:
        UserError: if there is no threshold, or one that is not above 0 and at most 1.
    """

    pixels: Tensor
    rand: Tensor
    warping: Tensor
    slices: Tensor

    def __init__(self, thresholds: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)) -> None:
        super().__init__()
        if not thresholds or min(thresholds) <= 0 or max(thresholds) > 1:
            raise UserError(f"the thresholds of a probability must be above 0 and at most 1, got {list(thresholds)}")
        self.thresholds, count = list(thresholds), len(thresholds)
        self.add_state("pixels", torch.zeros(count, 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("rand", torch.zeros(count), dist_reduce_fx="sum")
        self.add_state("warping", torch.zeros(count), dist_reduce_fx="sum")
        self.add_state("slices", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, membrane: Tensor, cells: Tensor) -> None:
        """Add slices: float membrane probabilities and bool true cells, both ``(N, H, W)``."""
        for probability, truth in zip(membrane.float().cpu().numpy(), cells.cpu().numpy(), strict=True):
            for i, threshold in enumerate(self.thresholds):
                found = probability < threshold
                self.pixels[i, 0] += 2 * int((found & truth).sum())
                self.pixels[i, 1] += int(found.sum()) + int(truth.sum())
                self.rand[i] += rand_error(truth, found)
                self.warping[i] += warping_error(truth, found)
            self.slices += 1

    def compute(self) -> Tensor:
        """Return the errors, float64 ``(3, thresholds)`` on the CPU, with rows as in `ERRORS`."""
        pixels, rand, warping = self.pixels.cpu().double(), self.rand.cpu().double(), self.warping.cpu().double()
        return torch.stack([1 - pixels[:, 0] / pixels[:, 1], rand / self.slices.cpu(), warping / self.slices.cpu()])


def rand_error(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Compute the adapted Rand error: 1 - F of the pairs of pixels that lie in one cell, within true cells.

    The paper's sums also pair each pixel with itself. These sums do not, as in scikit-image; the difference is below
    0.0001 on slices of 512 x 512. A pixel of a true cell that is predicted as membrane is in no pair.

    Args:
        truth: bool ``(H, W)``, true in cells.
        prediction: bool ``(H, W)``, true in cells.

    Returns:
        0 to 1; 0 if every cell is found whole and separate.
    """
    from scipy.ndimage import label  # takes 0.2 s to import

    true_cell, found_cell = label(truth)[0][truth].astype(np.int64), label(prediction)[0][truth]
    found = found_cell > 0
    sizes = np.unique(true_cell[found] << 32 | found_cell[found], return_counts=True)[1]
    in_truth, in_prediction, in_both = (
        int((size * (size - 1)).sum()) for size in (np.bincount(true_cell), np.bincount(found_cell[found]), sizes)
    )
    return 1 - 2 * in_both / (in_truth + in_prediction) if in_truth + in_prediction else 0.0


def warping_error(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Compute the share of pixels that differ between prediction and warped truth; shifted borders do not count.

    Args:
        truth: bool ``(H, W)``, true in cells.
        prediction: bool ``(H, W)``, true in cells.

    Returns:
        0 to 1.
    """
    return float((warp(truth, prediction) != prediction).mean())


def warp(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Move the truth towards the prediction without joining, splitting, adding or removing a cell or hole.

    V. Jain et al., "Boundary learning by optimization with topological constraints", CVPR 2010. Among the pixels that
    differ, simple ones (see `simple`) are flipped until none is left; pixels that are right stay. The result can
    depend on the order, so the order is fixed: every second pixel of every second row at once, because these are not
    neighbours.

    The challenge's published list counts only those remaining clusters that split or join cells. So its values are
    much lower, such as 0.000353 for U-Net.

    Args:
        truth: bool ``(H, W)``, true in cells.
        prediction: bool ``(H, W)``, true in cells.

    Returns:
        bool ``(H, W)``.
    """
    warped, goal = np.pad(truth, 1), np.pad(prediction, 1)
    stride, flat = warped.shape[1], warped.reshape(-1)
    ring = np.array([1, 1 - stride, -stride, -stride - 1, -1, stride - 1, stride, stride + 1])  # from the right, around
    differ = np.flatnonzero(warped != goal)
    turn = differ // stride % 2 * 2 + differ % stride % 2
    groups = [differ[turn == i] for i in range(4)]
    flipped = True
    while flipped:
        flipped = False
        for i, group in enumerate(groups):
            flips = simple(flat[group[:, None] + ring])
            flat[group[flips]] ^= True
            groups[i] = group[~flips]
            flipped |= bool(flips.any())
    return warped[1:-1, 1:-1]


def simple(ring: np.ndarray) -> np.ndarray:
    """Return whether a flip of a pixel keeps the topology of 4-connected cells and 8-connected membranes.

    It does if Yokoi's connectivity number of the cells around the pixel is 1 (S. Yokoi et al., "An analysis of
    topological properties of digitized binary pictures using local features", CGIP 1975).

    Args:
        ring: bool ``(M, 8)``, true in cells: the neighbours of each pixel in order around it, starting at a side.

    Returns:
        bool ``(M,)``.
    """
    side, corner, next_side = ring[:, 0::2], ring[:, 1::2], np.roll(ring[:, 0::2], -1, axis=1)
    return (side & ~(corner & next_side)).sum(axis=1) == 1
