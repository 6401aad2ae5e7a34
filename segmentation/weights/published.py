"""How other projects name and compute the networks whose weights they published, and how their names become ours."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]
CAFFE_PIXELS = (
    "blue, green, red from 0 to 255 less their mean: model.bgr: true, model.mean: [0.48109, 0.45753, 0.40787], "
    "model.std: [0.0039216, 0.0039216, 0.0039216]"
)


@dataclass(frozen=True)
class Layout:
    """The files of one project for one network.

    Args:
        project: owner and name of the repository.
        network: our class of the same network; a network that is none of ours is named with what sets it apart.
        marks: regular expressions; a file is in this layout if each matches the beginning of some key.
        rename: their key to ours, or to None for a tensor that their network keeps and never uses.
        arguments: what our class must be told so that equal weights give equal logits, from the state dict.
        pixels: what the images were scaled to, where it is not torchvision's RGB, mean and std.
    """

    project: str
    network: str
    marks: tuple[str, ...]
    rename: Callable[[str], str | None] = str
    arguments: Callable[[State], dict[str, Any]] = lambda state: {}
    pixels: str = ""

    def matches(self, state: State) -> bool:
        """Whether a file is in this layout."""
        return all(any(re.match(mark, key) for key in state) for mark in self.marks)


def kazuto1011(key: str) -> str:
    """``layer3.block2.conv3x3.bn`` is ``layer2.1.bn2``; with multi-scale input, all begin with ``base.``."""
    key = key.removeprefix("base.")
    key = re.sub(r"^layer1\.conv1\.(conv|bn)\.", r"backbone.\g<1>1.", key)
    part = re.match(r"layer(\d)\.block(\d+)\.(\w+)\.(conv|bn)\.(\w+)", key)
    if part:
        stage, block, name, kind, tensor = part.groups()
        if name == "shortcut":
            layer = f"downsample.{0 if kind == 'conv' else 1}"
        else:
            layer = f"{kind}{('reduce', 'conv3x3', 'increase').index(name) + 1}"
        return f"backbone.layer{int(stage) - 1}.{int(block) - 1}.{layer}.{tensor}"
    return re.sub(r"^aspp\.c(\d)\.", r"classifier.convs.\1.", key)


def hszhao(key: str) -> str:
    """``layer0`` is the deep stem, whose last batch norm has a name of its own here; ``cls`` and ``aux`` are heads."""
    key = re.sub(r"^layer0\.7\.", "backbone.bn1.", key)
    key = re.sub(r"^layer0\.(\d)\.", r"backbone.conv1.\1.", key)
    key = re.sub(r"^layer(\d)\.", r"backbone.layer\1.", key)
    key = re.sub(r"^cls\.", "classifier.", key)
    return re.sub(r"^aux\.", "aux_classifier.", key)


def jfzhang95(key: str) -> str | None:
    """ASPP and decoder, and the names inside Xception's units and MobileNet's blocks."""
    if key.startswith(("backbone.low_level_features.", "backbone.high_level_features.")):
        return None  # the same tensors stand under features
    key = re.sub(r"^aspp\.aspp(\d)\.(atrous_conv|bn)\.", lambda m: f"aspp.convs.{int(m[1]) - 1}.{m[2] == 'bn':d}.", key)
    key = key.replace("aspp.global_avg_pool.", "aspp.convs.4.")
    key = re.sub(r"^aspp\.(conv|bn)1\.", lambda m: f"aspp.project.{m[1] == 'bn':d}.", key)
    key = re.sub(r"^decoder\.(conv|bn)1\.", lambda m: f"decoder.reduce.{m[1] == 'bn':d}.", key)
    key = re.sub(r"^decoder\.last_conv\.8\.", "classifier.", key)
    key = re.sub(r"^decoder\.last_conv\.(\d)\.", lambda m: f"decoder.convs.{int(m[1]) // 4}.{int(m[1]) % 4}.", key)
    return key


def jfzhang95_xception(key: str) -> str | None:
    """A unit is ``rep``: ReLU, separable convolution and norm three times over; block1 and 2 lack the first ReLU."""
    key = re.sub(r"^backbone\.(conv|bn)([12])\.", lambda m: f"backbone.conv{m[2]}.{m[1] == 'bn':d}.", key)
    key = re.sub(r"\.block([12])\.rep\.(\d)\.", lambda m: f".block{m[1]}.rep.{int(m[2]) + 1}.", key)
    key = re.sub(r"\.rep\.(\d)\.", lambda m: f".conv{int(m[1]) // 3 + 1}." + ("3." if int(m[1]) % 3 == 2 else ""), key)
    key = re.sub(r"^backbone\.conv([345])\.", lambda m: f"backbone.exit2.conv{int(m[1]) - 2}.", key)
    key = re.sub(r"^backbone\.bn([345])\.", lambda m: f"backbone.exit2.conv{int(m[1]) - 2}.3.", key)
    for name, index in (("conv1", 0), ("bn", 1), ("pointwise", 2)):
        key = re.sub(rf"(backbone\.\w+\.conv\d)\.{name}\.", rf"\1.{index}.", key)
    key = key.replace(".skip.", ".shortcut.0.").replace(".skipbn.", ".shortcut.1.")
    key = re.sub(r"\.block20\.", ".exit1.", key)
    key = re.sub(r"\.block([4-9]|1\d)\.", lambda m: f".middle.{int(m[1]) - 4}.", key)
    return jfzhang95(key)


def jfzhang95_mobilenet(key: str) -> str | None:
    """Torchvision groups convolution, norm and ReLU6; here they stand in one row."""

    def block(match: re.Match) -> str:
        index, place = int(match[1]), int(match[2]) + (3 if match[1] == "1" else 0)  # the first block does not expand
        layer = {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1", 6: "2", 7: "3"}[place]
        if index == 1:
            layer = {"1.0": "0.0", "1.1": "0.1", "2": "1", "3": "2"}[layer]
        return f"backbone.features.{index}.conv.{layer}."

    return jfzhang95(re.sub(r"^backbone\.features\.(\d+)\.conv\.(\d)\.", block, key))


def vainf(key: str) -> str:
    """The decoder is called the classifier; MobileNet is cut into low and high level features."""
    key = re.sub(r"^backbone\.(low|high)_level_features\.", "backbone.features.", key)
    key = key.replace("classifier.project.", "decoder.reduce.").replace("classifier.aspp.", "aspp.")
    key = key.replace("classifier.classifier.3.", "classifier.")
    return key.replace("classifier.classifier.", "decoder.convs.0.")


def wkentaro(key: str) -> str:
    """Caffe's names, ``conv3_2`` for the second convolution of the third stage."""
    key = re.sub(r"^conv(\d)_(\d)\.", lambda m: f"backbone.conv{m[1]}.{2 * (int(m[2]) - 1)}.", key)
    key = re.sub(r"^(fc[67])\.", r"backbone.\1.", key)
    key = re.sub(r"^upscore(16|8)?\.", "classifier.upscore.", key)
    return re.sub(r"^(score_|upscore2|upscore_pool4)", r"classifier.\1", key)


