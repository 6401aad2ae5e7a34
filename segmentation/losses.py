"""Losses over labelled pixels; cross-entropy is the default."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

IGNORE = 255  # the only label that losses and metrics leave out


def labelled(mask: Tensor) -> Tensor:
    """Return 1 for labelled pixels and 0 for ignored ones, ``(N, H, W)`` float."""
    return (mask != IGNORE).float()


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return a value's mean over the processes of a run; every process must call this, and equally often."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.detach().clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


class Loss(nn.Module):
    """The contract of ``model.loss``: a weighted mean over pixels, and the weight of each pixel in that mean.

    Any other module that turns (logits, mask) into a mean over labelled pixels will do too; it then takes no
    `pixel_weight`, and every labelled pixel counts alike in validation.
    """

    def forward(self, logits: Tensor, mask: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """Return the mean over pixels.

        Args:
            logits: the network's output.
            mask: labels; 255 is ignored.
            pixel_weight: a further factor on each pixel, such as U-Net's border map.

        Shape:
            logits ``(N, K, H, W)``, or ``(N, 1, H, W)`` for two classes; mask int64 ``(N, H, W)``; pixel_weight float
            ``(N, H, W)`` -> scalar.
        """
        raise NotImplementedError

    def weight_of(self, mask: Tensor) -> Tensor:
        """Return the weight of each pixel in the mean: here `labelled`. ``(N, H, W)`` float."""
        return labelled(mask)


class CrossEntropy(Loss):
    """Cross-entropy of each labelled pixel; binary cross-entropy for one logit.

    With several processes, training divides by the mean of their weights, so that the mean of their gradients is the
    gradient of one process with all pixels, but for rounding (1e-6 of it in float32).

    Unlike ``torch.nn.CrossEntropyLoss``, a batch whose pixels are all ignored gives 0 with zero gradients, not nan.

    Args:
        class_weights: one factor per class; the mean is then weighted, as in torch. None weighs all classes alike.

    Shape:
        see `Loss`.

    Raises:
        UserError: in `forward`, if there is not one factor per class.
    """

    def __init__(self, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor | None

    def forward(self, logits: Tensor, mask: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        logits, valid = logits.float(), mask != IGNORE  # (N, H, W)
        target = mask.masked_fill(~valid, 0)
        if logits.shape[1] == 1:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], target.float(), reduction="none")
        else:
            loss = F.cross_entropy(logits, target, reduction="none")
        classes = max(2, logits.shape[1])
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise UserError(f"class_weights has {len(self.class_weights)} values for {classes} classes")
        weight = self.weight_of(mask) if pixel_weight is None else self.weight_of(mask) * pixel_weight
        total = mean_over_ranks(weight.sum()) if logits.requires_grad else weight.sum()
        return (loss * weight).sum() / total.clamp(min=torch.finfo(torch.float32).tiny)

    def weight_of(self, mask: Tensor) -> Tensor:
        """Return the weight of each pixel in the mean: its class's, and 0 where ignored. ``(N, H, W)`` float."""
        if self.class_weights is None:
            return super().weight_of(mask)
        valid = mask != IGNORE
        return self.class_weights[mask.masked_fill(~valid, 0)] * valid


def finite_sum(losses: Mapping[str, Tensor], where: str) -> Tensor:
    """Return the sum of a step's losses.

    Raises:
        UserError: if it is not finite; the message has the terms, and `where` this happened.
    """
    loss = torch.stack(list(losses.values())).sum()
    if not torch.isfinite(loss):
        terms = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
        raise UserError(f"the loss is not finite ({terms}) at {where}: lower the learning rate, or look at these files")
    return loss


@contextmanager
def batch_norm_errors(batch_size: int) -> Iterator[None]:
    """Turn batch norm's error about a single value per channel into advice.

    Raises:
        UserError: in place of that error.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"batch norm cannot train on a batch of {batch_size} where a feature map is 1x1: set data.batch_size to 2 "
            "or more, or model.freeze_bn: true"
        ) from error
