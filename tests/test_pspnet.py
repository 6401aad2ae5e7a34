"""PSPNet compared with a second implementation, and its pooling and interpolation with values computed by hand."""

import pytest
import torch
import torch.nn.functional as F
from conftest import count
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from segmentation.architectures.backbones.resnet import ResNet
from segmentation.architectures.pspnet import PSPNet, PyramidPooling, RegionMeans


@pytest.mark.parametrize(
    ("backbone", "aux_loss_weight", "parameters"),
    [
        ("resnet50", 0.0, 46_716_373),
        ("resnet50", 0.4, 49_081_578),
        ("resnet101", 0.0, 65_708_501),
        ("resnet101", 0.4, 68_073_706),
    ],
)
def test_parameter_counts(backbone, aux_loss_weight, parameters):
    with torch.device("meta"):
        assert count(PSPNet(21, backbone, aux_loss_weight=aux_loss_weight)) == parameters


def narrow(num_classes: int = 3, **arguments) -> PSPNet:
    """A small network with random statistics of batch norm; the initial ones change nothing."""
    torch.manual_seed(2)
    model = PSPNet(num_classes, base_channels=4, **arguments)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            low = 0.1 if name.endswith("bn3") else 0.5 if name.startswith("backbone") else 4.0
            nn.init.uniform_(module.weight, low, 2 * low)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


class Second:
    """The released model, from its tensors only; the comments give the sizes of a 473 x 473 crop."""

    def __init__(self, model: PSPNet, bins: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        self.p, self.bins = model.state_dict(), bins

    def conv(self, name: str, x: Tensor, **kwargs) -> Tensor:
        return F.conv2d(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), **kwargs)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (self.p[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return x * weight[:, None, None] + bias[:, None, None]

    def stage(self, name: str, x: Tensor, blocks: int, stride: int, dilation: int) -> Tensor:
        for i in range(blocks):
            at, step, y = f"{name}.{i}", stride if i == 0 else 1, x
            y = self.norm(f"{at}.bn1", self.conv(f"{at}.conv1", y)).relu()
            y = self.conv(f"{at}.conv2", y, stride=step, padding=dilation, dilation=dilation)
            y = self.norm(f"{at}.bn3", self.conv(f"{at}.conv3", self.norm(f"{at}.bn2", y).relu()))
            if i == 0:
                x = self.norm(f"{at}.downsample.1", self.conv(f"{at}.downsample.0", x, stride=step))
            x = (x + y).relu()
        return x

    def head(self, name: str, x: Tensor) -> Tensor:
        return self.conv(f"{name}.4", self.norm(f"{name}.1", self.conv(f"{name}.0", x, padding=1)).relu())

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm("backbone.conv1.1", self.conv("backbone.conv1.0", image, stride=2, padding=1)).relu()  # 237
        x = self.norm("backbone.conv1.4", self.conv("backbone.conv1.3", x, padding=1)).relu()
        x = self.norm("backbone.bn1", self.conv("backbone.conv1.6", x, padding=1)).relu()
        x = F.max_pool2d(x, 3, 2, 1)  # 119
        x = self.stage("backbone.layer1", x, 3, 1, 1)
        x = self.stage("backbone.layer2", x, 4, 2, 1)  # 60
        aux = self.stage("backbone.layer3", x, 6, 1, 2)
        x = self.stage("backbone.layer4", aux, 3, 1, 4)
        levels = [x]
        for i, side in enumerate(self.bins):
            y = self.conv(f"ppm.features.{i}.1", F.adaptive_avg_pool2d(x, side))
            y = self.norm(f"ppm.features.{i}.2", y).relu()
            levels.append(F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True))
        return self.head("classifier", torch.cat(levels, 1)), self.head("aux_classifier", aux)


@pytest.mark.parametrize("bins", [(1, 2, 3, 6), (4, 1)])
def test_the_network_is_the_released_one(bins):
    model = narrow(bins=bins)
    for size in ((65, 97), (57, 41)):
        image = torch.randn(1, 3, *size)
        with torch.inference_mode():
            main, _ = Second(model, bins)(image)
            expected = F.interpolate(main, size, mode="bilinear", align_corners=True)
            assert expected.std() > 0.1
            torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-4)


def test_training_adds_two_fifths_of_the_second_heads_loss():
    model = narrow().train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout2d)):
            module.eval()
    image, mask = torch.rand(2, 3, 49, 65), torch.randint(0, 3, (2, 49, 65))
    mask[:, :5] = 255
    terms = model.losses({"image": image, "mask": mask})
    assert list(terms) == ["main", "aux"]
    for name, factor, scores in zip(terms, (1.0, 0.4), Second(model)(model.preprocess(image)), strict=True):
        logits = F.interpolate(scores, (49, 65), mode="bilinear", align_corners=True)
        torch.testing.assert_close(terms[name], factor * F.cross_entropy(logits, mask, ignore_index=255))
    assert list(model.eval().losses({"image": image, "mask": mask})) == ["main"]


