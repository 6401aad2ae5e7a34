"""How logits are computed for a whole image: at once, from windows, or from several scales.

``model.inference`` is an object of one of these classes; validation, test and predict call it. Logits of windows are
collected in the CPU's memory, block by block, so an image may be larger than a GPU can hold.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .losses import labelled

Read = Callable[[int, int, int, int], Tensor]  # (top, bottom, left, right) -> preprocessed pixels (N, C, h, w)
LARGEST = 178_956_970  # pixels that a network sees at once; Pillow's limit too
Block = tuple[int, int, Tensor]  # top, left, and the logits (N, K, h, w) from there on

__all__ = ["Inference", "MultiScaleFlip", "SlidingWindow", "Tiled", "Whole"]


class Inference:
    """Compute the logits of a whole image. Subclasses define how."""

    def __call__(self, model: Any, image: Tensor) -> Tensor:
        """Return the logits of an image.

        Args:
            model: a `SegmentationModule`.
            image: preprocessed image on the model's device.

        Shape:
            image ``(N, C, H, W)`` -> logits ``(N, K, H, W)``.
        """
        raise NotImplementedError


class Whole(Inference):
    """Show the network the image at once.

    Raises:
        UserError: for an image of more than `LARGEST` pixels, for which no memory is large enough.
    """

    def __call__(self, model: Any, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if height * width > LARGEST:
            raise UserError(
                f"an image of {width} x {height} pixels is too large for the network as a whole: set model.inference: "
                "SlidingWindow, or use lightning predict_tiff"
            )
        return model(image)


class Tiled(Inference):
    """Compute logits part by part. Subclasses define `blocks`, which reads one part after another."""

    def blocks(self, model: Any, read: Read, height: int, width: int) -> Iterator[Block]:
        """Yield finished blocks of logits, float32 on the model's device, that cover the image once.

        Blocks come row by row, from left to right; the blocks of a row have one height.

        Args:
            model: a `SegmentationModule`.
            read: returns the pixels of a window inside the image.
            height: height of the image in pixels.
            width: width of the image in pixels.
        """
        raise NotImplementedError

    def __call__(self, model: Any, image: Tensor) -> Tensor:
        """Return the logits in the CPU's memory; see `Inference`."""
        height, width = image.shape[-2:]
        logits = torch.empty(0)
        blocks = self.blocks(model, lambda top, bottom, left, right: image[..., top:bottom, left:right], height, width)
        for top, left, block in blocks:
            if top == left == 0:
                logits = torch.empty(*block.shape[:2], height, width)
            logits[..., top : top + block.shape[-2], left : left + block.shape[-1]] = block
        return logits


