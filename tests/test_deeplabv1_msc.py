"""DeepLab v1 with multi-scale prediction (DeepLab-MSc) and in other widths."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.architectures.deeplabv1 import DeepLabV1

MAPS = ((3, 8), (64, 4), (128, 2), (256, 1), (512, 1))  # channels of the image and four poolings, strides to 1/8


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


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
    """The paper's words: one classifier over the concatenation of fc7 and the five two-layer perceptrons."""
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
    assert "multi_scale. left fresh, the file has none" in capsys.readouterr().err + caplog.text
    optimizer = torch.optim.SGD(model.param_groups(), lr=0.1)
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
    fast = {id(p) for group in model.param_groups() if group["lr_mult"] == 10 for p in group["params"]}
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
    assert "fc8. left fresh, it has 3 outputs in the file and 5 here" in said
    assert "multi_scale.classifier. left fresh, it has 3 outputs in the file and 5 here" in said
    torch.testing.assert_close(
        model.multi_scale.branches[2][3].weight, build(multi_scale=True).multi_scale.branches[2][3].weight
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"multi_scale": True, "fc7_padding": 1}, "multi_scale: true needs fc7_padding: 0"),
        ({"train_only_multi_scale": True}, "train_only_multi_scale: true needs multi_scale: true"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        DeepLabV1(21, **arguments)
