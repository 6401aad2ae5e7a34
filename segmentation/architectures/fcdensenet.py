"""FC-DenseNet: a U-shaped network of dense blocks, in which every layer sees all earlier ones of its block.

S. Jégou, M. Drozdzal, D. Vázquez, A. Romero, Y. Bengio, "The One Hundred Layers Tiramisu: Fully Convolutional
DenseNets for Semantic Segmentation", CVPR Workshops 2017, arXiv 1611.09326.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import SegmentationModule
from ..errors import UserError
from ..weights import load_file

LAYERS = {  # of the five blocks down, the bottleneck and the five blocks up
    56: (4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4),
    67: (5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5),
    103: (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4),
}
GROWTH_RATES = {56: 12, 67: 16, 103: 16}


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that can use the statistics of the batch at hand in evaluation too."""

    batch_statistics = False

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_statistics and not self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)


def bn_relu_conv(in_channels: int, channels: int, kernel_size: int, dropout: float) -> nn.Sequential:
    """Build the paper's layer (Table 1): batch norm, ReLU, a convolution that keeps the size, dropout."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(BatchNorm(in_channels), nn.ReLU(inplace=True), conv, nn.Dropout(dropout))


class DenseBlock(nn.Module):
    """Layers that each add `growth_rate` maps to all maps before them (Figure 2).

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, in_channels + layers * growth_rate, h, w)``, the input first.
    """

    def __init__(self, in_channels: int, growth_rate: int, layers: int, dropout: float) -> None:
        super().__init__()
        widths = [in_channels + growth_rate * layer for layer in range(layers)]
        self.layers = nn.ModuleList([bn_relu_conv(width, growth_rate, 3, dropout) for width in widths])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class TransitionDown(nn.Sequential):
    """A 1x1 layer that keeps the number of maps, and max pooling, which halves the resolution (Table 1)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__(bn_relu_conv(channels, channels, 1, dropout), nn.MaxPool2d(2))


class TransitionUp(nn.Module):
    """Double the resolution of the last block's new maps, and join the skip connection (Table 1).

    Shape:
        ``(N, in_channels, h, w)``, of which the last `channels` go up, and skip ``(N, skip_channels, H, W)`` with
        H, W of ``2h`` or ``2h + 1`` -> ``(N, channels + skip_channels, H, W)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.deconv = nn.ConvTranspose2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.deconv(x[:, -self.channels :])  # (N, channels, 2h + 1, 2w + 1)
        for dim in (2, 3):  # centre crop: of 2h + 1 rows, the first 2h or all
            x = x.narrow(dim, 0, skip.shape[dim])
        return torch.cat([x, skip], dim=1)


class FCDenseNet(SegmentationModule):
    """FC-DenseNet56, 67 or 103 (Table 2 lists the last), trained from scratch.

    On the way down a block passes on its input and its new maps. On the way up it passes on its new maps alone, which
    are then joined with the skip connection.

    Args:
        num_classes: number of output channels.
        depth: number of convolutions, transposed ones included: 56, 67 or 103.
        growth_rate: number of maps that a layer adds; None takes the paper's, 12 for depth 56 and 16 for 67 and 103.
        base_channels: width of the first convolution, 48 in the paper.
        dropout: rate in every layer of blocks and transitions down, element by element.
        batch_statistics: evaluate with the statistics of the batch at hand, as the paper does with one image a batch;
            by default with running averages. The weights fit both.
        weights: a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``. Five poolings need 32 pixels, and 64 with
        `batch_statistics`: smaller images are padded with zeros below and to the right.

    Differs from the paper: running averages by default in evaluation; batch norm's epsilon is 1e-5, that of the
    released code 1e-4.

    Raises:
        UserError: for another depth, or `batch_statistics` with `freeze_bn`.
    """

    def __init__(
        self,
        num_classes: int,
        depth: Literal[56, 67, 103] = 103,
        growth_rate: int | None = None,
        base_channels: int = 48,
        dropout: float = 0.2,
        batch_statistics: bool = False,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if depth not in LAYERS:
            raise UserError(f"depth is 56, 67 or 103, got {depth}")
        if batch_statistics and self.freeze_bn:
            raise UserError("batch_statistics uses no stored statistics that freeze_bn could keep: set one of the two")
        growth_rate = GROWTH_RATES[depth] if growth_rate is None else growth_rate
        layers = LAYERS[depth]
        self.least = 64 if batch_statistics else 32  # one value per channel at the bottom has no statistics

        self.conv = nn.Conv2d(self.in_channels, base_channels, 3, padding=1)
        self.down_blocks, self.transitions_down = nn.ModuleList(), nn.ModuleList()
        self.transitions_up, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        channels, skips = base_channels, []
        for count in layers[:5]:
            self.down_blocks.append(DenseBlock(channels, growth_rate, count, dropout))
            channels += count * growth_rate
            self.transitions_down.append(TransitionDown(channels, dropout))
            skips.append(channels)
        self.bottleneck = DenseBlock(channels, growth_rate, layers[5], dropout)
        made = layers[5] * growth_rate
        for count in layers[6:]:
            self.transitions_up.append(TransitionUp(made))
            channels = made + skips.pop()
            self.up_blocks.append(DenseBlock(channels, growth_rate, count, dropout))
            made = count * growth_rate
        self.classifier = nn.Conv2d(channels + made, num_classes, 1)

        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if isinstance(module, BatchNorm):
                module.batch_statistics = batch_statistics
        if weights is not None:
            load_file(self, weights, new_layers=("classifier.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Run the network of Table 2; the comments give FC-DenseNet103's channels."""
        height, width = image.shape[-2:]
        if min(height, width) < self.least:
            image = F.pad(image, [0, max(0, self.least - width), 0, max(0, self.least - height)])
        x = self.conv(image)  # (N, 48, H, W)
        skips = []
        for block, down in zip(self.down_blocks, self.transitions_down, strict=True):
            x = block(x)  # (N, 112, H, W), 192, 304, 464, (N, 656, H/16, W/16)
            skips.append(x)
            x = down(x)
        x = self.bottleneck(x)  # (N, 896, H/32, W/32), of which the last 240 go up
        for up, block in zip(self.transitions_up, self.up_blocks, strict=True):
            x = block(up(x, skips.pop()))  # (N, 1088, H/16, W/16), 816, 576, 384, (N, 256, H, W)
        return {"main": self.classifier(x)[..., :height, :width]}

    def new_layers(self) -> list[nn.Module]:
        """Return the last 1x1 convolution."""
        return [self.classifier]
