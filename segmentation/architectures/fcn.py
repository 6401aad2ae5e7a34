"""FCN: a classifier turned into convolutions; its coarse scores are joined with those of finer layers on the way up.

J. Long, E. Shelhamer, T. Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
arXiv 1411.4038; extended version PAMI 2017, arXiv 1605.06211.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import segmentation as published

from ..base import SegmentationModule
from ..errors import UserError
from ..weights import download, load_weights, read_weights
from .backbones import Backbone, classifier_head
from .backbones.resnet import ResNet
from .backbones.vgg import load_as_convolution, load_vgg16, vgg_stage

SKIPS = ("score_pool4", "score_pool3", "upscore2", "upscore_pool4", "upscore")  # differ from FCN-32s to FCN-8s


class VGG16(Backbone):
    """VGG-16 whose first two fully connected layers are convolutions, without the third (section 4.1).

    The 7x7 convolution fc6 makes the map smaller; 100 pixels of padding keep it large enough for every pixel.

    Args:
        in_channels: channels of the image.
        base_channels: width of the first stage, 64 in the paper; all others, and fc6 and fc7, scale with it.

    Shape:
        image ``(N, in_channels, H, W)`` -> ``pool3`` (256 channels, stride 8), ``pool4`` (512, stride 16), ``fc7``
        (4096, stride 32), of the padded image.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64) -> None:
        super().__init__()
        w = base_channels
        self.conv1 = vgg_stage(in_channels, w, layers=2)
        self.conv1[0].padding = (100, 100)  # type: ignore[assignment]
        self.conv2 = vgg_stage(w, 2 * w, layers=2)
        self.conv3 = vgg_stage(2 * w, 4 * w, layers=3)
        self.conv4 = vgg_stage(4 * w, 8 * w, layers=3)
        self.conv5 = vgg_stage(8 * w, 8 * w, layers=3)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.fc6 = nn.Conv2d(8 * w, 64 * w, 7)
        self.fc7 = nn.Conv2d(64 * w, 64 * w, 1)
        self.relu, self.drop6, self.drop7 = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Dropout(0.5)
        self.channels = {"pool3": 4 * w, "pool4": 8 * w, "fc7": 64 * w}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the features; the comments give the sizes for a 500 x 500 image."""
        x = self.pool(self.conv1(image))  # (N, 64, 349, 349)
        x = self.pool(self.conv2(x))  # (N, 128, 175, 175)
        pool3 = self.pool(self.conv3(x))  # (N, 256, 88, 88)
        pool4 = self.pool(self.conv4(pool3))  # (N, 512, 44, 44)
        x = self.pool(self.conv5(pool4))  # (N, 512, 22, 22)
        x = self.drop6(self.relu(self.fc6(x)))  # (N, 4096, 16, 16)
        x = self.drop7(self.relu(self.fc7(x)))
        return {"pool3": pool3, "pool4": pool4, "fc7": x}

    def load_imagenet(self) -> None:
        """Copy torchvision's VGG-16 with its first two fully connected layers."""
        state = load_vgg16((self.conv1, self.conv2, self.conv3, self.conv4, self.conv5))
        load_as_convolution(self.fc6, state, "classifier.0", window=7)
        load_as_convolution(self.fc7, state, "classifier.3", window=1)


class Upsampling(nn.ConvTranspose2d):
    """A transposed convolution that starts as bilinear interpolation (section 3.3), and may learn.

    Shape:
        ``(N, num_classes, h, w)`` -> ``(N, num_classes, factor (h + 1), factor (w + 1))``.
    """

    def __init__(self, num_classes: int, factor: int, learn: bool) -> None:
        super().__init__(num_classes, num_classes, 2 * factor, stride=factor, bias=False)
        tent = 1 - (torch.arange(2 * factor) - factor + 0.5).abs() / factor  # 1/4, 3/4, 3/4, 1/4 for factor 2
        with torch.no_grad():
            self.weight.copy_(torch.eye(num_classes)[:, :, None, None] * tent[:, None] * tent)
        self.requires_grad_(learn)


