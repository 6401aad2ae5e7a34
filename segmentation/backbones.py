"""Feature extractors: VGG-16, ResNet, Xception-65 and MobileNets, with what segmentation papers change in them."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import (
    MobileNet_V2_Weights,
    MobileNet_V3_Large_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    VGG16_BN_Weights,
    VGG16_Weights,
    mobilenet_v2,
    mobilenet_v3_large,
)

from .weights import download, load_weights


def vgg_stage(
    in_channels: int, out_channels: int, layers: int, dilation: int = 1, batch_norm: bool = False
) -> nn.Sequential:
    """A stage of VGG-16 without its pooling: 3x3 convolutions of equal width, each with ReLU.

    K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
    arXiv 1409.1556, Table 1, column D.

    Args:
        in_channels: of the first convolution.
        out_channels: of every convolution.
        layers: number of convolutions.
        dilation: of every convolution.
        batch_norm: normalise before every ReLU, as SegNet and DeconvNet do.

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, out_channels, h, w)``.
    """
    convs: list[nn.Module] = []
    for layer in range(layers):
        channels = in_channels if layer == 0 else out_channels
        convs.append(nn.Conv2d(channels, out_channels, 3, padding=dilation, dilation=dilation))
        convs += [nn.BatchNorm2d(out_channels)] if batch_norm else []
        convs.append(nn.ReLU(inplace=True))
    return nn.Sequential(*convs)


def load_vgg16(stages: Sequence[nn.Module], batch_norm: bool = False) -> dict[str, Tensor]:
    """Copy torchvision's VGG-16 into the five stages of a network, with other input channels inflated.

    Args:
        stages: hold the 13 convolutions in order, each followed by its batch norm with `batch_norm`.
        batch_norm: take torchvision's VGG-16 with batch norm.

    Returns:
        the fully connected layers: ``classifier.{0,3,6}.{weight,bias}``.
    """
    state = download((VGG16_BN_Weights if batch_norm else VGG16_Weights).IMAGENET1K_V1)
    layers = [m for stage in stages for m in stage.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    indices = sorted({int(key.split(".")[1]) for key in state if key.startswith("features.")})
    for layer, index in zip(layers, indices, strict=True):
        prefix = f"features.{index}."
        load_weights(layer, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, "ImageNet")
    return {key: value for key, value in state.items() if key.startswith("classifier.")}


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions (He et al., section 4.1), with torchvision's key names.

    Args:
        in_channels: channels of the input.
        channels: width of the 3x3 convolution; the output has four times as many.
        stride: of the 3x3 convolution, or of the first 1x1 with `stride_in_1x1`.
        dilation: of the 3x3 convolution.
        stride_in_1x1: the original MSRA and Caffe form, which DeepLab v2's weights need.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, dilation: int = 1, stride_in_1x1: bool = False
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, second, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = None
        if stride != 1 or in_channels != 4 * channels:
            shortcut = nn.Conv2d(in_channels, 4 * channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet(nn.Module):
    """ResNet-50 or -101 whose last stages trade stride for dilation.

    K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385,
    Table 1; key names and, by default, arithmetic are torchvision's.

    Args:
        depth: 50 or 101.
        in_channels: channels of the image.
        base_channels: width of the first stage's 3x3 convolutions, 64 in the paper; all others scale with it.
        output_stride: 32, 16 or 8: input pixels per pixel of the last feature map.
        multi_grid: factors on the dilation of the last stage's three blocks (DeepLab v3, section 3.2.1), which
            multiply the stage's own.
        dilate_first_block: give the first block of a dilated stage the stage's dilation, as DeepLab v2 and PSPNet do;
            torchvision keeps the previous stage's there.
        deep_stem: three 3x3 convolutions of 64, 64 and 128 channels for the 7x7 one, as PSPNet does.
        stride_in_1x1: see `Bottleneck`.
        ceil_mode: round the first pooling's size up, as Caffe does.

    Shape:
        image ``(N, in_channels, H, W)`` -> features by stage: ``layer1`` (256 channels, stride 4), ``layer2`` (512, 8),
        ``layer3`` (1024), ``layer4`` (2048, stride `output_stride`); ``channels`` has their widths.

    Raises:
        ValueError: for another depth, output stride, or other than three positive factors.
    """

    blocks = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

    def __init__(
        self,
        depth: int = 50,
        in_channels: int = 3,
        base_channels: int = 64,
        output_stride: int = 32,
        multi_grid: Sequence[int] = (1, 1, 1),
        dilate_first_block: bool = False,
        deep_stem: bool = False,
        stride_in_1x1: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        if len(multi_grid) != 3 or min(multi_grid) < 1:
            raise ValueError(f"multi_grid has one positive factor for each of the last three blocks, got {multi_grid}")
        if depth not in self.blocks or output_stride not in (8, 16, 32):
            raise ValueError(f"depth is 50 or 101, output_stride 8, 16 or 32, got {depth} and {output_stride}")
        self.depth = depth
        if deep_stem:
            first = self._conv_bn_relu(in_channels, base_channels, stride=2)
            second = self._conv_bn_relu(base_channels, base_channels)
            third = nn.Conv2d(base_channels, 2 * base_channels, 3, padding=1, bias=False)
            self.conv1: nn.Module = nn.Sequential(*first, *second, third)
        else:
            self.conv1 = nn.Conv2d(in_channels, base_channels, 7, stride=2, padding=3, bias=False)
        width = 2 * base_channels if deep_stem else base_channels
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=ceil_mode)

        stride_so_far, dilation = 4, 1
        for stage, count in enumerate(self.blocks[depth]):
            stride, first_dilation = (1 if stage == 0 else 2), dilation
            if stride == 2 and stride_so_far == output_stride:  # as far as it may shrink: dilate instead
                stride, dilation = 1, 2 * dilation
            stride_so_far *= stride
            if dilate_first_block:
                first_dilation = dilation
            channels = base_channels * 2**stage
            grid = [1] * count if stage < 3 else list(multi_grid)
            layers = [Bottleneck(width, channels, stride, first_dilation * grid[0], stride_in_1x1)]
            width = 4 * channels
            layers += [Bottleneck(width, channels, 1, dilation * factor, stride_in_1x1) for factor in grid[1:]]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.channels = {f"layer{stage + 1}": 4 * base_channels * 2**stage for stage in range(4)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _conv_bn_relu(in_channels: int, channels: int, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(image))))  # (N, 64, H/4, W/4)
        features = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            features[name] = x = getattr(self, name)(x)
        return features

    def load_imagenet(self) -> None:
        """Load torchvision's weights (version 1, on which its segmentation networks were trained)."""
        weights = {50: ResNet50_Weights.IMAGENET1K_V1, 101: ResNet101_Weights.IMAGENET1K_V1}[self.depth]
        load_weights(self, download(weights), "ImageNet", optional=("fc.",))


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
        ValueError: for another output stride.
    """

    def __init__(
        self, in_channels: int = 3, base_channels: int = 64, output_stride: int = 16, jfzhang95: bool = False
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise ValueError(f"Xception-65 has output_stride 8 or 16, got {output_stride}")
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


class MobileNetV2(nn.Module):
    """MobileNetV2 with dilation for its last strides, as DeepLab v3+ is published on it.

    M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    CVPR 2018, arXiv 1801.04381; layers and key names of torchvision without the last 1x1 convolution.

    Args:
        in_channels: channels of the image.
        output_stride: 16 or 8.
        layout: ``torchvision``, or whose weights are to be loaded, ``jfzhang95`` or ``VainF``. Both pad with zeros
            before a block's 1x1 expansion instead of before its depthwise convolution, so that the border holds
            relu6(batch norm(0)). With the first, a stage that lost its stride keeps its dilation and the next one is
            dilated, else it is dilated from its second block on. The second does not pad the first convolution.

    Shape:
        image ``(N, in_channels, H, W)`` -> features by name: ``stride4`` (24 channels), ``last`` (320, stride
        `output_stride`); ``channels`` has their widths.

    Raises:
        ValueError: for another output stride.
    """

    channels = {"stride4": 24, "last": 320}

    def __init__(
        self,
        in_channels: int = 3,
        output_stride: int = 16,
        layout: Literal["torchvision", "jfzhang95", "VainF"] = "torchvision",
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise ValueError(f"MobileNetV2 has output_stride 8 or 16, got {output_stride}")
        self.features = mobilenet_v2(weights=None).features[:-1]
        if in_channels != 3:
            self.features[0][0] = nn.Conv2d(in_channels, 32, 3, stride=2, padding=1, bias=False)
        if layout == "VainF":
            self.features[0][0].padding = (0, 0)
        self.pad_first, self.dilations = layout != "torchvision", [1]
        stride_so_far, dilation, first = 2, 1, 1
        for count, stride in ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)):
            previous = dilation
            if stride_so_far * stride > output_stride:
                dilation *= stride
                stride = 1
            stride_so_far *= stride
            rest = previous if layout == "jfzhang95" else dilation
            self.dilations += [previous] + [rest] * (count - 1)
            self._depthwise(first).stride = (stride, stride)
            first += count
        for index, rate in enumerate(self.dilations[1:], start=1):
            conv = self._depthwise(index)
            conv.dilation, conv.padding = (rate, rate), (0, 0) if self.pad_first else (rate, rate)

    def _depthwise(self, index: int) -> nn.Conv2d:
        return next(m for m in self.features[index].modules() if isinstance(m, nn.Conv2d) and m.groups > 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        short = [max(0, 3 - side) for side in image.shape[-2:]]  # a convolution without padding needs 3 pixels
        features, x = {}, self.features[0](F.pad(image, [0, short[1], 0, short[0]]) if any(short) else image)
        for index, block in enumerate(self.features[1:], start=1):
            rate = self.dilations[index]
            y = block.conv(F.pad(x, [rate] * 4) if self.pad_first else x)
            x = x + y if block.use_res_connect else y
            if index == 3:
                features["stride4"] = x
        return features | {"last": x}

    def load_imagenet(self) -> None:
        """Load torchvision's weights."""
        state = download(MobileNet_V2_Weights.IMAGENET1K_V1)
        load_weights(self, state, "ImageNet", optional=("classifier.", "features.18."))


