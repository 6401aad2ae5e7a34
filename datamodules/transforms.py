"""Joint transforms of image, mask and pixel weights that torchvision's v2 transforms lack.

They take ``tv_tensors.Image`` of any number of channels and any dtype, ``tv_tensors.Mask`` and `PixelWeight`, and
compose with every transform of torchvision v2. Images are resampled bilinearly, masks and pixel weights to the nearest
pixel. Pixels from outside the image get the label 255 and the weight 0.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from .errors import UserError

IGNORE = 255  # label of the pixels that losses and metrics leave out


class PixelWeight(tv_tensors.Mask):
    """A factor on each pixel's loss, float ``(H, W)``: torchvision moves it like a mask, `outside` fills it with 0."""


def outside(inpt: Tensor, fill: Sequence[float]) -> Tensor:
    """Return the values outside a tensor: `fill` for an image, 255 for a mask, 0 for pixel weights.

    Args:
        inpt: image ``(C, H, W)``, mask or pixel weights ``(H, W)``.
        fill: colour outside an image, one value or one per channel.

    Returns:
        float ``(C, 1, 1)``.

    Raises:
        UserError: if `fill` has neither one value nor one per channel.
    """
    if isinstance(inpt, tv_tensors.Mask):
        return torch.tensor([0.0 if isinstance(inpt, PixelWeight) else float(IGNORE)])[:, None, None]
    if len(fill) not in (1, inpt.shape[-3]):
        raise UserError(f"fill has {len(fill)} values, but the image has {inpt.shape[-3]} channels")
    return torch.tensor(fill, dtype=torch.float32)[:, None, None]


def resample(inpt: Tensor, fill: Sequence[float], move: Callable[[Tensor, InterpolationMode], Tensor]) -> Tensor:
    """Move an image (bilinear), a mask or pixel weights (nearest) by a function of v2 that samples 0 outside.

    The colour outside is subtracted before and added after, so that 0 stands for it. torchvision's own ``fill``
    multiplies the pixels at the image's edge twice by the share that the image covers. This darkens the edge by up to
    a quarter, even in an image that has the colour of `fill` everywhere.

    Args:
        inpt: image ``(C, H, W)``, mask or pixel weights ``(H, W)``, of any dtype.
        fill: see `outside`.
        move: is called with floats ``(C, H, W)`` and the interpolation.
    """
    is_mask = isinstance(inpt, tv_tensors.Mask)
    x = inpt.as_subclass(torch.Tensor)
    x = x[None] if is_mask else x
    floats = x if x.is_floating_point() else x.float()
    border = outside(inpt, fill).to(floats.dtype)
    floats = move(floats - border, InterpolationMode.NEAREST if is_mask else InterpolationMode.BILINEAR) + border
    x = floats if x.is_floating_point() else floats.round().to(x.dtype)
    return tv_tensors.wrap(x[0] if is_mask else x, like=inpt)


