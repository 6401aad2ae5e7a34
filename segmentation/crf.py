"""The fully connected CRF that DeepLab v1 and v2 apply after the network: mean field, in PyTorch or by pydensecrf.

P. Krähenbühl, V. Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS 2011,
arXiv 1210.5644. A. Adams, J. Baek, M. A. Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
Eurographics 2010.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

SMALLEST = 1e-5  # smaller probabilities are raised to it, as in pydensecrf's utilities


@dataclass(frozen=True)
class CRF:
    """The parameters of the energy, and the number of iterations that minimise it.

    The energy of a labelling x is E(x) = - sum log P(x_i) + the sum, over pairs of pixels with different labels, of

    w1 exp(-|p_i - p_j|^2 / 2 sigma_alpha^2 - |I_i - I_j|^2 / 2 sigma_beta^2) + w2 exp(-|p_i - p_j|^2 / 2 sigma_gamma^2)

    with positions p in pixels and colours I in 0..255 (DeepLab v2, equations 2 and 3). pydensecrf's names for the
    parameters stand in brackets.

    Args:
        w1: weight of the bilateral kernel (``compat`` of ``addPairwiseBilateral``).
        sigma_alpha: its standard deviation in pixels (``sxy``).
        sigma_beta: its standard deviation in colour, in steps of 0..255 (``srgb``).
        w2: weight of the smoothness kernel (``compat`` of ``addPairwiseGaussian``).
        sigma_gamma: its standard deviation in pixels (``sxy``).
        iterations: number of mean-field iterations.

    Raises:
        UserError: if a weight or `iterations` is negative, or a sigma is not positive.
    """

    w1: float = 4.0
    sigma_alpha: float = 67.0
    sigma_beta: float = 3.0
    w2: float = 3.0
    sigma_gamma: float = 1.0
    iterations: int = 10

    def __post_init__(self) -> None:
        if min(self.w1, self.w2, self.iterations) < 0:
            raise UserError(f"a CRF's weights and iterations must not be negative, got {self}")
        if min(self.sigma_alpha, self.sigma_beta, self.sigma_gamma) <= 0:
            raise UserError(f"a CRF's sigmas must be positive, got {self}")


# The settings that the authors of DeepLab released for VOC 2012. The only source for those of v1 is a listing by
# others. Those of v2 are kazuto1011's for ResNet-101, which reproduce the paper's gain.
PRESETS = {
    "deeplabv1": CRF(5, 50, 10, 3, 3),
    "deeplabv1_msc": CRF(3, 95, 3, 3, 3),
    "deeplabv1_largefov": CRF(4, 121, 5, 3, 3),
    "deeplabv1_msc_largefov": CRF(4, 83, 5, 3, 3),
    "deeplabv1_coco": CRF(5, 67, 3, 3, 3),
    "deeplabv1_coco_largefov": CRF(5, 69, 5, 3, 3),
    "deeplabv1_coco_msc_largefov": CRF(4, 59, 5, 3, 3),
    "deeplabv2": CRF(4, 67, 3, 3, 1),
}
Backend = Literal["torch", "pydensecrf"]


def refine(probs: Tensor, image: Tensor, crf: CRF, backend: Backend = "torch", bound: float = 0.05) -> Tensor:
    """Run mean field on an image or a batch.

    A class whose probability is nowhere above `bound` is left out and gets 0, because it costs time and wins no pixel:
    its mean over any neighbourhood is below `bound`, so the pairs give it less than (w1 + w2) `bound`.

    Args:
        probs: the network's probabilities at the image's size; a single channel is the probability of foreground.
        image: raw pixels in 0..255, not normalised.
        crf: the parameters.
        backend: ``torch``, on the device of `probs`, or ``pydensecrf``, on the CPU.
        bound: 0 keeps all classes.

    Shape:
        probs ``(N, K, H, W)``, image uint8 ``(N, 3, H, W)`` -> ``(N, K, H, W)`` float32.

    Raises:
        UserError: if shapes or types do not match, if a probability is not finite, if the sigmas are too small for the
            image, or if pydensecrf is needed and not installed.
    """
    if image.dtype != torch.uint8 or image.shape != (len(probs), 3, *probs.shape[2:]):
        raise UserError(
            f"the CRF needs raw RGB pixels, uint8 {(len(probs), 3, *probs.shape[2:])}, for probabilities of shape "
            f"{tuple(probs.shape)}, got {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
        )
    if not probs.is_floating_point() or not (probs := probs.float()).sum().isfinite():
        raise UserError("the CRF needs probabilities, but these contain values that are no finite numbers")
    if probs.shape[1] == 1:
        return refine(torch.cat([1 - probs, probs], dim=1), image, crf, backend, bound=0)[:, 1:]
    kept = (probs.amax(dim=(0, 2, 3)) > bound).nonzero()[:, 0]
    if len(kept) < 2:
        return probs
    solve = mean_field if backend == "torch" else by_pydensecrf
    refined = torch.zeros_like(probs)
    refined[:, kept] = solve(probs[:, kept], image, crf)
    return refined


# In PyTorch


def mean_field(probs: Tensor, image: Tensor, crf: CRF) -> Tensor:
    """Run algorithm 1 of Krähenbühl and Koltun, with symmetrically normalised kernels; shapes as in `refine`."""
    n, k, height, width = probs.shape
    position, which = pixels(n, height, width, probs.device)
    colour = image.to(probs.device).permute(0, 2, 3, 1).reshape(-1, 3).float()
    appearance = Lattice(torch.cat([position / crf.sigma_alpha, colour / crf.sigma_beta], dim=1), which)
    smoothness = grid_lattice(n, height, width, crf.sigma_gamma, probs.device)

    unary = probs.clamp(min=SMALLEST).log().permute(0, 2, 3, 1).reshape(-1, k)
    q = softmax(unary.clone())
    for _ in range(crf.iterations):  # message passing, compatibility (Potts), local update
        messages = appearance.filter(q).mul_(crf.w1).add_(smoothness.filter(q), alpha=crf.w2)
        q = softmax(messages.add_(unary))
    return q.view(n, height, width, k).permute(0, 3, 1, 2)


def pixels(n: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the position x and y ``(size, 2)`` and the image's index ``(size,)`` of each pixel of n images."""
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    position = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=2).float().view(-1, 2)
    return position.repeat(n, 1), torch.arange(n, device=device).repeat_interleave(height * width)


