"""U-Net: a contracting path that gathers context, and an expanding path that puts it back in place.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
arXiv 1505.04597.

The paper's network is ``UNet(num_classes, padding="valid", batch_norm=False)``. Its convolutions are not padded, so a
572 x 572 image gives 388 x 388 logits, and `OverlapTile` covers a large image with such tiles. By default `UNet` has
padding and batch norm, as most people train it today; paths, widths and skip connections are the paper's.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Batch, SegmentationModule
from ..errors import UserError
from ..inference import Block, Read, Tiled, mirror, read_mirrored
from ..weights import arguments_from_weights, load_file

BORDER = 92  # pixels that the valid network loses on each side: 572 -> 388
STEP, REST = 16, 12  # the valid network takes sides of 16 n + 12 pixels, so that all four poolings see even sides


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each followed by ReLU, with batch norm before the ReLU if wanted.

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
        in_channels: channels of the lower level.
        skip_channels: channels of the contracting path.
        channels: channels of the result.
        bilinear: interpolate, corners aligned; by default a transposed 2x2 convolution also halves the channels.
        padding: padding of the convolutions: 1, or 0 in the valid network.
        **conv: see `DoubleConv`.

    Shape:
        ``(N, in_channels, h, w)`` and skip ``(N, skip_channels, H, W)`` -> ``(N, channels, H, W)``; in the valid
        network ``(N, channels, 2h - 4, 2w - 4)``.
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

    The valid network loses 92 pixels on each side. So `forward` mirrors the image at its borders first (Figure 2), and
    `losses` compares the logits with the centre of the mask.

    Args:
        num_classes: number of output channels.
        base_channels: width of the first level, doubled at each of the four levels below; 64 in the paper.
        padding: ``same``, or ``valid`` as in the paper.
        batch_norm: add batch norm after every convolution; the paper has none.
        conv_bias: bias of the 3x3 convolutions; None adds one exactly where no batch norm follows.
        up: ``transposed`` 2x2 convolutions as in the paper, or ``bilinear`` interpolation; the lowest level then keeps
            the width of the level above, which leaves 17 of 31 million parameters. None takes what `weights` need,
            otherwise the paper's.
        dropout: rate after the two lowest levels of the contracting path (section 3.1, which gives no rate).
        pixel_shuffle: side of the blocks of pixels that the network sees as one position, by pixel-unshuffle before
            and pixel-shuffle after it (Shi et al., arXiv 1609.05158). 2 takes a quarter of the time; the paper has 1.
        weights: a path, or None.
        **kwargs: see `SegmentationModule`.

    Shape:
        image ``(N, C, H, W)`` -> logits ``(N, num_classes, H, W)``.

    A batch's ``pixel_weight`` ``(N, H, W)``, such as the paper's map of the gaps between cells (equation 2), weighs the
    pixels of the loss.

    Differs from the paper: an image is seen at once, unless `inference` is `OverlapTile`; transposed convolutions keep
    torch's initialisation.

    Raises:
        UserError: for an unknown `padding` or `up`, or a valid network with `pixel_shuffle`.
    """

    @arguments_from_weights
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
        up = up or "transposed"
        if padding not in ("same", "valid") or up not in ("transposed", "bilinear"):
            raise UserError(f"padding is same or valid, up is transposed or bilinear, got {padding}, {up}")
        if pixel_shuffle < 1 or (pixel_shuffle > 1 and padding == "valid"):
            raise UserError(f"pixel_shuffle must be 1 or more, and 1 with padding valid, got {pixel_shuffle}")
        self.padding, self.pixel_shuffle = padding, pixel_shuffle
        pad, bilinear = int(padding == "same"), up == "bilinear"
        conv = {"batch_norm": batch_norm, "conv_bias": not batch_norm if conv_bias is None else conv_bias}
        w = [base_channels * 2**level for level in range(5)]  # 64, 128, 256, 512, 1024
        bottom = w[4] // 2 if bilinear else w[4]
        out = [w[0], *(width // 2 if bilinear else width for width in w[1:4])]  # of the expanding path
        block = pixel_shuffle**2  # pixels that become channels

        self.down1 = DoubleConv(self.in_channels * block, w[0], w[0], pad, **conv)
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
        self.classifier = nn.Conv2d(out[0], num_classes * block, 1)

        for module in self.modules():  # Gaussian with standard deviation sqrt(2 / N), section 3
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if weights is not None:
            load_file(self, weights, new_layers=("classifier.",))

    def network(self, image: Tensor) -> Tensor:
        """Run the network of Figure 1; the comments give the sizes for the paper's 572 x 572 input."""
        x1 = self.down1(image)  # (N, 64, 568, 568)
        x2 = self.down2(self.pool(x1))  # (N, 128, 280, 280)
        x3 = self.down3(self.pool(x2))  # (N, 256, 136, 136)
        x4 = self.drop(self.down4(self.pool(x3)))  # (N, 512, 64, 64)
        x = self.drop(self.bottom(self.pool(x4)))  # (N, 1024, 28, 28)
        x = self.up4(x, x4)  # (N, 512, 52, 52)
        x = self.up3(x, x3)  # (N, 256, 100, 100)
        x = self.up2(x, x2)  # (N, 128, 196, 196)
        x = self.up1(x, x1)  # (N, 64, 388, 388)
        return self.classifier(x)  # (N, K, 388, 388)

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Run the network, on blocks of pixels with `pixel_shuffle`."""
        scores = self.network(F.pixel_unshuffle(image, self.pixel_shuffle))
        return {"main": F.pixel_shuffle(scores, self.pixel_shuffle)}

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits at the image's size. The image is mirrored at its borders as far as the network needs."""
        height, width = image.shape[-2:]
        if self.padding == "valid":
            below, right = (BORDER + missing(side + 2 * BORDER) for side in (height, width))
            image = mirror(image, BORDER, below, BORDER, right)
        else:  # whole blocks, and 16 of them at least for four poolings
            block, least = self.pixel_shuffle, 16 * self.pixel_shuffle
            below, right = (max(-side % block, least - side) for side in (height, width))
            image = mirror(image, 0, below, 0, right)
        return self.score_maps(image)["main"][..., :height, :width]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss. The valid network sees the bare crop, and the loss compares with the mask's centre."""
        image = self.preprocess(batch["image"])
        if self.padding == "same":
            return {"main": self.criterion(self(image), batch)}
        side = min(image.shape[-2:])
        if side < 188 or any(missing(length) for length in image.shape[-2:]):
            raise UserError(
                f"the valid U-Net trains on crops of 16 n + 12 pixels, 188 or more, such as 572; got "
                f"{image.shape[-2]} x {image.shape[-1]}: set data.crop_size"
            )
        logits = self.score_maps(image)["main"]
        keys = [key for key in ("mask", "pixel_weight") if key in batch]
        return {"main": self.criterion(logits, {key: centre_crop(batch[key], *logits.shape[-2:]) for key in keys})}

    def new_layers(self) -> list[nn.Module]:
        """Return the last 1x1 convolution."""
        return [self.classifier]


class OverlapTile(Tiled):
    """The overlap-tile strategy (Figure 2), for the valid network alone.

    A tile is read with the border that the network loses; outside the image that border is mirrored. Tiles lie on the
    grid of the poolings. So, with transposed convolutions on the way up, the logits are those of the whole image.

    Args:
        crop: side of the network's input in pixels, 16 n + 12; 572 in the paper.

    Raises:
        UserError: for another crop; in use, for a network that loses no border.
    """

    def __init__(self, crop: int = 572) -> None:
        if crop < 204 or missing(crop):
            raise UserError(f"crop of an OverlapTile is 16 n + 12 pixels, 204 or more, such as 572, got {crop}")
        self.crop = crop

    def blocks(self, model: Any, read: Read, height: int, width: int) -> Iterator[Block]:
        """Yield the tiles' logits, see `Tiled`.

        Raises:
            UserError: if the network loses no border.
        """
        if not isinstance(model, UNet) or model.padding == "same":
            raise UserError(
                f"OverlapTile is for the valid U-Net, and this {type(model).__name__} loses no border: set "
                "model.inference to SlidingWindow"
            )
        step = (self.crop - 2 * BORDER) // STEP * STEP  # 384 of the 388 pixels that come out
        for top in range(0, height, step):
            for left in range(0, width, step):
                h, w = min(step, height - top), min(step, width - left)
                below, right = (BORDER + -side % STEP + 4 for side in (h, w))
                rows, columns = (top - BORDER, top + h + below), (left - BORDER, left + w + right)
                pixels = read_mirrored(read, height, width, rows, columns)
                yield top, left, model.score_maps(pixels)["main"][..., :h, :w].float()


def missing(side: int) -> int:
    """Return the number of pixels that a side lacks to be 16 n + 12, as the valid network needs it."""
    return (REST - side) % STEP


def centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    """Cut the middle ``(..., height, width)`` out of ``(..., H, W)``."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]
