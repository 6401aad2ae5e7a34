"""FC-DenseNet against the released code's channels, bookkeeping by hand and a second implementation."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from conftest import shake
from torch import Tensor, nn

from segmentation.architectures.fcdensenet import FCDenseNet, TransitionUp


@pytest.mark.parametrize(
    ("depth", "classes", "parameters"),
    [
        (56, 21, 1_378_725),
        (56, 11, 1_376_795),
        (67, 21, 3_466_133),
        (67, 11, 3_463_243),
        (103, 21, 9_324_661),
        (103, 11, 9_322_091),
    ],
)
def test_parameter_counts_equal_the_released_networks(depth, classes, parameters):
    with torch.device("meta"):
        model = FCDenseNet(classes, depth)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in model.modules()) == depth


@pytest.mark.parametrize(
    ("depth", "channels"),
    [
        # By hand, growth 12 and 4 layers a block, so 48 new maps each: the way up has 48 + skip + 48
        (56, [48, 96, 144, 192, 240, 288, 336, 384, 336, 288, 240, 192]),
        # Growth 16 and 5 layers, 80 new maps: 80 + skip + 80
        (67, [48, 128, 208, 288, 368, 448, 528, 608, 528, 448, 368, 288]),
        # The released code's list; the paper's Table 2 prints four of them 16 too small
        (103, [48, 112, 192, 304, 464, 656, 896, 1088, 816, 576, 384, 256]),
    ],
)
def test_channels_after_each_block(depth, channels):
    seen = []
    with torch.device("meta"):
        model = FCDenseNet(11, depth)
        for module in (model.conv, *model.down_blocks, model.bottleneck, *model.up_blocks):
            module.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
        model(torch.empty(1, 3, 224, 224))
    assert seen == channels


BLOCKS = {  # layers on the way down, at the bottom, on the way up
    56: ([4] * 5, 4, [4] * 5),
    103: ([4, 5, 7, 10, 12], 15, [12, 10, 7, 5, 4]),
}


def second_writing(model: FCDenseNet, depth: int, image: Tensor, batch_statistics: bool = False) -> Tensor:
    """Lists of maps that are joined at every use; each part's tensors are taken in the order of their use."""

    def tensors(part: str) -> Iterator[Tensor]:
        state = model.state_dict().items()
        return iter([value for key, value in state if key.startswith(part) and "num_batches" not in key])

    def layer(maps: list[Tensor], part: Iterator[Tensor]) -> Tensor:
        scale, shift, mean, var, weight, bias = islice(part, 6)
        x = torch.cat(maps, 1)
        if batch_statistics:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        mean, var, scale, shift = (value.view(1, -1, 1, 1) for value in (mean, var, scale, shift))
        return F.conv2d(F.relu((x - mean) / (var + 1e-5).sqrt() * scale + shift), weight, bias, padding="same")

    down, bottom, up = BLOCKS[depth]
    blocks, transitions = tensors("down_blocks."), tensors("transitions_down.")
    stack, skips = [F.conv2d(image, *tensors("conv."), padding=1)], []
    for count in down:
        for _ in range(count):
            stack.append(layer(stack, blocks))
        skips.append(stack)
        stack = [F.max_pool2d(layer(stack, transitions), 2)]
    blocks, transitions, new = tensors("bottleneck."), tensors("transitions_up."), []
    for _ in range(bottom):
        new.append(layer(stack + new, blocks))
    blocks = tensors("up_blocks.")
    for count in up:
        skip = torch.cat(skips.pop(), 1)
        x = F.conv_transpose2d(torch.cat(new, 1), *islice(transitions, 2), stride=2)
        stack = [x[:, :, : skip.shape[2], : skip.shape[3]], skip]  # one row or none too many: the centre is the start
        new = []
        for _ in range(count):
            new.append(layer(stack + new, blocks))
    return F.conv2d(torch.cat(stack + new, 1), *tensors("classifier."))


