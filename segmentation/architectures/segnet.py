"""SegNet: a decoder that puts features back at the positions where the encoder's poolings found their maxima.

V. Badrinarayanan, A. Kendall, R. Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", TPAMI 2017, arXiv 1511.00561.
"""

from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..base import SegmentationModule
from ..errors import UserError
from ..weights import load_file
from .backbones.vgg import load_vgg16, vgg_stage
from .deconvnet import unpool


class SegNet(SegmentationModule):
    """VGG-16's 13 convolutions and their mirror image; only the positions of the maxima connect both (Figure 2).

    Poolings round odd sizes up, 45 to 23, and every unpooling knows the size before its pooling. So images of any size
    need no padding.

    Args:
        num_classes: number of output channels.
        variant: ``full``, or ``basic``: SegNet-Basic (section 3.1), four stages of one 7x7 convolution each, whose
            decoder has no ReLU. It first divides each pixel by its local response across channels, with constants made
            for values of 0..255: set ``mean: [0, 0, 0]`` and ``std`` to 1 / 255 = 0.003921569 to keep those values.
        base_channels: width of the first stage, 64 in the paper; all others scale with it.
        dropout: rate after every pooling from the third on, and after the decoder stages that mirror them, as in the
            released Bayesian SegNet; 0.5 in the paper's benchmark.
        weights: ``imagenet`` (encoder of the full variant, torchvision's VGG-16 with batch norm), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    Differs from the paper: batch norm evaluates with running averages, where the paper computes statistics over the
    whole training set after training. Basic has biases and local response normalisation, as in the released model,
    where the paper has no biases and normalises local contrast.

    Raises:
        UserError: for an unknown variant, or ImageNet weights for Basic.
    """

    def __init__(
        self,
        num_classes: int,
        variant: Literal["full", "basic"] = "full",
        base_channels: int = 64,
        dropout: float = 0.0,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if variant not in ("full", "basic"):
            raise UserError(f"variant is full or basic, got {variant}")
        if variant == "basic" and weights == "imagenet":
            raise UserError("SegNet-Basic has no ImageNet weights: set weights to a path or to null")
        w = base_channels
        # The decoder is listed beside the encoder, stage by stage, and runs from its last stage to its first.
        if variant == "full":
            stage = partial(vgg_stage, batch_norm=True)
            self.norm: nn.Module = nn.Identity()
            self.encoder = nn.ModuleList(
                [
                    stage(self.in_channels, w, layers=2),
                    stage(w, 2 * w, layers=2),
                    stage(2 * w, 4 * w, layers=3),
                    stage(4 * w, 8 * w, layers=3),
                    stage(8 * w, 8 * w, layers=3),
                ]
            )
            self.decoder = nn.ModuleList(
                [
                    stage(w, w, layers=1),
                    stage(2 * w, 2 * w, layers=1) + stage(2 * w, w, layers=1),
                    stage(4 * w, 4 * w, layers=2) + stage(4 * w, 2 * w, layers=1),
                    stage(8 * w, 8 * w, layers=2) + stage(8 * w, 4 * w, layers=1),
                    stage(8 * w, 8 * w, layers=3),
                ]
            )
            self.classifier = nn.Conv2d(w, num_classes, 3, padding=1)
        else:
            self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
            self.encoder = nn.ModuleList(
                nn.Sequential(*conv_bn(inputs, w), nn.ReLU(inplace=True)) for inputs in (self.in_channels, w, w, w)
            )
            self.decoder = nn.ModuleList(nn.Sequential(*conv_bn(w, w)) for _ in range(4))
            self.classifier = nn.Conv2d(w, num_classes, 1)
        self.drop = nn.Dropout(dropout)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if weights == "imagenet":
            load_vgg16(list(self.encoder), batch_norm=True)
        elif weights is not None:
            load_file(self, weights, new_layers=("classifier.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Encode, store where each maximum was, and decode in reverse order."""
        x = self.norm(image)
        memory = []
        for level, stage in enumerate(self.encoder):
            x = stage(x)
            size = x.shape[-2:]
            x, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
            memory.append((indices, size))
            if level >= 2:
                x = self.drop(x)
        # (N, 512, ceil(H / 32), ceil(W / 32)); Basic: (N, 64, ceil(H / 16), ceil(W / 16))
        for level in reversed(range(len(self.decoder))):
            indices, size = memory.pop()
            x = self.decoder[level](unpool(x, indices, size))
            if level >= 2:
                x = self.drop(x)
        return {"main": self.classifier(x)}  # (N, K, H, W)

    def new_layers(self) -> list[nn.Module]:
        """Return decoder and classifier, which have no ImageNet weights."""
        return [self.decoder, self.classifier]


def conv_bn(in_channels: int, channels: int) -> list[nn.Module]:
    """Return the 7x7 convolution of SegNet-Basic, and batch norm."""
    return [nn.Conv2d(in_channels, channels, 7, padding=3), nn.BatchNorm2d(channels)]
