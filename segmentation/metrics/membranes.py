"""The errors of the ISBI 2012 challenge: cells in electron microscopy, told apart by the membranes between them.

I. Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for connectomics", Frontiers
in Neuroanatomy 2015. Two cells are one where a single pixel of membrane is missing, which a pixel error hardly sees.

In a slice, a pixel is cell or membrane. Cells are 4-connected and membranes 8-connected, as in the challenge's own
program (Fiji's Trainable_Segmentation): a membrane that runs diagonally separates. Outside the picture is membrane.
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

    The pixel error is 1 - F1 of cell pixels, counted over all slices; the others are means over slices.

    Args:
        thresholds: a pixel is cell where its membrane probability is below; the challenge took 0.1, 0.2, ... 1.

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
            raise UserError(f"thresholds of a probability are above 0 and at most 1, got {list(thresholds)}")
        self.thresholds, count = list(thresholds), len(thresholds)
        self.add_state("pixels", torch.zeros(count, 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("rand", torch.zeros(count), dist_reduce_fx="sum")
        self.add_state("warping", torch.zeros(count), dist_reduce_fx="sum")
        self.add_state("slices", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, membrane: Tensor, cells: Tensor) -> None:
        """Add slices: the probability of membrane, and where the cells truly are, float and bool ``(N, H, W)``."""
        for probability, truth in zip(membrane.float().cpu().numpy(), cells.cpu().numpy(), strict=True):
            for i, threshold in enumerate(self.thresholds):
                found = probability < threshold
                self.pixels[i, 0] += 2 * int((found & truth).sum())
                self.pixels[i, 1] += int(found.sum()) + int(truth.sum())
                self.rand[i] += rand_error(truth, found)
                self.warping[i] += warping_error(truth, found)
            self.slices += 1

    def compute(self) -> Tensor:
        """The errors: float64 ``(3, thresholds)`` on the CPU, rows as in `ERRORS`."""
        pixels, rand, warping = self.pixels.cpu().double(), self.rand.cpu().double(), self.warping.cpu().double()
        return torch.stack([1 - pixels[:, 0] / pixels[:, 1], rand / self.slices.cpu(), warping / self.slices.cpu()])


def rand_error(truth: np.ndarray, prediction: np.ndarray) -> float:
    """One minus the F-score of pairs of pixels that lie in one cell: the adapted Rand error, of true cells alone.

    The paper's sums also pair each pixel with itself; as in scikit-image, they do not here, which makes less than
    0.0001 on slices of 512 x 512. A pixel of a true cell that is predicted membrane is in no pair.

    Args:
        truth: bool ``(H, W)``, true in cells.
        prediction: likewise.

    Returns:
        0, every cell is found whole and alone, to 1.
    """
    from scipy.ndimage import label  # 0.2 s to import

    true_cell, found_cell = label(truth)[0][truth].astype(np.int64), label(prediction)[0][truth]
    found = found_cell > 0
    sizes = np.unique(true_cell[found] << 32 | found_cell[found], return_counts=True)[1]
    in_truth, in_prediction, in_both = (
        int((size * (size - 1)).sum()) for size in (np.bincount(true_cell), np.bincount(found_cell[found]), sizes)
    )
    return 1 - 2 * in_both / (in_truth + in_prediction) if in_truth + in_prediction else 0.0


def warping_error(truth: np.ndarray, prediction: np.ndarray) -> float:
    """The share of pixels in which the warped truth and the prediction differ: what no shift of a border explains.

    Args:
        truth: bool ``(H, W)``, true in cells.
        prediction: likewise.

    Returns:
        0 to 1, the mean over the pixels.
    """
    return float((warp(truth, prediction) != prediction).mean())


def warp(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Make the truth as like the prediction as it can be without joining, splitting, adding or removing a cell or hole.

    V. Jain et al., "Boundary learning by optimization with topological constraints", CVPR 2010: pixels that differ are
    flipped where they are simple, till none is; pixels that are right stay. What remains can depend on the order, so
    it is fixed: every second pixel of every second row together, as none of these is another's neighbour.

    The challenge's published list counts, of what remains, only the clusters that split or join cells: its values are
    much lower, such as U-Net's 0.000353.

    Args:
        truth: bool ``(H, W)``, true in cells.
        prediction: likewise.

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
    """Whether a flip of a pixel leaves the topology as it is, of 4-connected cells and 8-connected membranes.

    It does where Yokoi's connectivity number, of the cells that meet at the pixel, is 1 (S. Yokoi et al., "An analysis
    of topological properties of digitized binary pictures using local features", CGIP 1975).

    Args:
        ring: bool ``(M, 8)``, true in cells: the neighbours of each pixel in turn around it, from a side to a corner.

    Returns:
        bool ``(M,)``.
    """
    side, corner, next_side = ring[:, 0::2], ring[:, 1::2], np.roll(ring[:, 0::2], -1, axis=1)
    return (side & ~(corner & next_side)).sum(axis=1) == 1
