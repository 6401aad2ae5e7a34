"""PSPNet: the features of a dilated ResNet, joined with their averages over regions of several sizes.

H. Zhao, J. Shi, X. Qi, X. Wang, J. Jia, "Pyramid Scene Parsing Network", CVPR 2017, arXiv 1612.01105.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import SegmentationModule, resize
from ..errors import UserError
from ..weights import load_file, load_weights
from .backbones import classifier_head
from .backbones.resnet import ResNet


class RegionMeans(nn.Module):
    """Means over side x side regions. ``nn.AdaptiveAvgPool2d`` does the same but cannot be ``deterministic`` on a GPU.

    Shape:
        ``(N, C, h, w)`` -> ``(N, C, side, side)``.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.weights(length, x) for length in x.shape[-2:])
        return rows @ x @ columns.T

    def weights(self, length: int, like: Tensor) -> Tensor:
        """Return the weight of each of `length` positions in each region's mean: ``(side, length)``."""
        position = torch.arange(length, device=like.device)
        region = torch.arange(self.side, device=like.device)[:, None]
        inside = (position >= region * length // self.side) & (position < -(-(region + 1) * length // self.side))
        return (inside / inside.sum(dim=1, keepdim=True)).to(like.dtype)


class PyramidPooling(nn.Module):
    """Pyramid pooling module (section 3.2, Figure 3): the features, and their averages over 1, 4, 9 and 36 regions.

    Args:
        in_channels: channels of the features; each of the n levels has in_channels / n.
        bins: number of regions along either side, for each level.
        align_corners: how the averages are interpolated to the features' size.

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, 2 * in_channels, h, w)``.

    Raises:
        UserError: if a bin is below 1, or the channels cannot be shared among the levels.
    """

    def __init__(self, in_channels: int, bins: Sequence[int], align_corners: bool = True) -> None:
        super().__init__()
        if not bins or min(bins) < 1 or in_channels % len(bins):
            raise UserError(f"bins must be positive, and their number divide {in_channels} channels, got {bins}")
        self.align_corners = align_corners
        channels = in_channels // len(bins)
        self.features = nn.ModuleList()
        for side in bins:
            conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            level = nn.Sequential(RegionMeans(side), conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
            self.features.append(level)

    def forward(self, features: Tensor) -> Tensor:
        size = features.shape[-2:]
        levels = [
            F.interpolate(level(features), size=size, mode="bilinear", align_corners=self.align_corners)
            for level in self.features
        ]
        return torch.cat([features, *levels], dim=1)


class PSPNet(SegmentationModule):
    """Dilated ResNet with pyramid pooling, and a second head on ``layer3`` in training (section 3.3, Figure 4).

    Args:
        num_classes: number of output channels.
        backbone: ``resnet50`` or ``resnet101``, with a stem of three 3x3 convolutions.
        bins: number of regions along either side of the feature map, for each level of the pyramid.
        aux_loss_weight: weight of the second head's loss, 0.4 in the paper; 0 builds no second head.
        align_corners: how all maps are interpolated; the published weights need True, where score j lies at pixel 8 j.
        output_stride: input pixels per feature: 8 as in the paper, 16 or 32.
        dropout: rate of dropping whole channels before the last convolution of either head.
        base_channels: width of the first stage, 64 in the paper; all others scale with it.
        weights: ``imagenet`` (torchvision's ResNet; it has another stem, so conv1, bn1 and the two convolutions of
            ``layer1`` that read them keep their random initialisation), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``. Crops of 8 k + 1 pixels (473, 713) are labelled
        exactly; other sizes repeat the last row and column of logits.

    Differs from the paper: batch norm is synchronised over GPUs only with ``trainer.sync_batchnorm``; a large image is
    evaluated at once, where the paper slides a window over it (``inference: SlidingWindow``).

    Raises:
        UserError: for an unknown backbone or output stride, or bins that are not positive.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Literal["resnet50", "resnet101"] = "resnet50",
        bins: Sequence[int] = (1, 2, 3, 6),
        aux_loss_weight: float = 0.4,
        align_corners: bool = True,
        output_stride: int = 8,
        dropout: float = 0.1,
        base_channels: int = 64,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if backbone not in ("resnet50", "resnet101"):
            raise UserError(f"backbone must be resnet50 or resnet101, got {backbone}")
        depth = int(backbone.removeprefix("resnet"))
        self.backbone = ResNet(
            depth, self.in_channels, base_channels, output_stride, dilate_first_block=True, deep_stem=True
        )
        channels, aux_channels = self.backbone.channels["layer4"], self.backbone.channels["layer3"]
        self.ppm = PyramidPooling(channels, bins, align_corners)
        self.classifier = classifier_head(2 * channels, channels // 4, num_classes, nn.Dropout2d(dropout))
        self.aux_classifier = None
        if aux_loss_weight:
            self.aux_classifier = classifier_head(aux_channels, aux_channels // 4, num_classes, nn.Dropout2d(dropout))
        self.loss_weights = {"aux": aux_loss_weight}  # both losses train the layers that they share (section 3.3)
        self.align_corners, self.output_stride = align_corners, output_stride
        if weights == "imagenet":
            self.load_imagenet(depth, base_channels)
        elif weights is not None:
            load_file(self, weights, ("classifier.4.", "aux_classifier.4."), optional=("aux_classifier.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Score the pooled features at the output stride (``main``), and in training earlier ones too (``aux``)."""
        features = self.backbone(image)
        maps = {"main": self.classifier(self.ppm(features["layer4"]))}  # (N, K, H/8, W/8)
        if self.aux_classifier is not None and self.training:
            maps["aux"] = self.aux_classifier(features["layer3"])
        return maps

    def upsample(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """Interpolate score maps to an image's (height, width); the loss is computed there."""
        if not self.align_corners:
            return resize(scores, size)
        grid = [self.output_stride * (side - 1) + 1 for side in scores.shape[-2:]]
        logits = F.interpolate(scores, size=grid, mode="bilinear", align_corners=True)
        return F.pad(logits, [0, size[1] - grid[1], 0, size[0] - grid[0]], mode="replicate")

    def new_layers(self) -> list[nn.Module]:
        """Return everything but the backbone."""
        return [self.ppm, self.classifier, *([] if self.aux_classifier is None else [self.aux_classifier])]

    def load_imagenet(self, depth: int, base_channels: int) -> None:
        """Copy the layers that torchvision's ResNet has in common with this one."""
        plain = ResNet(depth, self.in_channels, base_channels)
        plain.load_imagenet()
        stem = ("conv1.", "bn1.", "layer1.0.conv1.", "layer1.0.downsample.0.")
        state = {key: value for key, value in plain.state_dict().items() if not key.startswith(stem)}
        load_weights(self.backbone, state, "ImageNet, whose ResNet has another stem", optional=stem)