class RandomScaleCrop(v2.Transform):
    """Random scaling of image and mask, then a random window of fixed size (DeepLab v2, section 4.1).

    The window is chosen first and cut from the unscaled image, so that only the pixels inside it are resampled. With a
    crop of 321 on CamVid, this is about twice as fast as scaling the whole image. A scaled image that is smaller than
    the window lies at a random place in it.

    Args:
        crop_size: height and width of the result in pixels; one number for a square.
        scale_range: smallest and largest factor, drawn uniformly; (1, 1) only crops.
        fill: colour outside the image, one value per channel, in the image's own units (usually the data's mean).
        max_class_share: a window is drawn again at the same scale, at most 10 times, if one label takes more than
            this share of its labelled pixels, or if none of its pixels is labelled. Values below 1 show rare classes
            more often, 0.75 is usual; 1 takes every window.

    Shape:
        image ``(C, H, W)``, mask and pixel weights ``(H, W)`` -> ``(C, *crop_size)``, ``(*crop_size)``.

    Raises:
        UserError: if a side of the window, a factor or the share is not positive, if the smallest factor is above the
            largest, or if the share is above 1.
    """

    def __init__(
        self,
        crop_size: int | Sequence[int],
        scale_range: Sequence[float] = (0.5, 2.0),
        fill: Sequence[float] = (0,),
        max_class_share: float = 1.0,
    ) -> None:
        super().__init__()
        size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"crop_size must be one or two positive numbers, got {crop_size}")
        if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1]:
            raise UserError(f"scale_range must be (smallest, largest) with 0 < smallest <= largest, got {scale_range}")
        if not 0 < max_class_share <= 1:
            raise UserError(f"max_class_share must be above 0 and at most 1, got {max_class_share}")
        self.crop_size, self.scale_range, self.fill = size, tuple(scale_range), list(fill)
        self.max_class_share = max_class_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the scale and the window.

        Returns:
            ``rows`` and ``columns``, each (first source pixel, source pixels, result pixels, offset in the result).
        """
        scale = float(torch.empty(()).uniform_(*self.scale_range))
        height, width = flat_inputs[0].shape[-2:]
        masks = [x for x in flat_inputs if isinstance(x, tv_tensors.Mask) and not isinstance(x, PixelWeight)]
        for _ in range(11):
            rows = self._window(height, self.crop_size[0], scale)
            columns = self._window(width, self.crop_size[1], scale)
            # the labels are counted before scaling, because scaling does not change their shares
            if self.max_class_share == 1 or all(self._is_varied(mask, rows, columns) for mask in masks):
                break
        return {"rows": rows, "columns": columns}

    def _is_varied(self, mask: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> bool:
        (top, height, *_), (left, width, *_) = rows, columns
        labels = mask.as_subclass(torch.Tensor)[..., top : top + height, left : left + width].flatten()
        counts = torch.bincount(labels, minlength=IGNORE + 1)
        counts[IGNORE] = 0
        return 0 < int(counts.max()) <= self.max_class_share * int(counts.sum())

    @staticmethod
    def _window(length: int, crop: int, scale: float) -> tuple[int, int, int, int]:
        wanted = max(1, round(crop / scale))  # source pixels that the window covers
        if wanted <= length:
            start = int(torch.randint(length - wanted + 1, ()))
            return start, wanted, crop, 0
        kept = min(crop, max(1, round(length * scale)))  # the whole side, with padding around it
        return 0, length, kept, int(torch.randint(crop - kept + 1, ()))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut the drawn window from one tensor, resize it, and pad it where the image is too small."""
        top, height, new_height, above = params["rows"]
        left, width, new_width, before = params["columns"]
        is_mask = isinstance(inpt, tv_tensors.Mask)
        # plain tensors, because v2 resizes a Mask with "nearest", which is shifted by half a pixel
        x = inpt.as_subclass(torch.Tensor)[..., top : top + height, left : left + width]
        x = x[None] if is_mask else x
        if (height, width) != (new_height, new_width):
            mode = InterpolationMode.NEAREST_EXACT if is_mask else InterpolationMode.BILINEAR
            deep = x.dtype == torch.uint16  # v2 rounds all other integers, but truncates these
            x = F.resize(x.float() if deep else x, [new_height, new_width], interpolation=mode, antialias=not is_mask)
            x = x.round().to(torch.uint16) if deep else x
        if (new_height, new_width) != self.crop_size:
            border = outside(inpt, self.fill)
            border = border if x.is_floating_point() else border.round()
            canvas = border.to(x.dtype).expand(len(x), *self.crop_size).clone()
            canvas[:, above : above + new_height, before : before + new_width] = x
            x = canvas
        return tv_tensors.wrap(x[0] if is_mask else x, like=inpt)


class ElasticDeformation(v2.Transform):
    """Smooth random deformation: random displacements on a coarse grid, interpolated bicubically.

    O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI
    2015, arXiv 1505.04597, section 3.1. The grid's corners are the image's corners.

    Args:
        sigma: standard deviation of a grid point's displacement along each axis, in pixels.
        grid: points along each side of the grid.
        fill: colour outside the image, one value per channel, in the image's own units (usually the data's mean).

    Shape:
        image ``(C, H, W)``, mask and pixel weights ``(H, W)`` -> the same; all are deformed by one field.

    Raises:
        UserError: if `sigma` is negative or the grid has fewer than 2 points along a side.
    """

    def __init__(self, sigma: float = 10.0, grid: int = 3, fill: Sequence[float] = (0,)) -> None:
        super().__init__()
        if sigma < 0 or grid < 2:
            raise UserError(f"sigma must not be negative and grid must be at least 2, got {sigma} and {grid}")
        self.sigma, self.grid, self.fill = sigma, grid, list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the field: the offset from each pixel to its source, ``(1, H, W, 2)`` in pixels along x and y."""
        height, width = flat_inputs[0].shape[-2:]
        points = self.sigma * torch.randn(1, 2, self.grid, self.grid)
        field = nnf.interpolate(points, (height, width), mode="bicubic", align_corners=True)
        return {"displacement": field.permute(0, 2, 3, 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Sample one tensor through the field."""
        height, width = inpt.shape[-2:]
        displacement = params["displacement"] * 2 / torch.tensor([width, height])  # v2 measures in half sides
        return resample(inpt, self.fill, lambda x, mode: F.elastic(x, displacement, interpolation=mode))


