"""Feature extractors, one file per paper, and the layers that they share with the heads of the networks."""

from torch import Tensor, nn

from ...errors import UserError


class Backbone(nn.Module):
    """A network without its classifier: it turns an image into named feature maps.

    Attributes:
        channels: width of each feature map by its name, in the order in which the maps are computed.

    Shape:
        image ``(N, in_channels, H, W)`` -> feature maps ``(N, channels[name], h, w)`` by name.
    """

    channels: dict[str, int]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps."""
        raise NotImplementedError

    def load_imagenet(self) -> None:
        """Load torchvision's weights, which were trained on ImageNet.

        Raises:
            UserError: if torchvision has published none.
        """
        raise UserError(
            f"torchvision has no ImageNet weights for {type(self).__name__}: give a path, or --model.weights null"
        )


def conv_bn_relu(
    in_channels: int, channels: int, kernel_size: int = 1, stride: int = 1, dilation: int = 1, bias: bool = False
) -> list[nn.Module]:
    """Return a convolution that keeps the size at stride 1, batch norm and ReLU, for ``nn.Sequential``."""
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding, dilation, bias=bias)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def classifier_head(in_channels: int, channels: int, num_classes: int, dropout: nn.Module) -> nn.Sequential:
    """Return a 3x3 convolution with batch norm and ReLU, dropout, and a 1x1 convolution to the score maps."""
    return nn.Sequential(*conv_bn_relu(in_channels, channels, 3), dropout, nn.Conv2d(channels, num_classes, 1))
