"""Xception: depthwise separable convolutions, as DeepLab v3+ modifies it.

F. Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017, arXiv 1610.02357.
"""

from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from . import Backbone, conv_bn_relu


class SeparableConv(nn.Sequential):
    """A depthwise 3x3 convolution, one filter per channel, then a pointwise 1x1 convolution across channels.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: stride of the depthwise convolution.
        dilation: dilation of the depthwise convolution.
        relu: add ReLU after each batch norm.
        norm_inside: add batch norm, and ReLU, between the two convolutions too.

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, channels, h / stride, w / stride)``, sizes rounded up.
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
    """Three separable convolutions with a shortcut around them, without max pooling (DeepLab v3+, Figure 4).

    Args:
        in_channels: channels of the input.
        channels: channels of the three convolutions.
        stride: stride of the third convolution and of the shortcut.
        dilations: dilations of the three convolutions.
        shortcut: ``conv``, ``identity`` or None.
        relu_inside: put ReLU after every batch norm instead of once before each separable convolution.
        relu_shortcut: let the shortcut carry relu(x) instead of x.

    Shape:
        ``(N, in_channels, h, w)`` -> the output of the second convolution ``(N, channels[1], h, w)`` and the output of
        the unit ``(N, channels[2], h / stride, w / stride)``.
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


class Xception65(Backbone):
    """Modified aligned Xception (DeepLab v3+, arXiv 1802.02611, section 3.3 and Figure 4).

    It has more middle units than Xception, and separable convolutions of stride 2 in place of all max poolings.

    Args:
        in_channels: channels of the image.
        base_channels: width of the second convolution, 64 in the paper; all others scale with it.
        output_stride: 16, or 8 with dilation in place of the stride of the third entry unit.
        relu_shortcut: see `XceptionUnit`. These three arguments are the paper's by default; a port differs in them.
        dilate_exit: dilate the third convolution of the exit flow's first unit like the two before it.
        relu_in_exit: put ReLU after every batch norm of the exit flow's last unit.

    Shape:
        image ``(N, in_channels, H, W)`` -> ``block1`` (128 channels, stride 4, after ReLU), ``block2_conv2`` (256,
        stride 4, from the second convolution of the second entry unit), ``exit`` (2048, stride `output_stride`).

    Differs from the paper: batch norm's epsilon is 1e-5 as in PyTorch; the released TensorFlow code has 1e-3.

    Raises:
        UserError: for another output stride.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 64,
        output_stride: int = 16,
        relu_shortcut: bool = False,
        dilate_exit: bool = True,
        relu_in_exit: bool = True,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise UserError(f"Xception-65 has output_stride 8 or 16, got {output_stride}")
        rate = 16 // output_stride  # dilation of all that follows the removed stride
        c32, c64, c128, c256, c728, c1024, c1536, c2048 = (
            base_channels * width // 64 for width in (32, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        unit = partial(XceptionUnit, relu_shortcut=relu_shortcut)
        self.conv1 = nn.Sequential(*self._stem_conv(in_channels, c32, stride=2))
        self.conv2 = nn.Sequential(*self._stem_conv(c32, c64, stride=1))
        self.block1 = unit(c64, (c128, c128, c128), stride=2, shortcut="conv")
        self.block2 = unit(c128, (c256, c256, c256), stride=2, shortcut="conv")
        self.block3 = unit(c256, (c728, c728, c728), stride=2 // rate, shortcut="conv")
        self.middle = nn.ModuleList([unit(c728, (c728, c728, c728), dilations=(rate,) * 3) for _ in range(16)])
        dilations = (rate, rate, rate if dilate_exit else 1)
        self.exit1 = unit(c728, (c728, c1024, c1024), dilations=dilations, shortcut="conv")
        self.exit2 = unit(
            c1024, (c1536, c1536, c2048), dilations=(2 * rate,) * 3, shortcut=None, relu_inside=relu_in_exit
        )
        self.channels = {"block1": c128, "block2_conv2": c256, "exit": c2048}

    @staticmethod
    def _stem_conv(in_channels: int, channels: int, stride: int) -> list[nn.Module]:
        conv, norm, relu = conv_bn_relu(in_channels, channels, 3, stride)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        return [conv, norm, relu]

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
