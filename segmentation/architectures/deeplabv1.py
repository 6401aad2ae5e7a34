"""DeepLab v1 (LargeFOV): VGG-16 kept at stride 8 by dilated (atrous) convolutions.

L.-C. Chen, G. Papandreou, I. Kokkinos, K. Murphy, A. L. Yuille, "Semantic Image Segmentation with Deep Convolutional
Nets and Fully Connected CRFs", ICLR 2015, arXiv 1412.7062.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Batch, SegmentationModule
from ..errors import UserError
from ..weights import load_file
from .backbones.vgg import load_vgg16, vgg_stage


class MultiScale(nn.Module):
    """Score maps from the image and from the first four poolings, each through two layers (section 4.3).

    The paper concatenates these 5 x 128 channels with those of fc7 before the classifier. A 1x1 convolution of a
    concatenation is the sum of one 1x1 convolution per part. So fc8 stays as in the plain network, and these score maps
    are added to its own.

    Args:
        in_channels: channels of the image and of the four poolings.
        channels: width of both layers, 128 in the paper.
        num_classes: number of score maps.
        drop: dropout layer that follows each layer.

    Shape:
        image and poolings at strides 1, 2, 4, 8 and 8 -> ``(N, num_classes, ceil(H / 8), ceil(W / 8))``.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, num_classes: int, drop: type[nn.Dropout] | type[nn.Dropout2d]
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for inputs, stride in zip(in_channels, (8, 4, 2, 1, 1), strict=True):  # all maps come to stride 8
            conv1, conv2 = nn.Conv2d(inputs, channels, 3, stride, padding=1), nn.Conv2d(channels, channels, 1)
            self.branches.append(nn.Sequential(conv1, nn.ReLU(), drop(0.5), conv2, nn.ReLU(), drop(0.5)))
        self.classifier = nn.Conv2d(5 * channels, num_classes, 1, bias=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        features = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        return self.classifier(torch.cat(features, dim=1))


class DeepLabV1(SegmentationModule):
    """VGG-16 with the last two poolings at stride 1, conv5 dilated by 2 and fc6 a 3x3 convolution dilated by 12.

    The loss compares the score maps at stride 8 with every eighth label (section 4.2). With ``fc7_padding=1`` the score
    maps have another size; the loss then interpolates them to the mask.

    Args:
        num_classes: number of output channels.
        fc7_padding: 0 as in the paper; 1 pads the 1x1 convolution fc7, as a widely read blog post does. The score map
            is then two pixels larger than the features.
        dropout: ``elementwise`` as in Caffe, or ``channel`` (``Dropout2d``) as in that post.
        multi_scale: add `MultiScale`, which makes DeepLab-MSc (section 4.3). ``weights`` may be a plain network's.
        train_only_multi_scale: train only the layers that `multi_scale` adds, as the paper does.
        base_channels: width of the first stage, 64 in the paper; all others scale with it.
        weights: ``imagenet`` (torchvision's VGG-16, with fc6 and fc7 subsampled as in section 3.1), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``; score maps have ``ceil(H / 8) x ceil(W / 8)``.

    Differs from the paper: for sizes other than 8k + 1 the last row and column of scores are repeated; the average
    pooling divides by 9 everywhere. The paper does not give strides and dropout of the multi-scale branches; they are
    those that re-implementations report of the released model.

    Raises:
        UserError: for another padding or dropout, `multi_scale` with a padded fc7, or nothing to train.
    """

    def __init__(
        self,
        num_classes: int,
        fc7_padding: Literal[0, 1] = 0,
        dropout: Literal["elementwise", "channel"] = "elementwise",
        multi_scale: bool = False,
        train_only_multi_scale: bool = False,
        base_channels: int = 64,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if fc7_padding not in (0, 1) or dropout not in ("elementwise", "channel"):
            raise UserError(f"fc7_padding is 0 or 1, dropout elementwise or channel, got {fc7_padding}, {dropout}")
        if multi_scale and fc7_padding:
            raise UserError("multi_scale: true needs fc7_padding: 0, as its maps are not padded")
        if train_only_multi_scale and not multi_scale:
            raise UserError("train_only_multi_scale: true needs multi_scale: true, else nothing is trained")
        self.fc7_padding = fc7_padding
        drop = nn.Dropout if dropout == "elementwise" else nn.Dropout2d
        w = base_channels

        self.conv1 = vgg_stage(self.in_channels, w, layers=2)
        self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2 = vgg_stage(w, 2 * w, layers=2)
        self.pool2 = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv3 = vgg_stage(2 * w, 4 * w, layers=3)
        self.pool3 = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv4 = vgg_stage(4 * w, 8 * w, layers=3)
        self.pool4 = nn.MaxPool2d(3, stride=1, padding=1)
        self.conv5 = vgg_stage(8 * w, 8 * w, layers=3, dilation=2)  # pool4 no longer halves, so the filters widen
        self.pool5 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), nn.AvgPool2d(3, stride=1, padding=1))
        self.fc6 = nn.Conv2d(8 * w, 16 * w, 3, padding=12, dilation=12)  # field of view 224 px
        self.fc7 = nn.Conv2d(16 * w, 16 * w, 1, padding=fc7_padding)
        self.fc8 = nn.Conv2d(16 * w, num_classes, 1)
        self.relu = nn.ReLU(inplace=True)
        self.drop6, self.drop7 = drop(0.5), drop(0.5)
        self.multi_scale = None
        if multi_scale:
            self.multi_scale = MultiScale((self.in_channels, w, 2 * w, 4 * w, 8 * w), 2 * w, num_classes, drop)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for classifier in [self.fc8, *([] if self.multi_scale is None else [self.multi_scale.classifier])]:
            nn.init.normal_(classifier.weight, std=0.01)
        if weights == "imagenet":
            self.load_imagenet()
        elif weights is not None:
            load_file(self, weights, ("fc8.", "multi_scale.classifier."), optional=("multi_scale.",))
        if train_only_multi_scale:
            self.requires_grad_(False)
            self.multi_scale.requires_grad_(True)  # type: ignore[union-attr]

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Score every position of the stride-8 feature map."""
        pool1 = self.pool1(self.conv1(image))  # (N, 64, H/2, W/2)
        pool2 = self.pool2(self.conv2(pool1))  # (N, 128, H/4, W/4)
        pool3 = self.pool3(self.conv3(pool2))  # (N, 256, H/8, W/8)
        pool4 = self.pool4(self.conv4(pool3))  # (N, 512, H/8, W/8)
        x = self.pool5(self.conv5(pool4))  # (N, 512, H/8, W/8)
        x = self.drop6(self.relu(self.fc6(x)))  # (N, 1024, H/8, W/8)
        x = self.drop7(self.relu(self.fc7(x)))
        scores = self.fc8(x)  # (N, K, H/8, W/8)
        if self.multi_scale is not None:
            scores = scores + self.multi_scale((image, pool1, pool2, pool3, pool4))
        return {"main": scores}

    def upsample(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """Put score j at pixel 8 j, as in the loss and in Caffe's interpolation."""
        if self.fc7_padding:
            return super().upsample(scores, size)
        grid = [8 * (side - 1) + 1 for side in scores.shape[-2:]]
        scores = F.interpolate(scores, size=grid, mode="bilinear", align_corners=True)
        return F.pad(scores, [0, size[1] - grid[1], 0, size[0] - grid[0]], mode="replicate")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compare the score maps at stride 8 with every eighth label (section 4.2)."""
        if self.fc7_padding:
            return super().losses(batch)
        scores = self.score_maps(self.preprocess(batch["image"]))["main"]
        keys = [key for key in ("mask", "pixel_weight") if key in batch]
        return {"main": self.criterion(scores, {key: batch[key][:, ::8, ::8] for key in keys})}

    def new_layers(self) -> list[nn.Module]:
        """Return the classifier, trained at ten times the rate (section 4.2), and what `multi_scale` adds."""
        return [self.fc8, *([] if self.multi_scale is None else [self.multi_scale])]

    def load_imagenet(self) -> None:
        """Copy VGG-16's convolutions, and a part of its fully connected layers."""
        state = load_vgg16((self.conv1, self.conv2, self.conv3, self.conv4, self.conv5))
        load_fully_connected(self.fc6, self.fc7, state)


def load_fully_connected(fc6: nn.Conv2d, fc7: nn.Conv2d, state: dict[str, Tensor]) -> None:
    """Copy a random quarter of VGG-16's fc6, every third tap of its 7x7 kernel, and of fc7 (section 3.1).

    Args:
        fc6: 512 -> 1024, 3x3.
        fc7: 1024 -> 1024, 1x1.
        state: VGG-16's ``classifier.0`` and ``classifier.3``, of 4096 units each.
    """
    weight6, weight7 = state["classifier.0.weight"].view(4096, 512, 7, 7), state["classifier.3.weight"]
    keep6, keep7 = torch.randperm(4096)[:1024], torch.randperm(4096)[:1024]
    with torch.no_grad():
        fc6.weight.copy_(weight6[keep6][:, :, ::3, ::3])
        fc6.bias.copy_(state["classifier.0.bias"][keep6])  # type: ignore[union-attr]
        fc7.weight.copy_(weight7[keep7][:, keep6, None, None])
        fc7.bias.copy_(state["classifier.3.bias"][keep7])  # type: ignore[union-attr]
