"""U-Net: a contracting path that gathers context and an expanding path that puts it back in place.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
arXiv 1505.04597.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Batch, SegmentationModule
from ..errors import UserError
from ..inference import mirror
from ..weights import Weights, load_weights, read_weights

BORDER = 92  # pixels that the valid network loses on each side: 572 -> 388


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with ReLU and, if wanted, batch norm before it.

    Shape:
        ``(N, in_channels, h, w)`` -> ``(N, channels, h, w)``; with padding 0 both sides are 4 pixels shorter.
    """

    def __init__(
        self, in_channels: int, middle: int, channels: int, padding: int, batch_norm: bool, conv_bias: bool
    ) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((in_channels, middle), (middle, channels)):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=padding, bias=conv_bias))
            layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Up(nn.Module):
    """Double the resolution and join the features of the contracting path.

    Args:
        in_channels: of the lower level; half of them come up.
        skip_channels: of the contracting path.
        channels: of the result.
        bilinear: interpolate (corners aligned) and keep `in_channels`; else a transposed 2x2 convolution halves them.

    Shape:
        ``(N, in_channels, h, w)`` and skip ``(N, skip_channels, H, W)`` -> ``(N, channels, H, W)``, or two
        convolutions' border less than ``2h x 2w`` in the valid network.
    """

    def __init__(
        self, in_channels: int, skip_channels: int, channels: int, bilinear: bool, padding: int, **conv: bool
    ) -> None:
        super().__init__()
        self.padding = padding
        up_channels = in_channels if bilinear else in_channels // 2
        self.up: nn.Module = (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            if bilinear
            else nn.ConvTranspose2d(in_channels, up_channels, 2, stride=2)
        )
        joined = up_channels + skip_channels
        self.conv = DoubleConv(joined, joined // 2, channels, padding, **conv)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        if self.padding:  # odd sizes: bring the map that came up to the skip's size
            down, right = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        else:
            skip = centre_crop(skip, x.shape[-2], x.shape[-1])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(SegmentationModule):
    """U-Net, by default padded and with batch norm; ``padding="valid", batch_norm=False`` is the paper's.

    The valid network loses 92 pixels on each side, so `forward` mirrors the image at its borders first (Figure 2) and
    `losses` compares with the centre of the mask.

    Args:
        num_classes: output channels.
        base_channels: width of the first level, doubled at each of the four below; 64 in the paper.
        padding: ``same``, or ``valid`` as in the paper.
        batch_norm: normalise after every convolution; the paper has none.
        conv_bias: bias of the 3x3 convolutions; None has one exactly where no batch norm follows.
        up: ``transposed`` 2x2 convolutions as in the paper, or ``bilinear`` interpolation, whose lowest level keeps
            the width of the one above (which makes 17 of 31 million parameters); None takes what `weights` need, else
            the paper's.
        dropout: after the two lowest levels of the contracting path (section 3.1, which gives no rate).
        pixel_shuffle: work on blocks of this many pixels squared: pixel-unshuffle before the network and
            pixel-shuffle after it (Shi et al., arXiv 1609.05158), a quarter of the cost at 2 with no pixel dropped;
            1 as in the paper.
        weights: a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    A batch's ``weight`` ``(N, H, W)``, as the paper's map that thickens the gaps between cells (equation 2), weighs the
    pixels of the loss.

    Differs from the paper: an image is taken whole, mirrored at its borders, unless `inference` is `OverlapTile`, which
    tiles it as the paper does; transposed convolutions keep torch's initialisation.

    Raises:
        UserError: for an unknown padding or way up, or a valid network with `pixel_shuffle`.
    """

    def __init__(
        self,
        num_classes: int,
        base_channels: int = 64,
        padding: Literal["same", "valid"] = "same",
        batch_norm: bool = True,
        conv_bias: bool | None = None,
        up: Literal["transposed", "bilinear"] | None = None,
        dropout: float = 0.0,
        pixel_shuffle: int = 1,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        file = Weights() if weights is None else read_weights(weights, "UNet")
        up = up or file.arguments.get("up") or "transposed"
        self.hparams.update(up=up)  # a checkpoint builds the same network without the file
        if padding not in ("same", "valid") or up not in ("transposed", "bilinear"):
            raise UserError(f"padding is same or valid, up is transposed or bilinear, got {padding}, {up}")
        if pixel_shuffle < 1 or (pixel_shuffle > 1 and padding == "valid"):
            raise UserError(f"pixel_shuffle must be 1 or more, and 1 with padding valid, got {pixel_shuffle}")
        self.padding, self.pixel_shuffle = padding, pixel_shuffle
        self.border = BORDER if padding == "valid" else 0
        pad, bilinear = int(padding == "same"), up == "bilinear"
        conv = {"batch_norm": batch_norm, "conv_bias": not batch_norm if conv_bias is None else conv_bias}
        w = [base_channels * 2**level for level in range(5)]  # 64, 128, 256, 512, 1024
        bottom = w[4] // 2 if bilinear else w[4]
        out = [width // 2 if bilinear else width for width in w[:4]]  # of the expanding path
        out[0] = w[0]

        self.down1 = DoubleConv(self.in_channels * pixel_shuffle**2, w[0], w[0], pad, **conv)
        self.down2 = DoubleConv(w[0], w[1], w[1], pad, **conv)
        self.down3 = DoubleConv(w[1], w[2], w[2], pad, **conv)
        self.down4 = DoubleConv(w[2], w[3], w[3], pad, **conv)
        self.bottom = DoubleConv(w[3], bottom, bottom, pad, **conv)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(dropout)
        self.up4 = Up(bottom, w[3], out[3], bilinear, pad, **conv)
        self.up3 = Up(out[3], w[2], out[2], bilinear, pad, **conv)
        self.up2 = Up(out[2], w[1], out[1], bilinear, pad, **conv)
        self.up1 = Up(out[1], w[0], out[0], bilinear, pad, **conv)
        self.classifier = nn.Conv2d(out[0], num_classes * pixel_shuffle**2, 1)

        for module in self.modules():  # Gaussian with standard deviation sqrt(2 / N), section 3
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if weights is not None:
            load_weights(self, file.state, file.source, heads=("classifier.",))

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """The network of Figure 1; the comments give the sizes of the paper's 572 x 572 input."""
        x1 = self.down1(F.pixel_unshuffle(image, self.pixel_shuffle))  # (N, 64, 568, 568)
        x2 = self.down2(self.pool(x1))  # (N, 128, 280, 280)
        x3 = self.down3(self.pool(x2))  # (N, 256, 136, 136)
        x4 = self.drop(self.down4(self.pool(x3)))  # (N, 512, 64, 64)
        x = self.drop(self.bottom(self.pool(x4)))  # (N, 1024, 28, 28)
        x = self.up4(x, x4)  # (N, 512, 52, 52)
        x = self.up3(x, x3)  # (N, 256, 100, 100)
        x = self.up2(x, x2)  # (N, 128, 196, 196)
        x = self.up1(x, x1)  # (N, 64, 388, 388)
        return {"main": F.pixel_shuffle(self.classifier(x), self.pixel_shuffle)}  # (N, K, 388, 388)

    def forward(self, image: Tensor) -> Tensor:
        """Logits at the image's size, for any size; what the arithmetic needs around it is mirrored."""
        height, width = image.shape[-2:]
        if self.padding == "valid":  # sizes of 12 more than a multiple of 16 keep all poolings even
            below, right = (BORDER + (-(side + 2 * BORDER - 12)) % 16 for side in (height, width))
            image = mirror(image, BORDER, below, BORDER, right)
        else:  # four poolings need 16 blocks at least; whole blocks where there are several pixels to a block
            block, least = self.pixel_shuffle, 16 * self.pixel_shuffle
            below, right = (max(-side % block, least - side) for side in (height, width))
            image = mirror(image, 0, below, 0, right)
        return self.score_maps(image)["main"][..., :height, :width]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy; the valid network sees the bare crop and is held against the mask's centre."""
        image = self.preprocess(batch["image"])
        if self.padding == "same":
            return {"main": self.criterion(self(image), batch)}
        side = min(image.shape[-2:])
        if side < 188 or any((length - 12) % 16 for length in image.shape[-2:]):
            raise UserError(
                f"the valid U-Net trains on crops of 16 n + 12 pixels, 188 or more, such as 572; got "
                f"{image.shape[-2]} x {image.shape[-1]}: set data.crop_size"
            )
        logits = self.score_maps(image)["main"]
        keys = [key for key in ("mask", "pixel_weight") if key in batch]
        return {"main": self.criterion(logits, {key: centre_crop(batch[key], *logits.shape[-2:]) for key in keys})}

    def new_layers(self) -> list[nn.Module]:
        """The last 1x1 convolution."""
        return [self.classifier]


def centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    """Cut the middle ``(..., height, width)`` out of ``(..., H, W)``."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]