def test_pooled_regions_by_hand():
    """Each level has two channels, each a copy of one input channel, so the result is the mean over each region."""
    pooling = PyramidPooling(4, bins=(1, 2)).eval()
    for level in pooling.features:
        level[1].weight.data = torch.eye(4)[:2, :, None, None]
        level[2].eps = 1e-12  # torch wants it above 0
    x = torch.rand(1, 4, 4, 6)
    with torch.inference_mode():
        out = pooling(x)
    assert out.shape == (1, 8, 4, 6)
    torch.testing.assert_close(out[:, :4], x)
    torch.testing.assert_close(out[:, 4:6], x[:, :2].mean((2, 3), keepdim=True).expand(-1, -1, 4, 6))
    for row, rows in ((0, slice(0, 2)), (-1, slice(2, 4))):
        for column, columns in ((0, slice(0, 3)), (-1, slice(3, 6))):
            corner = out[0, 6:, row, column]  # corners are aligned, so they keep their region's mean
            torch.testing.assert_close(corner, x[0, :2, rows, columns].mean((1, 2)))
    line = torch.stack([out[0, 6, 0, 0].lerp(out[0, 6, 0, -1], k / 5) for k in range(6)])
    torch.testing.assert_close(out[0, 6, 0], line)


@pytest.mark.parametrize("size", [(60, 60), (7, 10), (5, 1), (90, 47)])
@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_means_over_regions_are_torchs_adaptive_pooling(side, size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(RegionMeans(side)(x), F.adaptive_avg_pool2d(x, side), atol=1e-5, rtol=1e-5)


def test_regions_that_do_not_divide_the_map_overlap():
    pooling = PyramidPooling(3, bins=(3,)).eval()
    pooling.features[0][1].weight.data = torch.eye(3)[:, :, None, None]
    x = torch.rand(1, 3, 7, 7)
    pooled = pooling.features[0][0](x)
    for i, rows in enumerate((slice(0, 3), slice(2, 5), slice(4, 7))):
        torch.testing.assert_close(pooled[0, :, i, 0], x[0, :, rows, :3].mean((1, 2)))


@pytest.mark.parametrize(("stride", "size"), [(8, (41, 49)), (8, (40, 44)), (16, (33, 47)), (32, (65, 100))])
def test_score_j_lies_at_pixel_stride_times_j(stride, size, monkeypatch):
    """Scores that equal their own position come out as a ramp over the pixels, which ends flat between the strides."""
    model = PSPNet(2, base_channels=4, output_stride=stride, aux_loss_weight=0.0).eval()
    with torch.inference_mode():
        height, width = model.score_maps(torch.zeros(1, 3, *size))["main"].shape[2:]
    assert (height, width) == tuple(-(-side // stride) for side in size)
    y, x = torch.meshgrid(stride * torch.arange(height), stride * torch.arange(width), indexing="ij")
    monkeypatch.setattr(model, "score_maps", lambda image: {"main": torch.stack([y, x])[None].float()})
    logits = model(torch.zeros(1, 3, *size))
    assert logits.shape == (1, 2, *size)
    torch.testing.assert_close(logits[0, 0, :, 0], torch.arange(size[0]).clamp(max=stride * (height - 1)).float())
    torch.testing.assert_close(logits[0, 1, 0], torch.arange(size[1]).clamp(max=stride * (width - 1)).float())


def test_corners_not_aligned():
    model = narrow(align_corners=False)
    image = torch.randn(1, 3, 61, 48)
    with torch.inference_mode():
        scores = model.score_maps(image)["main"]
        expected = F.interpolate(scores, (61, 48), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(image), expected)
        model.ppm.align_corners = True
        assert (model.score_maps(image)["main"] - scores).abs().max() > 1e-3


def test_dropout_is_of_whole_channels_in_both_heads():
    model = PSPNet(3, base_channels=4, dropout=0.3)
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout2d)]
    assert [drop.p for drop in drops] == [0.3, 0.3]


def test_imagenet_fits_but_for_the_stem(monkeypatch, capsys, caplog):
    torch.manual_seed(4)
    plain = ResNet(50, base_channels=4)
    state = {**plain.state_dict(), "fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    model = PSPNet(3, "resnet50", base_channels=4, weights="imagenet")
    said = capsys.readouterr().err + caplog.text
    other = [
        key
        for key, value in model.backbone.state_dict().items()
        if value.dim() == 4 and (key not in state or not torch.equal(value, state[key]))
    ]
    assert other == ["conv1.0.weight", "conv1.3.weight", "conv1.6.weight", "layer1.0.conv1.weight",
                     "layer1.0.downsample.0.weight"]  # fmt: skip
    assert "whose ResNet has another stem: conv1. keeps its random initialisation" in said


def test_weights_of_other_classes_and_without_the_second_head(tmp_path, capsys, caplog):
    torch.save(narrow(5).state_dict(), tmp_path / "five.pth")
    model = PSPNet(2, base_channels=4, aux_loss_weight=0.0, weights=str(tmp_path / "five.pth"))
    said = capsys.readouterr().err + caplog.text
    assert "classifier.4. keeps its random initialisation, as it has 5 outputs in the file and 2 here" in said
    assert "aux_classifier. dropped" in said
    torch.testing.assert_close(model.ppm.features[3][1].weight, narrow(5).ppm.features[3][1].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet18"}, "backbone must be resnet50 or resnet101, got resnet18"),
        ({"bins": [1, 0]}, "bins must be positive"),
        ({"bins": []}, "bins must be positive"),
        ({"bins": [1, 2, 4]}, "their number divide 2048 channels"),
        ({"output_stride": 4}, "output_stride 8, 16 or 32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        PSPNet(21, **arguments)
