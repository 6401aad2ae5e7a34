"""MaskFormer: predict a set of masks, each with one class, instead of a class for each pixel.

B. Cheng, A. G. Schwing, A. Kirillov, "Per-Pixel Classification is Not All You Need for Semantic Segmentation",
NeurIPS 2021, arXiv 2107.06278.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Batch, SegmentationModule
from ..errors import UserError
from ..losses import IGNORE, CrossEntropy
from ..weights import load_file
from .backbones.resnet import ResNet

TINY = torch.finfo(torch.float32).tiny  # keeps a division by no pixel or no score from giving nan


def conv_norm(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    """Return a convolution without bias that keeps the size, and group norm with 8 channels per group."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(channels // 8, channels))


class PixelDecoder(nn.Module):
    """Bring the backbone's features up to stride 4, stage by stage, as a feature pyramid network does.

    T.-Y. Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, arXiv 1612.03144.

    Args:
        in_channels: channels of the features at strides 4, 8, 16 and 32.
        channels: channels of all layers and of the result.

    Shape:
        four maps ``(N, in_channels[i], H/s, W/s)`` -> per-pixel embeddings ``(N, channels, H/4, W/4)``.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        *below, top = in_channels
        self.top = conv_norm(top, channels, 3)
        self.laterals = nn.ModuleList(conv_norm(width, channels, 1) for width in below)
        self.outputs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in below)
        self.embedding = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = F.relu(self.top(features[-1]))  # (N, 256, H/32, W/32)
        for level in (2, 1, 0):  # strides 16, 8 and 4
            x = self.laterals[level](features[level]) + F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.relu(self.outputs[level](x))
        return self.embedding(x)


class DecoderLayer(nn.Module):
    """Attention among the queries, attention from the queries to the image, and a two-layer network.

    Each has a shortcut, followed by layer norm. A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv
    1706.03762, Figure 1 right. Positions are added to queries and keys of every attention but not to its values, as in
    DETR (Carion et al., arXiv 2005.12872).

    Args:
        channels: channels of queries and image features; the two-layer network is 8 times as wide.
        num_heads: heads of both attentions.
        dropout: rate after each of the three, in the two-layer network, and on attention weights.

    Shape:
        x ``(N, Q, channels)``, features ``(N, P, channels)``, queries ``(Q, channels)``, positions ``(P, channels)``
        -> ``(N, Q, channels)``.
    """

    def __init__(self, channels: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(channels, 8 * channels)
        self.linear2 = nn.Linear(8 * channels, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, features: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
        placed = x + queries
        attended, _ = self.self_attention(placed, placed, x, need_weights=False)
        x = self.norm1(x + self.dropout(attended))
        attended, _ = self.cross_attention(x + queries, features + positions, features, need_weights=False)
        x = self.norm2(x + self.dropout(attended))
        expanded = self.dropout(F.relu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(expanded)))


class TransformerDecoder(nn.Module):
    """Turn learned queries into one embedding per segment by looking at the last feature map (section 3.3).

    Args:
        in_channels: channels of the backbone's last stage, 2048 for a ResNet.
        channels: channels of queries and embeddings.
        num_queries: number of segments.
        layers: number of `DecoderLayer`; all share one layer norm after them.
        num_heads: heads of each attention.
        dropout: see `DecoderLayer`.

    Shape:
        features ``(N, in_channels, h, w)`` -> embeddings after every layer ``(layers, N, num_queries, channels)``.
    """

    def __init__(
        self, in_channels: int, channels: int, num_queries: int, layers: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, channels, 1)
        self.queries = nn.Embedding(num_queries, channels)
        self.layers = nn.ModuleList(DecoderLayer(channels, num_heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        features = self.projection(features)
        positions = sine_positions(features)  # (h * w, 256)
        features = features.flatten(2).transpose(1, 2)  # (N, h * w, 256)
        queries = self.queries.weight
        x = torch.zeros_like(queries).expand(features.shape[0], -1, -1)
        embeddings = []
        for layer in self.layers:
            x = layer(x, features, queries, positions)
            embeddings.append(self.norm(x))
        return torch.stack(embeddings)


def sine_positions(features: Tensor) -> Tensor:
    """Return sines and cosines of a pixel's row and column, each scaled to (0, 2 pi], at falling frequencies.

    Shape:
        features ``(N, channels, h, w)`` -> ``(h * w, channels)``, of the same type.
    """
    channels, height, width = features.shape[1:]
    step = torch.arange(channels // 4, dtype=torch.float32, device=features.device)
    frequencies = 10000.0 ** (-step / (channels // 4))

    def encode(length: int) -> Tensor:
        position = torch.arange(1, length + 1, dtype=torch.float32, device=features.device) / length
        angles = 2 * math.pi * position[:, None] * frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # (length, channels / 2)

    rows = encode(height)[:, None].expand(-1, width, -1)
    columns = encode(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(features.dtype)


class MaskFormer(SegmentationModule):
    """MaskFormer over a ResNet, by default that of the paper's Table 1 with ResNet-50.

    Each of `num_queries` segments has a mask and a distribution over the classes and "no object". In training, every
    class that occurs in an image is one true mask. After each decoder layer the true masks are assigned to segments at
    the lowest cost, and unassigned segments learn "no object". With one class, the foreground is the only true mask.

    The logits of `forward` are scores: for each class, the sum over segments of class probability times mask
    probability (section 3.4). `probabilities` divides them by their sum over classes; there is no softmax.

    Args:
        num_classes: number of output channels.
        backbone: ``resnet50`` or ``resnet101``, at output stride 32.
        base_channels: width of the backbone's first stage; 64 in the paper.
        hidden_channels: width of pixel decoder and transformer, 256 in the paper; a multiple of 8 and of `num_heads`.
        num_queries: number of segments.
        decoder_layers: number of layers of the transformer.
        num_heads: heads of its attentions.
        no_object_weight: weight of unassigned segments in the classes' cross-entropy.
        mask_weight: weight of the focal loss, in the loss and in the assignment.
        dice_weight: weight of the dice loss, in the loss and in the assignment.
        dropout: rate in the transformer.
        aux_losses: train every decoder layer, not only the last.
        weights: ``imagenet``, a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> scores ``(N, num_classes, H, W)``, 0 or more.

    Differs from the paper: pixels labelled 255 count in neither loss nor assignment, where the paper's code counts them
    as outside of every mask. Batch norm is trained; `freeze_bn` freezes it as in the paper's code. Images are padded to
    the next multiple of 32, in training too.

    Raises:
        UserError: for an unknown backbone, a width that heads or groups do not divide, no query or no layer, or for
            `loss` and `class_weights`, since the losses are over masks.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Literal["resnet50", "resnet101"] = "resnet50",
        base_channels: int = 64,
        hidden_channels: int = 256,
        num_queries: int = 100,
        decoder_layers: int = 6,
        num_heads: int = 8,
        no_object_weight: float = 0.1,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        dropout: float = 0.1,
        aux_losses: bool = True,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if backbone not in ("resnet50", "resnet101"):
            raise UserError(f"backbone must be resnet50 or resnet101, got {backbone}")
        if hidden_channels % 8 or hidden_channels % num_heads:
            raise UserError(f"hidden_channels {hidden_channels} must be a multiple of 8 and of num_heads {num_heads}")
        if num_queries < 1 or decoder_layers < 1:
            raise UserError(f"num_queries and decoder_layers start at 1, got {num_queries} and {decoder_layers}")
        if type(self.loss) is not CrossEntropy or self.loss.class_weights is not None:
            raise UserError("MaskFormer has losses of its own, over masks: it takes neither loss nor class_weights")
        self.no_object_weight, self.mask_weight, self.dice_weight = no_object_weight, mask_weight, dice_weight
        self.aux_losses = aux_losses

        self.backbone = ResNet(int(backbone.removeprefix("resnet")), self.in_channels, base_channels)
        channels = list(self.backbone.channels.values())
        self.pixel_decoder = PixelDecoder(channels, hidden_channels)
        self.transformer_decoder = TransformerDecoder(
            channels[-1], hidden_channels, num_queries, decoder_layers, num_heads, dropout
        )
        self.classifier = nn.Linear(hidden_channels, num_classes + 1)  # the last one is "no object"
        first, second, third = (nn.Linear(hidden_channels, hidden_channels) for _ in range(3))
        self.mask_head = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        for module in (*self.pixel_decoder.modules(), self.transformer_decoder.projection):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # Caffe's Xavier: variance 1 / inputs
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if weights == "imagenet":
            self.backbone.load_imagenet()
        elif weights is not None:
            load_file(self, weights, new_layers=("classifier.",))

    compiled = "network"

    def network(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network of Figure 2 on an image of any size, padded with zeros below and to the right.

        Returns:
            the logits of the masks ``(L, N, num_queries, H/4, W/4)``, of the padded image, and of their classes
            ``(L, N, num_queries, num_classes + 1)``. L is the number of decoder layers in training, and 1 otherwise.
        """
        below, right = ((side + 31) // 32 * 32 - side for side in image.shape[-2:])
        image = F.pad(image, [0, right, 0, below])
        features = list(self.backbone(image).values())
        pixels = self.pixel_decoder(features)  # (N, 256, H/4, W/4)
        segments = self.transformer_decoder(features[-1])  # (L, N, 100, 256)
        if not (self.training and self.aux_losses):
            segments = segments[-1:]
        masks = torch.einsum("lnqc,nchw->lnqhw", self.mask_head(segments), pixels)
        return masks, self.classifier(segments)

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Weigh the last layer's masks by their classes, without "no object" (section 3.4), at the image's size."""
        height, width = image.shape[-2:]
        masks, classes = (logits[-1] for logits in self.network(image))
        masks = F.interpolate(masks, scale_factor=4, mode="bilinear", align_corners=False)
        classes = classes.softmax(dim=-1)[..., :-1]  # (N, 100, K)
        return {"main": torch.einsum("nqk,nqhw->nkhw", classes, masks.sigmoid())[..., :height, :width]}

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the scores over their sum; for one class the score itself, at most 1: ``(N, num_classes, H, W)``."""
        scores = logits.float()
        return scores.clamp(0, 1) if self.num_classes == 1 else scores / scores.sum(dim=1, keepdim=True).clamp(min=TINY)

    def logits_of(self, probs: Tensor) -> Tensor:
        """Return the probabilities: divided by their sum of 1, they stay the same."""
        return probs

    def evaluation_loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the cross-entropy of the probabilities, which are at least 1e-6."""
        probs = self.probabilities(logits)
        return self.loss(probs.logit(1e-6) if self.num_classes == 1 else probs.clamp(min=1e-6).log(), mask)

    def new_layers(self) -> list[nn.Module]:
        """Return everything but the backbone."""
        return [self.pixel_decoder, self.transformer_decoder, self.classifier, self.mask_head]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return equation 1 after the last decoder layer: ``class``, ``mask``, ``dice``; ``aux_...`` sums the others.

        Masks are compared with the truth at its size, and assigned at a quarter of it. A pixel counts by a batch's
        ``pixel_weight``, and not at all where it is labelled 255.
        """
        masks, classes = self.network(self.preprocess(batch["image"]))
        mask = batch["mask"]
        height, width = mask.shape[-2:]
        margin = [0, 4 * masks.shape[-1] - width, 0, 4 * masks.shape[-2] - height]
        weight = (mask != IGNORE).float() * batch.get("pixel_weight", 1.0)
        mask, weight = F.pad(mask, margin, value=IGNORE), F.pad(weight, margin)  # like the image in `network`
        with torch.autocast(masks.device.type, enabled=False):
            terms = self.mask_classification_loss(classes.float(), masks.float(), mask, weight)
        last = {name: values[-1] for name, values in terms.items()}
        aux = {f"aux_{name}": values[:-1].sum() for name, values in terms.items() if len(values) > 1}
        return last | aux

    def mask_classification_loss(
        self, classes: Tensor, masks: Tensor, mask: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        """Assign the truth's masks to segments and compare.

        Args:
            classes: logits ``(L, N, Q, num_classes + 1)``.
            masks: logits ``(L, N, Q, h, w)``.
            mask: labels ``(N, 4h, 4w)``.
            weight: weight of each pixel, 0 where ignored ``(N, 4h, 4w)``.

        Returns:
            the terms ``class``, ``mask`` and ``dice`` of each layer, ``(L,)``.
        """
        probs = classes.softmax(dim=-1)
        target = torch.full_like(probs[..., 0], self.num_classes, dtype=torch.long)  # (L, N, Q), all "no object"
        each_layer = torch.arange(len(classes), device=classes.device)[:, None]
        focals = dices = 0 * masks.sum(dim=(1, 2, 3, 4))  # in the graph even where no image has a mask
        num_masks = torch.zeros((), device=classes.device)
        for n in range(len(mask)):
            labels = mask[n][mask[n] != IGNORE].unique()
            if self.num_classes == 1:
                labels = labels[labels > 0]
            if len(labels) == 0:
                continue
            index = labels - int(self.num_classes == 1)  # the foreground, label 1, is class 0 of one
            truth = (mask[n] == labels[:, None, None]).float()  # (M, 4h, 4w)

            with torch.no_grad():
                small = masks[:, n], truth[:, ::4, ::4], weight[n, ::4, ::4]
                cost = self.mask_weight * focal_costs(*small) + self.dice_weight * dice_costs(*small)
                segments, which = assign(cost - probs[:, n][..., index])  # (L, min(Q, M))
            target[each_layer, n, segments] = index[which]

            logits = masks[each_layer, n, segments]  # (L, min(Q, M), h, w)
            logits = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
            focals = focals + focal_loss(logits, truth[which], weight[n]).sum(dim=1)
            dices = dices + dice_loss(logits, truth[which], weight[n]).sum(dim=1)
            num_masks += len(labels)

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(num_masks)
            num_masks /= torch.distributed.get_world_size()
        num_masks = num_masks.clamp(min=1)

        entropy = F.cross_entropy(classes.flatten(0, 2), target.flatten(), reduction="none").view_as(target)
        importance = torch.where(target == self.num_classes, self.no_object_weight, 1.0)
        importance = importance * (weight.amax(dim=(1, 2)) > 0)[:, None]  # an image without labels says nothing
        entropy = (importance * entropy).sum(dim=(1, 2)) / importance.sum(dim=(1, 2)).clamp(min=TINY)
        return {
            "class": entropy,
            "mask": self.mask_weight * focals / num_masks,
            "dice": self.dice_weight * dices / num_masks,
        }


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Find the pairs of segment and true mask whose costs have the smallest sum, for each layer (Hungarian algorithm).

    Shape:
        cost ``(L, Q, M)`` -> indices of segments and of masks, each ``(L, min(Q, M))``.
    """
    from scipy.optimize import linear_sum_assignment

    finite = cost.nan_to_num().cpu().numpy()  # a network that diverged: the loss will tell
    pairs = torch.from_numpy(np.stack([linear_sum_assignment(layer) for layer in finite])).to(cost.device)
    return pairs[:, 0], pairs[:, 1]


def focal(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the focal loss of each pixel, alpha 0.25 and gamma 2 (Lin et al., arXiv 1708.02002, equation 5)."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    surprise = -torch.expm1(-entropy)  # 1 - p_t
    return (0.25 * truth + 0.75 * (1 - truth)) * surprise**2 * entropy


def focal_loss(logits: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over pixels: logits and truth ``(..., h, w)``, weight ``(h, w)`` -> ``(...)``."""
    return (focal(logits, truth) * weight).sum(dim=(-2, -1)) / weight.sum().clamp(min=TINY)


def focal_costs(logits: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Return `focal_loss` of all pairs: ``(L, Q, h, w)``, truth ``(M, h, w)``, weight ``(h, w)`` -> ``(L, Q, M)``."""
    inside = focal(logits, torch.ones_like(logits)) * weight
    outside = focal(logits, torch.zeros_like(logits)) * weight
    costs = torch.einsum("lqhw,mhw->lqm", inside, truth) + torch.einsum("lqhw,mhw->lqm", outside, 1 - truth)
    return costs / weight.sum().clamp(min=TINY)


def dice_loss(logits: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Return 1 - Dice's coefficient, smoothed by 1 (Milletari et al., arXiv 1606.04797); shapes as in `focal_loss`."""
    probs, truth = logits.sigmoid() * weight, truth.expand(logits.shape)
    overlap, areas = (probs * truth).sum(dim=(-2, -1)), (probs + truth * weight).sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (areas + 1)


def dice_costs(logits: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Return `dice_loss` of all pairs; shapes as in `focal_costs`."""
    probs = logits.sigmoid() * weight
    overlap = torch.einsum("lqhw,mhw->lqm", probs, truth)
    areas = probs.sum(dim=(-2, -1))[..., None] + (truth * weight).sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (areas + 1)