def softmax(energies: Tensor) -> Tensor:
    """Apply softmax over the last axis of ``(size, K)`` in place; torch's takes ten times as long for small K."""
    energies.sub_(energies.amax(dim=1, keepdim=True)).exp_()
    return energies.div_(energies.sum(dim=1, keepdim=True))


class Lattice:
    """A Gaussian filter over points of any dimension d, computed on the permutohedral lattice (Adams et al.).

    Each point adds its values to the d + 1 corners of its simplex (splat). The corners are blurred along d + 1
    directions. Then each point reads the same corners (slice). The cost is linear in points and values.

    Args:
        features: ``(size, d)``, in units of the Gaussian's standard deviation.
        group: ``(size,)``, in ascending order; points of different groups do not affect each other.

    Raises:
        UserError: if the features span so many standard deviations that int64 cannot number the lattice points.
    """

    def __init__(self, features: Tensor, group: Tensor) -> None:
        size, d = features.shape
        nearest, order, turn, corner_weights = simplices(features)
        numbers, strides = number_corners(nearest, order, turn, group)

        # the lattice points in order of their numbers, and the corners that coincide with each of them
        numbers, splat = numbers.sort()
        points, which, counts = numbers.unique_consecutive(return_inverse=True, return_counts=True)
        self.corners = torch.empty_like(which, dtype=torch.int32).scatter_(0, splat, which.int()).view(size, d + 1)
        self.ends = F.pad(counts.cumsum(dim=0), (1, 1), value=0).int()
        self.ends[-1] = self.ends[-2]  # one more lattice point, which stands for missing neighbours and stays 0
        self.neighbours = [neighbours(points, strides.sum() - (d + 1) * stride) for stride in strides]
        self.blur_weights = torch.tensor([0.5, 1, 0.5], device=features.device).repeat(len(points) + 1, 1)

        self.weights = corner_weights / (1 + 2.0**-d) ** 0.5
        self.splat_weights = self.weights.flatten().index_select(0, splat)
        self.splat = (splat // (d + 1)).int()
        norm = self.filter(torch.ones(size, 1, device=features.device)).clamp(min=1e-20).rsqrt()
        self.weights = self.weights * norm
        self.splat_weights = self.splat_weights * norm[:, 0].index_select(0, self.splat)

    def filter(self, values: Tensor) -> Tensor:
        """Return Gaussian means around every point: ``(size, K)`` -> ``(size, K)``.

        Each step is a sum of weighted rows.
        """
        splat = {"per_sample_weights": self.splat_weights, "include_last_offset": True}
        x = F.embedding_bag(self.splat, values, self.ends, mode="sum", **splat)  # (lattice points + 1, K)
        for around in self.neighbours:
            x = F.embedding_bag(around, x, mode="sum", per_sample_weights=self.blur_weights)
        return F.embedding_bag(self.corners, x, mode="sum", per_sample_weights=self.weights)


def simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the simplex of the lattice around each point, and the point's weights for its corners.

    Args:
        features: ``(size, d)``, in units of the Gaussian's standard deviation.

    Returns:
        four tensors ``(size, d + 1)``: the nearest multiples of d + 1, divided by d + 1; the order of coordinates by
        their distance to these; by how much each multiple changes, 1, 0 or -1, to lie on the plane; the weights of
        corners 0 to d.
    """
    d = features.shape[1]
    # embed in the plane whose d + 1 coordinates sum to 0, in units of d + 1 (section 3.1)
    axis = torch.arange(1, d + 1, device=features.device)
    scaled = features * ((2 / 3) / (axis * (axis + 1.0))).sqrt()
    embedded = F.pad(scaled.flip(1).cumsum(dim=1).flip(1), (0, 1)) - F.pad(axis * scaled, (1, 0))  # (size, d + 1)
    nearest = embedded.round()
    # rank the coordinates by their distance to the nearest point, and move that point onto the plane
    distance, order = (embedded - nearest).sort(dim=1, descending=True)
    excess = nearest.sum(dim=1, keepdim=True).long()
    rank = torch.arange(d + 1, device=features.device)
    before = (rank - excess) % (d + 1)
    turn = (before + excess - rank) // (d + 1)
    distance, order = distance.gather(1, before) + turn, order.gather(1, before)
    # barycentric coordinates of the point among its simplex's corners 0 to d (proposition 4.2)
    rising = distance.flip(1)
    return nearest, order, turn, rising.diff(dim=1, prepend=rising[:, -1:] - 1)


def number_corners(nearest: Tensor, order: Tensor, turn: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Give each corner of each point's simplex a number that is its own among lattice points and groups.

    The digits of the number are the lattice point's first d coordinates and its group; the last coordinate follows
    from the others, because they sum to 0.

    Returns:
        the numbers ``(size * (d + 1),)`` and the value of a step by 1 in each coordinate ``(d + 1,)``, 0 for the last.

    Raises:
        UserError: if int64 cannot hold the numbers.
    """
    size, d = len(nearest), nearest.shape[1] - 1
    low, high = (extreme.long() * (d + 1) for extreme in (nearest.amin(dim=0) - 3, nearest.amax(dim=0) + 4))
    digits = [*(high - low)[:d].tolist(), int(group[-1]) + 1]
    if torch.tensor(digits, dtype=torch.float64).log2().sum() > 62:
        raise UserError("the CRF's sigmas are too small for this image: its lattice has more points than numbers")
    values = torch.tensor([1, *digits[:-1]], device=nearest.device).cumprod(dim=0)
    strides, group_stride = torch.cat([values[:d], values.new_zeros(1)]), values[d]
    first = ((nearest.long() * (d + 1) - low) * strides).sum(dim=1) + group * group_stride
    ranked = strides.expand(size, -1).gather(1, order)  # (size, d + 1), the coordinates' strides by rank
    first -= (d + 1) * (turn * ranked).sum(dim=1)
    steps = strides.sum() - (d + 1) * ranked.flip(1)[:, :-1]  # corner r differs from corner r - 1 by one step
    return torch.cat([first[:, None], steps], dim=1).cumsum(dim=1).flatten(), strides


def neighbours(points: Tensor, step: Tensor) -> Tensor:
    """Find the lattice points one step before and after each point in one direction.

    Args:
        points: numbers of the lattice points, ascending ``(count,)``.
        step: difference of the numbers of two neighbours.

    Returns:
        indices into `points`, int32 ``(count + 1, 3)``: the point before, the point, the point after. A missing
        neighbour has the index ``count``, and the last row holds this index alone.
    """
    count = len(points)
    wanted = points + step
    found = torch.searchsorted(points, wanted).clamp(max=count - 1)
    there = (points[found] == wanted).nonzero()[:, 0]
    around = torch.full((count + 1, 3), count, dtype=torch.int32, device=points.device)
    around[:count, 1] = torch.arange(count, device=points.device)
    around[there, 2] = found[there].int()
    around[found[there], 0] = there.int()
    return around


@lru_cache(maxsize=4)
def grid_lattice(n: int, height: int, width: int, sigma: float, device: torch.device) -> Lattice:
    """Return the lattice of pixel positions, which is the same for images of one size."""
    position, which = pixels(n, height, width, device)
    return Lattice(position / sigma, which)


# By pydensecrf


def by_pydensecrf(probs: Tensor, image: Tensor, crf: CRF) -> Tensor:
    """Run mean field by pydensecrf, image by image; shapes as in `refine`.

    Raises:
        UserError: if it is not installed.
    """
    need_pydensecrf()
    from pydensecrf.densecrf import DenseCRF2D

    k, height, width = probs.shape[1:]
    refined = []
    for unary, pixels in zip(-probs.cpu().clamp(min=SMALLEST).log(), image.cpu(), strict=True):
        field = DenseCRF2D(width, height, k)
        field.setUnaryEnergy(unary.reshape(k, -1).contiguous().numpy())
        field.addPairwiseGaussian(sxy=crf.sigma_gamma, compat=crf.w2)
        rgb = pixels.permute(1, 2, 0).contiguous().numpy()
        field.addPairwiseBilateral(sxy=crf.sigma_alpha, srgb=crf.sigma_beta, rgbim=rgb, compat=crf.w1)
        refined.append(torch.from_numpy(np.array(field.inference(crf.iterations))).view(k, height, width))
    return torch.stack(refined).to(probs.device)


def need_pydensecrf() -> None:
    """Check that pydensecrf is installed.

    Raises:
        UserError: if it is not; the message states how to install it.
    """
    if importlib.util.find_spec("pydensecrf") is None:
        raise UserError(
            "pydensecrf is not installed: `pip install pydensecrf2` compiles it, with g++ or, on Windows, Visual C++; "
            "DenseCRF's backend: torch needs neither"
        )
