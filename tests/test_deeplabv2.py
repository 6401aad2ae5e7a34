"""DeepLab v2 against a second implementation, its multi-scale loss and subsampled labels, and by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import count
from PIL import Image
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from segmentation.architectures.deeplabv2 import ASPP, DeepLabV2, subsample
from segmentation.checkpoints import init_args
from segmentation.optimizer import parameter_groups


@pytest.mark.parametrize(
    ("backbone", "parameters"), [("resnet101", 44_048_532), ("resnet50", 25_056_404), ("vgg16", 37_877_652)]
)
def test_parameter_counts(backbone, parameters):
    with torch.device("meta"):
        assert count(DeepLabV2(21, backbone)) == parameters
        assert count(DeepLabV2(21, backbone, scales=[1.0])) == parameters  # the scales share all weights


def narrow(backbone: str = "resnet50", num_classes: int = 3, **arguments) -> DeepLabV2:
    """A small network with random statistics of batch norm, and scores of unit size."""
    torch.manual_seed(2)
    model = DeepLabV2(num_classes, backbone, base_channels=4, **arguments)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            low = 0.1 if name.endswith("bn3") else 0.5
            nn.init.uniform_(module.weight, low, 2 * low)
            nn.init.normal_(module.bias, 0, 0.2)
    for score in model.new_layers():
        nn.init.normal_(score.weight, 0, 0.1)
        nn.init.normal_(score.bias, 0, 0.1)
    return model.eval()


class Second:
    """The released models at one scale, from the tensors only; the comments give the sizes of a 321 x 321 crop."""

    def __init__(self, model: DeepLabV2, rates: tuple[int, ...] = (6, 12, 18, 24), stride_in: int = 1) -> None:
        self.p, self.rates, self.stride_in = model.state_dict(), rates, stride_in

    def conv(self, name: str, x: Tensor, **kwargs) -> Tensor:
        return F.conv2d(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), **kwargs)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (self.p[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return x * weight[:, None, None] + bias[:, None, None]

    def stage(self, name: str, x: Tensor, blocks: int, stride: int, dilation: int) -> Tensor:
        for i in range(blocks):
            at, step, y = f"{name}.{i}", stride if i == 0 else 1, x
            first, second = (step, 1) if self.stride_in == 1 else (1, step)
            y = self.norm(f"{at}.bn1", self.conv(f"{at}.conv1", y, stride=first)).relu()
            y = self.conv(f"{at}.conv2", y, stride=second, padding=dilation, dilation=dilation)
            y = self.norm(f"{at}.bn3", self.conv(f"{at}.conv3", self.norm(f"{at}.bn2", y).relu()))
            if i == 0:
                x = self.norm(f"{at}.downsample.1", self.conv(f"{at}.downsample.0", x, stride=step))
            x = (x + y).relu()
        return x

    def resnet(self, image: Tensor) -> Tensor:
        x = self.norm("backbone.bn1", self.conv("backbone.conv1", image, stride=2, padding=3)).relu()  # 161
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)  # 81
        x = self.stage("backbone.layer1", x, 3, 1, 1)
        x = self.stage("backbone.layer2", x, 4, 2, 1)  # 41
        x = self.stage("backbone.layer3", x, 6, 1, 2)
        x = self.stage("backbone.layer4", x, 3, 1, 4)
        return sum(
            self.conv(f"classifier.convs.{i}", x, padding=rate, dilation=rate) for i, rate in enumerate(self.rates)
        )

    def vgg16(self, image: Tensor) -> Tensor:
        x = image
        for stage, (layers, stride) in enumerate(((2, 2), (2, 2), (3, 2), (3, 1), (3, 1))):
            rate = 2 if stage == 4 else 1
            for layer in range(layers):
                x = self.conv(f"backbone.stages.{stage}.{2 * layer}", x, padding=rate, dilation=rate).relu()
            x = F.max_pool2d(x, 3, stride, 1)  # 161, 81, 41, 41, 41
        total = torch.zeros(())
        for i, rate in enumerate(self.rates):
            fc6 = self.conv(f"classifier.convs.{i}.0", x, padding=rate, dilation=rate).relu()
            total = total + self.conv(f"classifier.convs.{i}.6", self.conv(f"classifier.convs.{i}.3", fc6).relu())
        return total


@pytest.mark.parametrize(
    ("backbone", "arguments", "second"),
    [
        ("resnet50", {}, {}),
        ("resnet50", {"stride_in_1x1": False}, {"stride_in": 3}),
        ("resnet50", {"atrous_rates": [12]}, {"rates": (12,)}),
        ("vgg16", {}, {}),
        ("vgg16", {"atrous_rates": (2, 4, 8, 12)}, {"rates": (2, 4, 8, 12)}),
    ],
)
def test_the_network_is_the_released_one(backbone, arguments, second):
    model = narrow(backbone, scales=[1.0], **arguments)
    run = getattr(Second(model, **second), "vgg16" if backbone == "vgg16" else "resnet")
    for size in ((65, 97), (64, 90)):  # the first pooling's ceil mode matters at even sizes
        image = torch.randn(1, 3, *size)
        with torch.inference_mode():
            expected = run(image)
            assert expected.std() > 0.05
            torch.testing.assert_close(model.score_maps(image)["main"], expected, atol=1e-5, rtol=1e-4)
            logits = F.interpolate(expected, size, mode="bilinear", align_corners=False)
            torch.testing.assert_close(model(image), logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16"])
def test_scales_meet_in_their_maximum(backbone):
    model = narrow(backbone)
    one = getattr(Second(model), "vgg16" if backbone == "vgg16" else "resnet")
    image = torch.randn(1, 3, 97, 83)
    with torch.inference_mode():
        scores = one(image)
        for scale in (0.75, 0.5):
            smaller = one(F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False))
            back = F.interpolate(smaller, scores.shape[2:], mode="bilinear", align_corners=False)
            assert (back > scores).any() and (back < scores).any()
            scores = torch.maximum(scores, back)
        maps = model.score_maps(image)
        assert list(maps) == ["main"]
        torch.testing.assert_close(maps["main"], scores, atol=1e-5, rtol=1e-4)


def nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's nearest neighbour, which kazuto1011 trains with because torch's own picks the corners of the blocks."""
    pictures = [Image.fromarray(value.float().numpy()) for value in values]
    arrays = [np.asarray(picture.resize(size[::-1], Image.Resampling.NEAREST)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).to(values.dtype)


def test_the_loss_is_the_plain_sum_over_scales_and_their_maximum():
    model = narrow().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    image, mask = torch.rand(2, 3, 65, 81), torch.randint(0, 3, (2, 65, 81))
    mask[:, :9] = 255
    one, pixels = Second(model).resnet, model.preprocess(image)
    whole = one(pixels)
    maps = {"scale_1": whole}
    for scale in (0.75, 0.5):
        maps[f"scale_{scale}"] = one(F.interpolate(pixels, scale_factor=scale, mode="bilinear", align_corners=False))
    back = [F.interpolate(scores, whole.shape[2:], mode="bilinear", align_corners=False) for scores in maps.values()]
    maps["main"] = torch.stack(back).max(dim=0).values
    terms = model.losses({"image": image, "mask": mask})
    assert list(terms) == ["main", "scale_1", "scale_0.75", "scale_0.5"]
    assert {tuple(scores.shape[2:]) for scores in maps.values()} == {(9, 11), (7, 8), (5, 6)}
    for name, scores in maps.items():
        labels = nearest(mask, tuple(scores.shape[2:]))
        torch.testing.assert_close(terms[name], F.cross_entropy(scores, labels, ignore_index=255), msg=name)


@pytest.mark.parametrize("size", [(9, 11), (41, 41), (5, 6), (1, 1)])
def test_labels_and_weights_are_taken_at_the_middle_of_each_block(size):
    batch = {"mask": torch.randint(0, 256, (2, 65, 321)), "pixel_weight": torch.rand(2, 65, 321), "name": ["a", "b"]}
    small = subsample(batch, size)
    assert set(small) == {"mask", "pixel_weight"} and small["mask"].dtype == torch.int64
    for key, values in small.items():
        torch.testing.assert_close(values, nearest(batch[key], size))
    middle = subsample({"mask": torch.arange(24).view(1, 1, 24)}, (1, 3))["mask"]
    assert middle.tolist() == [[[4, 12, 20]]]


def test_weights_of_pixels_count():
    model = narrow(scales=[1.0])
    batch = {"image": torch.rand(1, 3, 33, 33), "mask": torch.randint(0, 3, (1, 33, 33))}
    left = torch.zeros(1, 33, 33)
    left[..., :16] = 1
    half = {**batch, "mask": batch["mask"].masked_fill(left == 0, 255)}
    torch.testing.assert_close(model.losses({**batch, "pixel_weight": left})["main"], model.losses(half)["main"])


def test_aspp_sums_its_branches_and_a_rate_beyond_the_map_sees_the_centre_only():
    aspp = ASPP(4, 2, (1, 50))
    features = torch.randn(1, 4, 7, 9)
    near, far = aspp.convs
    expected = F.conv2d(features, near.weight, near.bias, padding=1)
    expected = expected + F.conv2d(features, far.weight[:, :, 1:2, 1:2], far.bias)
    torch.testing.assert_close(aspp(features), expected)


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16"])
def test_scores_start_small(backbone):
    model = DeepLabV2(21, backbone, base_channels=16)
    assert len(model.new_layers()) == 4
    for score in model.new_layers():
        assert score.out_channels == 21 and (score.bias == 0).all()
        assert 0.009 < score.weight.std() < 0.011


def test_learning_rates_and_decay_of_the_published_recipe():
    model = DeepLabV2(3, base_channels=4, freeze_bn=True, head_lr_mult=10, bias_lr_mult=2, bias_weight_decay=0.0)
    groups = {group["name"]: group for group in parameter_groups(model)}
    assert {name: group["lr_mult"] for name, group in groups.items()} == {
        "backbone_weight": 1, "head_weight": 10, "head_bias": 20}  # fmt: skip
    assert "weight_decay" not in groups["head_weight"] and groups["head_bias"]["weight_decay"] == 0
    assert len(groups["head_weight"]["params"]) == len(groups["head_bias"]["params"]) == 4


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
def test_the_smallest_images_have_a_pixel_at_every_scale(size):
    model = narrow(scales=[0.25, 1.0, 1.5])
    with torch.inference_mode():
        logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 3, *size) and torch.isfinite(logits).all()


