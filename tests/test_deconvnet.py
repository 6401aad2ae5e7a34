"""DeconvNet against a second implementation in plain convolutions, a fake VGG-16 and values computed by hand."""

import pytest
import torch
import torch.nn.functional as F
from conftest import shake
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.vgg import VGG, make_layers

from segmentation.architectures.deconvnet import DeconvNet, unpool


@pytest.mark.parametrize(("classes", "fc", "parameters"), [(21, 4096, 251_805_653), (21, 1024, 81_917_909)])
def test_parameter_count_is_that_of_the_released_model(classes, fc, parameters):
    """With 1024 channels: 4096 less 3072 of them in each of fc6, fc7 and fc6-deconv, and in two batch norms."""
    with torch.device("meta"):
        model = DeconvNet(classes, fc_channels=fc)
    assert sum(p.numel() for p in model.parameters()) == parameters
    fc6, fc6_deconv = 3072 * (512 * 49 + 1), 3072 * 512 * 49
    fc7 = 4096 * 4097 - 1024 * 1025
    assert fc6 + fc7 + fc6_deconv + 2 * 2 * 3072 == 251_805_653 - 81_917_909


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((224, 224), [(7, 7), (1, 1), (7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (224, 224)]),
        ((360, 480), [(12, 15), (6, 9), (12, 15), (24, 30), (48, 60), (96, 120), (192, 240), (384, 480)]),
        ((30, 260), [(7, 9), (1, 3), (7, 9), (14, 18), (28, 36), (56, 72), (112, 144), (224, 288)]),
    ],
)
def test_sizes_on_the_way_down_and_up(size, sizes):
    """Into fc6, out of it, out of fc6-deconv and into each stage up; 224 goes down to 1 x 1 as in the paper."""
    seen = []
    with torch.device("meta"):
        model = DeconvNet(21).eval()
        model.fc6.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
        for layer in (model.fc6, model.fc6_deconv):
            layer.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape[-2:])))
        for name in ("deconv5", "deconv4", "deconv3", "deconv2", "deconv1"):
            layer = model.get_submodule(name)
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
        assert model(torch.empty(1, 3, *size)).shape == (1, 21, *size)
    assert seen == sizes


def test_unpooling_puts_each_value_back_where_its_maximum_was():
    x = torch.tensor([[1.0, 2, 9, 3], [4, 3, 5, 6], [0, 0, 1, 2], [7, 0, 4, 3]])[None, None]
    pooled, switches = F.max_pool2d(x, 2, return_indices=True)
    assert pooled[0, 0].tolist() == [[4, 9], [7, 4]]
    back = unpool(-pooled, switches)
    assert back[0, 0].tolist() == [[0, 0, -9, 0], [-4, 0, 0, 0], [0, 0, 0, 0], [-7, 0, -4, 0]]


def second_writing(model: DeconvNet, image: Tensor) -> Tensor:
    """Compute the logits with torch's unpooling, and transposed convolutions as convolutions with a turned kernel."""
    state = model.state_dict()

    def norm_relu(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.relu(F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5))

    def turned(name: str) -> Tensor:
        return state[name].flip(-2, -1).transpose(0, 1)

    x, stack = image, []
    for stage, layers in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3)):
        for layer in range(layers):
            name = f"conv{stage}.{3 * layer}"
            x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)
            x = norm_relu(x, f"conv{stage}.{3 * layer + 1}")
        x, switches = F.max_pool2d(x, 2, 2, return_indices=True)
        stack.append(switches)
    x = norm_relu(F.conv2d(x, state["fc6.0.weight"], state["fc6.0.bias"]), "fc6.1")
    x = norm_relu(F.conv2d(x, state["fc7.0.weight"], state["fc7.0.bias"]), "fc7.1")
    x = F.conv2d(x, turned("fc6_deconv.0.weight"), state["fc6_deconv.0.bias"], padding=6)
    x = norm_relu(x, "fc6_deconv.1")
    for stage, layers in ((5, 3), (4, 3), (3, 3), (2, 2), (1, 2)):
        x = F.max_unpool2d(x, stack.pop(), 2, 2)
        for layer in range(layers):
            name = f"deconv{stage}.{3 * layer}"
            x = F.conv2d(x, turned(f"{name}.weight"), state[f"{name}.bias"], padding=1)
            x = norm_relu(x, f"deconv{stage}.{3 * layer + 1}")
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize("size", [(224, 224), (224, 288)])
def test_logits_are_those_of_plain_convolutions(size):
    model = shake(DeconvNet(4, base_channels=4, fc_channels=16), torch.randn(8, 3, 224, 224))
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = second_writing(model, image)
        assert expected.std() > 0.05
        torch.testing.assert_close(model(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (61, 47), (230, 97)])