class RandomRotation(v2.RandomRotation):
    """Rotation about the centre by a random angle; the size does not change.

    Args:
        degrees: the angle is drawn uniformly from -degrees to degrees, or from (smallest, largest); positive angles
            turn to the left.
        fill: colour outside the image, one value per channel, in the image's own units (usually the data's mean).

    Shape:
        image ``(C, H, W)``, mask and pixel weights ``(H, W)`` -> the same.
    """

    def __init__(self, degrees: float | Sequence[float], fill: Sequence[float] = (0,)) -> None:
        super().__init__(degrees)
        self.colour = list(fill)  # v2's class has an attribute ``fill``

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Rotate one tensor by the drawn angle."""
        return resample(inpt, self.colour, lambda x, mode: F.rotate(x, params["angle"], interpolation=mode))


def rearrange(inpt: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Move the pixels of a tensor of any dtype to other places.

    uint16 is moved as int16, because some versions of torch cannot flip it, and only the place of the bits changes.

    Args:
        inpt: image ``(C, H, W)``, mask or pixel weights ``(H, W)``.
        move: is called with a plain tensor of the same shape.
    """
    x = inpt.as_subclass(torch.Tensor)
    moved = move(x.view(torch.int16)).view(torch.uint16) if x.dtype == torch.uint16 else move(x)
    return tv_tensors.wrap(moved, like=inpt)


class RandomHorizontalFlip(v2.RandomHorizontalFlip):
    """torchvision's flip left to right with probability 0.5, for every dtype.

    Shape:
        image ``(C, H, W)``, mask and pixel weights ``(H, W)`` -> the same.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Flip one tensor."""
        return rearrange(inpt, lambda x: x.flip(-1))


class RandomVerticalFlip(v2.RandomVerticalFlip):
    """torchvision's flip upside down with probability 0.5, for every dtype.

    Shape:
        image ``(C, H, W)``, mask and pixel weights ``(H, W)`` -> the same.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Flip one tensor."""
        return rearrange(inpt, lambda x: x.flip(-2))


class RandomTurn(v2.Transform):
    """Random turn about the centre by a multiple of some degrees. It moves pixels exactly, and needs no colour outside.

    Args:
        degrees: 90 draws one of four directions, 180 one of two.

    Shape:
        image ``(C, H, W)``, mask and pixel weights ``(H, W)`` -> the same, or with H and W exchanged.

    Raises:
        UserError: if `degrees` is neither 90 nor 180.
    """

    def __init__(self, degrees: int) -> None:
        super().__init__()
        if degrees not in (90, 180):
            raise UserError(f"a turn is by multiples of 90 or 180 degrees, got {degrees}")
        self.degrees = degrees

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the number of quarter turns to the left."""
        return {"quarters": int(torch.randint(360 // self.degrees, ())) * self.degrees // 90}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turn one tensor."""
        return rearrange(inpt, lambda x: torch.rot90(x, params["quarters"], (-2, -1)))


class BandJitter(v2.Transform):
    """Random brightness and contrast per band, for images that ``v2.ColorJitter`` does not accept.

    Contrast moves a band's pixels away from or towards the band's mean, and brightness multiplies them. Integers are
    clamped to `value_range`, floats are not. Pixels that are nan stay nan and do not count for the mean. Grey that
    fills three bands stays grey.

    Args:
        strength: factors are drawn uniformly from max(0, 1 - strength) to 1 + strength.
        value_range: the values that mean black and white; None is 0 and the largest value of the dtype.

    Shape:
        image ``(C, H, W)`` -> the same, in the same dtype; masks and pixel weights do not change.

    Raises:
        UserError: if `strength` is negative.
    """

    def __init__(self, strength: float, value_range: Sequence[float] | None = None) -> None:
        super().__init__()
        if strength < 0:
            raise UserError(f"strength must not be negative, got {strength}")
        self.strength, self.value_range = strength, value_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the two factors of each band, each ``(C, 1, 1)``."""
        image = next(x for x in flat_inputs if not isinstance(x, tv_tensors.Mask))
        factors = torch.empty(2, image.shape[-3], 1, 1).uniform_(max(0.0, 1 - self.strength), 1 + self.strength)
        if image.shape[-3] == 3 and bool((image[..., 1:, :, :] == image[..., :1, :, :]).all()):
            factors = factors[:, :1].expand(-1, 3, -1, -1)
        return {"brightness": factors[0], "contrast": factors[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change an image; return masks and pixel weights as they are."""
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        x = inpt.as_subclass(torch.Tensor)
        floats = x if x.is_floating_point() else x.float()
        mean = floats.nanmean((-2, -1), keepdim=True)
        low = self.value_range[0] if self.value_range else 0.0
        floats = ((floats - mean) * params["contrast"] + mean - low) * params["brightness"] + low
        if not x.is_floating_point():
            limits = torch.iinfo(x.dtype)
            floats = floats.round().clamp(*(self.value_range or (limits.min, limits.max)))
        return tv_tensors.wrap(floats.to(x.dtype), like=inpt)


