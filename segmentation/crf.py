"""The fully connected CRF that DeepLab v1 and v2 put behind the network: mean field, in PyTorch or by pydensecrf.

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

SMALLEST = 1e-5  # probabilities below it count as it, as in pydensecrf's utilities


@dataclass(frozen=True)
class CRF:
    """The energy of a labelling: E(x) = - sum log P(x_i) + sum over pairs of pixels with different labels of

    w1 exp(-|p_i - p_j|^2 / 2 sigma_alpha^2 - |I_i - I_j|^2 / 2 sigma_beta^2) + w2 exp(-|p_i - p_j|^2 / 2 sigma_gamma^2)

    with positions p in pixels and colours I in 0..255 (DeepLab v2, equations 2 and 3). In brackets pydensecrf's names.

    Args:
        w1: weight of the bilateral kernel (``compat`` of ``addPairwiseBilateral``).
        sigma_alpha: its reach in pixels (``sxy``).
        sigma_beta: its tolerance to colour, in steps of 255 (``srgb``).
        w2: weight of the smoothness kernel (``compat`` of ``addPairwiseGaussian``).
        sigma_gamma: its reach in pixels (``sxy``).
        iterations: of mean field.

    Raises:
        UserError: if a weight is negative, a sigma not positive, or there are fewer than 0 iterations.
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


# The settings that the authors of DeepLab released for VOC 2012. Those of v1 are known from a listing of others alone;
# that of v2 is kazuto1011's for ResNet-101, which repeats the paper's gain.
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

    A class whose probability is nowhere above `bound` is left out and gets 0: it costs time and wins no pixel. Such a
    class has less than `bound` of any neighbourhood, so the pairs give it less than (w1 + w2) `bound`.

    Args:
        probs: of the network, at the image's size; of one class it is that of the foreground.
        image: raw pixels in 0..255, never the normalised ones.
        crf: the energy.
        backend: ``torch``, on the device of `probs`, or ``pydensecrf``, on the CPU.
        bound: 0 keeps all classes.

    Shape:
        probs ``(N, K, H, W)``, image uint8 ``(N, 3, H, W)`` -> ``(N, K, H, W)`` float32.

    Raises:
        UserError: if shapes or types do not fit, or a probability is not a number.
        UserError: if pydensecrf is wanted and not installed.
    """
    if image.dtype != torch.uint8 or image.shape != (len(probs), 3, *probs.shape[2:]):
        raise UserError(
            f"the CRF needs raw RGB pixels, uint8 {(len(probs), 3, *probs.shape[2:])} beside probabilities "
            f"{tuple(probs.shape)}, got {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
        )
    if not probs.is_floating_point() or not (probs := probs.float()).sum().isfinite():
        raise UserError("the CRF needs probabilities: these hold values that are no finite numbers")
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
    """Algorithm 1 of Krähenbühl and Koltun, with kernels normalised symmetrically: shapes as `refine`."""
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
    """The position of each pixel of n images, x and y ``(size, 2)``, and which image it is of ``(size,)``."""
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    position = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=2).float().view(-1, 2)
    return position.repeat(n, 1), torch.arange(n, device=device).repeat_interleave(height * width)


def softmax(energies: Tensor) -> Tensor:
    """Over the last axis, in place: ``(size, K)``. torch's own takes ten times as long where that axis is short."""
    energies.sub_(energies.amax(dim=1, keepdim=True)).exp_()
    return energies.div_(energies.sum(dim=1, keepdim=True))


