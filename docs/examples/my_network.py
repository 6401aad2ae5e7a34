"""A worked example of an architecture: dilated convolutions that collect context, on a small front end.

F. Yu, V. Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", ICLR 2016, arXiv 1511.07122.
"""

from typing import Any

from torch import Tensor, nn

from segmentation import SegmentationModule
from segmentation.errors import UserError

DILATIONS = (1, 1, 2, 4, 8, 16, 1)  # Table 1: the receptive field grows to 67 x 67, the resolution stays


class MyNetwork(SegmentationModule):
    """Two convolutions of stride 2, then the context module of Table 1 ("Basic"), then a classifier.

    Args:
        num_classes: number of output channels.
        channels: width of every layer.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``. `forward`, which interpolates the score maps to
        the size of the image, and the cross entropy are those of `SegmentationModule`.

    Differs from the paper: the front end has two layers in place of VGG-16, and the layers start from PyTorch's random
    weights in place of the identity.

    Raises:
        UserError: if `channels` is below 1.
    """

    def __init__(self, num_classes: int, channels: int = 32, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        if channels < 1:
            raise UserError(f"channels must be at least 1, got {channels}")
        self.front_end = nn.Sequential(
            conv_relu(self.in_channels, channels, stride=2),
            conv_relu(channels, channels, stride=2),
        )
        self.context = nn.Sequential(*(conv_relu(channels, channels, dilation=rate) for rate in DILATIONS))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Return the scores of all classes at a quarter of the resolution, under the name ``main``."""
        x = self.front_end(image)  # (N, channels, H/4, W/4)
        x = self.context(x)  # the same size
        return {"main": self.classifier(x)}  # (N, num_classes, H/4, W/4)

    def new_layers(self) -> list[nn.Module]:
        """Return the classifier: the argument `head_lr_mult` multiplies its learning rate."""
        return [self.classifier]


def conv_relu(in_channels: int, channels: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Build a 3x3 convolution that keeps the size, or halves it with a stride of 2, and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride=stride, padding=dilation, dilation=dilation),
        nn.ReLU(inplace=True),
    )