class Extra(v2.Transform):
    """Further transforms of torchvision's v2, or of your own, one after the other on an item of the data set.

    Pixels that a transform brings in from outside the image are ignored: torchvision would give them the class 0, or
    the colour of `fill` as a class. A map of one odd number is moved with the mask, and where the number is gone, the
    label becomes 255 and the pixel weight 0.

    Args:
        transforms: are called with a dict of ``tv_tensors``: ``image``, ``mask`` and others.

    Raises:
        UserError: for a transform that normalises, because the model does. In use, for a transform that fails, or
            returns another type or another number of bands than it got, or an image and a mask of different sizes.
    """

    INSIDE = 187 / 256  # exact in float32, and nobody's fill colour

    def __init__(self, transforms: Sequence[v2.Transform]) -> None:
        super().__init__()
        self.transforms = list(transforms)
        for transform in all_of(self.transforms):
            if isinstance(transform, v2.Normalize):
                raise UserError(
                    "data.transforms holds Normalize, but the model normalises the images: leave it out, and set "
                    "model.mean and model.std"
                )
            fills = getattr(transform, "_fill", None)
            if isinstance(fills, dict):  # a colour of three bands does not fit a mask
                transform._fill = {tv_tensors.Mask: IGNORE, PixelWeight: 0} | fills

    def forward(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """Transform ``image`` ``(C, H, W)``, ``mask`` ``(H, W)`` and, if there is one, ``pixel_weight`` ``(H, W)``."""
        moved = parts | {"inside": PixelWeight(torch.full(parts["mask"].shape, self.INSIDE))}
        for transform in self.transforms:
            name = f"the transform {type(transform).__name__} of data.transforms"
            try:
                moved = transform(moved)
            except Exception as error:  # any class: the transforms are not ours
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise UserError(f"{name} fails on {described(parts['image'])}: {reason}") from error
            self._check(name, parts, moved)
        outside = moved.pop("inside").as_subclass(torch.Tensor) != self.INSIDE
        for key, value in (("mask", IGNORE), ("pixel_weight", 0)):
            if key in moved:
                filled = moved[key].as_subclass(torch.Tensor).masked_fill(outside, value)
                moved[key] = tv_tensors.wrap(filled, like=moved[key])
        return moved

    def _check(self, name: str, before: dict[str, Tensor], after: dict[str, Any]) -> None:
        image, old = after["image"], before["image"]
        if not isinstance(image, Tensor) or image.dtype != old.dtype or image.shape[:-2] != old.shape[:-2]:
            raise UserError(
                f"{name} turns {described(old)} into {described(image)}: leave it out, because the model expects the "
                "images as they are stored, and scales them itself"
            )
        for key in after.keys() - {"image"}:
            if not isinstance(after[key], Tensor) or after[key].shape != image.shape[-2:]:
                raise UserError(
                    f"{name} changes the size of the image but not that of the mask: use a transform that takes both"
                )


def all_of(transforms: Sequence[Any]) -> Iterator[Any]:
    """Yield transforms, and those inside them, as `v2.RandomApply` and `v2.Compose` hold some."""
    for transform in transforms:
        yield transform
        yield from all_of(getattr(transform, "transforms", None) or ())


def described(image: Any) -> str:
    """Describe an image in words: ``an image of 3 bands of uint8``."""
    if not isinstance(image, Tensor):
        return f"a {type(image).__name__}"
    return f"an image of {image.shape[0]} bands of {str(image.dtype).removeprefix('torch.')}"
