"""DeepLab v3: parallel atrous convolutions of several rates and the image's mean, side by side.

L.-C. Chen, G. Papandreou, F. Schroff, H. Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017,
arXiv 1706.05587.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import segmentation as published

from .backbones import MobileNetV3Large, ResNet
from .base import Batch, SegmentationModule
from .weights import download, load_weights, read_weights


def conv_bn_relu(in_channels: int, channels: int, kernel_size: int = 1, dilation: int = 1) -> list[nn.Module]:
    """Convolution without bias that keeps the size, batch norm, ReLU."""
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=padding, dilation=dilation, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class ImagePooling(nn.Sequential):
    """Image-level feature: the mean over all positions through a 1x1 convolution, spread over the map again."""

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
        channels: of every branch and of the result.
        dropout: after the fusion.

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, channels, h, w)``.

    Raises:
        ValueError: if a rate is below 1.
    """

    def __init__(
        self, in_channels: int, atrous_rates: Sequence[int], channels: int = 256, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if not atrous_rates or min(atrous_rates) < 1:
            raise ValueError(f"atrous_rates must be positive, got {atrous_rates}")
        branches = [nn.Sequential(*conv_bn_relu(in_channels, channels))]
        branches += [nn.Sequential(*conv_bn_relu(in_channels, channels, 3, rate)) for rate in atrous_rates]
        self.convs = nn.ModuleList([*branches, ImagePooling(in_channels, channels)])
        self.project = nn.Sequential(*conv_bn_relu(len(self.convs) * channels, channels), nn.Dropout(dropout))

    def forward(self, features: Tensor) -> Tensor:
        return self.project(torch.cat([branch(features) for branch in self.convs], dim=1))


class DeepLabV3(SegmentationModule):
    """ResNet or MobileNetV3 with ASPP, in torchvision's layout and with its key names.

    Args:
        num_classes: output channels.
        backbone: ``resnet50``, ``resnet101`` or ``mobilenet_v3_large``.
        output_stride: input pixels per feature: 8 (default) or 16 for a ResNet, 16 for MobileNetV3.
        atrous_rates: of ASPP; None takes (12, 24, 36), and (6, 12, 18) for a ResNet at output stride 16.
        aux_loss_weight: weight of a second head's loss, on ``layer3`` or at stride 8 of MobileNetV3; 0 builds none.
        weights: ``imagenet`` (backbone), ``coco`` (torchvision's network, 21 VOC classes), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    Differs from the paper, as torchvision does: no multi-grid; a further 3x3 convolution after ASPP; Dropout; an
    auxiliary head; batch norm's statistics decay by 0.9 a step instead of 0.9997; for MobileNetV3 the rates of stride
    8 at stride 16. The output stride is the same in training and evaluation, and there is no second stage with frozen
    batch norm.

    Raises:
        ValueError: for an unknown backbone, or an output stride that it does not have.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Literal["resnet50", "resnet101", "mobilenet_v3_large"] = "resnet50",
        output_stride: int | None = None,
        atrous_rates: Sequence[int] | None = None,
        aux_loss_weight: float = 0.0,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        strides = {"resnet50": (8, 16), "resnet101": (8, 16), "mobilenet_v3_large": (16,)}
        if backbone not in strides:
            raise ValueError(f"backbone must be one of {', '.join(strides)}, got {backbone}")
        output_stride = output_stride or strides[backbone][0]
        if output_stride not in strides[backbone]:
            raise ValueError(f"{backbone} has output_stride {strides[backbone]}, got {output_stride}")
        if backbone == "mobilenet_v3_large":
            self.backbone: nn.Module = MobileNetV3Large(self.in_channels)
            self.last, channels, self.aux_from, aux_channels, rates = "stride16", 960, "stride8", 40, (12, 24, 36)
        else:
            self.backbone = ResNet(int(backbone.removeprefix("resnet")), self.in_channels, output_stride)
            self.last, channels, self.aux_from, aux_channels = "layer4", 2048, "layer3", 1024
            rates = (12, 24, 36) if output_stride == 8 else (6, 12, 18)
        self.classifier = nn.Sequential(
            ASPP(channels, atrous_rates or rates),
            *conv_bn_relu(256, 256, 3),
            nn.Conv2d(256, num_classes, 1),
        )
        self.aux_loss_weight = aux_loss_weight
        self.aux_classifier = None
        if aux_loss_weight:
            middle = aux_channels // 4
            layers = conv_bn_relu(aux_channels, middle, 3)
            self.aux_classifier = nn.Sequential(*layers, nn.Dropout(0.1), nn.Conv2d(middle, num_classes, 1))
        if weights == "imagenet":
            self.backbone.load_imagenet()  # type: ignore[operator]
        elif weights is not None:
            state = coco_weights(backbone) if weights == "coco" else read_weights(weights)
            load_weights(self, state, weights, heads=("classifier.4.", "aux_classifier."))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Score maps at the output stride: ``main``, and ``aux`` in training."""
        features = self.backbone(image)
        maps = {"main": self.classifier(features[self.last])}  # (N, K, H/8, W/8)
        if self.aux_classifier is not None and self.training:
            maps["aux"] = self.aux_classifier(features[self.aux_from])
        return maps

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy at full resolution, which the paper found better than shrinking labels (section 4.1)."""
        terms = super().losses(batch)
        if "aux" in terms:
            terms["aux"] = self.aux_loss_weight * terms["aux"]
        return terms

    def heads(self) -> list[nn.Module]:
        """Everything but the backbone."""
        return [self.classifier, *([] if self.aux_classifier is None else [self.aux_classifier])]


def coco_weights(backbone: str) -> dict[str, Tensor]:
    """Torchvision's published DeepLabV3 weights, trained on COCO's pictures of the 20 VOC classes."""
    weights = {
        "resnet50": published.DeepLabV3_ResNet50_Weights,
        "resnet101": published.DeepLabV3_ResNet101_Weights,
        "mobilenet_v3_large": published.DeepLabV3_MobileNet_V3_Large_Weights,
    }[backbone]
    return download(weights.COCO_WITH_VOC_LABELS_V1)
