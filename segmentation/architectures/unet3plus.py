"""UNet 3+: every decoder stage sees all five scales of the U-Net.

H. Huang, L. Lin, R. Tong, H. Hu, Q. Zhang, Y. Iwamoto, X. Han, Y.-W. Chen, J. Wu, "UNet 3+: A Full-Scale Connected UNet
for Medical Image Segmentation", ICASSP 2020, arXiv 2004.08790.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Batch, SegmentationModule
from ..errors import UserError
from ..inference import mirror, resize
from ..losses import IGNORE
from ..weights import load_file
from .backbones import conv_bn_relu
from .unet import DoubleConv

ABSENT = 100.0  # taken off the logits of a class that is not in the image: its probability is then 0
FOCUS = 2.0  # gamma of the focal loss (Lin et al., arXiv 1708.02002)
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM (Wang et al., 2003), the finest scale first
WINDOW = [math.exp(-(x**2) / (2 * 1.5**2)) for x in range(-5, 6)]  # its Gaussian window, sigma 1.5
WINDOW = [value / sum(WINDOW) for value in WINDOW]
C1, C2 = 0.01**2, 0.03**2  # its constants
TINY = 1e-12  # keeps a mean over nothing from 0 / 0


def conv_block(in_channels: int, channels: int) -> nn.Sequential:
    """Return a 3x3 convolution with bias, batch norm and ReLU."""
    return nn.Sequential(*conv_bn_relu(in_channels, channels, 3, bias=True))


class FullScaleStage(nn.Module):
    """A decoder stage (equation 1): the maps of all five scales are brought to its scale and fused.

    Args:
        stage: 1 (full resolution) to 4.
        in_channels: channels of the five maps, the finest first: encoder 1 to `stage`, then the decoder's, then the
            bottom's.
        channels: number of channels that each map contributes, 64 in the paper.

    Shape:
        five maps, each half as large as the map before -> ``(N, 5 * channels, h, w)`` at the size of map `stage`.
    """

    def __init__(self, stage: int, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.stage = stage
        self.branches = nn.ModuleList([conv_block(inputs, channels) for inputs in in_channels])
        self.fuse = conv_block(5 * channels, 5 * channels)

    def forward(self, *maps: Tensor) -> Tensor:
        finer = [F.max_pool2d(x, 2 ** (self.stage - k)) for k, x in enumerate(maps[: self.stage - 1], start=1)]
        coarser = [upsample(x, 2**k) for k, x in enumerate(maps[self.stage :], start=1)]
        scaled = [*finer, maps[self.stage - 1], *coarser]
        return self.fuse(torch.cat([branch(x) for branch, x in zip(self.branches, scaled, strict=True)], dim=1))


class UNet3Plus(SegmentationModule):
    """UNet 3+: full-scale skip connections, deep supervision, a hybrid loss, and a class-guided module if wanted.

    Args:
        num_classes: number of output channels.
        base_channels: width of the first level, doubled at each of the four levels below, and the number of channels
            that each map gives to a decoder stage; 64 in the paper.
        deep_supervision: train an output at every scale; evaluation computes the finest one alone.
        class_guidance: build the classification-guided module. In the paper two outputs at the bottom tell whether an
            image has the organ, and their argmax, 0 or 1, multiplies the probability map. Here every class has such a
            pair of outputs; with one class this is the paper's module.
        hybrid_loss: train with the sum of focal, MS-SSIM and IoU loss of every output; ``class_weights`` and a batch's
            ``pixel_weight`` then weigh the focal loss. False, or an injected ``loss``, trains with that loss alone.
        weights: a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    Differs from the paper: images are mirrored until their sides are multiples of 16. Several classes share a softmax.
    The gate subtracts from a logit, since a logit times 0 would mean a probability of 0.5; if all classes are gated,
    the softmax stays as it was. It works in evaluation only: argmax has no gradient, and a wrong gate would mislead the
    decoder. MS-SSIM has its luminance term at the coarsest scale alone, as in Wang et al., and fewer scales on crops
    below 176 pixels. The paper gives neither gamma of the focal loss (here 2) nor the module's dropout (here 0.5, as in
    the authors' code).

    Raises:
        UserError: if `class_weights` are not one per class.
    """

    def __init__(
        self,
        num_classes: int,
        base_channels: int = 64,
        deep_supervision: bool = True,
        class_guidance: bool = False,
        hybrid_loss: bool = True,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        class_weights = kwargs.get("class_weights")
        if class_weights is not None and len(class_weights) != max(2, num_classes):
            raise UserError(f"class_weights has {len(class_weights)} values for {max(2, num_classes)} classes")
        self.hybrid_loss = hybrid_loss and kwargs.get("loss") is None
        w = [base_channels * 2**level for level in range(5)]  # 64, 128, 256, 512, 1024
        d = 5 * base_channels  # 320

        self.down1 = DoubleConv(self.in_channels, w[0], w[0], padding=1, batch_norm=True, conv_bias=True)
        self.down2 = DoubleConv(w[0], w[1], w[1], padding=1, batch_norm=True, conv_bias=True)
        self.down3 = DoubleConv(w[1], w[2], w[2], padding=1, batch_norm=True, conv_bias=True)
        self.down4 = DoubleConv(w[2], w[3], w[3], padding=1, batch_norm=True, conv_bias=True)
        self.bottom = DoubleConv(w[3], w[4], w[4], padding=1, batch_norm=True, conv_bias=True)
        self.pool = nn.MaxPool2d(2)
        self.up4 = FullScaleStage(4, (w[0], w[1], w[2], w[3], w[4]), base_channels)
        self.up3 = FullScaleStage(3, (w[0], w[1], w[2], d, w[4]), base_channels)
        self.up2 = FullScaleStage(2, (w[0], w[1], d, d, w[4]), base_channels)
        self.up1 = FullScaleStage(1, (w[0], d, d, d, w[4]), base_channels)
        self.classifier = nn.Conv2d(d, num_classes, 3, padding=1)
        sides = (d, d, d, w[4]) if deep_supervision else ()
        self.sides = nn.ModuleList([nn.Conv2d(channels, num_classes, 3, padding=1) for channels in sides])
        self.guidance = None
        if class_guidance:
            pairs = nn.Conv2d(w[4], 2 * num_classes, 1)  # scores of absence, then of presence
            self.guidance = nn.Sequential(nn.Dropout(0.5), pairs, nn.AdaptiveMaxPool2d(1), nn.Flatten())

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if weights is not None:
            load_file(self, weights, ("classifier.", "sides.", "guidance."), optional=("sides.", "guidance."))

    compiled = "network"

    def network(self, image: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Run the network of Figure 1.

        Returns:
            the score maps ``main`` and, in training, ``side2`` to ``side5``; and the scores of the classes' absence,
            then of their presence, ``(N, 2 K)``, or None without the classification-guided module.
        """
        height, width = image.shape[-2:]
        x1 = self.down1(mirror(image, 0, -height % 16, 0, -width % 16))  # (N, 64, H, W), multiples of 16 from here on
        x2 = self.down2(self.pool(x1))  # (N, 128, H/2, W/2)
        x3 = self.down3(self.pool(x2))  # (N, 256, H/4, W/4)
        x4 = self.down4(self.pool(x3))  # (N, 512, H/8, W/8)
        x5 = self.bottom(self.pool(x4))  # (N, 1024, H/16, W/16)
        d4 = self.up4(x1, x2, x3, x4, x5)  # (N, 320, H/8, W/8)
        d3 = self.up3(x1, x2, x3, d4, x5)  # (N, 320, H/4, W/4)
        d2 = self.up2(x1, x2, d3, d4, x5)  # (N, 320, H/2, W/2)
        d1 = self.up1(x1, d2, d3, d4, x5)  # (N, 320, H, W)
        maps = {"main": self.classifier(d1)}  # (N, K, H, W)
        if self.training:
            for level, (side, x) in enumerate(zip(self.sides, (d2, d3, d4, x5), strict=False), start=1):
                maps[f"side{level + 1}"] = upsample(side(x), 2**level)
        maps = {name: scores[..., :height, :width] for name, scores in maps.items()}
        return maps, None if self.guidance is None else self.guidance(x5)

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Run the network; in evaluation the classification-guided module gates the classes that it finds absent."""
        maps, pairs = self.network(image)
        if pairs is not None and not self.training:
            absent = 1 - pairs.unflatten(1, (2, -1)).argmax(dim=1)  # (N, K)
            maps["main"] = maps["main"] - ABSENT * absent[:, :, None, None]
        return maps

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of every output, in three terms if hybrid, and that of the classification-guided module."""
        maps, pairs = self.network(self.preprocess(batch["image"]))
        terms: dict[str, Tensor] = {}
        for name, scores in maps.items():
            if self.hybrid_loss:
                hybrid = self.hybrid(scores, batch["mask"], batch.get("pixel_weight"))
                terms |= {f"{name}_{term}": value for term, value in hybrid.items()}
            else:
                terms[name] = self.criterion(scores, batch)
        if pairs is not None:
            terms["guidance"] = guidance_loss(pairs, batch["mask"])
        return terms

    def hybrid(self, scores: Tensor, mask: Tensor, pixel_weight: Tensor | None = None) -> dict[str, Tensor]:
        """Return the three terms of the hybrid loss, which look at pixels, at patches and at the whole map."""
        logits = resize(scores, mask.shape[-2:])
        weight = self.loss.weight_of(mask)  # type: ignore[operator]  # (N, H, W), 0 where ignored
        weight = weight if pixel_weight is None else weight * pixel_weight
        probs, target, labelled = self.probabilities(logits), one_hot(mask, self.num_classes), mask[:, None] != IGNORE
        return {
            "focal": focal_loss(logits, mask, weight),
            "ms_ssim": ms_ssim_loss(probs, target, labelled),
            "iou": iou_loss(probs, target, labelled),
        }

    def evaluation_loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of the full-resolution output."""
        terms = self.hybrid(logits, mask).values() if self.hybrid_loss else [super().evaluation_loss(logits, mask)]
        return torch.stack(list(terms)).sum()

    def new_layers(self) -> list[nn.Module]:
        """Return the outputs of all scales and the classification-guided module."""
        return [self.classifier, self.sides, *([] if self.guidance is None else [self.guidance])]


def upsample(x: Tensor, factor: int) -> Tensor:
    """Interpolate to `factor` times the size: bilinear, corners not aligned."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def one_hot(mask: Tensor, num_classes: int) -> Tensor:
    """Turn labels ``(N, H, W)`` into ``(N, K, H, W)`` of 0 and 1, all 0 where ignored; a single class is label 1."""
    classes = torch.arange(num_classes, device=mask.device) if num_classes > 1 else mask.new_ones(1)
    return (mask[:, None] == classes[:, None, None]).float()