class SkipClassifier(nn.Module):
    """Scores of fc7, upsampled step by step and joined with the scores of finer layers (section 4.2, Figure 3).

    Args:
        num_classes: number of score maps.
        channels: widths of ``pool3``, ``pool4`` and ``fc7``.
        output_stride: 32, 16 or 8.
        learn_upsampling: see `FCN`.
        at_once: see `FCN`.

    Shape:
        features of `VGG16` and the image's size (H, W) -> ``(N, num_classes, H, W)``.
    """

    def __init__(
        self, num_classes: int, channels: dict[str, int], output_stride: int, learn_upsampling: bool, at_once: bool
    ) -> None:
        super().__init__()
        self.score_fr = nn.Conv2d(channels["fc7"], num_classes, 1)
        if output_stride <= 16:
            self.upscore2 = Upsampling(num_classes, 2, learn_upsampling)
            self.score_pool4 = nn.Conv2d(channels["pool4"], num_classes, 1)
        if output_stride == 8:
            self.upscore_pool4 = Upsampling(num_classes, 2, learn_upsampling)
            self.score_pool3 = nn.Conv2d(channels["pool3"], num_classes, 1)
        self.upscore = Upsampling(num_classes, output_stride, learn_upsampling)
        self.output_stride = output_stride
        self.scale4, self.scale3 = (0.01, 0.0001) if at_once else (1.0, 1.0)
        self.scores = [module for module in self.children() if isinstance(module, nn.Conv2d)]
        for module in self.scores:  # a new skip starts with the predictions of the network before it
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: dict[str, Tensor], size: Sequence[int]) -> Tensor:
        # The offsets follow from the padding by 100 and the window of fc6: what is cut off is as wide on all sides.
        x = self.score_fr(features["fc7"])
        if self.output_stride <= 16:
            x = self.upscore2(x)
            x = x + crop(self.score_pool4(self.scale4 * features["pool4"]), 5, x.shape[-2:])
        if self.output_stride == 8:
            x = self.upscore_pool4(x)
            x = x + crop(self.score_pool3(self.scale3 * features["pool3"]), 9, x.shape[-2:])
        return crop(self.upscore(x), {32: 19, 16: 27, 8: 31}[self.output_stride], size)


