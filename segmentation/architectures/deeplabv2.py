"""DeepLab v2: atrous convolutions of several rates look at one feature map, and their scores are summed.

L.-C. Chen, G. Papandreou, I. Kokkinos, K. Murphy, A. L. Yuille, "DeepLab: Semantic Image Segmentation with Deep
Convolutional Nets, Atrous Convolution, and Fully Connected CRFs", TPAMI 2018, arXiv 1606.00915.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Batch, SegmentationModule, resize
from ..errors import UserError
from ..weights import arguments_from_weights, load_file
from .backbones import Backbone
from .backbones.resnet import ResNet
from .backbones.vgg import load_vgg16, vgg_stage
from .deeplabv1 import load_fully_connected


class AtrousVGG16(Backbone):
    """VGG-16 up to pool5 with the last two poolings at stride 1 and conv5 dilated by 2, as in DeepLab v1.

    Shape:
        image ``(N, in_channels, H, W)`` -> ``pool5`` ``(N, 512, ceil(H / 8), ceil(W / 8))``.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64) -> None:
        super().__init__()
        w = base_channels
        self.stages = nn.ModuleList(
            [
                vgg_stage(in_channels, w, layers=2),
                vgg_stage(w, 2 * w, layers=2),
                vgg_stage(2 * w, 4 * w, layers=3),
                vgg_stage(4 * w, 8 * w, layers=3),
                vgg_stage(8 * w, 8 * w, layers=3, dilation=2),
            ]
        )
        self.channels = {"pool5": 8 * w}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = image
        for stage, stride in zip(self.stages, (2, 2, 2, 1, 1), strict=True):
            x = F.max_pool2d(stage(x), 3, stride, padding=1)
        return {"pool5": x}


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (section 3.2, Figures 4 and 7): the sum of the scores of parallel branches.

    Args:
        in_channels: channels of the features.
        num_classes: number of score maps.
        atrous_rates: dilations of the 3x3 convolutions, in feature-map pixels.
        fc_channels: width of fc6 and fc7 in every branch, for VGG-16; 0 gives a single convolution per branch, as in
            the released ResNet-101.

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, num_classes, h, w)``.

    Raises:
        UserError: if a rate is below 1.
    """

    def __init__(self, in_channels: int, num_classes: int, atrous_rates: Sequence[int], fc_channels: int = 0) -> None:
        super().__init__()
        if not atrous_rates or min(atrous_rates) < 1:
            raise UserError(f"atrous_rates must be positive, got {atrous_rates}")
        self.convs = nn.ModuleList()
        for rate in atrous_rates:
            conv = nn.Conv2d(in_channels, fc_channels or num_classes, 3, padding=rate, dilation=rate)
            if fc_channels:
                fc7, fc8 = nn.Conv2d(fc_channels, fc_channels, 1), nn.Conv2d(fc_channels, num_classes, 1)
                drops = nn.Dropout(0.5), nn.Dropout(0.5)
                self.convs.append(nn.Sequential(conv, nn.ReLU(), drops[0], fc7, nn.ReLU(), drops[1], fc8))
            else:
                self.convs.append(conv)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        self.scores = [branch[-1] if isinstance(branch, nn.Sequential) else branch for branch in self.convs]
        for score in self.scores:
            nn.init.normal_(score.weight, std=0.01)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([branch(features) for branch in self.convs]).sum(dim=0)


class DeepLabV2(SegmentationModule):
    """Dilated ResNet or VGG-16 with ASPP, on the image at several scales (MSC); the maximum of the scores counts.

    The published recipe has batch norm frozen (``freeze_bn``), ten times the learning rate for ASPP's weights
    (``head_lr_mult: 10``) and twenty times, without decay, for its biases (``bias_lr_mult: 2, bias_weight_decay: 0``).

    Args:
        num_classes: number of output channels.
        backbone: ``resnet101``, ``resnet50`` or ``vgg16``.
        atrous_rates: dilations of ASPP: (6, 12, 18, 24) is ASPP-L; ASPP-S is (2, 4, 8, 12), LargeFOV (12,).
        scales: scales of the image, in training and in evaluation, with 1.0 among them; [1.0] alone is the network
            without MSC. None takes the scales of `weights`, otherwise the paper's (1.0, 0.75, 0.5).
        stride_in_1x1: put a ResNet's stride in the first 1x1 convolution of a block, as in Caffe's ResNets, not in the
            3x3 convolution. None takes what `weights` need, otherwise True; ``imagenet`` needs False.
        base_channels: width of the first stage, 64 in the paper; all others scale with it.
        weights: ``imagenet`` (backbone; for VGG-16 also fc6 and fc7, subsampled as in DeepLab v1), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    Differs from the paper: scores are interpolated with corners not aligned, and labels are subsampled at the middle of
    their blocks, as in kazuto1011/deeplab-pytorch, whose weights are published. Training starts from COCO only if
    ``weights`` do. Batch norm that is not frozen decays its statistics by 0.9 a step instead of 0.999.

    Raises:
        UserError: for an unknown backbone, a rate below 1, or scales that are not positive or lack 1.0.
    """

    @arguments_from_weights
    def __init__(
        self,
        num_classes: int,
        backbone: Literal["resnet101", "resnet50", "vgg16"] = "resnet101",
        atrous_rates: Sequence[int] = (6, 12, 18, 24),
        scales: Sequence[float] | None = None,
        stride_in_1x1: bool | None = None,
        base_channels: int = 64,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        scales = scales or (1.0, 0.75, 0.5)
        if backbone not in ("resnet101", "resnet50", "vgg16"):
            raise UserError(f"backbone must be resnet101, resnet50 or vgg16, got {backbone}")
        if 1.0 not in scales or min(scales) <= 0:
            raise UserError(f"scales must be positive and have 1.0 among them, got {scales}")
        self.scales = tuple(scales)
        self.backbone: AtrousVGG16 | ResNet
        if backbone == "vgg16":
            self.backbone = AtrousVGG16(self.in_channels, base_channels)
            self.last, fc_channels = "pool5", 16 * base_channels
        else:
            self.backbone = ResNet(
                int(backbone.removeprefix("resnet")),
                self.in_channels,
                base_channels,
                output_stride=8,
                dilate_first_block=True,
                stride_in_1x1=stride_in_1x1 is not False,
                ceil_mode=True,
            )
            self.last, fc_channels = "layer4", 0
        self.classifier = ASPP(self.backbone.channels[self.last], num_classes, atrous_rates, fc_channels)
        if weights == "imagenet":
            self.load_imagenet()
        elif weights is not None:
            last = ".6." if fc_channels else "."
            scores = [f"classifier.convs.{branch}{last}" for branch in range(len(atrous_rates))]
            load_file(self, weights, scores, optional=("classifier.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Score the image at every scale: ``main`` is the maximum at stride 8; training gets each scale's too."""
        least = math.ceil(1 / min(self.scales))  # else the smallest image would have no pixel
        height, width = image.shape[-2:]
        image = F.pad(image, [0, max(0, least - width), 0, max(0, least - height)], mode="replicate")
        maps = {}
        for scale in self.scales:
            scaled = image
            if scale != 1:
                scaled = F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
            maps[f"scale_{scale:g}"] = self.classifier(self.backbone(scaled)[self.last])  # (N, K, scale H/8, scale W/8)
        size = maps["scale_1"].shape[-2:]
        main = torch.stack([resize(scores, size) for scores in maps.values()]).amax(dim=0)  # (N, K, H/8, W/8)
        return {"main": main, **maps} if self.training and len(self.scales) > 1 else {"main": main}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compare the maximum, and each scale's scores, with labels subsampled to their size."""
        maps = self.score_maps(self.preprocess(batch["image"]))
        return {name: self.criterion(scores, subsample(batch, scores.shape[-2:])) for name, scores in maps.items()}

    def new_layers(self) -> list[nn.Module]:
        """Return the convolutions that give scores."""
        return list(self.classifier.scores)

    def load_imagenet(self) -> None:
        """Copy torchvision's backbone; with VGG-16 every branch gets another random part of the classifier."""
        if isinstance(self.backbone, ResNet):
            return self.backbone.load_imagenet()
        state = load_vgg16(list(self.backbone.stages))
        for branch in self.classifier.convs:
            load_fully_connected(branch[0], branch[3], state)  # type: ignore[index]


def subsample(batch: Batch, size: Sequence[int]) -> Batch:
    """Take the labels, and pixel weights if any, at the middle of each cell of a (height, width) grid."""
    small: Batch = {}
    for key in [key for key in ("mask", "pixel_weight") if key in batch]:
        values = batch[key][:, None].float()
        small[key] = F.interpolate(values, tuple(size), mode="nearest-exact")[:, 0].to(batch[key].dtype)
    return small
