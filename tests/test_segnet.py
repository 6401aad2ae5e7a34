"""SegNet against a second implementation of its released layer tables, torchvision's VGG-16 and hand-made values."""

import pytest
import torch
import torch.nn.functional as F
from conftest import shake
from torch import Tensor, nn
from torchvision.models import WeightsEnum, vgg16_bn

from segmentation.architectures.segnet import SegNet, unpool


@pytest.mark.parametrize(
    ("classes", "variant", "parameters"),
    [(21, "full", 29_455_125), (11, "full", 29_449_355), (21, "basic", 1_417_237), (11, "basic", 1_416_587)],
)
def test_parameter_counts_equal_the_released_models(classes, variant, parameters):
    with torch.device("meta"):
        model = SegNet(classes, variant)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_unpooling_puts_each_value_back_where_its_maximum_was():
    x = torch.tensor([[1.0, 5, 2], [3, 4, 9], [8, 7, 6]])[None, None]  # odd sides: the last windows are cut off
    pooled, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    assert pooled[0, 0].tolist() == [[5, 9], [8, 6]]
    back = unpool(10 * pooled + 1, indices, (3, 3))
    assert back[0, 0].tolist() == [[0, 51, 0], [0, 0, 91], [81, 0, 61]]


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (45, 30), (23, 9), (8, 8)])
def test_unpooling_is_torchs(size):
    x = torch.randn(2, 3, *size).to(memory_format=torch.channels_last)
    pooled, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    expected = F.max_unpool2d(pooled, indices, 2, output_size=size)
    assert torch.equal(unpool(pooled, indices, size), expected)


def test_unpooling_runs_where_only_deterministic_operations_may():
    model = SegNet(2, base_channels=2)
    torch.use_deterministic_algorithms(True)
    try:
        model(torch.randn(2, 3, 40, 40)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


# The released networks' layers in order: weights' place in ours, P pools, U unpools with the newest indices
LAYERS = {
    "full": (
        "encoder.0.0 encoder.0.3 P encoder.1.0 encoder.1.3 P encoder.2.0 encoder.2.3 encoder.2.6 P "
        "encoder.3.0 encoder.3.3 encoder.3.6 P encoder.4.0 encoder.4.3 encoder.4.6 P "
        "U decoder.4.0 decoder.4.3 decoder.4.6 U decoder.3.0 decoder.3.3 decoder.3.6 "
        "U decoder.2.0 decoder.2.3 decoder.2.6 U decoder.1.0 decoder.1.3 U decoder.0.0"
    ),
    "basic": (
        "encoder.0.0 P encoder.1.0 P encoder.2.0 P encoder.3.0 P "
        "U decoder.3.0 U decoder.2.0 U decoder.1.0 U decoder.0.0"
    ),
}
WIDTHS = {  # of the same layers, at a first width of 64
    "full": [64, 64, 128, 128, *[256] * 3, *[512] * 6, *[512] * 5, *[256] * 3, 128, 128, 64, 64],
    "basic": [64] * 8,
}


@pytest.mark.parametrize("variant", LAYERS)
def test_widths_are_those_of_the_released_layer_table(variant):
    with torch.device("meta"):
        model = SegNet(11, variant)
    layers = [layer for layer in LAYERS[variant].split() if layer not in "PU"]
    assert [model.get_submodule(layer).out_channels for layer in layers] == WIDTHS[variant]
    assert model.classifier.kernel_size == ((3, 3) if variant == "full" else (1, 1))


def second_writing(model: SegNet, image: Tensor, basic: bool) -> Tensor:
    """Run the table as one flat loop over the state dict."""
    state = model.state_dict()
    x, stack = image, []
    if basic:  # three channels: every one is within two of every other
        x = x / (1 + 1e-4 / 5 * (x**2).sum(1, keepdim=True)) ** 0.75
    for layer in LAYERS["basic" if basic else "full"].split():
        if layer == "P":
            size = x.shape[-2:]
            x, indices = nn.MaxPool2d(2, 2, ceil_mode=True, return_indices=True)(x)
            stack.append((indices, size))
        elif layer == "U":
            indices, size = stack.pop()
            x = nn.MaxUnpool2d(2, 2)(x, indices, output_size=size)
        else:
            stage, index = layer.rsplit(".", 1)
            norm = f"{stage}.{int(index) + 1}"
            x = F.conv2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"], padding=3 if basic else 1)
            mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
            x = F.batch_norm(x, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"], eps=1e-5)
            if not (basic and stage.startswith("decoder")):
                x = F.relu(x)
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"], padding=0 if basic else 1)


@pytest.mark.parametrize("variant", ["full", "basic"])
@pytest.mark.parametrize("size", [(64, 96), (61, 47), (3, 90), (1, 1)])
def test_logits_are_those_of_the_released_layer_table(variant, size):
    middle, spread = (128, 50) if variant == "basic" else (0, 1)  # of 0..255, where response normalisation matters
    model = shake(SegNet(4, variant, base_channels=8), middle + spread * torch.randn(4, 3, 64, 64))
    image = middle + spread * torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = second_writing(model, image, variant == "basic")
        assert expected.std() > 0.05
        torch.testing.assert_close(model(image), expected, atol=1e-4, rtol=1e-4)


def test_basic_normalises_stored_pixels_by_their_local_response():
    std = [0.003921569] * 3
    model = SegNet(2, "basic", base_channels=2, mean=[0.0] * 3, std=std)
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    out = model.norm(model.preprocess(pixel)).flatten()
    factor = (1 + 2e-5 * (200**2 + 100**2 + 50**2)) ** -0.75  # 2.05 ** -0.75 = 0.5837
    torch.testing.assert_close(out, torch.tensor([200.0, 100, 50]) * factor, rtol=1e-4, atol=0)
    assert isinstance(SegNet(2, base_channels=2).norm, nn.Identity)


def test_a_camvid_image_passes_the_sizes_of_the_released_upsampling_layers():
    """360 x 480 has 45 rows after three poolings, then 23 and 12; the released decoder names 23 x 30 and 45 x 60."""
    sizes = []
    with torch.device("meta"):
        model = SegNet(11)
        for stage in model.decoder:
            stage.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
        assert model(torch.empty(1, 3, 360, 480)).shape == (1, 11, 360, 480)
    assert sizes == [(23, 30), (45, 60), (90, 120), (180, 240), (360, 480)]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("full", [(8, 8, 8), (16, 4, 4), (16, 2, 2), (16, 4, 4), (8, 8, 8), (4, 16, 16)]),
        ("basic", [(2, 8, 8), (2, 4, 4), (2, 8, 8), (2, 16, 16)]),
    ],
)
def test_dropout_stands_in_the_deep_stages_alone(variant, expected):
    """After pool3, pool4 and pool5 and their mirror images; after pool3 and pool4 in Basic."""
    model = SegNet(3, variant, base_channels=2, dropout=0.5)
    shapes = []
    model.drop.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    image = torch.randn(2, 3, 64, 64)
    model(image)
    assert shapes == expected and model.drop.p == 0.5
    model.eval()
    assert torch.equal(model(image), model(image))


