"""Other projects' published weights: how their files are recognised, renamed, and computed.

`LAYOUTS` has a row per project and network: how to recognise a file, our name of each key, and the constructor
arguments that make our network compute what theirs does. `PORTS` says how the DeepLab v3+ of each project differs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        network: our class of the same network, or a description of a network that we do not have.
        marks: regular expressions; a file has this layout if each of them matches the beginning of some key.
        rename: turns their key into ours, or into None for a tensor that their network stores and never uses.
        arguments: constructor arguments that our class needs for equal logits; computed from the state dict.
        defaults: constructor arguments that their network had in training, and that the user may change.
        pixels: how their images were scaled, where this differs from torchvision's RGB, mean and std.
    """

    project: str
    network: str
    marks: tuple[str, ...]
    rename: Callable[[str], str | None] = str
    arguments: Callable[[State], dict[str, Any]] = lambda state: {}
    defaults: Callable[[State], dict[str, Any]] = lambda state: {}
    pixels: str = ""

    def matches(self, state: State) -> bool:
        """Return whether a file has this layout."""
        return all(any(re.match(mark, key) for key in state) for mark in self.marks)


def kazuto1011(key: str) -> str:
    """Rename ``layer3.block2.conv3x3.bn`` to ``layer2.1.bn2``; with multi-scale input, keys begin with ``base.``."""
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
    """Rename ``layer0``, the deep stem, to ``conv1`` and ``bn1``, and the classifiers ``cls`` and ``aux``."""
    key = re.sub(r"^layer0\.7\.", "backbone.bn1.", key)
    key = re.sub(r"^layer0\.(\d)\.", r"backbone.conv1.\1.", key)
    key = re.sub(r"^layer(\d)\.", r"backbone.layer\1.", key)
    key = re.sub(r"^cls\.", "classifier.", key)
    return re.sub(r"^aux\.", "aux_classifier.", key)


def jfzhang95(key: str) -> str | None:
    """Rename ASPP and decoder, which are the same over every backbone."""
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
    """Rename a unit's ``rep``: three times ReLU, separable convolution and norm; block1 and 2 lack the first ReLU."""
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
    """Rename a block's layers: torchvision groups convolution, norm and ReLU6, this project lists them in one row."""

    def block(match: re.Match) -> str:
        index, place = int(match[1]), int(match[2]) + (3 if match[1] == "1" else 0)  # the first block does not expand
        layer = {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1", 6: "2", 7: "3"}[place]
        if index == 1:
            layer = {"1.0": "0.0", "1.1": "0.1", "2": "1", "3": "2"}[layer]
        return f"backbone.features.{index}.conv.{layer}."

    return jfzhang95(re.sub(r"^backbone\.features\.(\d+)\.conv\.(\d)\.", block, key))


def vainf(key: str) -> str:
    """Rename the decoder, which they call classifier, and MobileNet, which they cut into low and high level."""
    key = re.sub(r"^backbone\.(low|high)_level_features\.", "backbone.features.", key)
    key = key.replace("classifier.project.", "decoder.reduce.").replace("classifier.aspp.", "aspp.")
    key = key.replace("classifier.classifier.3.", "classifier.")
    return key.replace("classifier.classifier.", "decoder.convs.0.")


def wkentaro(key: str) -> str:
    """Rename Caffe's ``conv3_2``, the second convolution of the third stage."""
    key = re.sub(r"^conv(\d)_(\d)\.", lambda m: f"backbone.conv{m[1]}.{2 * (int(m[2]) - 1)}.", key)
    key = re.sub(r"^(fc[67])\.", r"backbone.\1.", key)
    key = re.sub(r"^upscore(16|8)?\.", "classifier.upscore.", key)
    return re.sub(r"^(score_|upscore2|upscore_pool4)", r"classifier.\1", key)


def milesial(key: str) -> str:
    """Rename ``inc``, the first level of the contracting path, and ``up1``, the lowest of the expanding path."""
    key = key.replace("maxpool_conv.1.", "").replace("double_conv.", "")
    key = re.sub(r"^inc\.", "down1.", re.sub(r"^down(\d)\.", lambda m: f"down{int(m[1]) + 1}.", key))
    key = key.replace("down5.", "bottom.")
    key = re.sub(r"^up(\d)\.", lambda m: f"up{5 - int(m[1])}.", key)
    return re.sub(r"^outc\.conv\.", "classifier.", key)


def smp(key: str) -> str:
    """Rename the separable convolutions of ``aspp.1`` and ``block2``, which keep their norm outside."""
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


@dataclass(frozen=True)
class Port:
    """What a project's DeepLab v3+ computes that the shapes of its weights do not reveal. The defaults are the paper's.

    Args:
        align_corners: align the corners in both interpolations.
        resnet: further arguments of `ResNet`; the paper's multi-grid is v3's, whose 77.21 is its start (Table 3).
        xception: further arguments of `Xception65`.
        mobilenet: further arguments of `MobileNetV2`.
        xception_low_level: the map of Xception at stride 4 that the decoder joins.
        separable: backbones for which ASPP and decoder have separable convolutions.
        norm_inside: batch norm and ReLU inside separable convolutions too.
        conv_after_aspp: a further 3x3 convolution after ASPP.
        decoder_layers: number of 3x3 convolutions in the decoder.
        low_level_first: the decoder puts the low-level features before ASPP's.
    """

    align_corners: bool = False
    resnet: dict[str, Any] = field(default_factory=lambda: {"dilate_first_block": True, "multi_grid": (1, 2, 4)})
    xception: dict[str, Any] = field(default_factory=dict)
    mobilenet: dict[str, Any] = field(default_factory=dict)
    xception_low_level: str = "block2_conv2"
    separable: tuple[str, ...] = ("xception65",)
    norm_inside: bool = True
    conv_after_aspp: bool = False
    decoder_layers: int = 2
    low_level_first: bool = False


PORTS = {
    "paper": Port(),
    "jfzhang95": Port(
        align_corners=True,
        # Its ReLU works in place, so the shortcuts carry relu(x).
        xception={"relu_shortcut": True, "dilate_exit": False, "relu_in_exit": False},
        mobilenet={"pad_block_input": True, "dilate_next_stage": True},
        xception_low_level="block1",
        separable=(),
    ),
    "VainF": Port(
        resnet={},
        mobilenet={"pad_block_input": True, "pad_stem": False},
        xception_low_level="block1",
        separable=(),
        decoder_layers=1,
        low_level_first=True,
    ),
    "smp": Port(
        align_corners=True,
        resnet={"dilate_first_block": True},
        xception_low_level="block1",
        separable=("resnet50", "resnet101"),
        norm_inside=False,
        conv_after_aspp=True,
        decoder_layers=1,
    ),
}

LAYOUTS = (
    Layout(
        "kazuto1011/deeplab-pytorch",
        "DeepLabV2",
        (r"(base\.)?layer1\.conv1\.conv", r"(base\.)?aspp\.c0"),
        kazuto1011,
        lambda state: {"stride_in_1x1": True},
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
        pixels="RGB from 0 to 1: model.mean: [0, 0, 0], model.std: [1, 1, 1]",
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
# What torchvision's ImageNet weights need, by our class.
IMAGENET: dict[str, dict[str, Any]] = {"DeepLabV2": {"stride_in_1x1": False}}
