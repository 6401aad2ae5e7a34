"""U-Net against a second implementation of the paper's figure, and the sizes of its valid convolutions."""

import pytest
import torch
import torch.nn.functional as F
from conftest import count, shake_norms
from torch import Tensor, nn

from segmentation.architectures.unet import UNet, mirror
from segmentation.errors import UserError


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: UNet(2, in_channels=1, mean=[0.5], std=[0.5], padding="valid", batch_norm=False), 31_030_658),
        (lambda: UNet(21, padding="valid", batch_norm=False), 31_033_045),
        (lambda: UNet(21, padding="valid", conv_bias=True), 31_044_821),
        (lambda: UNet(21, padding="valid"), 31_038_933),
        (lambda: UNet(21), 31_038_933),
        (lambda: UNet(11), 31_038_283),
        (lambda: UNet(2), 31_037_698),
        (lambda: UNet(21, up="bilinear"), 17_264_277),
    ],
)
def test_parameter_counts_equal_the_papers(build, parameters):
    with torch.device("meta"):
        model = build()
    assert count(model) == parameters


class Milesial(nn.Module):
    """The padded U-Net implemented a second time from the paper's figure, in functions."""

    def __init__(self, unet: UNet, bilinear: bool) -> None:
        super().__init__()
        self.u, self.bilinear = unet, bilinear

    def double(self, block: nn.Sequential, x: Tensor) -> Tensor:
        for conv, norm in ((block[0], block[1]), (block[3], block[4])):
            x = F.conv2d(x, conv.weight, conv.bias, padding=1)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
            x = F.relu(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in (self.u.down1, self.u.down2, self.u.down3, self.u.down4):
            x = self.double(block, x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.double(self.u.bottom, x)
        for up in (self.u.up4, self.u.up3, self.u.up2, self.u.up1):
            skip = skips.pop()
            if self.bilinear:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            else:
                x = F.conv_transpose2d(x, up.up.weight, up.up.bias, stride=2)
            dy, dx = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
            x = self.double(up.conv, torch.cat([skip, x], 1))
        return F.conv2d(x, self.u.classifier.weight, self.u.classifier.bias)


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
@pytest.mark.parametrize("size", [(64, 80), (61, 47)])
def test_padded_unet_is_the_papers_graph(up, size):
    unet = shake_norms(UNet(4, base_channels=8, up=up))
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = Milesial(unet, up == "bilinear")(image)
        torch.testing.assert_close(unet(image), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("side", "expected"), [(188, 4), (204, 20), (540, 356), (556, 372), (572, 388)])
def test_valid_unet_loses_184_pixels(side, expected):
    with torch.device("meta"):
        unet = UNet(2, padding="valid", batch_norm=False)
        scores = unet.score_maps(torch.empty(1, 3, side, side))["main"]
    assert scores.shape == (1, 2, expected, expected)


def test_valid_unet_forward_equals_the_bare_network_inside_the_mirrored_image():
    unet = UNet(2, base_channels=4, padding="valid", batch_norm=False).eval()
    image = torch.randn(1, 3, 20, 36)
    # Torch reflects no wider border in one step.
    padded = F.pad(F.pad(image, (30, 30, 0, 0), "reflect"), (0, 0, 18, 18), "reflect")
    inner = mirror(image, 18, 18, 30, 30)
    torch.testing.assert_close(inner, padded)
    with torch.inference_mode():
        whole = unet(image)
        bare = unet.score_maps(mirror(image, 92, 92, 92, 92))["main"]  # 204 x 220: both 16 n + 12
    torch.testing.assert_close(whole, bare[..., :20, :36], atol=1e-5, rtol=1e-4)


def test_pixel_shuffle_keeps_every_pixel():
    """Each logit depends on every pixel of its own block; a strided network would drop some."""
    unet = UNet(2, base_channels=4, pixel_shuffle=2).eval()
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    unet(image)[0, 0, 16, 16].backward()
    assert (image.grad[0].abs().sum(0)[16:18, 16:18] > 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNet(21, padding="reflect"), "padding"),
        (lambda: UNet(21, padding="valid", pixel_shuffle=2), "pixel_shuffle"),
        (lambda: UNet(21, in_channels=1), "mean and std"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
