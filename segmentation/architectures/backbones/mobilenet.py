"""MobileNetV2 and MobileNetV3: inverted residuals, small enough for a phone.

M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
CVPR 2018, arXiv 1801.04381. A. Howard et al., "Searching for MobileNetV3", ICCV 2019, arXiv 1905.02244.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, MobileNet_V3_Large_Weights, mobilenet_v2, mobilenet_v3_large

from ...errors import UserError
from ...weights import download, load_weights
from . import Backbone


class MobileNetV2(Backbone):
    """MobileNetV2 with dilation in place of its last strides, as DeepLab v3+ is published on it.

    Layers and key names are torchvision's, without the last 1x1 convolution.

    Args:
        in_channels: channels of the image.
        output_stride: 16 or 8.
        pad_stem: pad the first convolution. These three arguments are torchvision's by default; ports differ in them.
        pad_block_input: pad with zeros before a block's 1x1 expansion instead of before its depthwise convolution, so
            that the border holds relu6(batch norm(0)).
        dilate_next_stage: a stage that loses its stride keeps its dilation, and the next stage is dilated. Otherwise
            it is dilated from its second block on.

    Shape:
        image ``(N, in_channels, H, W)`` -> ``stride4`` (24 channels), ``last`` (320, stride `output_stride`).

    Raises:
        UserError: for another output stride.
    """

    channels = {"stride4": 24, "last": 320}

    def __init__(
        self,
        in_channels: int = 3,
        output_stride: int = 16,
        pad_stem: bool = True,
        pad_block_input: bool = False,
        dilate_next_stage: bool = False,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise UserError(f"MobileNetV2 has output_stride 8 or 16, got {output_stride}")
        self.features = mobilenet_v2(weights=None).features[:-1]
        if in_channels != 3:
            self.features[0][0] = nn.Conv2d(in_channels, 32, 3, stride=2, padding=1, bias=False)
        if not pad_stem:
            self.features[0][0].padding = (0, 0)
        self.pad_block_input, self.dilations = pad_block_input, [1]
        stride_so_far, dilation, first = 2, 1, 1
        for count, stride in ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)):
            previous = dilation
            if stride_so_far * stride > output_stride:
                dilation *= stride
                stride = 1
            stride_so_far *= stride
            rest = previous if dilate_next_stage else dilation
            self.dilations += [previous] + [rest] * (count - 1)
            self._depthwise(first).stride = (stride, stride)
            first += count
        for index, rate in enumerate(self.dilations[1:], start=1):
            conv = self._depthwise(index)
            conv.dilation, conv.padding = (rate, rate), (0, 0) if pad_block_input else (rate, rate)

    def _depthwise(self, index: int) -> nn.Conv2d:
        return next(m for m in self.features[index].modules() if isinstance(m, nn.Conv2d) and m.groups > 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        short = [max(0, 3 - side) for side in image.shape[-2:]]  # a convolution without padding needs 3 pixels
        features, x = {}, self.features[0](F.pad(image, [0, short[1], 0, short[0]]) if any(short) else image)
        for index, block in enumerate(self.features[1:], start=1):
            rate = self.dilations[index]
            y = block.conv(F.pad(x, [rate] * 4) if self.pad_block_input else x)
            x = x + y if block.use_res_connect else y
            if index == 3:
                features["stride4"] = x
        return features | {"last": x}

    def load_imagenet(self) -> None:
        """Load torchvision's weights, trained on ImageNet."""
        state = download(MobileNet_V2_Weights.IMAGENET1K_V1)
        load_weights(self, state, "ImageNet", optional=("classifier.", "features.18."))


class MobileNetV3Large(nn.Sequential, Backbone):
    """Torchvision's MobileNetV3-Large with output stride 16: its last three blocks are dilated by 2.

    Args:
        in_channels: channels of the image.

    Shape:
        image ``(N, in_channels, H, W)`` -> ``stride4`` (24 channels), ``stride8`` (40) and ``stride16`` (960).
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
        """Load torchvision's weights, trained on ImageNet."""
        state = download(MobileNet_V3_Large_Weights.IMAGENET1K_V1)
        state = {key.removeprefix("features."): value for key, value in state.items()}
        load_weights(self, state, "ImageNet", optional=("classifier.",))