class SlidingWindow(Tiled):
    """Windows that overlap, as large as the training crops. In the overlap their logits are averaged.

    Apart from a batch of windows, the device holds the logits of the overlap with the next row of windows:
    4 bytes x num_classes x `crop` x `overlap` x the image's width.

    Args:
        crop: side of a window in pixels; a window is never larger than the image.
        overlap: least overlap of neighbours, as a share of `crop`; 1/3 in the code of the PSPNet paper.
        blend: ``average`` weighs all pixels of a window alike; ``gaussian`` weighs its middle more, with a standard
            deviation of an eighth of its side (nnU-Net, Isensee et al., 2021).
        batch_size: number of windows that the network sees at once.

    Raises:
        UserError: for a crop or batch below 1, an overlap outside [0, 1), or an unknown blend.
    """

    def __init__(
        self,
        crop: int,
        overlap: float = 1 / 3,
        blend: Literal["average", "gaussian"] = "average",
        batch_size: int = 1,
    ) -> None:
        if crop < 1 or batch_size < 1:
            raise UserError(f"crop and batch_size of a SlidingWindow must be 1 or more, got {crop}, {batch_size}")
        if not 0 <= overlap < 1:
            raise UserError(f"overlap of a SlidingWindow is a share of its crop, 0 or more and below 1, got {overlap}")
        if blend not in ("average", "gaussian"):
            raise UserError(f"blend of a SlidingWindow is average or gaussian, got {blend}")
        self.crop, self.overlap, self.blend, self.batch_size = crop, overlap, blend, batch_size

    def blocks(self, model: Any, read: Read, height: int, width: int) -> Iterator[Block]:
        """Yield the logits of windows, see `Tiled`; a block ends where the next window begins."""
        h, w = min(self.crop, height), min(self.crop, width)
        tops, lefts = positions(height, self.crop, self.overlap), positions(width, self.crop, self.overlap)
        bottoms, rights = [*tops[1:], height], [*lefts[1:], width]  # of the pixels that no later window covers
        row_shares, column_shares = shares(tops, h, height, self.blend), shares(lefts, w, width, self.blend)
        most = max(top + h - bottom for top, bottom in zip(tops, bottoms, strict=True))
        below: Tensor | None = None  # (N, K, most, W), logits of the last row of windows for pixels of this row
        overlap = 0  # rows of `below` that are in use
        for top, bottom, row_share in zip(tops, bottoms, row_shares, strict=True):
            beside: Tensor | None = None  # logits of the last window for pixels of this window
            windows = self.windows(model, read, (top, top + h), [(left, left + w) for left in lefts])
            for left, right, column_share, logits in zip(lefts, rights, column_shares, windows, strict=True):
                logits = logits * (row_share[:, None] * column_share).to(logits.device)
                if beside is not None:
                    logits[..., : beside.shape[-1]] += beside
                beside, logits = logits[..., right - left :], logits[..., : right - left]
                if below is None:
                    below = logits.new_zeros(*logits.shape[:2], most, width)
                logits[:, :, :overlap] += below[:, :, :overlap, left:right]
                below[:, :, : top + h - bottom, left:right] = logits[:, :, bottom - top :]
                yield top, left, logits[:, :, : bottom - top]
            overlap = top + h - bottom

    def windows(
        self, model: Any, read: Read, rows: tuple[int, int], columns: Sequence[tuple[int, int]]
    ) -> Iterator[Tensor]:
        """Yield logits ``(N, K, h, w)`` of a row of windows from left to right, in float32 even with autocast."""
        for start in range(0, len(columns), self.batch_size):
            pixels = [read(*rows, *sides) for sides in columns[start : start + self.batch_size]]
            yield from model(torch.cat(pixels)).float().split(len(pixels[0]))


class MultiScaleFlip(Inference):
    """The mean of the probabilities over several scales of the image and its mirror images (DeepLab v3, section 4).

    Args:
        scales: factors on the image's size; the default is DeepLab v3's.
        flip: also look at each image mirrored left to right.
        inference: how logits are computed for each of these images; None is `Whole`. `SlidingWindow` gives PSPNet's
            protocol.

    Raises:
        UserError: if there is no scale, or one that is not above 0.
    """

    def __init__(
        self,
        scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
        flip: bool = True,
        inference: Inference | None = None,
    ) -> None:
        if not scales or min(scales) <= 0:
            raise UserError(f"scales of a MultiScaleFlip are one factor or more, each above 0, got {list(scales)}")
        self.scales, self.flip, self.inference = scales, flip, inference or Whole()

    def __call__(self, model: Any, image: Tensor) -> Tensor:
        """Return logits whose probabilities are the mean; see `Inference`."""
        size = tuple(image.shape[-2:])
        probs: Any = 0
        for scale in self.scales:
            scaled = resize(image, [max(1, round(side * scale)) for side in size])
            probs += model.probabilities(resize(self.inference(model, scaled).float(), size))
            if self.flip:
                logits = self.inference(model, scaled.flip(-1)).flip(-1)
                probs += model.probabilities(resize(logits.float(), size))
        return model.logits_of(probs / (len(self.scales) * (1 + self.flip)))


