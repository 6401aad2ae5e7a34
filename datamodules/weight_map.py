"""U-Net's loss weights, which make it learn the thin borders between touching objects.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
arXiv 1505.04597, section 3, equation 2 and figure 3.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .transforms import IGNORE

NEGLIGIBLE = 1e-6  # share of w0 below which a border term counts as 0


def border_weights(
    mask: Tensor,
    instances: Tensor | None = None,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Weigh each pixel by its class, and the background between two objects by how narrow the gap is.

    w(x) = w_c(x) + w0 * exp(-(d1 + d2)^2 / (2 sigma^2)), where d1 and d2 are the distances in pixels from x to the
    nearest pixels of the nearest and the second nearest object. The second term stands on background pixels (label 0)
    alone: the paper's equation does not say so, but its figure 3 shows flat weights on the cells, and there d1 = 0
    would reward a cell's own rim more than the gap that is to be learned.

    Args:
        mask: labels; 0 is background, 255 is ignored and gets weight 0.
        instances: a number per object, 0 where there is none. None takes the connected pixels of one class (above,
            below, left, right) as an object, which joins objects that touch.
        w0: weight added in a gap of no width.
        sigma: width at which that weight falls, in pixels.
        class_weights: w_c, one weight per class. None weighs the classes that occur by the inverse of their frequency
            in this mask, with mean 1 over the labelled pixels.

    Shape:
        mask ``(H, W)``, instances ``(H, W)`` -> float32 ``(H, W)``.

    Raises:
        UserError: if mask and instances differ in size, `sigma` is not positive, or a label has no class weight.
    """
    from scipy import ndimage

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

    objects = np.zeros(labels.shape, np.int32)
    if instances is None:
        for label in present[present > 0]:
            parts, _ = ndimage.label(labels == label)
            objects[parts > 0] = parts[parts > 0] + objects.max()
    else:
        given = instances.numpy()
        objects[given != 0] = np.unique(given[given != 0], return_inverse=True)[1] + 1  # 1, 2, 3, ... from any numbers

    # Beyond this distance an object has no say, so its distances are only computed in a window around it.
    reach = int(np.ceil(sigma * np.sqrt(-2 * np.log(NEGLIGIBLE))))
    nearest = np.full(labels.shape, np.inf, np.float32)
    second = nearest.copy()
    for number, box in enumerate(ndimage.find_objects(objects), 1):
        window = tuple(slice(max(side.start - reach, 0), side.stop + reach) for side in box)
        distance = ndimage.distance_transform_edt(objects[window] != number).astype(np.float32)
        second[window] = np.minimum(second[window], np.maximum(nearest[window], distance))
        nearest[window] = np.minimum(nearest[window], distance)
    gap = labels == 0
    weights[gap] += w0 * np.exp(-((nearest[gap] + second[gap]) ** 2) / (2 * sigma**2))
    return torch.from_numpy(weights)
