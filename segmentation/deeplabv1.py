"""DeepLab v1 (LargeFOV): VGG-16 kept at an eighth of the resolution by holes in its filters.

L.-C. Chen, G. Papandreou, I. Kokkinos, K. Murphy, A. L. Yuille, "Semantic Image Segmentation with Deep Convolutional
Nets and Fully Connected CRFs", ICLR 2015, arXiv 1412.7062.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import vgg16_imagenet, vgg_stage
from .base import Batch, SegmentationModule
from .weights import load_weights, read_weights


class DeepLabV1(SegmentationModule):
    """VGG-16 with the last two poolings at stride 1, conv5 dilated by 2 and fc6 a 3x3 convolution dilated by 12.

    The loss compares score maps at an eighth of the resolution with labels subsampled by 8 (section 4.2). Where a map
    has another size than those labels (``fc7_padding=1``), it is interpolated to the mask, as the blog post does.

    Args:
        num_classes: output channels.
        fc7_padding: 0 as in the paper; 1 pads the 1x1 convolution fc7, which makes the score map two pixels larger
            than the features and is what a widely read blog post does.
        dropout: ``elementwise`` as in Caffe, or ``channel`` (``Dropout2d``) as in that post.
        weights: ``imagenet`` (torchvision's VGG-16, fc6 and fc7 subsampled as in section 3.1), a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``; score maps have ``ceil(H / 8) x ceil(W / 8)``.

    Differs from the paper: sizes other than 8k + 1 repeat the last row and column of scores; the average pooling
    divides by 9 everywhere; batch 20 of the paper, while its released solver has 30.

    Raises:
        ValueError: for another padding or kind of dropout, or ImageNet weights with other than three channels.
    """

    def __init__(
        self,
        num_classes: int,
        fc7_padding: Literal[0, 1] = 0,
        dropout: Literal["elementwise", "channel"] = "elementwise",
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if fc7_padding not in (0, 1) or dropout not in ("elementwise", "channel"):
            raise ValueError(f"fc7_padding is 0 or 1, dropout elementwise or channel, got {fc7_padding}, {dropout}")
        self.fc7_padding = fc7_padding
        drop = nn.Dropout if dropout == "elementwise" else nn.Dropout2d

        self.conv1 = vgg_stage(self.in_channels, 64, layers=2)
        self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2 = vgg_stage(64, 128, layers=2)
        self.pool2 = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv3 = vgg_stage(128, 256, layers=3)
        self.pool3 = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv4 = vgg_stage(256, 512, layers=3)
        self.pool4 = nn.MaxPool2d(3, stride=1, padding=1)
        self.conv5 = vgg_stage(512, 512, layers=3, dilation=2)  # pool4 no longer halves, so the filters widen
        self.pool5 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), nn.AvgPool2d(3, stride=1, padding=1))
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=12, dilation=12)  # field of view 224 px
        self.fc7 = nn.Conv2d(1024, 1024, 1, padding=fc7_padding)
        self.fc8 = nn.Conv2d(1024, num_classes, 1)
        self.relu = nn.ReLU(inplace=True)
        self.drop6, self.drop7 = drop(0.5), drop(0.5)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.fc8.weight, std=0.01)
        if weights == "imagenet":
            self.load_imagenet()
        elif weights is not None:
            load_weights(self, read_weights(weights), weights, heads=("fc8.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Score every position of the stride-8 feature map."""
        x = self.pool1(self.conv1(image))  # (N, 64, H/2, W/2)
        x = self.pool2(self.conv2(x))  # (N, 128, H/4, W/4)
        x = self.pool3(self.conv3(x))  # (N, 256, H/8, W/8)
        x = self.pool4(self.conv4(x))  # (N, 512, H/8, W/8)
        x = self.pool5(self.conv5(x))  # (N, 512, H/8, W/8)
        x = self.drop6(self.relu(self.fc6(x)))  # (N, 1024, H/8, W/8)
        x = self.drop7(self.relu(self.fc7(x)))
        return {"main": self.fc8(x)}

    def forward(self, image: Tensor) -> Tensor:
        """Logits at the image's size: score j lies at pixel 8 j, as in the loss and in Caffe's interpolation."""
        if self.fc7_padding:
            return super().forward(image)
        height, width = image.shape[-2:]
        scores = self.score_maps(image)["main"]  # (N, K, ceil(H / 8), ceil(W / 8))
        grid = [8 * (side - 1) + 1 for side in scores.shape[-2:]]
        scores = F.interpolate(scores, size=grid, mode="bilinear", align_corners=True)
        return F.pad(scores, [0, width - grid[1], 0, height - grid[0]], mode="replicate")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy at stride 8 against every eighth label (section 4.2)."""
        if self.fc7_padding:
            return super().losses(batch)
        scores = self.score_maps(self.preprocess(batch["image"]))["main"]
        return {"main": self.loss(scores, batch["mask"][:, ::8, ::8])}

    def heads(self) -> list[nn.Module]:
        """The classifier, trained at ten times the rate (section 4.2)."""
        return [self.fc8]

    def load_imagenet(self) -> None:
        """Take VGG-16's convolutions, and a random quarter of fc6 (every third tap of 7x7) and fc7 (section 3.1)."""
        if self.in_channels != 3:
            raise ValueError(f"ImageNet weights are for 3 channels, the model has in_channels {self.in_channels}")
        state = vgg16_imagenet()
        stages = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5)
        convs = [layer for stage in stages for layer in stage if isinstance(layer, nn.Conv2d)]
        names = sorted({int(key.split(".")[1]) for key in state if key.startswith("features.")})
        with torch.no_grad():
            for conv, name in zip(convs, names, strict=True):
                conv.weight.copy_(state[f"features.{name}.weight"])
                conv.bias.copy_(state[f"features.{name}.bias"])  # type: ignore[union-attr]
            fc6, fc7 = state["classifier.0.weight"].view(4096, 512, 7, 7), state["classifier.3.weight"]
            keep6, keep7 = torch.randperm(4096)[:1024], torch.randperm(4096)[:1024]
            self.fc6.weight.copy_(fc6[keep6][:, :, ::3, ::3])
            self.fc6.bias.copy_(state["classifier.0.bias"][keep6])  # type: ignore[union-attr]
            self.fc7.weight.copy_(fc7[keep7][:, keep6, None, None])
            self.fc7.bias.copy_(state["classifier.3.bias"][keep7])  # type: ignore[union-attr]
