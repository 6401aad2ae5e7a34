"""Joint transforms of image and mask: what torchvision's v2 transforms lack for segmentation.

They work on ``tv_tensors.Image`` and ``tv_tensors.Mask`` and compose with every transform of torchvision v2. Labels
are only ever resampled to the nearest neighbour, and pixels that a crop adds outside the image are labelled 255.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

IGNORE = 255  # the only label that losses and metrics leave out


class RandomScaleCrop(v2.Transform):
    """Scale image and mask by a random factor, then cut a random window of fixed size (DeepLab v2, section 4.1).

    The window is chosen first and cut from the unscaled picture, so that only the pixels that survive are resampled:
    at crop 321 on CamVid about twice as fast as scaling the whole image. Where the scaled image is smaller than the
    window it lies at a random place in it.

    Args:
        crop_size: height and width of the result in pixels; one number for a square.
        scale_range: smallest and largest factor, drawn uniformly; (1, 1) only crops.
        fill: colour outside the image, one value per channel, in the image's own units (usually the data's mean).

    Shape:
        image ``(C, H, W)``, mask ``(H, W)`` -> ``(C, *crop_size)``, ``(*crop_size)``.

    Raises:
        ValueError: if a side of the window or a factor is not positive, or the factors are in the wrong order.
    """

    def __init__(
        self, crop_size: int | Sequence[int], scale_range: Sequence[float] = (0.5, 2.0), fill: Sequence[float] = (0,)
    ) -> None:
        super().__init__()
        size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"crop_size must be one or two positive numbers, got {crop_size}")
        if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range must be (smallest, largest) with 0 < smallest <= largest, got {scale_range}")
        self.crop_size, self.scale_range, self.fill = size, tuple(scale_range), list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the scale and the window; each side as (first source pixel, source pixels, result pixels, offset)."""
        scale = float(torch.empty(()).uniform_(*self.scale_range))
        return {
            "rows": self._window(flat_inputs[0].shape[-2], self.crop_size[0], scale),
            "columns": self._window(flat_inputs[0].shape[-1], self.crop_size[1], scale),
        }

    @staticmethod
    def _window(length: int, crop: int, scale: float) -> tuple[int, int, int, int]:
        wanted = max(1, round(crop / scale))  # source pixels that the window covers
        if wanted <= length:
            start = int(torch.randint(length - wanted + 1, ()))
            return start, wanted, crop, 0
        kept = min(crop, max(1, round(length * scale)))  # the whole side, with padding around it
        return 0, length, kept, int(torch.randint(crop - kept + 1, ()))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut, resize and pad one tensor with the drawn window."""
        top, height, new_height, above = params["rows"]
        left, width, new_width, before = params["columns"]
        is_mask = isinstance(inpt, tv_tensors.Mask)
        # plain tensors, because v2 resizes a Mask with "nearest", which is half a pixel off from the bilinear image
        x = inpt.as_subclass(torch.Tensor)[..., top : top + height, left : left + width]
        x = x[None] if is_mask else x
        if (height, width) != (new_height, new_width):
            mode = InterpolationMode.NEAREST_EXACT if is_mask else InterpolationMode.BILINEAR
            x = F.resize(x, [new_height, new_width], interpolation=mode, antialias=not is_mask)
        below, after = self.crop_size[0] - new_height - above, self.crop_size[1] - new_width - before
        if above or below or before or after:
            fill = [float(IGNORE)] if is_mask else self.fill
            x = F.pad(x, [before, above, after, below], fill=fill)
        return tv_tensors.wrap(x[0] if is_mask else x, like=inpt)
