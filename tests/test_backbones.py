"""Backbones against torchvision's features, and their strides and dilations."""

import pytest
import torch
import torchvision
from conftest import dilations, shake_norms
from torch import nn
from torchvision.models import resnet50

from segmentation.architectures.backbones.mobilenet import MobileNetV2
from segmentation.architectures.backbones.resnet import ResNet
from segmentation.architectures.backbones.xception import Xception65
from segmentation.errors import UserError


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


@pytest.mark.parametrize("stride", [16, 8])
def test_xception_keeps_its_resolution_by_dilation(stride):
    with torch.device("meta"):
        net = Xception65(output_stride=stride)
        features = net(torch.empty(1, 3, 513, 513))
    assert features["exit"].shape == (1, 2048, 512 // stride + 1, 512 // stride + 1)
    assert features["block2_conv2"].shape == (1, 256, 129, 129) and features["block1"].shape == (1, 128, 129, 129)
    rate = 16 // stride
    assert dilations(net.middle) == [rate] * 48 and dilations(net.exit2) == [2 * rate] * 3
    assert not any(isinstance(m, nn.MaxPool2d) for m in net.modules())


def test_mobilenetv2_gives_torchvisions_features_at_the_tap():
    """Both are the same network up to the first stride that ours removes."""
    peer = torchvision.models.mobilenet_v2(weights=None).eval()
    ours = MobileNetV2().eval()
    ours.load_state_dict(
        {k: v for k, v in peer.state_dict().items() if k.startswith("features.") and "18" not in k[:12]}
    )
    image = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image)["stride4"], peer.features[:4](image))
    assert ours(image)["last"].shape == (1, 320, 5, 7)


def test_a_resnet_of_another_depth_is_refused():
    with pytest.raises(UserError, match="depth"):
        ResNet(34)