def test_imagenet_keeps_torchvisions_strides_also_in_checkpoints(monkeypatch):
    state = dict(narrow().backbone.state_dict())
    state |= {"fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    model = DeepLabV2(3, "resnet50", base_channels=4, weights="imagenet")
    first = model.backbone.layer2[0]
    assert first.conv1.stride == (1, 1) and first.conv2.stride == (2, 2)
    torch.testing.assert_close(first.conv2.weight, state["layer2.0.conv2.weight"])
    again = DeepLabV2(**init_args(model))
    assert again.backbone.layer2[0].conv2.stride == (2, 2)
    assert DeepLabV2(3, "resnet50", base_channels=4).backbone.layer2[0].conv1.stride == (2, 2)


def test_imagenet_gives_every_branch_of_vgg16_its_part_of_the_classifier(monkeypatch):
    fc = {"classifier.0.weight": torch.arange(49.0).view(1, 1, 49).expand(4096, 512, 49).reshape(4096, -1)}
    fc |= {"classifier.0.bias": torch.arange(4096.0), "classifier.3.bias": torch.arange(4096.0)}
    fc["classifier.3.weight"] = torch.arange(4096.0)[:, None] * 4096 + torch.arange(4096.0)
    monkeypatch.setattr("segmentation.architectures.deeplabv2.load_vgg16", lambda stages: fc)
    model = DeepLabV2(3, "vgg16", weights="imagenet")
    kept = set()
    for fc6, _, _, fc7, *_ in model.classifier.convs:
        assert fc6.weight[0, 0].tolist() == [[0, 3, 6], [21, 24, 27], [42, 45, 48]]
        torch.testing.assert_close(fc7.weight[:, :, 0, 0], fc7.bias[:, None] * 4096 + fc6.bias)
        kept.add(tuple(fc6.bias.tolist()))
    assert len(kept) == 4


def test_what_a_file_needs_is_kept(tmp_path):
    """A checkpoint of a network without MSC builds a network without MSC, unless the user sets scales."""
    model = narrow(scales=[1.0], stride_in_1x1=False)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    again = DeepLabV2(3, "resnet50", base_channels=4, weights=str(tmp_path / "x.ckpt")).eval()
    assert init_args(again)["scales"] == [1.0] and init_args(again)["stride_in_1x1"] is False
    image = torch.randn(1, 3, 40, 40)
    with torch.inference_mode():
        torch.testing.assert_close(again(image), model(image), atol=0, rtol=0)
    asked = DeepLabV2(3, "resnet50", scales=[1, 0.5], base_channels=4, weights=str(tmp_path / "x.ckpt"))
    assert init_args(asked)["scales"] == [1, 0.5]


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16"])
def test_weights_of_other_classes_and_without_a_head(backbone, tmp_path, capsys, caplog):
    five = narrow(backbone, 5)
    torch.save(five.state_dict(), tmp_path / "five.pth")
    bare = {key: value for key, value in five.state_dict().items() if key.startswith("backbone.")}
    torch.save(bare, tmp_path / "bare.pth")
    two = DeepLabV2(2, backbone, base_channels=4, weights=str(tmp_path / "five.pth"))
    said = capsys.readouterr().err + caplog.text
    assert said.count("keeps its random initialisation, as it has 5 outputs in the file and 2 here") >= 4
    key = next(key for key, value in bare.items() if value.dim() == 4)
    torch.testing.assert_close(two.state_dict()[key], bare[key])
    if backbone == "vgg16":
        torch.testing.assert_close(two.classifier.convs[2][3].weight, five.classifier.convs[2][3].weight)
    DeepLabV2(2, backbone, base_channels=4, weights=str(tmp_path / "bare.pth"))
    assert "classifier. keeps its random initialisation, as the file has none" in capsys.readouterr().err + caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet18"}, "backbone must be resnet101, resnet50 or vgg16, got resnet18"),
        ({"atrous_rates": [6, 0]}, r"atrous_rates must be positive, got \[6, 0\]"),
        ({"scales": [0.5]}, r"scales must be positive and have 1.0 among them, got \[0.5\]"),
        ({"scales": [1.0, -0.5]}, "scales must be positive"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        DeepLabV2(21, **arguments)
