"""Files of other projects: our network gives the logits that theirs gives with the same weights.

Each peer is written down here from its project's definition as a function over a `Peer`, which draws a layer's weights
when its name first comes up. So the names and the arithmetic are independent of ours.
"""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from conftest import shake_norms
from torch import Tensor

from segmentation import DeepLabV2, DeepLabV3Plus, PSPNet, UNet

W = 16  # width of the first stage instead of 64, which keeps names and arithmetic


class Peer(dict):
    """A state dict that draws missing weights at random, and the two layers that all peers consist of."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)

    def draw(self, name: str, *shape: int, scale: float = 1.0, low: float = 0.0, high: float = 0.0) -> Tensor:
        if name not in self:
            value = torch.randn(shape, generator=self.random)
            self[name] = scale * value if low == high else low + (high - low) * value.sigmoid()
        return self[name]

    def conv(self, x: Tensor, name: str, out: int, kernel: int = 1, bias: bool = False, **kwargs) -> Tensor:
        inputs = x.shape[1] // kwargs.get("groups", 1)
        weight = self.draw(f"{name}.weight", out, inputs, kernel, kernel, scale=(2 / inputs) ** 0.5 / kernel)
        return F.conv2d(x, weight, self.draw(f"{name}.bias", out) if bias else None, **kwargs)

    def bn(self, x: Tensor, name: str, gain: float = 1.0) -> Tensor:
        c = x.shape[1]
        return F.batch_norm(
            x,
            self.draw(f"{name}.running_mean", c),
            self.draw(f"{name}.running_var", c, low=0.5, high=1.5),
            self.draw(f"{name}.weight", c, low=0.5 * gain, high=1.5 * gain),
            self.draw(f"{name}.bias", c),
        )

    def resnet_stage(self, x: Tensor, name: str, channels: int, stride: int, dilations: list[int]) -> Tensor:
        for index, dilation in enumerate(dilations):
            block, s = f"{name}.{index}", stride if index == 0 else 1
            shortcut = x
            if index == 0:
                shortcut = self.bn(
                    self.conv(x, f"{block}.downsample.0", 4 * channels, stride=s), f"{block}.downsample.1"
                )
            y = F.relu(self.bn(self.conv(x, f"{block}.conv1", channels), f"{block}.bn1"))
            y = self.conv(y, f"{block}.conv2", channels, 3, stride=s, padding=dilation, dilation=dilation)
            y = self.conv(F.relu(self.bn(y, f"{block}.bn2")), f"{block}.conv3", 4 * channels)
            x = F.relu(self.bn(y, f"{block}.bn3", gain=0.2) + shortcut)
        return x


def up(x: Tensor, size, align: bool) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align)


def kazuto(p: Peer, image: Tensor, prefix: str = "") -> Tensor:
    """DeepLab v2 on a ResNet of 3, 4, 6, 3 blocks: stride in `reduce`, ceil pooling, logits at stride 8."""
    x = F.relu(p.bn(p.conv(image, f"{prefix}layer1.conv1.conv", W, 7, stride=2, padding=3), f"{prefix}layer1.conv1.bn"))
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for stage, (count, stride, d) in enumerate([(3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4)], start=2):
        c = W * 2 ** (stage - 2)
        for i in range(1, count + 1):
            b, s = f"{prefix}layer{stage}.block{i}", stride if i == 1 else 1
            y = F.relu(p.bn(p.conv(x, f"{b}.reduce.conv", c, stride=s), f"{b}.reduce.bn"))
            y = p.conv(y, f"{b}.conv3x3.conv", c, 3, padding=d, dilation=d)
            y = F.relu(p.bn(y, f"{b}.conv3x3.bn"))
            y = p.bn(p.conv(y, f"{b}.increase.conv", 4 * c), f"{b}.increase.bn", gain=0.2)
            if i == 1:
                x = p.bn(p.conv(x, f"{b}.shortcut.conv", 4 * c, stride=s), f"{b}.shortcut.bn")
            x = F.relu(x + y)
    return sum(
        p.conv(x, f"{prefix}aspp.c{i}", 5, 3, bias=True, padding=r, dilation=r) for i, r in enumerate((6, 12, 18, 24))
    )


def kazuto_msc(p: Peer, image: Tensor) -> Tensor:
    """The same on three scales: smaller score maps are enlarged to the first, and the largest score counts."""
    maps = [kazuto(p, image, "base.")]
    for scale in (0.75, 0.5):
        small = F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
        maps.append(up(kazuto(p, small, "base."), maps[0].shape[-2:], align=False))
    return torch.stack(maps).amax(0)


def semseg(p: Peer, image: Tensor) -> Tensor:
    """PSPNet-50: deep stem, every 3x3 of a dilated stage dilated, corners aligned, logits of the input's size."""
    x = image
    for i, (c, stride) in enumerate([(W, 2), (W, 1), (2 * W, 1)]):
        x = F.relu(p.bn(p.conv(x, f"layer0.{3 * i}", c, 3, stride=stride, padding=1), f"layer0.{3 * i + 1}"))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, (count, stride, d) in enumerate([(3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4)], start=1):
        x = p.resnet_stage(x, f"layer{stage}", W * 2 ** (stage - 1), stride, [d] * count)
        if stage == 3:  # for the file only: evaluation does not use the auxiliary head
            p.conv(p.bn(p.conv(x, "aux.0", 4 * W, 3, padding=1), "aux.1"), "aux.4", 5, bias=True)
    pooled = [x]
    for i, bins in enumerate((1, 2, 3, 6)):
        y = p.conv(F.adaptive_avg_pool2d(x, bins), f"ppm.features.{i}.1", 8 * W)
        pooled.append(up(F.relu(p.bn(y, f"ppm.features.{i}.2")), x.shape[-2:], align=True))
    x = F.relu(p.bn(p.conv(torch.cat(pooled, 1), "cls.0", 8 * W, 3, padding=1), "cls.1"))
    return up(p.conv(x, "cls.4", 5, bias=True), image.shape[-2:], align=True)