class Lattice:
    """A Gaussian filter over points of any dimension d, by way of the permutohedral lattice.

    Each point lends its values to the d + 1 corners of its simplex (splat), the corners are blurred along d + 1
    directions, and the points collect from the same corners (slice). Cost is linear in points and values.

    Args:
        features: ``(size, d)``, in units of the Gaussian's standard deviation.
        group: ``(size,)``; points of different groups do not see each other.

    Raises:
        UserError: if features spread over too many standard deviations to be numbered.
    """

    def __init__(self, features: Tensor, group: Tensor) -> None:
        size, d = features.shape
        device = features.device
        # onto the plane whose d + 1 coordinates sum to 0, in units of d + 1 (section 3.1)
        axis = torch.arange(1, d + 1, device=device)
        scaled = features * ((2 / 3) / (axis * (axis + 1.0))).sqrt()
        elevated = F.pad(scaled.flip(1).cumsum(dim=1).flip(1), (0, 1)) - F.pad(axis * scaled, (1, 0))  # (size, d + 1)
        nearest = elevated.round()
        # the simplex: coordinates ranked by their distance to the nearest point, which is first brought onto the plane
        distance, order = (elevated - nearest).sort(dim=1, descending=True)
        excess = nearest.sum(dim=1, keepdim=True).long()
        rank = torch.arange(d + 1, device=device)
        before = (rank - excess) % (d + 1)
        turn = (before + excess - rank) // (d + 1)  # 1, 0 or -1
        distance, order = distance.gather(1, before) + turn, order.gather(1, before)
        # barycentric coordinates of the point among its simplex's corners 0 to d (proposition 4.2)
        rising = distance.flip(1)
        corner_weights = rising.diff(dim=1, prepend=rising[:, -1:] - 1)  # (size, d + 1)

        # a number for each lattice point: its first d coordinates as digits; corner r differs from r - 1 by one step
        low, high = (extreme.long() * (d + 1) for extreme in (nearest.amin(dim=0) - 3, nearest.amax(dim=0) + 4))
        digits = [*(high - low)[:d].tolist(), int(group[-1]) + 1]
        if torch.tensor(digits, dtype=torch.float64).log2().sum() > 62:
            raise UserError("the CRF's sigmas are too small for this image: its lattice has more points than numbers")
        value = torch.tensor([1, *digits[:-1]], device=device).cumprod(dim=0)
        value, of_group = torch.cat([value[:d], value.new_zeros(1)]), value[d]  # the last coordinate follows
        first = ((nearest.long() * (d + 1) - low) * value).sum(dim=1) + group * of_group
        ranked = value.expand(size, -1).gather(1, order)  # of each coordinate, by rank
        first -= (d + 1) * (turn * ranked).sum(dim=1)
        steps = value.sum() - (d + 1) * ranked.flip(1)[:, :-1]
        numbers = torch.cat([first[:, None], steps], dim=1).cumsum(dim=1).flatten()  # of each point's corners

        # the lattice points in order, the corners that are each of them, and its neighbours along each direction
        numbers, self.lent = numbers.sort()
        points, which, shares = numbers.unique_consecutive(return_inverse=True, return_counts=True)
        count = len(points)  # and one more, which stands for points that are not there and stays 0
        self.corners = torch.empty_like(which, dtype=torch.int32).scatter_(0, self.lent, which.int()).view(size, d + 1)
        self.ends = F.pad(shares.cumsum(dim=0), (1, 1), value=0).int()
        self.ends[-1] = self.ends[-2]
        self.blurs = []
        for direction in range(d + 1):
            wanted = points + value.sum() - (d + 1) * value[direction]
            found = torch.searchsorted(points, wanted).clamp(max=count - 1)
            there = (points[found] == wanted).nonzero()[:, 0]
            around = torch.full((count + 1, 3), count, dtype=torch.int32, device=device)
            around[:count, 1] = torch.arange(count, device=device)
            around[there, 2] = found[there].int()
            around[found[there], 0] = there.int()
            self.blurs.append(around)
        self.blur_weights = torch.tensor([0.5, 1, 0.5], device=device).repeat(count + 1, 1)

        self.weights = corner_weights / (1 + 2.0**-d) ** 0.5
        self.lent_weights = self.weights.flatten().index_select(0, self.lent)
        self.lent = (self.lent // (d + 1)).int()
        norm = self.filter(torch.ones(size, 1, device=device)).clamp(min=1e-20).rsqrt()
        self.weights, self.lent_weights = self.weights * norm, self.lent_weights * norm[:, 0].index_select(0, self.lent)

    def filter(self, values: Tensor) -> Tensor:
        """Gaussian means around every point: ``(size, K)`` -> ``(size, K)``. Each step is a sum of weighted rows."""
        lent = {"per_sample_weights": self.lent_weights, "include_last_offset": True}
        x = F.embedding_bag(self.lent, values, self.ends, mode="sum", **lent)  # (count + 1, K)
        for around in self.blurs:
            x = F.embedding_bag(around, x, mode="sum", per_sample_weights=self.blur_weights)
        return F.embedding_bag(self.corners, x, mode="sum", per_sample_weights=self.weights)


@lru_cache(maxsize=4)
def grid_lattice(n: int, height: int, width: int, sigma: float, device: torch.device) -> Lattice:
    """The lattice of the pixels' positions alone, which images of one size share."""
    position, which = pixels(n, height, width, device)
    return Lattice(position / sigma, which)


# By pydensecrf


def by_pydensecrf(probs: Tensor, image: Tensor, crf: CRF) -> Tensor:
    """The same by pydensecrf, image by image: shapes as `refine`.

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
    """Say how to install it.

    Raises:
        UserError: if it is not installed.
    """
    if importlib.util.find_spec("pydensecrf") is None:
        raise UserError(
            "pydensecrf is not installed: `pip install pydensecrf2` compiles it, with g++ or, on Windows, Visual C++; "
            "DenseCRF's backend: torch needs neither"
        )