def evaluate(model: Any, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of logits, the weight of all pixels in it, and the labels.

    Sliding-window logits stay on the CPU, where there may be more of them than the device can hold. They are evaluated
    in strips of 256 rows.

    Args:
        model: a `SegmentationModule`.
        logits: at the mask's size.
        mask: the truth; it says on which device to compute.

    Shape:
        logits ``(N, K, H, W)``, mask ``(N, H, W)`` -> scalar, scalar, int64 ``(N, H, W)``.
    """
    rows = mask.shape[1] if logits.device == mask.device else 256
    weight_of = getattr(model.loss, "weight_of", labelled)
    losses, weights, labels = [], [], []
    for strip, truth in zip(logits.split(rows, dim=2), mask.split(rows, dim=1), strict=True):
        strip = strip.to(mask.device)
        losses.append(model.evaluation_loss(strip, truth))
        weights.append(weight_of(truth).sum())
        ordered = strip if model.num_classes > 1 else model.probabilities(strip)  # softmax keeps the order of classes
        labels.append(model.labels(ordered))
    total = torch.stack(weights).sum()
    share = torch.stack(weights) / total.clamp(min=torch.finfo(torch.float32).tiny)
    return (torch.stack(losses) * share).sum(), total, torch.cat(labels, dim=1)


def finite_images(logits: Tensor) -> Tensor:
    """Return whether all logits of each image are finite: ``(N, K, H, W)`` -> bool ``(N,)``, on the logits' device."""
    return logits.isfinite().flatten(1).all(dim=1)


def why_not_finite(model: Any, name: str) -> str:
    """Say whether the weights or an image make a network's output infinite or nan.

    Args:
        model: the network.
        name: the first such image, "" if another process saw it.
    """
    state = model.state_dict().items()
    layer = next((key for key, value in state if value.is_floating_point() and not value.isfinite().all()), None)
    if layer is not None:
        return f"the weights hold values that are not finite, first in {layer}: give another checkpoint"
    return (
        f"the network's output for {name or 'an image'} is not finite, and its weights are: look at that image's "
        "values, or compute with trainer.precision 32"
    )


def positions(length: int, crop: int, overlap: float) -> list[int]:
    """Return where windows begin along a side: evenly from border to border, with at least this overlap."""
    step, room = max(1, round(crop * (1 - overlap))), max(0, length - crop)
    gaps = -(-room // step)
    return [round(i * room / max(1, gaps)) for i in range(gaps + 1)]


def shares(starts: Sequence[int], crop: int, length: int, blend: str) -> list[Tensor]:
    """Return each window's share ``(crop,)`` in the pixels that it covers along a side; a pixel's shares sum to 1."""
    weight = torch.ones(crop)
    if blend == "gaussian":  # at the ends still 3e-4
        weight = torch.exp(-0.5 * ((torch.arange(crop) - (crop - 1) / 2) / (crop / 8)) ** 2)
    total = torch.zeros(length)
    for start in starts:
        total[start : start + crop] += weight
    return [weight / total[start : start + crop] for start in starts]


def mirror(image: Tensor, above: int, below: int, left: int, right: int) -> Tensor:
    """Extend an image by reflection at its borders, repeatedly where a side is shorter than its extension.

    Shape:
        ``(..., H, W)`` -> ``(..., above + H + below, left + W + right)``.
    """
    height, width = image.shape[-2:]
    rows, columns = reflect(-above, height + below, height), reflect(-left, width + right, width)
    return image[..., rows[:, None].to(image.device), columns.to(image.device)]


def read_mirrored(read: Read, height: int, width: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Read a window that may reach over the image's borders, where the image is mirrored as in `mirror`."""
    y, x = reflect(*rows, height), reflect(*columns, width)
    top, left = int(y.min()), int(x.min())
    return read(top, int(y.max()) + 1, left, int(x.max()) + 1)[..., (y - top)[:, None], x - left]


def reflect(start: int, stop: int, length: int) -> Tensor:
    """Return the pixels, 0 to length - 1, at the positions from start to stop of a mirrored line."""
    position = torch.arange(start, stop)
    period = max(1, 2 * (length - 1))  # there and back again; the border pixel is not doubled
    position = position - position // period * period  # the remainder, which ONNX takes of constants alone
    return torch.minimum(position, period - position)


def resize(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate images or score maps to (height, width), unless they have that size (bilinear)."""
    if scores.shape[-2:] == tuple(size):
        return scores
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)