def jfzhang_head(p: Peer, x: Tensor, low: Tensor, image: Tensor, rates) -> Tensor:
    branches = [F.relu(p.bn(p.conv(x, "aspp.aspp1.atrous_conv", 4 * W), "aspp.aspp1.bn"))]
    for i, r in enumerate(rates, start=2):
        y = p.conv(x, f"aspp.aspp{i}.atrous_conv", 4 * W, 3, padding=r, dilation=r)
        branches.append(F.relu(p.bn(y, f"aspp.aspp{i}.bn")))
    mean = F.relu(p.bn(p.conv(x.mean((2, 3), keepdim=True), "aspp.global_avg_pool.1", 4 * W), "aspp.global_avg_pool.2"))
    branches.append(up(mean, x.shape[-2:], align=True))
    x = F.relu(p.bn(p.conv(torch.cat(branches, 1), "aspp.conv1", 4 * W), "aspp.bn1"))
    low = F.relu(p.bn(p.conv(low, "decoder.conv1", 3 * W // 4), "decoder.bn1"))
    x = torch.cat([up(x, low.shape[-2:], align=True), low], 1)
    x = F.relu(p.bn(p.conv(x, "decoder.last_conv.0", 4 * W, 3, padding=1), "decoder.last_conv.1"))
    x = F.relu(p.bn(p.conv(x, "decoder.last_conv.4", 4 * W, 3, padding=1), "decoder.last_conv.5"))
    return up(p.conv(x, "decoder.last_conv.8", 5, bias=True), image.shape[-2:], align=True)


def jfzhang_resnet(p: Peer, image: Tensor) -> Tensor:
    """DeepLabV3+ on ResNet-50 at stride 16 (the project has 101): multi-grid 1, 2, 4 in layer4."""
    x = F.relu(p.bn(p.conv(image, "backbone.conv1", W, 7, stride=2, padding=3), "backbone.bn1"))
    x = low = p.resnet_stage(F.max_pool2d(x, 3, 2, 1), "backbone.layer1", W, 1, [1] * 3)
    x = p.resnet_stage(x, "backbone.layer2", 2 * W, 2, [1] * 4)
    x = p.resnet_stage(x, "backbone.layer3", 4 * W, 2, [1] * 6)
    x = p.resnet_stage(x, "backbone.layer4", 8 * W, 1, [2, 4, 8])
    return jfzhang_head(p, x, low, image, (6, 12, 18))


def separable(p: Peer, x: Tensor, name: str, out: int, dilation: int = 1, stride: int = 1) -> Tensor:
    c = x.shape[1]
    x = p.conv(F.pad(x, [dilation] * 4), f"{name}.conv1", c, 3, groups=c, dilation=dilation, stride=stride)
    return p.conv(p.bn(x, f"{name}.bn"), f"{name}.pointwise", out)


def jfzhang_xception(p: Peer, image: Tensor, stride8: bool) -> Tensor:
    """AlignedXception: its ReLUs work in place, so a shortcut carries the output of the first ReLU of its unit."""
    width = {c: W * c // 64 for c in (32, 64, 128, 256, 728, 1024, 1536, 2048)}
    x = F.relu(p.bn(p.conv(image, "backbone.conv1", width[32], 3, stride=2, padding=1), "backbone.bn1"))
    x = F.relu(p.bn(p.conv(x, "backbone.conv2", width[64], 3, padding=1), "backbone.bn2"))

    def unit(x: Tensor, index: int, outs: list[int], stride: int, dilations: list[int]) -> Tensor:
        name, x = f"backbone.block{index}", F.relu(x)
        y, place = x, 0 if index in (1, 2) else 1
        for i, (out, d) in enumerate(zip(outs, dilations, strict=True)):
            y = separable(p, F.relu(y), f"{name}.rep.{place}", width[out], d, stride if i == 2 else 1)
            y = p.bn(y, f"{name}.rep.{place + 1}", gain=0.1 if i == 2 else 0.7)
            place += 3
        if stride != 1 or x.shape[1] != width[outs[2]]:
            x = p.bn(p.conv(x, f"{name}.skip", width[outs[2]], stride=stride), f"{name}.skipbn")
        return x + y

    x = low = F.relu(unit(x, 1, [128] * 3, 2, [1] * 3))
    x = unit(x, 2, [256] * 3, 2, [1] * 3)
    d = 2 if stride8 else 1
    x = unit(x, 3, [728] * 3, 1 if stride8 else 2, [1] * 3)
    for index in range(4, 20):
        x = unit(x, index, [728] * 3, 1, [d] * 3)
    x = F.relu(unit(x, 20, [728, 1024, 1024], 1, [d, d, 1]))
    for index, out in ((3, 1536), (4, 1536), (5, 2048)):
        x = separable(p, x, f"backbone.conv{index}", width[out], 2 * d)
        x = F.relu(p.bn(x, f"backbone.bn{index}"))
    return jfzhang_head(p, x, low, image, (12, 24, 36) if stride8 else (6, 12, 18))


MOBILE = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def mobilenet(p: Peer, image: Tensor, names, dilations: dict[int, int], padding: int) -> tuple[Tensor, Tensor]:
    """MobileNetV2 at stride 16 as both projects have it: zeros around the input of a block, before its expansion."""
    x = F.relu6(p.bn(p.conv(image, names(0, 0), 32, 3, stride=2, padding=padding), names(0, 1)))
    index = 0
    for expand, out, count, stride in MOBILE:
        for i in range(count):
            index += 1
            s, d = (stride if i == 0 and index < 14 else 1), dilations.get(index, 1)
            y, place, hidden = F.pad(x, [d] * 4), 0, expand * x.shape[1]
            if expand > 1:
                y = F.relu6(p.bn(p.conv(y, names(index, 0), hidden), names(index, 1)))
                place = 3
            y = p.conv(y, names(index, place), hidden, 3, groups=hidden, stride=s, dilation=d)
            y = F.relu6(p.bn(y, names(index, place + 1)))
            y = p.bn(p.conv(y, names(index, place + 3), out), names(index, place + 4))
            x = x + y if s == 1 and x.shape[1] == out else y
            if index == 3:
                low = x
    return x, low


def jfzhang_mobilenet(p: Peer, image: Tensor) -> Tensor:
    """A stage that lost its stride keeps dilation 1, the next has 2; each tensor has two names."""

    def names(index: int, place: int) -> str:
        return f"backbone.features.0.{place}" if index == 0 else f"backbone.features.{index}.conv.{place}"

    x, low = mobilenet(p, image, names, {17: 2}, padding=1)
    logits = jfzhang_head(p, x, low, image, (6, 12, 18))
    for key in [key for key in p if key.startswith("backbone.features.")]:
        index = int(key.split(".")[2])
        part = f"low_level_features.{index}" if index < 4 else f"high_level_features.{index - 4}"
        p[key.replace(f"features.{index}", part)] = p[key]
    return logits


def vainf_head(p: Peer, x: Tensor, low: Tensor, image: Tensor) -> Tensor:
    c = "classifier.aspp"
    branches = [F.relu(p.bn(p.conv(x, f"{c}.convs.0.0", 4 * W), f"{c}.convs.0.1"))]
    for i, r in enumerate((6, 12, 18), start=1):
        y = p.conv(x, f"{c}.convs.{i}.0", 4 * W, 3, padding=r, dilation=r)
        branches.append(F.relu(p.bn(y, f"{c}.convs.{i}.1")))
    mean = F.relu(p.bn(p.conv(x.mean((2, 3), keepdim=True), f"{c}.convs.4.1", 4 * W), f"{c}.convs.4.2"))
    branches.append(mean.expand_as(branches[0]))
    x = F.relu(p.bn(p.conv(torch.cat(branches, 1), f"{c}.project.0", 4 * W), f"{c}.project.1"))
    low = F.relu(p.bn(p.conv(low, "classifier.project.0", 3 * W // 4), "classifier.project.1"))
    x = torch.cat([low, up(x, low.shape[-2:], align=False)], 1)
    x = F.relu(p.bn(p.conv(x, "classifier.classifier.0", 4 * W, 3, padding=1), "classifier.classifier.1"))
    return up(p.conv(x, "classifier.classifier.3", 5, bias=True), image.shape[-2:], align=False)


def vainf_resnet(p: Peer, image: Tensor) -> Tensor:
    """Torchvision's dilated ResNet-50 at stride 16: the first block of layer4 keeps dilation 1."""
    x = F.relu(p.bn(p.conv(image, "backbone.conv1", W, 7, stride=2, padding=3), "backbone.bn1"))
    x = low = p.resnet_stage(F.max_pool2d(x, 3, 2, 1), "backbone.layer1", W, 1, [1] * 3)
    x = p.resnet_stage(x, "backbone.layer2", 2 * W, 2, [1] * 4)
    x = p.resnet_stage(x, "backbone.layer3", 4 * W, 2, [1] * 6)
    return vainf_head(p, p.resnet_stage(x, "backbone.layer4", 8 * W, 1, [1, 2, 2]), low, image)


def vainf_mobilenet(p: Peer, image: Tensor) -> Tensor:
    """Torchvision's grouping, cut in two; dilated from the second block of the stage on; the stem has no padding."""

    def names(index: int, place: int) -> str:
        part = f"backbone.{'low' if index < 4 else 'high'}_level_features.{index}"
        if index == 0:
            return f"{part}.{place}"
        group, inside = divmod(place, 3)
        last = 1 if index == 1 else 2
        return f"{part}.conv.{group}.{inside}" if group < last else f"{part}.conv.{last + inside}"

    return vainf_head(p, *mobilenet(p, image, names, {15: 2, 16: 2, 17: 2}, padding=0), image)


def milesial(p: Peer, image: Tensor, bilinear: bool) -> Tensor:
    """The padded U-Net with batch norm."""

    def double(x: Tensor, name: str, out: int, middle: int | None = None) -> Tensor:
        for i, channels in ((0, middle or out), (3, out)):
            name_i = f"{name}.double_conv"
            x = F.relu(p.bn(p.conv(x, f"{name_i}.{i}", channels, 3, padding=1), f"{name_i}.{i + 1}"))
        return x

    widths, half = [W, 2 * W, 4 * W, 8 * W, 16 * W], 2 if bilinear else 1
    x, skips = double(image, "inc", W), []
    for i in range(1, 5):
        skips.append(x)
        out = widths[i] // (half if i == 4 else 1)
        x = double(F.max_pool2d(x, 2), f"down{i}.maxpool_conv.1", out)
    for i, skip in enumerate(reversed(skips), start=1):
        out = widths[4 - i] // (half if i < 4 else 1)
        if bilinear:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        else:
            c = x.shape[1]
            weight = p.draw(f"up{i}.up.weight", c, c // 2, 2, 2, scale=c**-0.5)
            x = F.conv_transpose2d(x, weight, p.draw(f"up{i}.up.bias", c // 2), stride=2)
        dy, dx = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
        x = torch.cat([skip, F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])], 1)
        x = double(x, f"up{i}.conv", out, x.shape[1] // 2 if bilinear else None)
    return p.conv(x, "outc.conv", 5, bias=True)


def to_image(network):
    """Interpolate scores at stride 8 to the size of the image, as the project does in evaluation."""
    return lambda p, image: up(network(p, image), image.shape[-2:], align=False)


narrow = {"num_classes": 5, "base_channels": W}
CASES = {
    "kazuto1011": (to_image(kazuto), lambda f: DeepLabV2(backbone="resnet50", weights=f, **narrow)),
    "kazuto1011 msc": (to_image(kazuto_msc), lambda f: DeepLabV2(backbone="resnet50", weights=f, **narrow)),
    "hszhao": (semseg, lambda f: PSPNet(backbone="resnet50", weights=f, **narrow)),
    "hszhao without aux": (semseg, lambda f: PSPNet(backbone="resnet50", aux_loss_weight=0, weights=f, **narrow)),
    "jfzhang95 resnet": (jfzhang_resnet, lambda f: DeepLabV3Plus(backbone="resnet50", weights=f, **narrow)),
    "jfzhang95 xception": (
        lambda p, x: jfzhang_xception(p, x, False),
        lambda f: DeepLabV3Plus(backbone="xception65", weights=f, **narrow),
    ),
    "jfzhang95 xception stride 8": (
        lambda p, x: jfzhang_xception(p, x, True),
        lambda f: DeepLabV3Plus(backbone="xception65", output_stride=8, weights=f, **narrow),
    ),
    "jfzhang95 mobilenet": (jfzhang_mobilenet, lambda f: DeepLabV3Plus(backbone="mobilenet_v2", weights=f, **narrow)),
    "VainF resnet": (vainf_resnet, lambda f: DeepLabV3Plus(backbone="resnet50", weights=f, **narrow)),
    "VainF mobilenet": (vainf_mobilenet, lambda f: DeepLabV3Plus(backbone="mobilenet_v2", weights=f, **narrow)),
    "milesial": (lambda p, x: milesial(p, x, False), lambda f: UNet(weights=f, **narrow)),
    "milesial bilinear": (lambda p, x: milesial(p, x, True), lambda f: UNet(weights=f, **narrow)),
}


@pytest.mark.parametrize("stride", [16, 8])
def test_a_file_of_segmentation_models_pytorch_gives_its_logits(stride, tmp_path):
    """Their DeepLabV3Plus accepts only sides that are multiples of 16."""
    rates = (6, 12, 18) if stride == 16 else (12, 24, 36)
    peer = smp.DeepLabV3Plus(
        "resnet50", encoder_weights=None, classes=5, encoder_output_stride=stride, decoder_atrous_rates=rates
    )
    shake_norms(peer)
    torch.save(peer.state_dict(), tmp_path / "x.pth")
    ours = DeepLabV3Plus(5, "resnet50", output_stride=stride, weights=str(tmp_path / "x.pth")).eval()
    assert sum(p.numel() for p in DeepLabV3Plus(21, "resnet50", "smp").parameters()) == 26_682_725
    for size in ((64, 96), (96, 48)):
        image = torch.randn(1, 3, *size)
        with torch.inference_mode():
            theirs = peer(image)
            assert theirs.std() > 0.01
            torch.testing.assert_close(ours(image), theirs, atol=1e-4 * float(theirs.std()), rtol=1e-4)


def test_the_unet_of_segmentation_models_pytorch_is_refused_by_name(tmp_path):
    torch.save(smp.Unet("resnet18", encoder_weights=None).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"segmentation_models.pytorch for its Unet.*but the model is UNet"):
        UNet(1, weights=str(tmp_path / "x.pth"))


@pytest.mark.parametrize("case", CASES)
def test_a_published_file_gives_its_projects_logits(case, tmp_path):
    network, build = CASES[case]
    sizes = [(65, 81), (97, 65)] if case.startswith("hszhao") else [(64, 96), (67, 93)]
    torch.manual_seed(0)
    images, peer = [torch.randn(1, 3, *size) for size in sizes], Peer()
    network(peer, images[0])  # draws the weights
    state = {f"module.{key}": value.clone() for key, value in peer.items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {}, "best_pred": np.float64(0.5)}, tmp_path / "x.pth")
    ours = build(str(tmp_path / "x.pth")).eval()
    for image in images:
        with torch.inference_mode():
            theirs = network(peer, image)
            assert 0.1 < theirs.std() < 30  # scores that differ from pixel to pixel, so that a match proves something
            torch.testing.assert_close(ours(image), theirs, atol=1e-4, rtol=1e-5)
