"""DeepLab v3: parallel atrous convolutions of several rates and the image's mean, concatenated.

L.-C. Chen, G. Papandreou, F. Schroff, H. Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017,
arXiv 1706.05587.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import segmentation as published

from ..base import SegmentationModule
from ..errors import UserError
from ..weights import download, load_file, load_weights
from .backbones import Backbone, classifier_head, conv_bn_relu
from .backbones.mobilenet import MobileNetV3Large
from .backbones.resnet import Bottleneck, ResNet


class ImagePooling(nn.Sequential):
    """Image-level feature: the mean over all positions, through a 1x1 convolution, copied to every position."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, channels))

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(features).expand(-1, -1, *features.shape[-2:])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (section 3.3): one feature map seen through several fields of view.

    Args:
        in_channels: channels of the backbone's last stage, 2048 for a ResNet.
        atrous_rates: dilations of the 3x3 branches in feature-map pixels: (6, 12, 18) at output stride 16, twice that
            at 8. On a 33x33 map (513 px at stride 16) rate 36 sees only its centre tap.
        channels: channels of every branch and of the result.
        dropout: rate after the fusion.

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, channels, h, w)``.

    Raises:
        UserError: if a rate is below 1.
    """

    def __init__(
        self, in_channels: int, atrous_rates: Sequence[int], channels: int = 256, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if not atrous_rates or min(atrous_rates) < 1:
            raise UserError(f"atrous_rates must be positive, got {atrous_rates}")
        branches = [nn.Sequential(*conv_bn_relu(in_channels, channels))]
        branches += [nn.Sequential(*conv_bn_relu(in_channels, channels, 3, dilation=rate)) for rate in atrous_rates]
        self.convs = nn.ModuleList([*branches, ImagePooling(in_channels, channels)])
        self.project = nn.Sequential(*conv_bn_relu(len(self.convs) * channels, channels), nn.Dropout(dropout))

    def forward(self, features: Tensor) -> Tensor:
        return self.project(torch.cat([branch(features) for branch in self.convs], dim=1))


class CascadedModules(nn.Sequential):
    """block5, block6 and block7: copies of the ResNet's last block, deeper with atrous convolution (section 3.2).

    Args:
        channels: channels of the features, 2048 for a ResNet.
        rate: dilation of the ResNet's last block, 2 at output stride 16; it doubles with each further block, as each
            would have halved the resolution (Figure 3b).
        multi_grid: factors on the rate of the three convolutions of each block (section 3.2.1).

    Shape:
        ``(N, channels, h, w)`` -> the same.
    """

    def __init__(self, channels: int, rate: int, multi_grid: Sequence[int]) -> None:
        blocks = []
        for block_rate in (2 * rate, 4 * rate, 8 * rate):
            units = [Bottleneck(channels, channels // 4, dilation=block_rate * factor) for factor in multi_grid]
            blocks.append(nn.Sequential(*units))
        super().__init__(*blocks)


class DeepLabV3(SegmentationModule):
    """ResNet or MobileNetV3 with ASPP, in torchvision's layout, or the paper's with ASPP or cascaded modules.

    Args:
        num_classes: number of output channels.
        backbone: ``resnet50``, ``resnet101`` or ``mobilenet_v3_large``.
        layout: ``torchvision``, with its key names; or ``paper``: multi-grid, all blocks of a dilated stage dilated
            alike, and a 1x1 classifier right after ASPP (ResNets only).
        cascade: three further blocks in a row instead of ASPP (section 3.2), in the paper's layout.
        output_stride: input pixels per feature: 8 or 16 for a ResNet, 16 for MobileNetV3. None is torchvision's 8, or
            16 in the paper's layout; to evaluate at 8, load the same weights with ``output_stride: 8``.
        atrous_rates: dilations of ASPP; None is (12, 24, 36), and (6, 12, 18) for a ResNet at output stride 16.
        multi_grid: factors on the dilations of the last block; None is no factors for torchvision, (1, 2, 4) for ASPP
            and (1, 2, 1) for the cascade, which were best in Tables 3 and 5.
        aux_loss_weight: weight of a second head's loss, on ``layer3`` or at stride 8 of MobileNetV3; 0 builds no
            second head.
        base_channels: width of the ResNet's first stage, 64 in the paper; all others, and the head's, scale with it.
        weights: ``imagenet`` (backbone), ``coco`` (torchvision's network, 21 VOC classes), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    Differs from the paper: batch norm's statistics decay by 0.9 a step instead of 0.9997; block5 to block7 start from
    random weights. The second stage of training, with frozen batch norm at output stride 8, is a second run with
    ``weights`` and ``freeze_bn``. Torchvision's layout differs more: no multi-grid, a further 3x3 convolution after
    ASPP, dropout, an auxiliary head, and for MobileNetV3 at stride 16 the rates of stride 8.

    Raises:
        UserError: for an unknown backbone or layout, an output stride that the backbone does not have, or if `layout`
            or `cascade` do not go with the backbone.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Literal["resnet50", "resnet101", "mobilenet_v3_large"] = "resnet50",
        layout: Literal["torchvision", "paper"] = "torchvision",
        cascade: bool = False,
        output_stride: int | None = None,
        atrous_rates: Sequence[int] | None = None,
        multi_grid: Sequence[int] | None = None,
        aux_loss_weight: float = 0.0,
        base_channels: int = 64,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        strides = {"resnet50": (8, 16), "resnet101": (8, 16), "mobilenet_v3_large": (16,)}
        if backbone not in strides or layout not in ("torchvision", "paper"):
            raise UserError(
                f"backbone is one of {', '.join(strides)}, layout torchvision or paper; got {backbone}, {layout}"
            )
        paper, mobile = layout == "paper", backbone == "mobilenet_v3_large"
        if (paper and mobile) or (cascade and not paper):
            raise UserError("layout: paper needs a ResNet, and cascade: true needs layout: paper")
        output_stride = output_stride or (16 if paper or mobile else 8)
        if output_stride not in strides[backbone]:
            raise UserError(f"{backbone} has output_stride {strides[backbone]}, got {output_stride}")
        if multi_grid is None:
            multi_grid = (1, 2, 1) if cascade else (1, 2, 4) if paper else (1, 1, 1)
        self.backbone: Backbone
        if mobile:
            self.backbone = MobileNetV3Large(self.in_channels)
            self.last, self.aux_from, rates = "stride16", "stride8", (12, 24, 36)
        else:
            self.backbone = ResNet(
                int(backbone.removeprefix("resnet")),
                self.in_channels,
                base_channels,
                output_stride,
                multi_grid,
                dilate_first_block=paper,
            )
            self.last, self.aux_from = "layer4", "layer3"
            rates = (12, 24, 36) if output_stride == 8 else (6, 12, 18)
        channels, middle = self.backbone.channels[self.last], 4 * base_channels
        head: list[nn.Module]
        if cascade:
            head = [CascadedModules(channels, 32 // output_stride, multi_grid)]
            middle = channels
        else:
            head = [ASPP(channels, atrous_rates or rates, middle, dropout=0.0 if paper else 0.5)]
        if not paper:
            head += conv_bn_relu(middle, middle, 3)
        self.classifier = nn.Sequential(*head, nn.Conv2d(middle, num_classes, 1))
        self.loss_weights = {"aux": aux_loss_weight}
        self.aux_classifier = None
        if aux_loss_weight:
            width = self.backbone.channels[self.aux_from]
            self.aux_classifier = classifier_head(width, width // 4, num_classes, nn.Dropout(0.1))
        last = (f"classifier.{len(self.classifier) - 1}.", "aux_classifier.4.")
        if weights == "imagenet":
            self.backbone.load_imagenet()
        elif weights == "coco":
            load_weights(self, coco_weights(backbone), "COCO", last, optional=("aux_classifier.",))
        elif weights is not None:
            load_file(self, weights, last, optional=("aux_classifier.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Score the last features at the output stride (``main``), and in training earlier ones too (``aux``).

        The loss compares both at full resolution, which the paper found better than shrinking labels (section 4.1).
        """
        features = self.backbone(image)
        maps = {"main": self.classifier(features[self.last])}  # (N, K, H/8, W/8)
        if self.aux_classifier is not None and self.training:
            maps["aux"] = self.aux_classifier(features[self.aux_from])
        return maps

    def new_layers(self) -> list[nn.Module]:
        """Return everything but the backbone."""
        return [self.classifier, *([] if self.aux_classifier is None else [self.aux_classifier])]


def coco_weights(backbone: str) -> dict[str, Tensor]:
    """Return torchvision's published DeepLabV3 weights, trained on COCO's images of the 20 VOC classes."""
    weights = {
        "resnet50": published.DeepLabV3_ResNet50_Weights,
        "resnet101": published.DeepLabV3_ResNet101_Weights,
        "mobilenet_v3_large": published.DeepLabV3_MobileNet_V3_Large_Weights,
    }[backbone]
    return download(weights.COCO_WITH_VOC_LABELS_V1)