class FCN(SegmentationModule):
    """FCN-32s, FCN-16s or FCN-8s on VGG-16, or torchvision's FCN on a dilated ResNet.

    FCN-8s is trained in stages: FCN-32s, then FCN-16s and FCN-8s with the checkpoint before it as ``weights`` and a
    hundredth of its learning rate; or `at_once`.

    Args:
        num_classes: number of output channels.
        backbone: ``vgg16``, ``resnet50`` or ``resnet101``.
        output_stride: input pixels per score of the finest layer: 32, 16 or 8. For a ResNet torchvision has 8, by
            dilation.
        learn_upsampling: train VGG-16's transposed convolutions; by default they stay bilinear, as in the released
            code.
        at_once: scale VGG-16's ``pool4`` by 0.01 and ``pool3`` by 0.0001 before their scores, so that FCN-8s trains in
            one stage, as in the extended version.
        aux_loss_weight: weight of a second head's loss, on ``layer3`` of a ResNet; 0 builds none.
        base_channels: width of the first stage, 64 in the paper; all others scale with it.
        weights: ``imagenet`` (backbone, with fc6 and fc7), ``coco`` (torchvision's network on a ResNet, 21 VOC
            classes), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    Differs from the paper: `learn_upsampling` trains the last transposed convolution too. The loss is the mean over
    pixels; the released solvers for VGG-16 take the sum, with learning rates of 1e-10 and less.

    Raises:
        UserError: for an unknown backbone or output stride, or an argument that the backbone has no use for.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Literal["vgg16", "resnet50", "resnet101"] = "vgg16",
        output_stride: Literal[32, 16, 8] = 8,
        learn_upsampling: bool = False,
        at_once: bool = False,
        aux_loss_weight: float = 0.0,
        base_channels: int = 64,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if backbone not in ("vgg16", "resnet50", "resnet101") or output_stride not in (32, 16, 8):
            raise UserError(
                f"backbone is vgg16, resnet50 or resnet101, output_stride 32, 16 or 8, got {backbone}, {output_stride}"
            )
        vgg = backbone == "vgg16"
        if (vgg and (aux_loss_weight or weights == "coco")) or (not vgg and (learn_upsampling or at_once)):
            raise UserError(
                "learn_upsampling and at_once are for vgg16, aux_loss_weight and weights: coco for a ResNet, got "
                f"backbone {backbone}"
            )
        self.loss_weights = {"aux": aux_loss_weight}
        self.aux_classifier = None
        self.backbone: VGG16 | ResNet
        self.classifier: nn.Module
        if vgg:
            self.backbone = VGG16(self.in_channels, base_channels)
            self.classifier = SkipClassifier(
                num_classes, self.backbone.channels, output_stride, learn_upsampling, at_once
            )
        else:
            depth = int(backbone.removeprefix("resnet"))
            self.backbone = ResNet(depth, self.in_channels, base_channels, output_stride)
            width, aux_width = self.backbone.channels["layer4"], self.backbone.channels["layer3"]
            self.classifier = classifier_head(width, width // 4, num_classes, nn.Dropout(0.1))
            if aux_loss_weight:
                self.aux_classifier = classifier_head(aux_width, aux_width // 4, num_classes, nn.Dropout(0.1))
        if weights == "imagenet":
            self.backbone.load_imagenet()
        elif weights == "coco":
            last = ("classifier.4.", "aux_classifier.4.")
            load_weights(self, coco_weights(backbone), "COCO", last, optional=("aux_classifier.",))
        elif weights is not None:
            self.load_file(weights)

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Score the image: ``main``, and with a second head ``aux`` in training."""
        features = self.backbone(image)
        if isinstance(self.backbone, VGG16):
            return {"main": self.classifier(features, image.shape[-2:])}  # (N, K, H, W)
        maps = {"main": self.classifier(features["layer4"])}  # (N, K, H/8, W/8)
        if self.aux_classifier is not None and self.training:
            maps["aux"] = self.aux_classifier(features["layer3"])
        return maps

    def load_file(self, path: str) -> None:
        """Load a file of weights; bilinear kernels for another factor or number of classes stay as they are."""
        file, own = read_weights(path, "FCN"), self.state_dict()
        state = {
            key: value
            for key, value in file.state.items()
            if ".upscore" not in key or (key in own and own[key].shape == value.shape)
        }
        skips = [f"classifier.{name}." for name in SKIPS]
        scores = ("classifier.score_", "classifier.4.", "aux_classifier.4.")
        load_weights(self, state, file.source, scores, optional=(*skips, "aux_classifier."))
        self.known = file.known

    def new_layers(self) -> list[nn.Module]:
        """Return the layers that give scores."""
        if isinstance(self.classifier, SkipClassifier):
            return list(self.classifier.scores)
        return [self.classifier, *([] if self.aux_classifier is None else [self.aux_classifier])]


def crop(x: Tensor, border: int, size: Sequence[int]) -> Tensor:
    """Cut ``(..., height, width)`` out of ``(..., H, W)``, `border` pixels from the top and from the left."""
    return x[..., border : border + size[0], border : border + size[1]]


def coco_weights(backbone: str) -> dict[str, Tensor]:
    """Return torchvision's published FCN weights, trained on COCO's images of the 20 VOC classes."""
    weights = {"resnet50": published.FCN_ResNet50_Weights, "resnet101": published.FCN_ResNet101_Weights}[backbone]
    return download(weights.COCO_WITH_VOC_LABELS_V1)
