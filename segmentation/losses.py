"""Losses that a model takes as its argument ``loss``; plain cross-entropy is the default."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

IGNORE = 255  # the only label that losses and metrics leave out


class CrossEntropy(nn.Module):
    """Per-pixel cross-entropy over labelled pixels; binary with one logit.

    Unlike ``torch.nn.CrossEntropyLoss``, a batch whose pixels are all ignored gives 0 with zero gradients, not nan.

    Args:
        class_weights: one factor per class; the mean is then weighted, as in torch. None weighs all alike.

    Shape:
        logits ``(N, K, H, W)``, or ``(N, 1, H, W)`` for two classes; mask int64 ``(N, H, W)``; weight float
        ``(N, H, W)``, a further factor per pixel such as U-Net's border map, or None -> scalar.

    Raises:
        UserError: in `forward`, if the weights are not one per class.
    """

    def __init__(self, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor | None

    def forward(self, logits: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        logits, valid = logits.float(), mask != IGNORE  # (N, H, W)
        target = mask.masked_fill(~valid, 0)
        if logits.shape[1] == 1:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], target.float(), reduction="none")
        else:
            loss = F.cross_entropy(logits, target, reduction="none")
        classes = max(2, logits.shape[1])
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise UserError(f"class_weights has {len(self.class_weights)} values for {classes} classes")
        weight = self.weight(mask) if weight is None else self.weight(mask) * weight
        return (loss * weight).sum() / weight.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def weight(self, mask: Tensor) -> Tensor:
        """The weight of each pixel in the mean: its class's, 0 where ignored. ``(N, H, W)`` float."""
        valid = mask != IGNORE
        if self.class_weights is None:
            return valid.float()
        return self.class_weights[mask.masked_fill(~valid, 0)] * valid