def test_imagenet_weights_are_torchvisions_encoder(monkeypatch):
    peer = shake(vgg16_bn(weights=None).features, torch.randn(2, 3, 64, 64))
    state = {f"features.{key}": value for key, value in peer.state_dict().items()}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    model = SegNet(5, weights="imagenet").eval()
    x = image = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        for stage in model.encoder:
            x = F.max_pool2d(stage(x), 2)
        torch.testing.assert_close(x, peer(image), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"ImageNet do not fit: weight: \(64, 3, 3, 3\) in the file, \(8, 3, 3, 3\)"):
        SegNet(5, base_channels=8, weights="imagenet")


def test_own_weights_come_back_and_another_class_count_leaves_the_classifier_fresh(tmp_path):
    first = shake(SegNet(5, base_channels=4), torch.randn(4, 3, 64, 64))
    torch.save(first.state_dict(), tmp_path / "segnet.pth")
    image = torch.randn(1, 3, 40, 33)
    again = SegNet(5, base_channels=4, weights=str(tmp_path / "segnet.pth")).eval()
    assert torch.equal(first(image), again(image))
    other = SegNet(3, base_channels=4, weights=str(tmp_path / "segnet.pth")).eval()
    assert other(image).shape == (1, 3, 40, 33)
    assert torch.equal(other.decoder[0][0].weight, first.decoder[0][0].weight)


def test_heads_are_all_but_the_encoder():
    model = SegNet(5, base_channels=2)
    heads = {id(p) for head in model.new_layers() for p in head.parameters()}
    encoder = {id(p) for p in model.encoder.parameters()}
    assert not heads & encoder and heads | encoder == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("variant", ["full", "basic"])
@pytest.mark.parametrize("classes", [1, 5])
def test_training_reaches_every_parameter(variant, classes):
    torch.manual_seed(0)
    model = SegNet(classes, variant, base_channels=4, dropout=0.5).train()
    image, mask = torch.rand(2, 3, 61, 47), torch.randint(0, max(2, classes), (2, 61, 47))
    losses = model.losses({"image": image, "mask": mask})
    assert list(losses) == ["main"]
    losses["main"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SegNet(5, "large"), "variant is full or basic, got large"),
        (lambda: SegNet(5, "basic", weights="imagenet"), "SegNet-Basic has no ImageNet weights"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
