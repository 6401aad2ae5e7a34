"""DeepLab v1 compared with values computed by hand, and its multi-scale prediction with a second implementation."""

import pytest
import torch
import torch.nn.functional as F
from conftest import count
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from segmentation.architectures.deeplabv1 import DeepLabV1
from segmentation.errors import UserError
from segmentation.optimizer import parameter_groups


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: DeepLabV1(21), 20_505_429),
        (lambda: DeepLabV1(11), 20_495_179),
        (lambda: DeepLabV1(21, fc7_padding=1, dropout="channel"), 20_505_429),
    ],
)
def test_parameter_counts_equal_the_papers(build, parameters):
    with torch.device("meta"):
        model = build()
    assert count(model) == parameters


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
    height, width = (-(-side // 8) for side in size)
    ramp = torch.stack(
        [8.0 * torch.arange(width).expand(height, width), 8.0 * torch.arange(height)[:, None].expand(height, width)]
    )

    class Ramp(DeepLabV1):
        def score_maps(self, image: Tensor) -> dict[str, Tensor]:
            return {"main": ramp[None]}

    logits = Ramp(2).eval()(torch.zeros(1, 3, *size))
    assert logits.shape == (1, 2, *size)
    torch.testing.assert_close(logits[0, 0, 0], torch.arange(size[1]).clamp(max=8 * (width - 1)).float())
    torch.testing.assert_close(logits[0, 1, :, 0], torch.arange(size[0]).clamp(max=8 * (height - 1)).float())


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


# Multi-scale prediction

MAPS = ((3, 8), (64, 4), (128, 2), (256, 1), (512, 1))  # channels of the image and four poolings, strides to 1/8


def test_parameter_counts_by_hand():
    added = sum((9 * channels + 1) * 128 + (128 + 1) * 128 for channels, _ in MAPS) + 640 * 21
    with torch.device("meta"):
        assert count(DeepLabV1(21)) == 20_505_429
        assert count(DeepLabV1(21, multi_scale=True)) == 20_505_429 + added == 21_711_445
        assert count(DeepLabV1(21, multi_scale=True, train_only_multi_scale=True)) == added
        wide, narrow = DeepLabV1(21, multi_scale=True), DeepLabV1(21, multi_scale=True, base_channels=16)
    for (name, large), small in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        expected = [side if side in (1, 3, 21) else side // 4 for side in large.shape]
        assert list(small.shape) == expected, name


def build(**arguments) -> DeepLabV1:
    torch.manual_seed(2)
    model = DeepLabV1(3, base_channels=4, **arguments)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.1)
    for name, parameter in model.named_parameters():
        if name in ("fc8.weight", "multi_scale.classifier.weight"):
            nn.init.normal_(parameter, 0, 0.1)
    return model.eval()


def second(model: DeepLabV1, image: Tensor) -> Tensor:
    """Compute one classifier over the concatenation of fc7 and the five two-layer perceptrons, as the paper says."""
    p = model.state_dict()

    def conv(name: str, x: Tensor, **kwargs) -> Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **kwargs).relu()

    x, maps = image, [image]
    for stage, (layers, stride) in enumerate(((2, 2), (2, 2), (3, 2), (3, 1), (3, 1)), start=1):
        rate = 2 if stage == 5 else 1
        for layer in range(layers):
            x = conv(f"conv{stage}.{2 * layer}", x, padding=rate, dilation=rate)
        x = F.max_pool2d(x, 3, stride, 1)
        maps.append(x)
    x = conv("fc7", conv("fc6", F.avg_pool2d(x, 3, 1, 1), padding=12, dilation=12))
    features = [x]
    for i, (_, stride) in enumerate(MAPS):
        at = f"multi_scale.branches.{i}"
        features.append(conv(f"{at}.3", conv(f"{at}.0", maps[i], stride=stride, padding=1)))
    weight = torch.cat([p["fc8.weight"], p["multi_scale.classifier.weight"]], dim=1)
    return F.conv2d(torch.cat(features, dim=1), weight, p["fc8.bias"])


@pytest.mark.parametrize("size", [(41, 65), (40, 61), (7, 1)])
def test_scores_are_those_of_one_classifier_over_the_concatenation(size):
    model, image = build(multi_scale=True), torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = second(model, image)
        assert expected.shape[2:] == tuple(-(-side // 8) for side in size)
        torch.testing.assert_close(model.score_maps(image)["main"], expected, atol=1e-5, rtol=1e-4)
        assert (model.multi_scale.branches[0](image)).std() > 0.01
        assert model(image).shape == (2, 3, *size)


def test_a_plain_network_grows_and_only_what_is_new_is_trained(tmp_path, capsys, caplog):
    """Section 4.3: the weights found so far stay, and those that multi-scale prediction adds are learned."""
    plain = build()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = build(multi_scale=True, train_only_multi_scale=True, weights=str(tmp_path / "plain.pth"))
    assert "multi_scale. keeps its random initialisation, as the file has none" in capsys.readouterr().err + caplog.text
    optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1)
    model.train()
    image, mask = torch.rand(2, 3, 41, 41), torch.randint(0, 3, (2, 41, 41))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.losses({"image": image, "mask": mask})["main"].backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith("multi_scale.")}
    torch.testing.assert_close(model.fc6.weight, plain.fc6.weight)


def test_heads_are_the_classifier_and_what_is_new():
    model = DeepLabV1(3, base_channels=4, multi_scale=True, head_lr_mult=10)
    fast = {id(p) for group in parameter_groups(model) if group["lr_mult"] == 10 for p in group["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in fast}
    assert named == {name for name, _ in model.named_parameters() if name.startswith(("fc8.", "multi_scale."))}


@pytest.mark.parametrize("multi_scale", [False, True])
def test_weights_of_pixels_are_subsampled_with_the_labels(multi_scale):
    model = build(multi_scale=multi_scale)
    batch = {"image": torch.rand(1, 3, 41, 33), "mask": torch.randint(0, 3, (1, 41, 33))}
    upper = torch.zeros(1, 41, 33)
    upper[:, :20] = 1
    half = {**batch, "mask": batch["mask"].masked_fill(upper == 0, 255)}
    torch.testing.assert_close(model.losses({**batch, "pixel_weight": upper})["main"], model.losses(half)["main"])


def test_other_classes_leave_both_classifiers_fresh(tmp_path, capsys, caplog):
    torch.save(build(multi_scale=True).state_dict(), tmp_path / "three.pth")
    model = DeepLabV1(5, base_channels=4, multi_scale=True, weights=str(tmp_path / "three.pth"))
    said = capsys.readouterr().err + caplog.text
    assert "fc8. keeps its random initialisation, as it has 3 outputs in the file and 5 here" in said
    assert "multi_scale.classifier. keeps its random initialisation, as it has 3 outputs in the file and 5 here" in said
    torch.testing.assert_close(
        model.multi_scale.branches[2][3].weight, build(multi_scale=True).multi_scale.branches[2][3].weight
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fc7_padding": 2}, "fc7_padding"),
        ({"num_classes": 0}, "num_classes"),
        ({"multi_scale": True, "fc7_padding": 1}, "multi_scale: true needs fc7_padding: 0"),
        ({"train_only_multi_scale": True}, "train_only_multi_scale: true needs multi_scale: true"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        DeepLabV1(**{"num_classes": 21, **arguments})
