"""DeepLab v3+: DeepLab v3 as the encoder, and a small decoder that sharpens the outlines of objects.

L.-C. Chen, Y. Zhu, G. Papandreou, F. Schroff, H. Adam, "Encoder-Decoder with Atrous Separable Convolution for Semantic
Image Segmentation", ECCV 2018, arXiv 1802.02611.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import SegmentationModule
from ..errors import UserError
from ..weights import arguments_from_weights, load_file
from ..weights.published import PORTS
from .backbones import Backbone, conv_bn_relu
from .backbones.mobilenet import MobileNetV2, MobileNetV3Large
from .backbones.resnet import ResNet
from .backbones.xception import SeparableConv, Xception65
from .deeplabv3 import ASPP

Conv3x3 = Callable[..., nn.Module]


def dense_conv(in_channels: int, channels: int) -> nn.Module:
    """Return a 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(*conv_bn_relu(in_channels, channels, 3))


class SeparableASPP(ASPP):
    """ASPP whose atrous 3x3 convolutions are depthwise separable (section 3.1). Shapes and other arguments are ASPP's.

    Args:
        conv: builds a separable convolution.
    """

    def __init__(
        self, in_channels: int, atrous_rates: Sequence[int], channels: int, dropout: float, conv: Conv3x3
    ) -> None:
        super().__init__(in_channels, atrous_rates, channels, dropout)
        for branch, rate in enumerate(atrous_rates, start=1):
            self.convs[branch] = conv(in_channels, channels, dilation=rate)


class Decoder(nn.Module):
    """Join ASPP's features with low-level features of four times their resolution (section 3.1, Figure 2).

    Args:
        in_channels: channels of ASPP's features.
        low_level_channels: channels of the backbone's features at stride 4.
        reduced: channels to which a 1x1 convolution reduces them; 48, so few that they do not outweigh ASPP (Table 1).
        conv: builds a 3x3 convolution, dense or separable, from its input and output channels.
        layers: number of 3x3 convolutions; two were best (Table 2).
        align_corners: how ASPP's features are interpolated.
        low_level_first: join the low-level features before ASPP's.

    Shape:
        ``(N, in_channels, H/16, W/16)`` and ``(N, low_level_channels, H/4, W/4)`` -> ``(N, in_channels, H/4, W/4)``.
    """

    def __init__(
        self,
        in_channels: int,
        low_level_channels: int,
        reduced: int,
        conv: Conv3x3,
        layers: int,
        align_corners: bool,
        low_level_first: bool,
    ) -> None:
        super().__init__()
        self.align_corners, self.low_level_first = align_corners, low_level_first
        self.reduce = nn.Sequential(*conv_bn_relu(low_level_channels, reduced))
        inputs = [in_channels + reduced, *[in_channels] * (layers - 1)]
        self.convs = nn.Sequential(*(conv(channels, in_channels) for channels in inputs))

    def forward(self, features: Tensor, low_level: Tensor) -> Tensor:
        size, align = low_level.shape[-2:], self.align_corners
        features = F.interpolate(features, size=size, mode="bilinear", align_corners=align)
        joined = [features, self.reduce(low_level)]
        return self.convs(torch.cat(joined[::-1] if self.low_level_first else joined, dim=1))  # (N, 304, H/4, W/4) in


