"""Xception: depthwise separable convolutions, as DeepLab v3+ modifies it.

F. Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017, arXiv 1610.02357.
"""

from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError


class SeparableConv(nn.Sequential):
    """A 3x3 convolution per channel, then a 1x1 across channels, each with batch norm and, if wanted, ReLU.

    Args:
        in_channels: of the depthwise convolution.
        channels: of the pointwise convolution.
        stride: of the depthwise convolution.
        dilation: of the depthwise convolution.
        relu: after either batch norm.
        norm_inside: batch norm, and ReLU, between the two as well.

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, channels, h, w)`` at stride 1, half of it rounded up at stride 2.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        dilation: int = 1,
        relu: bool = True,
        norm_inside: bool = True,
    ) -> None:
        depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, padding=dilation, dilation=dilation, groups=in_channels, bias=False
        )
        pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        nn.init.trunc_normal_(depthwise.weight, std=0.33)  # as in the released TensorFlow code
        nn.init.trunc_normal_(pointwise.weight, std=0.06)
        layers: list[nn.Module] = []
        for conv in (depthwise, pointwise):
            layers.append(conv)
            if conv is pointwise or norm_inside:
                layers += [nn.BatchNorm2d(conv.out_channels), *([nn.ReLU(inplace=True)] if relu else [])]
        super().__init__(*layers)


class XceptionUnit(nn.Module):
    """Three separable convolutions beside a shortcut, without max pooling (DeepLab v3+, Figure 4).

    Args:
        in_channels: channels of the input.
        channels: of the three convolutions.
        stride: of the last one, and of the shortcut.
        dilations: of the three.
        shortcut: ``conv``, ``identity`` or None.
        relu_inside: ReLU after every batch norm instead of once before each separable convolution.
        relu_shortcut: the shortcut carries relu(x) instead of x.

    Shape:
        ``(N, in_channels, h, w)`` -> the output of the second convolution ``(N, channels[1], h, w)`` and that of the
        unit ``(N, channels[2], h / stride, w / stride)``.
    """

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, int, int],
        stride: int = 1,
        dilations: tuple[int, int, int] = (1, 1, 1),
        shortcut: Literal["conv", "identity"] | None = "identity",
        relu_inside: bool = False,
        relu_shortcut: bool = False,
    ) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1 = SeparableConv(in_channels, first, 1, dilations[0], relu_inside)
        self.conv2 = SeparableConv(first, second, 1, dilations[1], relu_inside)
        self.conv3 = SeparableConv(second, third, stride, dilations[2], relu_inside)
        self.before = nn.Identity() if relu_inside else nn.ReLU()
        self.relu_shortcut, self.shortcut = relu_shortcut, None if shortcut is None else nn.Sequential()
        if shortcut == "conv":
            conv = nn.Conv2d(in_channels, third, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(third))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        second = self.conv2(self.before(self.conv1(self.before(x))))
        third = self.conv3(self.before(second))
        if self.shortcut is not None:
            third = third + self.shortcut(F.relu(x) if self.relu_shortcut else x)
        return second, third


class Xception65(nn.Module):
    """Modified aligned Xception: more middle units, and separable convolutions of stride 2 for all max poolings.

    DeepLab v3+ (arXiv 1802.02611), section 3.3 and Figure 4, after F. Chollet, "Xception", CVPR 2017,
    arXiv 1610.02357.

    Args:
        in_channels: channels of the image.
        base_channels: width of the second convolution, 64 in the paper; all others scale with it.
        output_stride: 16, or 8 with dilation for the stride of the third entry unit.
        jfzhang95: compute as the port in jfzhang95/pytorch-deeplab-xception does, whose weights need it: its in-place
            ReLU also changes what the shortcuts carry, the exit flow has one ReLU before each separable convolution
            and none inside, and the third convolution of its first unit is not dilated.

    Shape:
        image ``(N, in_channels, H, W)`` -> features by name: ``block1`` (128 channels, stride 4, after ReLU),
        ``block2_conv2`` (256, stride 4, the second convolution of the second entry unit), ``exit`` (2048, stride
        `output_stride`); ``channels`` has their widths.

    Differs from the paper: batch norm's epsilon is 1e-5 as in PyTorch; the released TensorFlow code has 1e-3.

    Raises:
        UserError: for another output stride.
    """

    def __init__(
        self, in_channels: int = 3, base_channels: int = 64, output_stride: int = 16, jfzhang95: bool = False
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise UserError(f"Xception-65 has output_stride 8 or 16, got {output_stride}")
        rate = 16 // output_stride  # of all that follows the removed stride
        c32, c64, c128, c256, c728, c1024, c1536, c2048 = (
            base_channels * width // 64 for width in (32, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        unit = partial(XceptionUnit, relu_shortcut=jfzhang95)
        self.conv1 = nn.Sequential(*self._conv_bn_relu(in_channels, c32, stride=2))
        self.conv2 = nn.Sequential(*self._conv_bn_relu(c32, c64))
        self.block1 = unit(c64, (c128, c128, c128), stride=2, shortcut="conv")
        self.block2 = unit(c128, (c256, c256, c256), stride=2, shortcut="conv")
        self.block3 = unit(c256, (c728, c728, c728), stride=2 // rate, shortcut="conv")
        self.middle = nn.ModuleList([unit(c728, (c728, c728, c728), dilations=(rate,) * 3) for _ in range(16)])
        dilations = (rate, rate, 1 if jfzhang95 else rate)
        self.exit1 = unit(c728, (c728, c1024, c1024), dilations=dilations, shortcut="conv")
        self.exit2 = unit(
            c1024, (c1536, c1536, c2048), dilations=(2 * rate,) * 3, shortcut=None, relu_inside=not jfzhang95
        )
        self.channels = {"block1": c128, "block2_conv2": c256, "exit": c2048}

    @staticmethod
    def _conv_bn_relu(in_channels: int, channels: int, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.conv2(self.conv1(image))  # (N, 64, H/2, W/2)
        _, block1 = self.block1(x)  # (N, 128, H/4, W/4)
        block2_conv2, x = self.block2(block1)  # (N, 256, H/4, W/4), (N, 256, H/8, W/8)
        _, x = self.block3(x)  # (N, 728, H/16, W/16)
        for unit in self.middle:
            _, x = unit(x)
        _, x = self.exit1(x)  # (N, 1024, H/16, W/16)
        _, x = self.exit2(x)  # (N, 2048, H/16, W/16)
        return {"block1": F.relu(block1), "block2_conv2": block2_conv2, "exit": F.relu(x)}
