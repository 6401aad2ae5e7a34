"""Architectures against the papers' parameter counts and against installed peers."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import shake_norms
from torch import Tensor, nn
from torchvision.models import WeightsEnum, resnet50, segmentation

from segmentation import DeepLabV1, DeepLabV3, DeepLabV3Plus, UNet
from segmentation.architectures.backbones.mobilenet import MobileNetV2
from segmentation.architectures.backbones.resnet import ResNet
from segmentation.architectures.backbones.xception import Xception65
from segmentation.architectures.deeplabv3 import CascadedModules
from segmentation.architectures.unet import mirror
from segmentation.errors import UserError


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: DeepLabV1(21), 20_505_429),
        (lambda: DeepLabV1(11), 20_495_179),
        (lambda: DeepLabV1(21, fc7_padding=1, dropout="channel"), 20_505_429),
        (lambda: DeepLabV3(21), 39_638_869),
        (lambda: DeepLabV3(21, aux_loss_weight=0.5), 42_004_074),
        (lambda: DeepLabV3(21, "resnet50", output_stride=16), 39_638_869),
        (lambda: DeepLabV3(21, "resnet101"), 58_630_997),
        (lambda: DeepLabV3(21, "resnet101", aux_loss_weight=0.5), 60_996_202),
        (lambda: DeepLabV3(21, "mobilenet_v3_large"), 11_025_477),
        (lambda: DeepLabV3(21, "mobilenet_v3_large", aux_loss_weight=0.5), 11_029_328),
        (lambda: DeepLabV3(21, "resnet101", "paper"), 58_040_661),
        (lambda: DeepLabV3(21, "resnet101", "paper", output_stride=8), 58_040_661),
        (lambda: DeepLabV3(21, "resnet50", "paper"), 39_048_533),
        (lambda: DeepLabV3Plus(21, "resnet101"), 59_344_309),
        (lambda: DeepLabV3Plus(21, "resnet101", "jfzhang95", output_stride=8), 59_344_309),
        (lambda: DeepLabV3Plus(21, "resnet50"), 40_352_181),
        (lambda: DeepLabV3Plus(21, "resnet50", "VainF"), 39_761_845),
        (lambda: DeepLabV3Plus(21, "resnet101", "VainF"), 58_753_973),
        (lambda: DeepLabV3Plus(21, "xception65"), 41_055_413),
        (lambda: DeepLabV3Plus(21, "xception65", output_stride=8), 41_055_413),
        (lambda: DeepLabV3Plus(21, "xception65", low_level="block1"), 41_049_269),
        (lambda: DeepLabV3Plus(21, "xception65", "jfzhang95"), 54_705_317),
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


PEERS = {
    "resnet50": segmentation.deeplabv3_resnet50,
    "resnet101": segmentation.deeplabv3_resnet101,
    "mobilenet_v3_large": segmentation.deeplabv3_mobilenet_v3_large,
}


@pytest.mark.parametrize("backbone", PEERS)
@pytest.mark.parametrize("size", [(64, 96), (97, 75)])
def test_deeplabv3_gives_torchvisions_logits(backbone, size, tmp_path):
    peer = shake_norms(PEERS[backbone](weights=None, weights_backbone=None, num_classes=21, aux_loss=True))
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = DeepLabV3(21, backbone, aux_loss_weight=0.5, weights=str(tmp_path / "peer.pth")).eval()
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        theirs = peer(image)["out"]
        assert 0.05 < theirs.std() < 20  # logits that differ from pixel to pixel, so that a match says something
        torch.testing.assert_close(ours(image), theirs, atol=1e-4, rtol=0)


def test_deeplabv3_training_gives_torchvisions_main_and_aux_scores(tmp_path):
    peer = shake_norms(PEERS["resnet50"](weights=None, weights_backbone=None, num_classes=5, aux_loss=True)).train()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = DeepLabV3(5, aux_loss_weight=0.5, weights=str(tmp_path / "peer.pth")).train()
    for module in (*peer.modules(), *ours.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    image, mask = torch.rand(2, 3, 65, 65), torch.randint(0, 5, (2, 65, 65))
    theirs = peer(ours.preprocess(image))
    terms = ours.losses({"image": image, "mask": mask})
    torch.testing.assert_close(terms["main"], F.cross_entropy(theirs["out"], mask), atol=1e-4, rtol=0)
    torch.testing.assert_close(terms["aux"], 0.5 * F.cross_entropy(theirs["aux"], mask), atol=1e-4, rtol=0)


def test_weights_of_another_class_count_leave_the_head_fresh(tmp_path, caplog, capsys):
    peer = PEERS["resnet50"](weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "peer.pth")
    ours = DeepLabV3(4, weights=str(tmp_path / "peer.pth"))
    torch.testing.assert_close(ours.classifier[1].weight, peer.classifier[1].weight)
    assert ours.classifier[4].weight.shape[0] == 4
    said = capsys.readouterr().err + caplog.text
    assert "classifier.4. left fresh, it has 21 outputs in the file and 4 here" in said
    assert "aux_classifier. dropped, this network has none" in said


def test_missing_batch_norm_statistics_are_not_passed_over(tmp_path):
    state = PEERS["resnet50"](weights=None, weights_backbone=None, num_classes=21).state_dict()
    del state["backbone.bn1.running_mean"]
    torch.save(state, tmp_path / "peer.pth")
    with pytest.raises(ValueError, match=r"backbone.bn1.running_mean: absent in the file"):
        DeepLabV3(21, weights=str(tmp_path / "peer.pth"))


def test_weights_of_another_network_are_refused_with_keys_and_shapes(tmp_path):
    torch.save(resnet50(weights=None).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"do not fit: conv1.weight: \(64, 3, 7, 7\) in the file, absent"):
        DeepLabV3(21, weights=str(tmp_path / "resnet.pth"))


@pytest.mark.parametrize(
    ("stride", "dilate"), [(32, [False] * 3), (16, [False, False, True]), (8, [False, True, True])]
)
@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
def test_resnet_gives_torchvisions_features(stride, dilate, size):
    peer = shake_norms(resnet50(weights=None, replace_stride_with_dilation=dilate))
    ours = ResNet(50, output_stride=stride).eval()
    ours.load_state_dict({k: v for k, v in peer.state_dict().items() if not k.startswith("fc.")})
    image = torch.randn(1, 3, *size)
    with torch.inference_mode():
        x = peer.maxpool(peer.relu(peer.bn1(peer.conv1(image))))
        x = peer.layer4(peer.layer3(peer.layer2(peer.layer1(x))))
        torch.testing.assert_close(ours(image)["layer4"], x, atol=1e-4, rtol=1e-4)


def test_resnet_options_of_deeplabv2_and_pspnet():
    v2 = ResNet(101, output_stride=8, dilate_first_block=True, stride_in_1x1=True, ceil_mode=True)
    assert v2.layer2[0].conv1.stride == (2, 2) and v2.layer2[0].conv2.stride == (1, 1)
    assert {m.conv2.dilation for m in v2.layer3} == {(2, 2)} and {m.conv2.dilation for m in v2.layer4} == {(4, 4)}
    assert v2(torch.rand(1, 3, 160, 160))["layer1"].shape[-1] == 41  # floor gives 40 (specs: ceil-mode pooling)
    psp = ResNet(50, output_stride=8, deep_stem=True)
    assert psp.layer1[0].conv1.in_channels == 128
    assert psp(torch.rand(1, 3, 65, 65))["layer4"].shape == (1, 2048, 9, 9)


def dilations(module: nn.Module) -> list[int]:
    return [m.dilation[0] for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


@pytest.mark.parametrize(("stride", "rates"), [(16, [2, 4, 8]), (8, [4, 8, 16])])
def test_multi_grid_multiplies_the_rate_of_the_last_stage(stride, rates):
    """DeepLab v3, section 3.2.1: rates 2 * (1, 2, 4) at output stride 16, twice that at 8."""
    with torch.device("meta"):
        model = DeepLabV3(21, layout="paper", output_stride=stride)
    assert dilations(model.backbone.layer4) == rates
    assert dilations(model.backbone.layer3) == [16 // stride] * 6
    assert dilations(model.classifier[0]) == ([6, 12, 18] if stride == 16 else [12, 24, 36])


def test_cascaded_modules_double_the_rate():
    """Figure 3b: rates 2, 4, 8 and 16 of block4 to block7 at output stride 16, with multi-grid (1, 2, 1)."""
    with torch.device("meta"):
        model = DeepLabV3(21, layout="paper", cascade=True)
    assert isinstance(model.classifier[0], CascadedModules)
    assert dilations(model.backbone.layer4) == [2, 4, 2]
    assert dilations(model.classifier) == [4, 8, 4, 8, 16, 8, 16, 32, 16]


@pytest.mark.parametrize("stride", [16, 8])
def test_xception_keeps_its_resolution_by_dilation(stride):
    with torch.device("meta"):
        net = Xception65(output_stride=stride)
        features = net(torch.empty(1, 3, 513, 513))
    assert features["exit"].shape == (1, 2048, 33, 33) if stride == 16 else (1, 2048, 65, 65)
    assert features["block2_conv2"].shape == (1, 256, 129, 129) and features["block1"].shape == (1, 128, 129, 129)
    rate = 16 // stride
    assert dilations(net.middle) == [rate] * 48 and dilations(net.exit2) == [2 * rate] * 3
    assert not any(isinstance(m, nn.MaxPool2d) for m in net.modules())


def test_mobilenetv2_gives_torchvisions_features_at_the_tap():
    """Up to the first removed stride the two are the same network."""
    peer = torchvision.models.mobilenet_v2(weights=None).eval()
    ours = MobileNetV2().eval()
    ours.load_state_dict(
        {k: v for k, v in peer.state_dict().items() if k.startswith("features.") and "18" not in k[:12]}
    )
    image = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image)["stride4"], peer.features[:4](image))
    assert ours(image)["last"].shape == (1, 320, 5, 7)


class Milesial(nn.Module):
    """The padded U-Net written down a second time from the paper's figure, flat and functional."""

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
    padded = F.pad(F.pad(image, (30, 30, 0, 0), "reflect"), (0, 0, 18, 18), "reflect")  # all that torch can at once
    inner = mirror(image, 18, 18, 30, 30)
    torch.testing.assert_close(inner, padded)
    with torch.inference_mode():
        whole = unet(image)
        bare = unet.score_maps(mirror(image, 92, 92, 92, 92))["main"]  # 204 x 220: both 16 n + 12
    torch.testing.assert_close(whole, bare[..., :20, :36], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda k: DeepLabV1(k),
        lambda k: DeepLabV1(k, fc7_padding=1),
        lambda k: DeepLabV3(k, "mobilenet_v3_large"),
        lambda k: DeepLabV3(k, output_stride=16),
        lambda k: UNet(k, base_channels=4),
        lambda k: UNet(k, base_channels=4, padding="valid", batch_norm=False),
        lambda k: UNet(k, base_channels=4, pixel_shuffle=2),
    ],
)
@pytest.mark.parametrize(("classes", "size"), [(1, (33, 70)), (5, (1, 9)), (3, (64, 64))])
def test_logits_have_the_inputs_size_for_any_size_and_class_count(build, classes, size):
    model = build(classes).eval()
    with torch.inference_mode():
        logits = model(torch.randn(1, 3, *size))
        assert logits.shape == (1, classes, *size)
        assert torch.isfinite(logits).all()
        total = model.probabilities(logits).sum(1)
    if classes > 1:
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(("padding", "side"), [(0, 40), (1, 42)])
def test_deeplabv1_score_map_sizes(padding, side):
    with torch.device("meta"):
        model = DeepLabV1(21, fc7_padding=padding)
        assert model.score_maps(torch.empty(1, 3, 320, 320))["main"].shape[-2:] == (side, side)