def milesial(key: str) -> str:
    """``inc`` and ``down1`` to ``down4`` are the contracting path, ``up1`` is the lowest step of the expanding one."""
    key = key.replace("maxpool_conv.1.", "").replace("double_conv.", "")
    key = re.sub(r"^inc\.", "down1.", re.sub(r"^down(\d)\.", lambda m: f"down{int(m[1]) + 1}.", key))
    key = key.replace("down5.", "bottom.")
    key = re.sub(r"^up(\d)\.", lambda m: f"up{5 - int(m[1])}.", key)
    return re.sub(r"^outc\.conv\.", "classifier.", key)


def smp(key: str) -> str:
    """``aspp.1`` and ``block2`` hold a separable convolution within, and its norm beside it."""
    key = re.sub(r"^encoder\.", "backbone.", key)
    key = re.sub(r"^decoder\.block1\.", "decoder.reduce.", key)
    key = re.sub(r"^segmentation_head\.0\.", "classifier.", key)
    key = re.sub(r"^decoder\.aspp\.0\.", "aspp.0.", key)
    key = re.sub(r"^(aspp\.0\.convs\.[123])\.1\.", r"\1.2.", key)  # norm of a separable branch
    key = re.sub(r"^(aspp\.0\.convs\.[123])\.0\.(\d)\.", r"\1.\2.", key)
    key = re.sub(r"^decoder\.aspp\.1\.(\d)\.", r"aspp.1.\1.", key)
    key = re.sub(r"^decoder\.aspp\.2\.", "aspp.1.2.", key)
    key = re.sub(r"^decoder\.block2\.0\.(\d)\.", r"decoder.convs.0.\1.", key)
    return re.sub(r"^decoder\.block2\.1\.", "decoder.convs.0.2.", key)


