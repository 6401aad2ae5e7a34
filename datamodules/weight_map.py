"""U-Net's pixel weights, which make the network learn the thin borders between touching objects.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
arXiv 1505.04597, section 3, equation 2 and figure 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .transforms import IGNORE

NEGLIGIBLE = 1e-6  # share of w0 below which a border term counts as 0


@dataclass(frozen=True)
class BorderWeight:
    """`border_weights` with the constants of one data set; its ``repr`` is part of the cache's key."""

    w0: float
    sigma: float
    class_weights: tuple[float, ...]

    def __call__(self, mask: Tensor, instances: Tensor | None) -> Tensor:
        return border_weights(mask, instances, self.w0, self.sigma, self.class_weights)


def border_weights(
    mask: Tensor,
    instances: Tensor | None = None,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Weigh each pixel by its class, and the background between two objects by how narrow the gap is.

    w(x) = w_c(x) + w0 * exp(-(d1 + d2)^2 / (2 sigma^2)), where d1 and d2 are the distances in pixels from x to the
    nearest object and to the second nearest object.

    Differs from the paper: the second term is added on background pixels (label 0) only. The equation does not say
    so, but figure 3 shows constant weights on the cells. There d1 is 0, so the term would raise the weight of a
    cell's own rim above that of the gap, which is what the network must learn.

    Args:
        mask: labels; 0 is background, and 255 is ignored and gets weight 0.
        instances: a number for each object, and 0 elsewhere. None takes the connected pixels of one class (above,
            below, left, right) as an object, so objects that touch count as one.
        w0: weight that is added in a gap of width 0.
        sigma: how fast that weight falls with the gap's width, in pixels.
        class_weights: w_c, one weight per class. None weighs the classes that occur by the inverse of their frequency
            in this mask, so that the mean over the labelled pixels is 1.

    Shape:
        mask ``(H, W)``, instances ``(H, W)`` -> float32 ``(H, W)``.

    Raises:
        UserError: if mask and instances differ in size, `sigma` is not positive, or a label has no class weight.
    """
    if instances is not None and instances.shape != mask.shape:
        raise UserError(f"the mask is {tuple(mask.shape)}, but the instances are {tuple(instances.shape)}")
    if sigma <= 0:
        raise UserError(f"sigma must be positive, got {sigma}")
    labels = mask.numpy()
    counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)
    counts[IGNORE] = 0
    present = np.flatnonzero(counts)
    factors = np.zeros(len(counts))
    if class_weights is None:
        factors[present] = counts.sum() / (len(present) * counts[present])
    elif present.max(initial=0) >= len(class_weights):
        raise UserError(f"class_weights has {len(class_weights)} values, but the mask holds the label {present[-1]}")
    else:
        factors[present] = np.asarray(class_weights)[present]
    weights = factors[labels].astype(np.float32)

    objects = connected_objects(labels) if instances is None else renumbered(instances.numpy())
    reach = int(np.ceil(sigma * np.sqrt(-2 * np.log(NEGLIGIBLE))))
    nearest, second = two_distances(objects, reach)
    gap = labels == 0
    weights[gap] += w0 * np.exp(-((nearest[gap] + second[gap]) ** 2) / (2 * sigma**2))
    return torch.from_numpy(weights)


def connected_objects(labels: np.ndarray) -> np.ndarray:
    """Find the objects, each the connected pixels of one class, and number them: int32 ``(H, W)``, 0 elsewhere."""
    from scipy import ndimage  # only these weights need it

    objects = np.zeros(labels.shape, np.int32)
    for label in np.setdiff1d(np.unique(labels), (0, IGNORE)):
        parts, _ = ndimage.label(labels == label)
        objects[parts > 0] = parts[parts > 0] + objects.max()
    return objects


def renumbered(instances: np.ndarray) -> np.ndarray:
    """Replace any numbers of objects by 1, 2, 3, ...: int32 ``(H, W)``, 0 stays 0."""
    objects = np.zeros(instances.shape, np.int32)
    objects[instances != 0] = np.unique(instances[instances != 0], return_inverse=True)[1] + 1
    return objects


def two_distances(objects: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the distances in pixels to the nearest and to the second nearest object, each float32 ``(H, W)``.

    Args:
        objects: numbers 1, 2, 3, ... and 0 elsewhere, ``(H, W)``.
        reach: distance in pixels beyond which an object adds nothing. Its distances are computed in a window that
            reaches so far, and stay infinite outside.
    """
    from scipy import ndimage

    nearest = np.full(objects.shape, np.inf, np.float32)
    second = nearest.copy()
    for number, box in enumerate(ndimage.find_objects(objects), 1):
        window = tuple(slice(max(side.start - reach, 0), side.stop + reach) for side in box)
        distance = ndimage.distance_transform_edt(objects[window] != number).astype(np.float32)
        second[window] = np.minimum(second[window], np.maximum(nearest[window], distance))
        nearest[window] = np.minimum(nearest[window], distance)
    return nearest, second