class MobileNetV3Large(nn.Sequential):
    """Torchvision's MobileNetV3-Large with output stride 16: its last three blocks dilated by 2.

    A. Howard et al., "Searching for MobileNetV3", ICCV 2019, arXiv 1905.02244.

    Args:
        in_channels: channels of the image.

    Shape:
        image ``(N, in_channels, H, W)`` -> features by name: ``stride4`` (24 channels), ``stride8`` (40) and
        ``stride16`` (960); ``channels`` has their widths.
    """

    channels = {"stride4": 24, "stride8": 40, "stride16": 960}

    def __init__(self, in_channels: int = 3) -> None:
        layers = list(mobilenet_v3_large(weights=None, dilated=True).features)
        if in_channels != 3:
            layers[0][0] = nn.Conv2d(in_channels, 16, 3, stride=2, padding=1, bias=False)
        super().__init__(*layers)

    def forward(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        names = {3: "stride4", 4: "stride8", 16: "stride16"}  # torchvision's auxiliary head is at 4
        features, x = {}, image
        for index, layer in enumerate(self):
            x = layer(x)
            if index in names:
                features[names[index]] = x
        return features

    def load_imagenet(self) -> None:
        """Load torchvision's weights."""
        state = download(MobileNet_V3_Large_Weights.IMAGENET1K_V1)
        state = {key.removeprefix("features."): value for key, value in state.items()}
        load_weights(self, state, "ImageNet", optional=("classifier.",))