LAYOUTS = (
    Layout(
        "kazuto1011/deeplab-pytorch",
        "DeepLabV2",
        (r"(base\.)?layer1\.conv1\.conv", r"(base\.)?aspp\.c0"),
        kazuto1011,
        lambda state: {"scales": [1.0, 0.75, 0.5] if any(key.startswith("base.") for key in state) else [1.0]},
        CAFFE_PIXELS,
    ),
    Layout("hszhao/semseg", "PSPNet", (r"layer0\.0\.", r"ppm\.features"), hszhao),
    Layout(
        "jfzhang95/pytorch-deeplab-xception",
        "DeepLabV3Plus",
        (r"aspp\.aspp1", r"decoder\.last_conv", r"backbone\.block1\.rep"),
        jfzhang95_xception,
        lambda state: {"layout": "jfzhang95"},
    ),
    Layout(
        "jfzhang95/pytorch-deeplab-xception",
        "DeepLabV3Plus",
        (r"aspp\.aspp1", r"decoder\.last_conv", r"backbone\.features"),
        jfzhang95_mobilenet,
        lambda state: {"layout": "jfzhang95"},
    ),
    Layout(
        "jfzhang95/pytorch-deeplab-xception",
        "DeepLabV3Plus",
        (r"aspp\.aspp1", r"decoder\.last_conv"),
        jfzhang95,
        lambda state: {"layout": "jfzhang95"},
    ),
    Layout(
        "VainF/DeepLabV3Plus-Pytorch",
        "DeepLabV3Plus",
        (r"classifier\.aspp\.convs", r"classifier\.project"),
        vainf,
        lambda state: {"layout": "VainF"},
    ),
    Layout(
        "VainF/DeepLabV3Plus-Pytorch",
        "DeepLabV3",
        (r"classifier\.classifier\.0\.convs",),
        lambda key: key.replace("classifier.classifier.", "classifier."),
    ),
    Layout("wkentaro/pytorch-fcn", "FCN", (r"conv1_1\.", r"score_fr\."), wkentaro, pixels=CAFFE_PIXELS),
    Layout(
        "milesial/Pytorch-UNet",
        "UNet",
        (r"inc\.double_conv", r"outc\.conv"),
        milesial,
        lambda state: {"up": "transposed" if "up1.up.weight" in state else "bilinear"},
        "RGB from 0 to 1: model.mean: [0, 0, 0], model.std: [1, 1, 1]",
    ),
    Layout(
        "segmentation_models.pytorch",
        "its Unet, a ResNet with a decoder of one width per level",
        (r"decoder\.blocks\.0\.conv1", r"segmentation_head\.0"),
    ),
    Layout(
        "segmentation_models.pytorch",
        "DeepLabV3Plus",
        (r"encoder\.layer4\.0\.conv3", r"decoder\.aspp\.0\.convs", r"decoder\.block2"),
        smp,
        lambda state: {"layout": "smp"},
    ),
    Layout("segmentation_models.pytorch", "a network of its own", (r"encoder\.", r"segmentation_head\.0")),
)