def test_other_sizes_are_filled_up_with_zeros_and_cut_back(size):
    model = shake(DeconvNet(4, base_channels=2, fc_channels=4), torch.randn(4, 3, 224, 224))
    image = torch.randn(1, 3, *size)
    canvas = torch.zeros(1, 3, 224 if size[0] <= 224 else 256, 224)
    canvas[..., : size[0], : size[1]] = image
    with torch.inference_mode():
        logits = model(image)
        assert logits.shape == (1, 4, *size)
        torch.testing.assert_close(logits, model(canvas)[..., : size[0], : size[1]])


def test_the_loss_is_that_of_the_logits():
    model = shake(DeconvNet(3, base_channels=2, fc_channels=4), torch.randn(4, 3, 224, 224))
    image, mask = torch.rand(2, 3, 40, 50), torch.randint(0, 3, (2, 40, 50))
    mask[:, :9] = 255
    loss = model.losses({"image": image, "mask": mask})["main"]
    expected = F.cross_entropy(model(model.preprocess(image)), mask, ignore_index=255)
    torch.testing.assert_close(loss, expected)


def test_imagenet_weights_are_torchvisions_up_to_fc7(monkeypatch):
    """A VGG-16 built by torchvision, an eighth as wide: its linear layers equal our convolutions."""
    widths = [8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M"]
    peer = VGG(make_layers(widths, batch_norm=True), num_classes=10, init_weights=False)
    peer.classifier = nn.Sequential(nn.Linear(64 * 49, 24), nn.Identity(), nn.Identity(), nn.Linear(24, 24))
    shake(peer, torch.randn(4, 3, 224, 224))
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: peer.state_dict())
    model = DeconvNet(5, base_channels=8, fc_channels=24, weights="imagenet").eval()
    x = image = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        for stage in (model.conv1, model.conv2, model.conv3, model.conv4, model.conv5):
            x, _ = model.pool(stage(x))
        x = model.fc7[0](model.fc6[0](x))  # without their batch norm and ReLU, which the peer lacks
        assert x.std() > 0.1
        torch.testing.assert_close(x.flatten(1), peer(image), atol=1e-4, rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"ImageNet do not fit: weight: \(24, 64, 7, 7\) in the file, \(12, 64, 7, 7\)"
    ):
        DeconvNet(5, base_channels=8, fc_channels=12, weights="imagenet")


def test_own_weights_come_back_and_another_class_count_leaves_the_classifier_fresh(tmp_path):
    first = shake(DeconvNet(5, base_channels=2, fc_channels=4), torch.randn(4, 3, 224, 224))
    torch.save(first.state_dict(), tmp_path / "deconvnet.pth")
    image = torch.randn(1, 3, 40, 33)
    again = DeconvNet(5, base_channels=2, fc_channels=4, weights=str(tmp_path / "deconvnet.pth")).eval()
    assert torch.equal(first(image), again(image))
    other = DeconvNet(3, base_channels=2, fc_channels=4, weights=str(tmp_path / "deconvnet.pth")).eval()
    assert other(image).shape == (1, 3, 40, 33)
    assert torch.equal(other.deconv1[0].weight, first.deconv1[0].weight)


def test_heads_are_the_way_up():
    model = DeconvNet(5, base_channels=2, fc_channels=4)
    heads = {id(p) for head in model.new_layers() for p in head.parameters()}
    down = (model.conv1, model.conv2, model.conv3, model.conv4, model.conv5, model.fc6, model.fc7)
    rest = {id(p) for module in down for p in module.parameters()}
    assert not heads & rest and heads | rest == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("classes", [1, 5])
def test_training_reaches_every_parameter(classes):
    torch.manual_seed(0)
    model = DeconvNet(classes, base_channels=2, fc_channels=8).train()
    image, mask = torch.rand(2, 3, 61, 47), torch.randint(0, max(2, classes), (2, 61, 47))
    losses = model.losses({"image": image, "mask": mask})
    assert list(losses) == ["main"]
    losses["main"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.dim() == 4)
