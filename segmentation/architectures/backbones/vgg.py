"""VGG-16: stages of 3x3 convolutions.

K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
arXiv 1409.1556.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import VGG16_BN_Weights, VGG16_Weights

from ...weights import download, load_weights


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