def test_deeplabv1_loss_uses_every_eighth_label():
    torch.manual_seed(0)
    model = DeepLabV1(3).eval()
    image, mask = torch.rand(1, 3, 41, 49), torch.randint(0, 3, (1, 41, 49))
    scores = model.score_maps(model.preprocess(image))["main"]
    picked = torch.tensor([[mask[0, 8 * i, 8 * j] for j in range(7)] for i in range(6)])[None]
    loss = model.losses({"image": image, "mask": mask})["main"]
    torch.testing.assert_close(loss, F.cross_entropy(scores, picked))


@pytest.mark.parametrize("size", [(41, 49), (40, 44)])
def test_deeplabv1_puts_score_j_at_pixel_8j_as_its_loss_does(size):
    """Scores that equal their own position come out as a ramp over the pixels."""
    model = DeepLabV1(2).eval()
    height, width = (-(-side // 8) for side in size)
    ramp = torch.stack(
        [8.0 * torch.arange(width).expand(height, width), 8.0 * torch.arange(height)[:, None].expand(height, width)]
    )
    model.score_maps = lambda image: {"main": ramp[None]}
    logits = model(torch.zeros(1, 3, *size))
    assert logits.shape == (1, 2, *size)
    torch.testing.assert_close(logits[0, 0, 0], torch.arange(size[1]).clamp(max=8 * (width - 1)).float())
    torch.testing.assert_close(logits[0, 1, :, 0], torch.arange(size[0]).clamp(max=8 * (height - 1)).float())


def test_pixel_shuffle_keeps_every_pixel():
    """Each logit may depend on each pixel of its own block, so none is dropped as by a strided network."""
    unet = UNet(2, base_channels=4, pixel_shuffle=2).eval()
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    unet(image)[0, 0, 16, 16].backward()
    assert (image.grad[0].abs().sum(0)[16:18, 16:18] > 0).all()


def test_deeplabv1_takes_vgg16_as_the_paper_does(monkeypatch):
    state = {}
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    indices = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    for index, inputs, outputs in zip(indices, widths, widths[1:], strict=False):
        state[f"features.{index}.weight"] = torch.full((outputs, inputs, 3, 3), float(index))
        state[f"features.{index}.bias"] = torch.full((outputs,), float(index))
    taps = torch.arange(49.0).view(1, 1, 7, 7).expand(4096, 512, 7, 7)
    state["classifier.0.weight"], state["classifier.0.bias"] = taps.reshape(4096, -1), torch.arange(4096.0)
    state["classifier.3.weight"] = torch.arange(4096.0)[:, None] * 4096 + torch.arange(4096.0)
    state["classifier.3.bias"] = torch.arange(4096.0)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    model = DeepLabV1(21, weights="imagenet")
    assert model.conv1[0].weight.unique().tolist() == [0.0] and model.conv5[4].weight.unique().tolist() == [28.0]
    assert model.fc6.weight[0, 0].tolist() == [[0, 3, 6], [21, 24, 27], [42, 45, 48]]
    keep6, keep7 = model.fc6.bias, model.fc7.bias
    assert len(keep6.unique()) == len(keep7.unique()) == 1024
    torch.testing.assert_close(model.fc7.weight[:, :, 0, 0], keep7[:, None] * 4096 + keep6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeepLabV1(21, fc7_padding=2), "fc7_padding"),
        (lambda: DeepLabV1(0), "num_classes"),
        (lambda: DeepLabV3(21, "resnet18"), "backbone"),
        (lambda: DeepLabV3(21, output_stride=4), "output_stride"),
        (lambda: DeepLabV3(21, atrous_rates=[0]), "atrous_rates"),
        (lambda: DeepLabV3(21, weights="nowhere.pth"), "nowhere.pth"),
        (lambda: DeepLabV3(21, cascade=True), "layout: paper"),
        (lambda: DeepLabV3(21, "mobilenet_v3_large", "paper"), "layout: paper needs a ResNet"),
        (lambda: DeepLabV3(21, multi_grid=[1, 2]), "multi_grid"),
        (lambda: DeepLabV3Plus(21, "mobilenet_v3_large", output_stride=8), "at output_stride 16 only"),
        (lambda: DeepLabV3Plus(21, "xception65", weights="imagenet"), "xception65"),
        (lambda: DeepLabV3Plus(21, low_level="conv1"), "low_level of resnet101 is one of layer1"),
        (lambda: DeepLabV3Plus(21, "vgg16"), "backbone"),
        (lambda: UNet(21, padding="reflect"), "padding"),
        (lambda: UNet(21, padding="valid", pixel_shuffle=2), "pixel_shuffle"),
        (lambda: UNet(21, in_channels=1), "mean and std"),
        (lambda: ResNet(34), "depth"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
