"""DeconvNet: VGG-16 down to a single vector and, step by step, its mirror image back up.

H. Noh, S. Hong, B. Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015, arXiv 1505.04366.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..base import SegmentationModule
from ..weights import load_file
from .backbones.vgg import load_as_convolution, load_vgg16, vgg_stage


def deconv_stage(*channels: int) -> nn.Sequential:
    """Build transposed 3x3 convolutions of stride 1, from each width to the next, with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        deconv = nn.ConvTranspose2d(inputs, outputs, 3, padding=1)
        layers += [deconv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class DeconvNet(SegmentationModule):
    """VGG-16 with its fully connected layers, then unpooling and transposed convolutions (Figure 2, Table 2).

    The 7x7 convolution fc6 turns a 224 x 224 image into one vector, and fc6-deconv spreads it over 7 x 7 again. A
    larger image has a vector at each position of the window.

    Args:
        num_classes: number of output channels.
        base_channels: width of the first stage, 64 in the paper; all other convolutions scale with it.
        fc_channels: width of fc6 and fc7: 4096 in the paper, where they and fc6-deconv hold 88 % of 252 million
            parameters; 1024 in the SegNet paper's comparison.
        weights: ``imagenet`` (torchvision's VGG-16 with batch norm, for the convolutions and for fc6 and fc7), a path,
            or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``. Inside, zeros below and to the right make both
        sides multiples of 32, and 224 at least.

    Differs from the paper: it labels the whole image at once, where the paper labels 50 object proposals and takes the
    maximum, after training on single objects and then on proposals. There is no ensemble with FCN-8s. Batch norm
    evaluates with running averages. ImageNet weights have no batch norm after fc6 and fc7, so it starts from ones.
    """

    def __init__(
        self,
        num_classes: int,
        base_channels: int = 64,
        fc_channels: int = 4096,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        w, fc = base_channels, fc_channels
        self.conv1 = vgg_stage(self.in_channels, w, layers=2, batch_norm=True)
        self.conv2 = vgg_stage(w, 2 * w, layers=2, batch_norm=True)
        self.conv3 = vgg_stage(2 * w, 4 * w, layers=3, batch_norm=True)
        self.conv4 = vgg_stage(4 * w, 8 * w, layers=3, batch_norm=True)
        self.conv5 = vgg_stage(8 * w, 8 * w, layers=3, batch_norm=True)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.fc6 = nn.Sequential(nn.Conv2d(8 * w, fc, 7), nn.BatchNorm2d(fc), nn.ReLU(inplace=True))
        self.fc7 = nn.Sequential(nn.Conv2d(fc, fc, 1), nn.BatchNorm2d(fc), nn.ReLU(inplace=True))
        spread = nn.ConvTranspose2d(fc, 8 * w, 7)
        self.fc6_deconv = nn.Sequential(spread, nn.BatchNorm2d(8 * w), nn.ReLU(inplace=True))
        self.deconv5 = deconv_stage(8 * w, 8 * w, 8 * w, 8 * w)
        self.deconv4 = deconv_stage(8 * w, 8 * w, 8 * w, 4 * w)
        self.deconv3 = deconv_stage(4 * w, 4 * w, 4 * w, 2 * w)
        self.deconv2 = deconv_stage(2 * w, 2 * w, w)
        self.deconv1 = deconv_stage(w, w, w)
        self.classifier = nn.Conv2d(w, num_classes, 1)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.ConvTranspose2d) or module is self.classifier:
                nn.init.normal_(module.weight, std=0.01)  # type: ignore[arg-type]
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if weights == "imagenet":
            self.load_imagenet()
        elif weights is not None:
            load_file(self, weights, new_layers=("classifier.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Run the network of Table 2; the comments give the sizes for its 224 x 224 input."""
        height, width = image.shape[-2:]
        below, right = (max(-side % 32, 224 - side) for side in (height, width))
        x = F.pad(image, [0, right, 0, below])
        x, switches1 = self.pool(self.conv1(x))  # (N, 64, 112, 112)
        x, switches2 = self.pool(self.conv2(x))  # (N, 128, 56, 56)
        x, switches3 = self.pool(self.conv3(x))  # (N, 256, 28, 28)
        x, switches4 = self.pool(self.conv4(x))  # (N, 512, 14, 14)
        x, switches5 = self.pool(self.conv5(x))  # (N, 512, 7, 7)
        x = self.fc7(self.fc6(x))  # (N, 4096, 1, 1)
        x = self.fc6_deconv(x)  # (N, 512, 7, 7)
        x = self.deconv5(unpool(x, switches5))  # (N, 512, 14, 14)
        x = self.deconv4(unpool(x, switches4))  # (N, 256, 28, 28)
        x = self.deconv3(unpool(x, switches3))  # (N, 128, 56, 56)
        x = self.deconv2(unpool(x, switches2))  # (N, 64, 112, 112)
        x = self.deconv1(unpool(x, switches1))  # (N, 64, 224, 224)
        return {"main": self.classifier(x)[..., :height, :width]}

    def new_layers(self) -> list[nn.Module]:
        """Return the way up, which has no ImageNet weights."""
        ups = [self.fc6_deconv, self.deconv5, self.deconv4, self.deconv3, self.deconv2, self.deconv1]
        return [*ups, self.classifier]

    def load_imagenet(self) -> None:
        """Copy VGG-16's convolutions, and its first two fully connected layers as convolutions."""
        state = load_vgg16((self.conv1, self.conv2, self.conv3, self.conv4, self.conv5), batch_norm=True)
        load_as_convolution(self.fc6[0], state, "classifier.0", window=7)
        load_as_convolution(self.fc7[0], state, "classifier.3", window=1)


def unpool(x: Tensor, switches: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Put every value where its maximum was, and 0 elsewhere (section 3.2.1).

    ``torch.nn.functional.max_unpool2d`` does the same, but refuses to run with Trainer's ``deterministic``.

    Args:
        x: the small map.
        switches: positions of the maxima in the flattened large map, as max pooling returns them.
        size: height and width of the large map; None doubles both sides.

    Shape:
        ``(N, C, h, w)`` and switches of the same shape -> ``(N, C, *size)``.
    """
    height, width = size or (2 * x.shape[2], 2 * x.shape[3])
    flat = x.new_zeros(*x.shape[:2], height * width)
    return flat.scatter(2, switches.flatten(2), x.flatten(2)).unflatten(2, (height, width))
