"""DeepLab v3+: DeepLab v3 as the encoder, and a small decoder that gives objects their outlines back.

L.-C. Chen, Y. Zhu, G. Papandreou, F. Schroff, H. Adam, "Encoder-Decoder with Atrous Separable Convolution for Semantic
Image Segmentation", ECCV 2018, arXiv 1802.02611.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Batch, SegmentationModule
from ..errors import UserError
from ..weights import Weights, load_weights, read_weights
from .backbones.mobilenet import MobileNetV2, MobileNetV3Large
from .backbones.resnet import ResNet
from .backbones.xception import SeparableConv, Xception65
from .deeplabv3 import ASPP, conv_bn_relu

Conv3x3 = Callable[..., nn.Module]


def dense_conv(in_channels: int, channels: int) -> nn.Module:
    """A 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(*conv_bn_relu(in_channels, channels, 3))


class Decoder(nn.Module):
    """Join ASPP's map with low-level features of four times its resolution (section 3.1, Figure 2).

    Args:
        in_channels: of ASPP's map.
        low_level_channels: of the backbone's map at stride 4.
        reduced: what a 1x1 convolution leaves of them; 48, few enough not to outweigh ASPP (Table 1).
        conv: builds a 3x3 convolution, dense or separable, from its input and output channels.
        layers: number of 3x3 convolutions; two were best (Table 2).
        align_corners: how ASPP's map is interpolated.
        low_level_first: order of the two maps when they are joined.

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


class SeparableASPP(ASPP):
    """ASPP whose atrous 3x3 convolutions are depthwise separable (section 3.1). Shapes and other arguments are ASPP's.

    Args:
        conv: builds such a convolution.
    """

    def __init__(
        self, in_channels: int, atrous_rates: Sequence[int], channels: int, dropout: float, conv: Conv3x3
    ) -> None:
        super().__init__(in_channels, atrous_rates, channels, dropout)
        for branch, rate in enumerate(atrous_rates, start=1):
            self.convs[branch] = conv(in_channels, channels, dilation=rate)


class DeepLabV3Plus(SegmentationModule):
    """A backbone, ASPP at its end, and the decoder; from logits at stride 4 it is interpolated to the image.

    Args:
        num_classes: output channels.
        backbone: ``xception65``, ``resnet50``, ``resnet101``, ``mobilenet_v2`` or ``mobilenet_v3_large``.
        layout: whose network, see `LAYOUTS`: ``paper``, or that of a repository whose weights are to be loaded:
            ``jfzhang95``, ``VainF``, or ``smp`` (segmentation_models.pytorch). None takes what `weights` were
            recognised as, else the paper's.
        output_stride: input pixels per feature of ASPP: 16 or 8, for MobileNetV3 16.
        atrous_rates: of ASPP; None takes (6, 12, 18) at output stride 16 and (12, 24, 36) at 8.
        low_level: name of the backbone's map at stride 4 that the decoder joins; None takes the layout's:
            ``layer1`` of a ResNet (256 channels), ``block2_conv2`` of Xception (256; ``block1`` has 128), ``stride4``
            of a MobileNet (24).
        separable: depthwise separable convolutions in ASPP and decoder; None takes the layout's.
        dropout: after ASPP's fusion.
        base_channels: width of the first stage of a ResNet or Xception, 64 in the papers; all others, and the head's,
            scale with it. MobileNets keep their width.
        weights: ``imagenet`` (torchvision's backbones), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    Differs from the paper: corners are not aligned, which its released code does; batch norm's statistics decay by 0.9
    a step instead of 0.9997; depthwise weights are decayed like all others; MobileNetV3 came later.

    Raises:
        UserError: for an unknown backbone, layout or low-level map, an output stride that the backbone does not have,
            or ImageNet weights for Xception, which torchvision does not have.
    """

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
        file = Weights() if weights in (None, "imagenet") else read_weights(str(weights), "DeepLabV3Plus")
        layout = layout or file.arguments.get("layout") or "paper"
        self.hparams.update(layout=layout)  # a checkpoint builds the same network without the file
        if layout not in LAYOUTS:
            raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
        form = LAYOUTS[layout]
        self.align_corners = form["align_corners"]
        depth = {"resnet50": 50, "resnet101": 101}.get(backbone)
        self.backbone: nn.Module
        if depth:
            self.backbone = ResNet(
                depth,
                self.in_channels,
                base_channels,
                output_stride,
                form["multi_grid"],
                dilate_first_block=form["dilate_first_block"],
            )
            tap = "layer1"
        elif backbone == "xception65":
            self.backbone = Xception65(self.in_channels, base_channels, output_stride, layout == "jfzhang95")
            tap = form["xception_tap"]
        elif backbone == "mobilenet_v2":
            self.backbone = MobileNetV2(
                self.in_channels, output_stride, layout if layout in ("jfzhang95", "VainF") else "torchvision"
            )
            tap = "stride4"
        elif backbone == "mobilenet_v3_large" and output_stride == 16:
            self.backbone, tap = MobileNetV3Large(self.in_channels), "stride4"
        else:
            names = "xception65, resnet50, resnet101, mobilenet_v2 or mobilenet_v3_large"
            raise UserError(f"backbone is {names}, the last at output_stride 16 only; got {backbone}, {output_stride}")
        widths: dict[str, int] = self.backbone.channels  # type: ignore[assignment]
        self.low_level, self.last = low_level or tap, list(widths)[-1]
        if self.low_level not in list(widths)[:-1]:
            raise UserError(f"low_level of {backbone} is one of {', '.join(list(widths)[:-1])}, got {low_level}")
        if separable is None:
            separable = backbone in form["separable"]
        conv: Conv3x3 = partial(SeparableConv, norm_inside=form["norm_inside"]) if separable else dense_conv
        rates = atrous_rates or ((6, 12, 18) if output_stride == 16 else (12, 24, 36))
        channels, reduced = 4 * base_channels, 3 * base_channels // 4  # 256 and 48
        self.aspp: nn.Module
        if separable:
            self.aspp = SeparableASPP(widths[self.last], rates, channels, dropout, conv)
        else:
            self.aspp = ASPP(widths[self.last], rates, channels, dropout)
        if form["conv_after_aspp"]:
            self.aspp = nn.Sequential(self.aspp, conv(channels, channels))
        self.decoder = Decoder(
            channels,
            widths[self.low_level],
            reduced,
            conv,
            form["decoder_layers"],
            self.align_corners,
            form["low_level_first"],
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        if weights == "imagenet":
            if backbone == "xception65":
                raise UserError(
                    "torchvision has no ImageNet weights for xception65: give a path, or --model.weights null"
                )
            self.backbone.load_imagenet()  # type: ignore[operator]
        elif weights is not None:
            load_weights(self, file.state, file.source, heads=("classifier.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Score maps at stride 4."""
        features = self.backbone(image)
        x = self.aspp(features[self.last])  # (N, 256, H/16, W/16)
        x = self.decoder(x, features[self.low_level])  # (N, 256, H/4, W/4)
        return {"main": self.classifier(x)}  # (N, K, H/4, W/4)

    def forward(self, image: Tensor) -> Tensor:
        """Logits at the image's size."""
        scores = self.score_maps(image)["main"]
        return F.interpolate(scores, size=image.shape[-2:], mode="bilinear", align_corners=self.align_corners)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy at full resolution."""
        return {"main": self.criterion(self(self.preprocess(batch["image"])), batch)}

    def new_layers(self) -> list[nn.Module]:
        """Everything but the backbone."""
        return [self.aspp, self.decoder, self.classifier]


# Where the paper and three widely used ports differ beyond the shapes of their weights.
LAYOUTS: dict[str, dict[str, Any]] = {
    "paper": {
        "align_corners": False,
        "dilate_first_block": True,
        "multi_grid": (1, 2, 4),  # of ResNets, as in v3, whose 77.21 is the paper's start without a decoder (Table 3)
        "separable": ("xception65",),
        "decoder_layers": 2,
        "norm_inside": True,  # batch norm and ReLU inside of separable convolutions too
        "conv_after_aspp": False,
        "low_level_first": False,
        "xception_tap": "block2_conv2",
    },
    "jfzhang95": {
        "align_corners": True,
        "dilate_first_block": True,
        "multi_grid": (1, 2, 4),
        "separable": (),
        "decoder_layers": 2,
        "norm_inside": True,  # batch norm and ReLU inside of separable convolutions too
        "conv_after_aspp": False,
        "low_level_first": False,
        "xception_tap": "block1",
    },
    "VainF": {
        "align_corners": False,
        "dilate_first_block": False,
        "multi_grid": (1, 1, 1),
        "separable": (),
        "decoder_layers": 1,
        "norm_inside": True,
        "conv_after_aspp": False,
        "low_level_first": True,
        "xception_tap": "block1",
    },
    "smp": {
        "align_corners": True,
        "dilate_first_block": True,
        "multi_grid": (1, 1, 1),
        "separable": ("resnet50", "resnet101"),
        "norm_inside": False,
        "conv_after_aspp": True,
        "decoder_layers": 1,
        "low_level_first": False,
        "xception_tap": "block1",
    },
}