class DeepLabV3Plus(SegmentationModule):
    """A backbone, ASPP on its last features, and the decoder, whose score maps at stride 4 are interpolated.

    Args:
        num_classes: number of output channels.
        backbone: ``xception65``, ``resnet50``, ``resnet101``, ``mobilenet_v2`` or ``mobilenet_v3_large``.
        layout: ``paper``, or the project whose weights you load: ``jfzhang95``, ``VainF`` or ``smp``
            (segmentation_models.pytorch); see `PORTS`. None takes what `weights` need, otherwise the paper's.
        output_stride: input pixels per feature of ASPP: 16 or 8, for MobileNetV3 16.
        atrous_rates: dilations of ASPP; None is (6, 12, 18) at output stride 16 and (12, 24, 36) at 8.
        low_level: name of the features at stride 4 that the decoder joins; None is ``layer1`` of a ResNet (256
            channels), ``block2_conv2`` of Xception (256; ``block1`` has 128), ``stride4`` of a MobileNet (24).
        separable: depthwise separable convolutions in ASPP and decoder; None is True for Xception alone.
        dropout: rate after ASPP's fusion.
        base_channels: width of the first stage of a ResNet or Xception, 64 in the papers; all others, and the head's,
            scale with it. MobileNets keep their width.
        weights: ``imagenet`` (torchvision's backbones), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    Differs from the paper: corners are not aligned, as they are in its released code; batch norm's statistics decay by
    0.9 a step instead of 0.9997; depthwise weights decay like all others; MobileNetV3 came later.

    Raises:
        UserError: for an unknown backbone, layout or low-level name, an output stride that the backbone does not have,
            or ImageNet weights for Xception, which torchvision does not have.
    """

    @arguments_from_weights
    def __init__(
        self,
        num_classes: int,
        backbone: Literal["xception65", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_large"] = "resnet101",
        layout: Literal["paper", "jfzhang95", "VainF", "smp"] | None = None,
        output_stride: int = 16,
        atrous_rates: Sequence[int] | None = None,
        low_level: str | None = None,
        separable: bool | None = None,
        dropout: float = 0.5,
        base_channels: int = 64,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if (layout or "paper") not in PORTS:
            raise UserError(f"layout must be one of {', '.join(PORTS)}, got {layout}")
        port, inputs = PORTS[layout or "paper"], self.in_channels
        self.backbone: Backbone
        if backbone in ("resnet50", "resnet101"):
            depth = int(backbone.removeprefix("resnet"))
            self.backbone, tap = ResNet(depth, inputs, base_channels, output_stride, **port.resnet), "layer1"
        elif backbone == "xception65":
            self.backbone = Xception65(inputs, base_channels, output_stride, **port.xception)
            tap = port.xception_low_level
        elif backbone == "mobilenet_v2":
            self.backbone, tap = MobileNetV2(inputs, output_stride, **port.mobilenet), "stride4"
        elif backbone == "mobilenet_v3_large" and output_stride == 16:
            self.backbone, tap = MobileNetV3Large(inputs), "stride4"
        else:
            names = "xception65, resnet50, resnet101, mobilenet_v2 or mobilenet_v3_large"
            raise UserError(f"backbone is {names}, the last at output_stride 16 only; got {backbone}, {output_stride}")
        widths = self.backbone.channels
        *earlier, self.last = widths
        self.low_level = low_level or tap
        if self.low_level not in earlier:
            raise UserError(f"low_level of {backbone} is one of {', '.join(earlier)}, got {low_level}")

        separable = backbone in port.separable if separable is None else separable
        conv: Conv3x3 = partial(SeparableConv, norm_inside=port.norm_inside) if separable else dense_conv
        rates = atrous_rates or ((6, 12, 18) if output_stride == 16 else (12, 24, 36))
        channels, reduced = 4 * base_channels, 3 * base_channels // 4  # 256 and 48
        aspp = partial(SeparableASPP, conv=conv) if separable else ASPP
        self.aspp: nn.Module = aspp(widths[self.last], rates, channels, dropout)
        if port.conv_after_aspp:
            self.aspp = nn.Sequential(self.aspp, conv(channels, channels))
        decoder = port.decoder_layers, port.align_corners, port.low_level_first
        self.decoder = Decoder(channels, widths[self.low_level], reduced, conv, *decoder)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.align_corners = port.align_corners
        if weights == "imagenet":
            self.backbone.load_imagenet()
        elif weights is not None:
            load_file(self, weights, new_layers=("classifier.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Encode, look at the last features through ASPP, and decode at stride 4."""
        features = self.backbone(image)
        x = self.aspp(features[self.last])  # (N, 256, H/16, W/16)
        x = self.decoder(x, features[self.low_level])  # (N, 256, H/4, W/4)
        return {"main": self.classifier(x)}  # (N, K, H/4, W/4)

    def upsample(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """Interpolate score maps to an image's (height, width); the loss is computed there."""
        return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=self.align_corners)

    def new_layers(self) -> list[nn.Module]:
        """Return everything but the backbone."""
        return [self.aspp, self.decoder, self.classifier]
