"""DeepLab v3+ by its parameter counts; test_published.py compares its logits with three other projects'."""

import pytest
import torch
from conftest import count

from segmentation.architectures.deeplabv3plus import DeepLabV3Plus
from segmentation.errors import UserError


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: DeepLabV3Plus(21, "resnet101"), 59_344_309),
        (lambda: DeepLabV3Plus(21, "resnet101", "jfzhang95", output_stride=8), 59_344_309),
        (lambda: DeepLabV3Plus(21, "resnet50"), 40_352_181),
        (lambda: DeepLabV3Plus(21, "resnet50", "VainF"), 39_761_845),
        (lambda: DeepLabV3Plus(21, "resnet101", "VainF"), 58_753_973),
        (lambda: DeepLabV3Plus(21, "xception65"), 41_055_413),
        (lambda: DeepLabV3Plus(21, "xception65", output_stride=8), 41_055_413),
        (lambda: DeepLabV3Plus(21, "xception65", low_level="block1"), 41_049_269),
        (lambda: DeepLabV3Plus(21, "xception65", "jfzhang95"), 54_705_317),
    ],
)
def test_parameter_counts_equal_the_papers(build, parameters):
    with torch.device("meta"):
        model = build()
    assert count(model) == parameters


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeepLabV3Plus(21, "mobilenet_v3_large", output_stride=8), "at output_stride 16 only"),
        (lambda: DeepLabV3Plus(21, "xception65", weights="imagenet"), "Xception65"),
        (lambda: DeepLabV3Plus(21, low_level="conv1"), "low_level of resnet101 is one of layer1"),
        (lambda: DeepLabV3Plus(21, "vgg16"), "backbone"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