@pytest.mark.parametrize("depth", [56, 103])
@pytest.mark.parametrize("size", [(64, 96), (61, 47), (35, 32)])
def test_logits_are_those_of_a_second_writing(depth, size):
    model = shake(FCDenseNet(4, depth, growth_rate=4, base_channels=6), torch.randn(4, 3, 64, 64))
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = second_writing(model, depth, image)
        assert expected.std() > 0.05
        torch.testing.assert_close(model(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", [56, 103])
def test_batch_statistics_are_those_of_the_images_at_hand(depth):
    model = shake(
        FCDenseNet(4, depth, growth_rate=4, base_channels=6, batch_statistics=True), torch.randn(4, 3, 64, 64)
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    image = torch.randn(2, 3, 97, 64)
    with torch.inference_mode():
        expected = second_writing(model, depth, image, batch_statistics=True)
        torch.testing.assert_close(model(image), expected, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # nothing was averaged in


def test_batch_statistics_are_a_switch_on_the_same_weights():
    build = {"num_classes": 4, "depth": 56, "growth_rate": 3, "base_channels": 6, "dropout": 0.0}
    running = shake(FCDenseNet(**build), torch.randn(4, 3, 64, 64))
    batch = FCDenseNet(**build, batch_statistics=True).eval()
    batch.load_state_dict(running.state_dict())
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        evaluated = batch(image)
        assert (evaluated - running(image)).abs().max() > 0.01
        assert not torch.allclose(batch(image[:1]), evaluated[:1], atol=1e-3)  # the other image changes the result
        torch.testing.assert_close(evaluated, running.train()(image))  # without dropout, as in training
        batch.train()(image)
    for (key, value), other in zip(running.state_dict().items(), batch.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=key)  # and training updates the averages as before


@pytest.mark.parametrize(("batch_statistics", "least"), [(False, 32), (True, 64)])
@pytest.mark.parametrize("size", [(1, 1), (9, 70)])
def test_small_images_are_filled_up_with_zeros_and_cut_back(batch_statistics, least, size):
    build = {"growth_rate": 2, "base_channels": 4, "batch_statistics": batch_statistics}
    model = shake(FCDenseNet(4, 56, **build), torch.randn(4, 3, 64, 64))
    image = torch.randn(1, 3, *size)
    canvas = torch.zeros(1, 3, least, max(least, size[1]))
    canvas[..., : size[0], : size[1]] = image
    with torch.inference_mode():
        logits = model(image)
        assert logits.shape == (1, 4, *size) and torch.isfinite(logits).all()
        torch.testing.assert_close(logits, model(canvas)[..., : size[0], : size[1]])


def test_transition_up_keeps_the_newest_maps_and_cuts_to_the_skip():
    up = TransitionUp(2)
    x = torch.randn(1, 5, 3, 4)
    for rows, columns in ((6, 8), (7, 9), (6, 9)):
        skip = torch.randn(1, 3, rows, columns)
        out = up(x, skip)
        assert out.shape == (1, 5, rows, columns)
        assert torch.equal(out[:, 2:], skip)
        whole = F.conv_transpose2d(x[:, 3:], up.deconv.weight, up.deconv.bias, stride=2)  # 7 x 9
        torch.testing.assert_close(out[:, :2], whole[..., :rows, :columns])


def test_dropout_is_elementwise_and_in_every_layer_but_the_first_convolution_and_the_ways_up():
    with torch.device("meta"):
        model = FCDenseNet(11)
    rates = [m.p for m in model.modules() if type(m) is nn.Dropout]
    assert rates == [0.2] * (91 + 5)  # 91 layers in blocks and five transitions down


def test_own_weights_come_back_and_another_class_count_leaves_the_classifier_fresh(tmp_path):
    build = {"depth": 56, "growth_rate": 2, "base_channels": 4}
    first = shake(FCDenseNet(5, **build), torch.randn(4, 3, 64, 64))
    torch.save(first.state_dict(), tmp_path / "tiramisu.pth")
    image = torch.randn(1, 3, 40, 33)
    again = FCDenseNet(5, **build, weights=str(tmp_path / "tiramisu.pth")).eval()
    assert torch.equal(first(image), again(image))
    other = FCDenseNet(3, **build, weights=str(tmp_path / "tiramisu.pth")).eval()
    assert other(image).shape == (1, 3, 40, 33)
    assert torch.equal(other.conv.weight, first.conv.weight)


@pytest.mark.parametrize("classes", [1, 5])
def test_training_reaches_every_parameter(classes):
    torch.manual_seed(0)
    model = FCDenseNet(classes, 56, growth_rate=4, base_channels=8).train()
    image, mask = torch.rand(2, 3, 61, 47), torch.randint(0, max(2, classes), (2, 61, 47))
    losses = model.losses({"image": image, "mask": mask})
    assert list(losses) == ["main"]
    losses["main"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FCDenseNet(5, 101), "depth is 56, 67 or 103, got 101"),
        (lambda: FCDenseNet(5, 56, batch_statistics=True, freeze_bn=True), "batch_statistics .* freeze_bn"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
