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
    """Build a stage of VGG-16 (Table 1, column D) without its pooling: 3x3 convolutions, each with ReLU.

    Args:
        in_channels: input channels of the first convolution.
        out_channels: output channels of every convolution.
        layers: number of convolutions.
        dilation: dilation of every convolution.
        batch_norm: add batch norm before every ReLU, as SegNet and DeconvNet do.

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
    """Copy the convolutions of torchvision's VGG-16 into the five stages of a network.

    Args:
        stages: modules that hold the 13 convolutions in order.
        batch_norm: copy torchvision's VGG-16 with batch norm.

    Returns:
        the weights of the fully connected layers, ``classifier.{0,3,6}.{weight,bias}``.
    """
    state = download((VGG16_BN_Weights if batch_norm else VGG16_Weights).IMAGENET1K_V1)
    layers = [m for stage in stages for m in stage.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    indices = sorted({int(key.split(".")[1]) for key in state if key.startswith("features.")})
    for layer, index in zip(layers, indices, strict=True):
        prefix = f"features.{index}."
        load_weights(layer, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, "ImageNet")
    return {key: value for key, value in state.items() if key.startswith("classifier.")}


def load_as_convolution(conv: nn.Module, state: dict[str, Tensor], name: str, window: int) -> None:
    """Copy a fully connected layer into a convolution: it looked at ``window x window`` positions.

    Args:
        conv: receives the weights.
        state: the fully connected layers of VGG-16, see `load_vgg16`.
        name: which of them, such as ``classifier.0``.
        window: side of the convolution's kernel.
    """
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    load_weights(conv, {"weight": weight.view(len(weight), -1, window, window), "bias": bias}, "ImageNet")
