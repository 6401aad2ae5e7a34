"""ResNet: blocks that add to their input.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, ResNet101_Weights

from ...errors import UserError
from ...weights import download, load_weights
from . import Backbone, conv_bn_relu


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions (section 4.1), with torchvision's key names.

    Args:
        in_channels: channels of the input.
        channels: width of the 3x3 convolution; the output has four times as many channels.
        stride: stride of the 3x3 convolution, or of the first 1x1 convolution with `stride_in_1x1`.
        dilation: dilation of the 3x3 convolution.
        stride_in_1x1: stride in the first 1x1 convolution, as in the original MSRA and Caffe networks. DeepLab v2's
            published weights need it.

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, 4 * channels, h / stride, w / stride)``.
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


class ResNet(Backbone):
    """ResNet-50 or -101 (Table 1) whose last stages may replace stride by dilation.

    Key names and, by default, arithmetic are torchvision's.

    Args:
        depth: 50 or 101.
        in_channels: channels of the image.
        base_channels: width of the first stage's 3x3 convolutions, 64 in the paper; all others scale with it.
        output_stride: input pixels per pixel of the last feature map: 32, 16 or 8.
        multi_grid: factors on the dilations of the last stage's three blocks (DeepLab v3, section 3.2.1).
        dilate_first_block: dilate the first block of a dilated stage like the others, as DeepLab v2 and PSPNet do.
            Torchvision gives it the dilation of the previous stage.
        deep_stem: begin with three 3x3 convolutions of 64, 64 and 128 channels instead of one 7x7 convolution, as
            PSPNet does.
        stride_in_1x1: see `Bottleneck`.
        ceil_mode: round the size of the first pooling up, as Caffe does.

    Shape:
        image ``(N, in_channels, H, W)`` -> ``layer1`` (256 channels, stride 4), ``layer2`` (512, stride 8), ``layer3``
        (1024), ``layer4`` (2048, stride `output_stride`).

    Raises:
        UserError: for another depth or output stride, or if `multi_grid` is not three positive factors.
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
            raise UserError(f"multi_grid has one positive factor for each of the last three blocks, got {multi_grid}")
        if depth not in self.blocks or output_stride not in (8, 16, 32):
            raise UserError(f"depth is 50 or 101, output_stride 8, 16 or 32, got {depth} and {output_stride}")
        self.depth = depth
        if deep_stem:
            first = conv_bn_relu(in_channels, base_channels, 3, stride=2)
            second = conv_bn_relu(base_channels, base_channels, 3)
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

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(image))))  # (N, 64, H/4, W/4)
        features = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            features[name] = x = getattr(self, name)(x)
        return features

    def load_imagenet(self) -> None:
        """Load torchvision's weights, version 1, from which its segmentation networks were trained."""
        weights = {50: ResNet50_Weights.IMAGENET1K_V1, 101: ResNet101_Weights.IMAGENET1K_V1}[self.depth]
        load_weights(self, download(weights), "ImageNet", optional=("fc.",))