def focal_loss(logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean of cross-entropy times (1 - p) ** gamma, where p is the true class's probability."""
    logits, label = logits.float(), mask.masked_fill(mask == IGNORE, 0)
    if logits.shape[1] == 1:
        entropy = F.binary_cross_entropy_with_logits(logits[:, 0], label.float(), reduction="none")
    else:
        entropy = F.cross_entropy(logits, label, reduction="none")
    loss = (1 - torch.exp(-entropy)) ** FOCUS * entropy
    return (loss * weight).sum() / weight.sum().clamp(min=TINY)


def ms_ssim_loss(probs: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
    """Return 1 - MS-SSIM, the mean over images and classes; labelled is bool ``(N, 1, H, W)``.

    Ignored pixels count like pixels outside the image: windows, and the 2x2 pixels that become one at the next scale,
    take means and variances over labelled pixels only, and a window counts by its share of labelled pixels.
    """
    p, g, share = probs, target, labelled.to(probs.dtype)  # (N, K, H, W) twice, (N, 1, H, W)
    missing = [max(0, len(WINDOW) - side) for side in p.shape[-2:]]
    if any(missing):  # an image smaller than the window
        p, g, share = (F.pad(x, (0, missing[1], 0, missing[0])) for x in (p, g, share))
    count = sum(min(p.shape[-2:]) >> scale >= len(WINDOW) for scale in range(len(SCALES)))
    exponents = [exponent * sum(SCALES) / sum(SCALES[:count]) for exponent in SCALES[:count]]
    similarity = torch.ones_like(p[..., 0, 0])  # (N, K)
    for scale, exponent in enumerate(exponents):
        seen = blur(share).clamp(min=TINY)
        mean_p, mean_g, pp, gg, pg = (blur(x * share) / seen for x in (p, g, p * p, g * g, p * g))
        ssim = (2 * (pg - mean_p * mean_g) + C2) / (pp - mean_p**2 + gg - mean_g**2 + C2)
        if scale == count - 1:
            ssim = ssim * (2 * mean_p * mean_g + C1) / (mean_p**2 + mean_g**2 + C1)
        ssim = (ssim * seen).sum(dim=(-2, -1)) / seen.sum(dim=(-2, -1))
        similarity = similarity * ssim.clamp(min=1e-6) ** exponent  # no root of a negative
        pooled = F.avg_pool2d(share, 2).clamp(min=TINY)
        p, g, share = F.avg_pool2d(p * share, 2) / pooled, F.avg_pool2d(g * share, 2) / pooled, pooled
    return mean_of_labelled(1 - similarity, labelled)


def blur(x: Tensor) -> Tensor:
    """Return the Gaussian mean of every whole window, by plain sums: TF32 and autocast round too coarsely for C2."""
    for dim in (-2, -1):
        length = x.shape[dim] - len(WINDOW) + 1
        x = sum(value * x.narrow(dim, start, length) for start, value in enumerate(WINDOW))  # type: ignore[assignment]
    return x


def iou_loss(probs: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
    """Return 1 - intersection / union of probability and target, the mean over the classes in each image."""
    intersection = (probs * target).sum(dim=(-2, -1))  # (N, K)
    union = (probs * labelled + target).sum(dim=(-2, -1)) - intersection
    occurs = target.amax(dim=(-2, -1))
    return ((1 - intersection / union.clamp(min=1)) * occurs).sum() / occurs.sum().clamp(min=1)


def guidance_loss(pairs: Tensor, mask: Tensor) -> Tensor:
    """Return the binary cross-entropy of every class's two scores, absent and present, with each image's labels."""
    present = one_hot(mask, pairs.shape[1] // 2).amax(dim=(-2, -1))  # (N, K)
    entropy = F.binary_cross_entropy_with_logits(pairs.float(), torch.cat([1 - present, present], 1), reduction="none")
    return mean_of_labelled(entropy, mask != IGNORE)


def mean_of_labelled(loss: Tensor, labelled: Tensor) -> Tensor:
    """Return the mean of ``(N, K)`` over the images that have a label at all."""
    counts = labelled.flatten(1).any(dim=1).float()  # (N,)
    return (loss.mean(dim=1) * counts).sum() / counts.sum().clamp(min=1)
