"""Draw the architectures: ``python docs/architectures/draw.py`` writes an SVG per network beside this file.

A drawing is a list of boxes and arrows on a grid. The rows are resolutions, so a network that goes down on the left and
up on the right looks like its U. Every size in a drawing belongs to a module of the network, and tests/test_docs.py
compares it with the size that the module really gives.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

BOX_WIDTH, BOX_HEIGHT = 132, 42  # pixels of the drawing
COLUMN, ROW = 160, 66  # from one box to the next
LEFT, TOP, EDGE = 52, 10, 14  # room for the names of the rows, above the first box, and at the right
ROLES = {  # colour and meaning of the boxes
    "image": ("#eceff1", "image"),
    "encoder": ("#cfe2f7", "encoder"),
    "context": ("#e3d7f3", "context"),
    "decoder": ("#cfebd3", "decoder"),
    "scores": ("#fde0b8", "class scores"),
}
KINDS = {  # colour, width and dashes of the arrows
    "flow": ("#455a64", 1.4, ""),
    "down": ("#c62828", 1.4, ""),
    "up": ("#2e7d32", 1.4, ""),
    "skip": ("#ef6c00", 2.2, ""),
    "places": ("#6a1b9a", 1.8, "2 4"),
    "training": ("#78909c", 1.4, "6 4"),
}
TIMES = "\N{MULTIPLICATION SIGN}"  # drawn for every single x


@dataclass(frozen=True)
class Box:
    """A feature map.

    Args:
        text: what makes the map.
        size: channels, height and width; two numbers for vectors, none for a box without a size.
        column: place on the grid.
        row: place on the grid.
        role: a key of `ROLES`.
        module: whose output has this size, such as ``down1``; ``drop (3)`` for the third run, ``down1 in`` for the
            input, ``image`` and ``logits`` for those of the network.
    """

    text: str
    size: tuple[int, ...]
    column: float
    row: float
    role: str
    module: str

    @property
    def x(self) -> float:
        """Return the middle of the box, in pixels from the left."""
        return LEFT + BOX_WIDTH / 2 + COLUMN * self.column

    @property
    def y(self) -> float:
        """Return the middle of the box, in pixels from the top."""
        return TOP + ROW / 2 + ROW * self.row


@dataclass(frozen=True)
class Arrow:
    """An arrow between two boxes.

    Args:
        start: key of a box.
        end: key of a box.
        kind: a key of `KINDS`.
        route: ``straight`` (from side to side, or from top to bottom in one column), ``across`` (horizontally, then
            vertically), ``along`` (vertically, then horizontally), ``fork`` (horizontally, vertically, horizontally),
            ``line`` (from side to side on the shortest way) or ``arc`` (on the right of a column).
        text: stands beside the arrow.
        size: of the map that comes of joining, after the text.
        module: see `Box`.
    """

    start: str
    end: str
    kind: str = "flow"
    route: str = "straight"
    text: str = ""
    size: tuple[int, ...] = ()
    module: str = ""


@dataclass(frozen=True)
class Drawing:
    """A drawing of one network.

    Args:
        network: name of the class in ``segmentation``.
        arguments: with which it is built.
        image: height and width of the image that `forward` is given.
        rows: name of each band of rows, with its first and last row.
        boxes: by key.
        arrows: in the order in which they are drawn.
        legend: meaning of each kind of arrow.
    """

    network: str
    arguments: Mapping[str, Any]
    image: tuple[int, int]
    rows: Sequence[tuple[str, float, float]]
    boxes: Mapping[str, Box]
    arrows: Sequence[Arrow]
    legend: Mapping[str, str] = field(default_factory=dict)


def rows(count: int) -> list[tuple[str, float, float]]:
    """Return bands of one row each: 1/1, 1/2, 1/4 and so on."""
    return [(f"1/{2**row}", row, row) for row in range(count)]


# The networks

FCN = Drawing(
    "FCN",
    {"num_classes": 21},
    (500, 500),
    rows(6),
    {
        "image": Box("image", (3, 500, 500), 0, 0, "image", "image"),
        "pool1": Box("conv1, pool1", (64, 349, 349), 0, 1, "encoder", "backbone.pool"),
        "pool2": Box("conv2, pool2", (128, 175, 175), 0, 2, "encoder", "backbone.pool (2)"),
        "pool3": Box("conv3, pool3", (256, 88, 88), 0, 3, "encoder", "backbone.pool (3)"),
        "pool4": Box("conv4, pool4", (512, 44, 44), 0, 4, "encoder", "backbone.pool (4)"),
        "pool5": Box("conv5, pool5", (512, 22, 22), 0, 5, "encoder", "backbone.pool (5)"),
        "fc6": Box("fc6: 7 x 7", (4096, 16, 16), 1, 5, "encoder", "backbone.fc6"),
        "fc7": Box("fc7: 1 x 1", (4096, 16, 16), 2, 5, "encoder", "backbone.fc7"),
        "score": Box("score: 1 x 1", (21, 16, 16), 3, 5, "scores", "classifier.score_fr"),
        "score4": Box("score of pool4", (21, 44, 44), 1.5, 4, "scores", "classifier.score_pool4"),
        "score3": Box("score of pool3", (21, 88, 88), 1.5, 3, "scores", "classifier.score_pool3"),
        "sum4": Box("x 2, plus pool4's", (21, 34, 34), 3, 4, "decoder", "classifier.upscore2"),
        "sum3": Box("x 2, plus pool3's", (21, 70, 70), 3, 3, "decoder", "classifier.upscore_pool4"),
        "up": Box("x 8", (21, 568, 568), 3, 0, "decoder", "classifier.upscore"),
        "logits": Box("crop: logits", (21, 500, 500), 4, 0, "scores", "logits"),
    },
    [
        Arrow("image", "pool1", "down", text="padded by 100"),
        *(Arrow(f"pool{n}", f"pool{n + 1}", "down") for n in range(1, 5)),
        Arrow("pool5", "fc6"),
        Arrow("fc6", "fc7"),
        Arrow("fc7", "score"),
        Arrow("score", "sum4", "up"),
        Arrow("sum4", "sum3", "up"),
        Arrow("sum3", "up", "up"),
        Arrow("pool4", "score4"),
        Arrow("pool3", "score3"),
        Arrow("score4", "sum4", "skip", text="crop"),
        Arrow("score3", "sum3", "skip", text="crop"),
        Arrow("up", "logits"),
    ],
    {"down": "3 x 3 convolutions, max pooling 2 x 2", "up": "transposed convolution (bilinear)", "skip": "sum"},
)

DEEPLABV1 = Drawing(
    "DeepLabV1",
    {"num_classes": 21},
    (321, 321),
    rows(4),
    {
        "image": Box("image", (3, 321, 321), 0, 0, "image", "image"),
        "pool1": Box("conv1, pool1", (64, 161, 161), 0, 1, "encoder", "pool1"),
        "pool2": Box("conv2, pool2", (128, 81, 81), 0, 2, "encoder", "pool2"),
        "pool3": Box("conv3, pool3", (256, 41, 41), 0, 3, "encoder", "pool3"),
        "pool4": Box("conv4, pool4", (512, 41, 41), 1, 3, "encoder", "pool4"),
        "pool5": Box("conv5, rate 2", (512, 41, 41), 2, 3, "encoder", "pool5"),
        "fc6": Box("fc6: rate 12", (1024, 41, 41), 3, 3, "context", "fc6"),
        "fc7": Box("fc7: 1 x 1", (1024, 41, 41), 4, 3, "context", "fc7"),
        "fc8": Box("fc8: 1 x 1", (21, 41, 41), 5, 3, "scores", "fc8"),
        "logits": Box("logits", (21, 321, 321), 5, 0, "scores", "logits"),
    },
    [
        *(Arrow(a, b, "down") for a, b in (("image", "pool1"), ("pool1", "pool2"), ("pool2", "pool3"))),
        *(Arrow(a, b) for a, b in (("pool3", "pool4"), ("pool4", "pool5"), ("pool5", "fc6"), ("fc6", "fc7"))),
        Arrow("fc7", "fc8"),
        Arrow("fc8", "logits", "up"),
    ],
    {"down": "3 x 3 convolutions, max pooling of stride 2", "flow": "stride 1", "up": "bilinear, x 8"},
)

DEEPLABV2 = Drawing(
    "DeepLabV2",
    {"num_classes": 21},
    (321, 321),
    [*rows(3), ("1/8", 3, 5.4)],
    {
        "image": Box("image", (3, 321, 321), 0, 0, "image", "image"),
        "conv1": Box("conv1: 7 x 7", (64, 161, 161), 0, 1, "encoder", "backbone.conv1"),
        "layer1": Box("layer1", (256, 81, 81), 0, 2, "encoder", "backbone.layer1"),
        "layer2": Box("layer2", (512, 41, 41), 0, 3.8, "encoder", "backbone.layer2"),
        "layer3": Box("layer3, rate 2", (1024, 41, 41), 1, 3.8, "encoder", "backbone.layer3"),
        "layer4": Box("layer4, rate 4", (2048, 41, 41), 2, 3.8, "encoder", "backbone.layer4"),
        **{
            f"aspp{i}": Box(f"3 x 3, rate {rate}", (21, 41, 41), 3, 3 + 0.8 * i, "context", f"classifier.convs.{i}")
            for i, rate in enumerate((6, 12, 18, 24))
        },
        "sum": Box("sum, scale 1", (21, 41, 41), 4, 3.8, "scores", "classifier"),
        "three": Box("same, scale 3/4", (21, 31, 31), 4, 4.6, "scores", "classifier (2)"),
        "half": Box("same, scale 1/2", (21, 21, 21), 4, 5.4, "scores", "classifier (3)"),
        "max": Box("maximum", (21, 41, 41), 5, 3.8, "scores", "classifier"),
        "logits": Box("logits", (21, 321, 321), 5, 0, "scores", "logits"),
    },
    [
        *(Arrow(a, b, "down") for a, b in (("image", "conv1"), ("conv1", "layer1"), ("layer1", "layer2"))),
        Arrow("layer2", "layer3"),
        Arrow("layer3", "layer4"),
        *(Arrow("layer4", f"aspp{i}", route="fork") for i in range(4)),
        *(Arrow(f"aspp{i}", "sum", route="fork") for i in range(4)),
        *(Arrow(scale, "max", route="fork") for scale in ("sum", "three", "half")),
        Arrow("max", "logits", "up"),
    ],
    {"down": "stride 2", "flow": "stride 1", "up": "bilinear"},
)

ASPP_BRANCHES = ("1 x 1", "3 x 3, rate 6", "3 x 3, rate 12", "3 x 3, rate 18", "image mean")

DEEPLABV3 = Drawing(
    "DeepLabV3",
    {"num_classes": 21, "backbone": "resnet101", "layout": "paper"},
    (513, 513),
    [*rows(4), ("1/16", 4, 7.2)],
    {
        "image": Box("image", (3, 513, 513), 0, 0, "image", "image"),
        "conv1": Box("conv1: 7 x 7", (64, 257, 257), 0, 1, "encoder", "backbone.conv1"),
        "layer1": Box("layer1", (256, 129, 129), 0, 2, "encoder", "backbone.layer1"),
        "layer2": Box("layer2", (512, 65, 65), 0, 3, "encoder", "backbone.layer2"),
        "layer3": Box("layer3", (1024, 33, 33), 0, 5.6, "encoder", "backbone.layer3"),
        "layer4": Box("layer4, multi-grid", (2048, 33, 33), 1, 5.6, "encoder", "backbone.layer4"),
        **{
            f"aspp{i}": Box(text, (256, 33, 33), 2, 4 + 0.8 * i, "context", f"classifier.0.convs.{i}")
            for i, text in enumerate(ASPP_BRANCHES)
        },
        "concat": Box("concatenation", (1280, 33, 33), 3, 5.6, "context", "classifier.0.project in"),
        "project": Box("1 x 1", (256, 33, 33), 4, 5.6, "context", "classifier.0.project"),
        "scores": Box("1 x 1", (21, 33, 33), 5, 5.6, "scores", "classifier.1"),
        "logits": Box("logits", (21, 513, 513), 5, 0, "scores", "logits"),
    },
    [
        *(Arrow(a, b, "down") for a, b in (("image", "conv1"), ("conv1", "layer1"), ("layer1", "layer2"))),
        Arrow("layer2", "layer3", "down"),
        Arrow("layer3", "layer4"),
        *(Arrow("layer4", f"aspp{i}", route="fork") for i in range(5)),
        *(Arrow(f"aspp{i}", "concat", route="fork") for i in range(5)),
        Arrow("concat", "project"),
        Arrow("project", "scores"),
        Arrow("scores", "logits", "up"),
    ],
    {"down": "stride 2", "flow": "stride 1", "up": "bilinear, x 16"},
)

DEEPLABV3PLUS = Drawing(
    "DeepLabV3Plus",
    {"num_classes": 21},
    (513, 513),
    [*rows(4), ("1/16", 4, 7.2)],
    {
        "image": Box("image", (3, 513, 513), 0, 0, "image", "image"),
        "conv1": Box("conv1: 7 x 7", (64, 257, 257), 0, 1, "encoder", "backbone.conv1"),
        "layer1": Box("layer1", (256, 129, 129), 0, 2, "encoder", "backbone.layer1"),
        "layer2": Box("layer2", (512, 65, 65), 0, 3, "encoder", "backbone.layer2"),
        "layer3": Box("layer3", (1024, 33, 33), 0, 5.6, "encoder", "backbone.layer3"),
        "layer4": Box("layer4, multi-grid", (2048, 33, 33), 1, 5.6, "encoder", "backbone.layer4"),
        **{
            f"aspp{i}": Box(text, (256, 33, 33), 2, 4 + 0.8 * i, "context", f"aspp.convs.{i}")
            for i, text in enumerate(ASPP_BRANCHES)
        },
        "project": Box("joined; 1 x 1", (256, 33, 33), 3, 5.6, "context", "aspp.project"),
        "reduce": Box("1 x 1", (48, 129, 129), 2, 2, "decoder", "decoder.reduce"),
        "concat": Box("concatenation", (304, 129, 129), 3, 2, "decoder", "decoder.convs in"),
        "convs": Box("two 3 x 3", (256, 129, 129), 4, 2, "decoder", "decoder.convs"),
        "scores": Box("1 x 1", (21, 129, 129), 5, 2, "scores", "classifier"),
        "logits": Box("logits", (21, 513, 513), 5, 0, "scores", "logits"),
    },
    [
        *(Arrow(a, b, "down") for a, b in (("image", "conv1"), ("conv1", "layer1"), ("layer1", "layer2"))),
        Arrow("layer2", "layer3", "down"),
        Arrow("layer3", "layer4"),
        *(Arrow("layer4", f"aspp{i}", route="fork") for i in range(5)),
        *(Arrow(f"aspp{i}", "project", route="fork") for i in range(5)),
        Arrow("layer1", "reduce", "skip", text="low-level features"),
        Arrow("reduce", "concat", "skip"),
        Arrow("project", "concat", "up"),
        Arrow("concat", "convs"),
        Arrow("convs", "scores"),
        Arrow("scores", "logits", "up"),
    ],
    {"down": "stride 2", "flow": "stride 1", "up": "bilinear, x 4", "skip": "skip connection"},
)

PSPNET = Drawing(
    "PSPNet",
    {"num_classes": 21},
    (473, 473),
    [*rows(3), ("1/8", 3, 6.2)],
    {
        "image": Box("image", (3, 473, 473), 0, 0, "image", "image"),
        "conv1": Box("three 3 x 3", (128, 237, 237), 0, 1, "encoder", "backbone.conv1"),
        "layer1": Box("layer1", (256, 119, 119), 0, 2, "encoder", "backbone.layer1"),
        "layer2": Box("layer2", (512, 60, 60), 0, 4.6, "encoder", "backbone.layer2"),
        "layer3": Box("layer3, rate 2", (1024, 60, 60), 1, 4.6, "encoder", "backbone.layer3"),
        "layer4": Box("layer4, rate 4", (2048, 60, 60), 2, 4.6, "encoder", "backbone.layer4"),
        "aux": Box("second head", (21, 60, 60), 1, 3, "scores", "aux_classifier"),
        **{
            f"bin{side}": Box(f"means of {side} x {side}", (512, side, side), 3, row, "context", f"ppm.features.{i}")
            for i, (side, row) in enumerate(((1, 3), (2, 3.8), (3, 5.4), (6, 6.2)))
        },
        "concat": Box("concatenation", (4096, 60, 60), 4, 4.6, "context", "ppm"),
        "scores": Box("3 x 3, 1 x 1", (21, 60, 60), 5, 4.6, "scores", "classifier"),
        "logits": Box("logits", (21, 473, 473), 5, 0, "scores", "logits"),
    },
    [
        *(Arrow(a, b, "down") for a, b in (("image", "conv1"), ("conv1", "layer1"), ("layer1", "layer2"))),
        Arrow("layer2", "layer3"),
        Arrow("layer3", "layer4"),
        Arrow("layer3", "aux", "training"),
        *(Arrow("layer4", f"bin{side}", route="fork") for side in (1, 2, 3, 6)),
        Arrow("layer4", "concat", "skip"),
        *(Arrow(f"bin{side}", "concat", "up", route="fork") for side in (1, 2, 3, 6)),
        Arrow("concat", "scores"),
        Arrow("scores", "logits", "up"),
    ],
    {"down": "stride 2", "up": "bilinear", "skip": "features as they are", "training": "in training only"},
)

UNET = Drawing(
    "UNet",
    {"num_classes": 2, "in_channels": 1, "mean": [0.5], "std": [0.5], "padding": "valid", "batch_norm": False},
    (388, 388),  # `forward` adds the 92 pixels on each side that the convolutions lose
    rows(5),
    {
        "image": Box("image tile", (1, 572, 572), 0, 0, "image", "down1 in"),
        "down1": Box("two 3 x 3", (64, 568, 568), 1, 0, "encoder", "down1"),
        "down2": Box("two 3 x 3", (128, 280, 280), 1, 1, "encoder", "down2"),
        "down3": Box("two 3 x 3", (256, 136, 136), 1, 2, "encoder", "down3"),
        "down4": Box("two 3 x 3", (512, 64, 64), 1, 3, "encoder", "down4"),
        "bottom": Box("two 3 x 3", (1024, 28, 28), 2.25, 4, "context", "bottom"),
        "up4": Box("two 3 x 3", (512, 52, 52), 3.5, 3, "decoder", "up4"),
        "up3": Box("two 3 x 3", (256, 100, 100), 3.5, 2, "decoder", "up3"),
        "up2": Box("two 3 x 3", (128, 196, 196), 3.5, 1, "decoder", "up2"),
        "up1": Box("two 3 x 3", (64, 388, 388), 3.5, 0, "decoder", "up1"),
        "scores": Box("1 x 1: logits", (2, 388, 388), 4.5, 0, "scores", "logits"),
    },
    [
        Arrow("image", "down1"),
        *(Arrow(f"down{n}", f"down{n + 1}", "down") for n in range(1, 4)),
        Arrow("down4", "bottom", "down", "along"),
        Arrow("bottom", "up4", "up", "across"),
        *(Arrow(f"up{n}", f"up{n - 1}", "up") for n in (4, 3, 2)),
        *(
            Arrow(f"down{n}", f"up{n}", "skip", text="crop; joined:", size=(width, side, side), module=f"up{n}.conv in")
            for n, width, side in ((1, 128, 392), (2, 256, 200), (3, 512, 104), (4, 1024, 56))
        ),
        Arrow("up1", "scores"),
    ],
    {"down": "max pooling 2 x 2", "up": "up-convolution 2 x 2", "skip": "cropped in the middle and concatenated"},
)

UNET3PLUS = Drawing(
    "UNet3Plus",
    {"num_classes": 1},
    (320, 320),
    rows(5),
    {
        "image": Box("image", (3, 320, 320), 0, 0, "image", "image"),
        "e1": Box("encoder 1", (64, 320, 320), 1, 0, "encoder", "down1"),
        "e2": Box("encoder 2", (128, 160, 160), 1, 1, "encoder", "down2"),
        "e3": Box("encoder 3", (256, 80, 80), 1, 2, "encoder", "down3"),
        "e4": Box("encoder 4", (512, 40, 40), 1, 3, "encoder", "down4"),
        "e5": Box("encoder 5", (1024, 20, 20), 3.25, 4, "context", "bottom"),
        "d4": Box("decoder 4", (320, 40, 40), 3.25, 3, "decoder", "up4"),
        "d3": Box("decoder 3", (320, 80, 80), 3.25, 2, "decoder", "up3"),
        "d2": Box("decoder 2", (320, 160, 160), 3.25, 1, "decoder", "up2"),
        "d1": Box("decoder 1", (320, 320, 320), 3.25, 0, "decoder", "up1"),
        "scores": Box("3 x 3: logits", (1, 320, 320), 4.9, 0, "scores", "classifier"),
        "side2": Box("3 x 3: side", (1, 160, 160), 4.9, 1, "scores", "sides.0"),
        "side3": Box("3 x 3: side", (1, 80, 80), 4.9, 2, "scores", "sides.1"),
        "side4": Box("3 x 3: side", (1, 40, 40), 4.9, 3, "scores", "sides.2"),
        "side5": Box("3 x 3: side", (1, 20, 20), 4.9, 4, "scores", "sides.3"),
    },
    [
        *(Arrow(f"d{n}", f"side{n}", "training") for n in (2, 3, 4)),
        Arrow("e5", "side5", "training"),
        Arrow("image", "e1"),
        *(Arrow(f"e{n}", f"e{n + 1}", "down") for n in range(1, 4)),
        Arrow("e4", "e5", "down", "along"),
        *(Arrow(f"e{n}", f"d{m}", "down", "line") for n in range(1, 4) for m in range(n + 1, 5)),
        *(Arrow(f"e{n}", f"d{n}", "skip") for n in range(1, 5)),
        Arrow("e5", "d4", "up"),
        *(Arrow(f"d{n}", f"d{n - 1}", "up") for n in (4, 3, 2)),
        *(Arrow("e5", f"d{n}", "up", "arc") for n in (3, 2, 1)),
        *(Arrow(f"d{n}", f"d{m}", "up", "arc") for n in (4, 3) for m in range(1, n - 1)),
        Arrow("d1", "scores"),
    ],
    {
        "down": "max pooling by 2, 4 or 8, then 3 x 3",
        "skip": "3 x 3",
        "up": "bilinear, then 3 x 3",
        "training": "in training only",
    },
)

SEGNET = Drawing(
    "SegNet",
    {"num_classes": 11},
    (360, 480),
    rows(6),
    {
        "image": Box("image", (3, 360, 480), 0, 0, "image", "image"),
        **{
            f"e{n}": Box(f"{count} 3 x 3", size, 1, n - 1, "encoder", f"encoder.{n - 1}")
            for n, count, size in (
                (1, "two", (64, 360, 480)),
                (2, "two", (128, 180, 240)),
                (3, "three", (256, 90, 120)),
                (4, "three", (512, 45, 60)),
                (5, "three", (512, 23, 30)),
            )
        },
        "bottom": Box("pool5", (512, 12, 15), 2.25, 5, "context", "drop (3)"),
        **{
            f"d{n}": Box(f"{count} 3 x 3", size, 3.5, n - 1, "decoder", f"decoder.{n - 1}")
            for n, count, size in (
                (5, "three", (512, 23, 30)),
                (4, "three", (256, 45, 60)),
                (3, "three", (128, 90, 120)),
                (2, "two", (64, 180, 240)),
                (1, "one", (64, 360, 480)),
            )
        },
        "scores": Box("3 x 3: logits", (11, 360, 480), 4.5, 0, "scores", "classifier"),
    },
    [
        Arrow("image", "e1"),
        *(Arrow(f"e{n}", f"e{n + 1}", "down") for n in range(1, 5)),
        Arrow("e5", "bottom", "down", "along"),
        Arrow("bottom", "d5", "up", "across"),
        *(Arrow(f"d{n}", f"d{n - 1}", "up") for n in (5, 4, 3, 2)),
        *(Arrow(f"e{n}", f"d{n}", "places", text="places of the maxima") for n in range(1, 6)),
        Arrow("d1", "scores"),
    ],
    {"down": "max pooling 2 x 2", "up": "unpooling 2 x 2", "places": "where each maximum was, no features"},
)

DECONVNET = Drawing(
    "DeconvNet",
    {"num_classes": 21},
    (224, 224),
    [*rows(6), ("vector", 6, 6)],
    {
        "image": Box("image", (3, 224, 224), 0, 0, "image", "image"),
        **{
            f"conv{n}": Box(f"conv{n}", (width, side, side), 1, n - 1, "encoder", f"conv{n}")
            for n, width, side in ((1, 64, 224), (2, 128, 112), (3, 256, 56), (4, 512, 28), (5, 512, 14))
        },
        "pool5": Box("pool5", (512, 7, 7), 1, 5, "encoder", "fc6 in"),
        "fc6": Box("fc6: 7 x 7", (4096, 1, 1), 2, 6, "context", "fc6"),
        "fc7": Box("fc7: 1 x 1", (4096, 1, 1), 3, 6, "context", "fc7"),
        "spread": Box("fc6-deconv: 7 x 7", (512, 7, 7), 4, 5, "decoder", "fc6_deconv"),
        **{
            f"deconv{n}": Box(f"deconv{n}", (width, side, side), 4, n - 1, "decoder", f"deconv{n}")
            for n, width, side in ((5, 512, 14), (4, 256, 28), (3, 128, 56), (2, 64, 112), (1, 64, 224))
        },
        "scores": Box("1 x 1: logits", (21, 224, 224), 5, 0, "scores", "classifier"),
    },
    [
        Arrow("image", "conv1"),
        *(Arrow(f"conv{n}", f"conv{n + 1}", "down") for n in range(1, 5)),
        Arrow("conv5", "pool5", "down"),
        Arrow("pool5", "fc6", "flow", "along"),
        Arrow("fc6", "fc7"),
        Arrow("fc7", "spread", "flow", "across"),
        Arrow("spread", "deconv5", "up"),
        *(Arrow(f"deconv{n}", f"deconv{n - 1}", "up") for n in (5, 4, 3, 2)),
        *(Arrow(f"conv{n}", f"deconv{n}", "places", text="switches: places of the maxima") for n in range(1, 6)),
        Arrow("deconv1", "scores"),
    ],
    {"down": "max pooling 2 x 2", "up": "unpooling 2 x 2", "places": "where each maximum was, no features"},
)

FCDENSENET = Drawing(
    "FCDenseNet",
    {"num_classes": 11},
    (224, 224),
    rows(6),
    {
        "image": Box("image", (3, 224, 224), 0, 0, "image", "image"),
        "conv": Box("3 x 3", (48, 224, 224), 1, 0, "encoder", "conv"),
        **{
            f"d{n}": Box(f"{layers} dense layers", (width, side, side), 2, n - 1, "encoder", f"down_blocks.{n - 1}")
            for n, layers, width, side in (
                (1, 4, 112, 224),
                (2, 5, 192, 112),
                (3, 7, 304, 56),
                (4, 10, 464, 28),
                (5, 12, 656, 14),
            )
        },
        "bottom": Box("15 dense layers", (896, 7, 7), 3.1, 5, "context", "bottleneck"),
        **{
            f"u{n}": Box(f"{layers} dense layers", (width, side, side), 4.2, n - 1, "decoder", f"up_blocks.{5 - n}")
            for n, layers, width, side in (
                (5, 12, 1088, 14),
                (4, 10, 816, 28),
                (3, 7, 576, 56),
                (2, 5, 384, 112),
                (1, 4, 256, 224),
            )
        },
        "scores": Box("1 x 1: logits", (11, 224, 224), 5.2, 0, "scores", "classifier"),
    },
    [
        Arrow("image", "conv"),
        Arrow("conv", "d1"),
        *(Arrow(f"d{n}", f"d{n + 1}", "down") for n in range(1, 5)),
        Arrow("d5", "bottom", "down", "along"),
        Arrow("bottom", "u5", "up", "across"),
        *(Arrow(f"u{n}", f"u{n - 1}", "up") for n in (5, 4, 3, 2)),
        *(
            Arrow(f"d{n}", f"u{n}", "skip", text="joined:", size=(width, side, side), module=f"up_blocks.{5 - n} in")
            for n, width, side in ((1, 192, 224), (2, 304, 112), (3, 464, 56), (4, 656, 28), (5, 896, 14))
        ),
        Arrow("u1", "scores"),
    ],
    {
        "down": "1 x 1, max pooling 2 x 2",
        "up": "only the block's new maps, transposed 3 x 3",
        "skip": "concatenated",
    },
)

MASKFORMER = Drawing(
    "MaskFormer",
    {"num_classes": 150},
    (512, 512),
    [("1/1", 0, 0), ("1/4", 1, 1), ("1/8", 2, 2), ("1/16", 3, 3), ("1/32", 4, 4), ("queries", 5, 6)],
    {
        "image": Box("image", (3, 512, 512), 0, 0, "image", "image"),
        "layer1": Box("layer1", (256, 128, 128), 0, 1, "encoder", "backbone.layer1"),
        "layer2": Box("layer2", (512, 64, 64), 0, 2, "encoder", "backbone.layer2"),
        "layer3": Box("layer3", (1024, 32, 32), 0, 3, "encoder", "backbone.layer3"),
        "layer4": Box("layer4", (2048, 16, 16), 0, 4, "encoder", "backbone.layer4"),
        "top": Box("3 x 3", (256, 16, 16), 1.5, 4, "decoder", "pixel_decoder.top"),
        "p3": Box("sum, 3 x 3", (256, 32, 32), 1.5, 3, "decoder", "pixel_decoder.outputs.2"),
        "p2": Box("sum, 3 x 3", (256, 64, 64), 1.5, 2, "decoder", "pixel_decoder.outputs.1"),
        "p1": Box("sum, 3 x 3", (256, 128, 128), 1.5, 1, "decoder", "pixel_decoder.outputs.0"),
        "pixels": Box("pixel embedding", (256, 128, 128), 2.7, 1, "decoder", "pixel_decoder.embedding"),
        "transformer": Box("transformer", (100, 256), 1.5, 5, "context", "transformer_decoder"),
        "embedding": Box("mask embedding", (100, 256), 2.7, 5, "context", "mask_head"),
        "classes": Box("class or none", (100, 151), 2.7, 6, "scores", "classifier"),
        "masks": Box("product: masks", (100, 128, 128), 3.8, 1, "scores", ""),
        "logits": Box("sum: class x mask", (150, 512, 512), 4.9, 0, "scores", "logits"),
    },
    [
        *(Arrow(a, b, "down") for a, b in (("image", "layer1"), ("layer1", "layer2"), ("layer2", "layer3"))),
        Arrow("layer3", "layer4", "down"),
        Arrow("layer4", "top"),
        *(Arrow(a, b, "up") for a, b in (("top", "p3"), ("p3", "p2"), ("p2", "p1"))),
        *(Arrow(f"layer{n}", f"p{n}", "skip", text="1 x 1") for n in (1, 2, 3)),
        Arrow("p1", "pixels"),
        Arrow("layer4", "transformer", route="along", text="1 x 1"),
        Arrow("transformer", "embedding"),
        Arrow("transformer", "classes", route="fork"),
        Arrow("pixels", "masks"),
        Arrow("embedding", "masks", route="across"),
        Arrow("masks", "logits", "up", "along"),
        Arrow("classes", "logits", route="across"),
    ],
    {"down": "stride 2", "up": "nearest or bilinear upsampling", "skip": "added"},
)

DRAWINGS = (
    *(FCN, DEEPLABV1, DEEPLABV2, DEEPLABV3, DEEPLABV3PLUS, PSPNET, UNET, UNET3PLUS, SEGNET, DECONVNET, FCDENSENET),
    MASKFORMER,
)


# How they are drawn


def svg(drawing: Drawing) -> str:
    """Return a drawing as SVG, on white so that it can be read on a dark page too."""
    boxes = drawing.boxes.values()
    width = max(box.x for box in boxes) + BOX_WIDTH / 2 + EDGE
    bottom = TOP + ROW * (max(last for _, _, last in drawing.rows) + 1)
    legend, height = draw_legend(drawing, width, bottom + 24)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#1c2326">',
        f"<title>{drawing.network}: feature maps from image to logits</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        *draw_rows(drawing, width),
        *(draw_arrow(drawing, arrow) for arrow in drawing.arrows),
        *(draw_box(box) for box in boxes),
        *(draw_label(drawing, arrow) for arrow in drawing.arrows),
        *legend,
        "</svg>\n",
    ]
    return "\n".join(part for part in parts if part)


def draw_rows(drawing: Drawing, width: float) -> list[str]:
    """Return the bands behind the boxes, every other one in grey, with their names."""
    parts = []
    for number, (name, first, last) in enumerate(drawing.rows):
        top, bottom = TOP + ROW * first, TOP + ROW * (last + 1)
        if number % 2 == 0:
            parts.append(f'<rect y="{top:g}" width="{width:g}" height="{bottom - top:g}" fill="#f6f8f9"/>')
        parts.append(text(name, LEFT / 2, (top + bottom) / 2 + 4, 11, "middle", "#607d8b"))
    return parts


def draw_box(box: Box) -> str:
    """Return a box with its text and size."""
    left, top = box.x - BOX_WIDTH / 2, box.y - BOX_HEIGHT / 2
    return "\n".join(
        [
            f'<rect x="{left:g}" y="{top:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="4" '
            f'fill="{ROLES[box.role][0]}" stroke="#90a4ae"/>',
            text(box.text, box.x, box.y - 4, 12, "middle", weight="bold"),
            text(words(box.size), box.x, box.y + 13, 11.5, "middle"),
        ]
    )


def draw_arrow(drawing: Drawing, arrow: Arrow) -> str:
    """Return the line of an arrow and its head."""
    points, path = route(drawing.boxes[arrow.start], drawing.boxes[arrow.end], arrow.route)
    (x0, y0), (x, y) = points[-2:]
    length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
    ux, uy = (x - x0) / length, (y - y0) / length
    colour, width, dashes = KINDS[arrow.kind]
    head = [(x, y), (x - 8 * ux - 4 * uy, y - 8 * uy + 4 * ux), (x - 8 * ux + 4 * uy, y - 8 * uy - 4 * ux)]
    corners = " ".join(f"{px:.1f},{py:.1f}" for px, py in head)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    line = f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'
    return f'{line}\n<polygon points="{corners}" fill="{colour}"/>'


def route(start: Box, end: Box, way: str) -> tuple[list[tuple[float, float]], str]:
    """Return the corners of an arrow's way and its SVG path; see `Arrow`."""
    half, tall = BOX_WIDTH / 2, BOX_HEIGHT / 2
    right, left = (start.x + half, start.y), (end.x - half, end.y)
    up = end.y < start.y
    enter = (end.x, end.y + tall if up else end.y - tall)  # from below or from above
    leave = (start.x, start.y - tall if up else start.y + tall)
    if way == "arc":
        bulge = 26 + 13 * abs(start.row - end.row)
        ends = (right[0], start.y - 8), (end.x + half, end.y + 8)
        controls = (ends[0][0] + bulge, ends[0][1]), (ends[1][0] + bulge, ends[1][1])
        curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*controls, ends[1]))
        return [controls[1], ends[1]], f"M{ends[0][0]:.1f},{ends[0][1]:.1f} C{curve}"
    middle = left[0] - (COLUMN - BOX_WIDTH) / 2
    points = {
        "straight": [right, left] if start.row == end.row else [leave, enter],
        "line": [right, left],
        "across": [right, (end.x, start.y), enter],
        "along": [leave, (start.x, end.y), left],
        "fork": [right, (middle, start.y), (middle, end.y), left],
    }[way]
    points = [point for number, point in enumerate(points) if number == 0 or point != points[number - 1]]
    return points, "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def draw_label(drawing: Drawing, arrow: Arrow) -> str:
    """Return the words of an arrow: above the middle of a horizontal one, to the right of a vertical one."""
    label = " ".join(part for part in (arrow.text, words(arrow.size)) if part)
    if not label:
        return ""
    points, _ = route(drawing.boxes[arrow.start], drawing.boxes[arrow.end], arrow.route)
    (x0, y0), (x1, y1) = points[:2] if arrow.route == "along" else points[-2:]
    colour = KINDS[arrow.kind][0]
    if y0 == y1:
        return text(label, (x0 + x1) / 2 - 4, y0 - 5, 10.5, "middle", colour)
    return text(label, x0 + 6, (y0 + y1) / 2 + 3, 10.5, "start", colour)


def draw_legend(drawing: Drawing, width: float, top: float) -> tuple[list[str], float]:
    """Return the meaning of the arrows and colours, from left to right in lines, and where it ends."""
    entries: list[tuple[str, str]] = [(kind, meaning) for kind, meaning in drawing.legend.items()]
    entries += [(role, ROLES[role][1]) for role in ROLES if any(box.role == role for box in drawing.boxes.values())]
    entries += [("", "sizes: channels x height x width"), ("", "left: resolution, image = 1/1")]
    parts, x, y = [], float(LEFT), top
    for key, meaning in entries:
        space = 6.0 * len(meaning) + (34 if key else 0)
        if x + space > width - EDGE:
            x, y = LEFT, y + 20
        if key in KINDS:
            colour, thick, dashes = KINDS[key]
            dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
            line = f'<path d="M{x:g},{y - 4:g} h18" stroke="{colour}" stroke-width="{thick}"{dashed}/>'
            head = f'<polygon points="{x + 25:g},{y - 4:g} {x + 17:g},{y - 8:g} {x + 17:g},{y:g}" fill="{colour}"/>'
            parts += [line, head]
        elif key:
            fill = ROLES[key][0]
            parts.append(f'<rect x="{x + 4:g}" y="{y - 11:g}" width="20" height="13" fill="{fill}" stroke="#90a4ae"/>')
        parts.append(text(meaning, x + (30 if key else 0), y, 11, "start", "#37474f"))
        x += space + 18
    return parts, y + 14


def text(content: str, x: float, y: float, size: float, anchor: str, colour: str = "", weight: str = "") -> str:
    """Return a line of text."""
    content = escape(re.sub(r"\bx\b", TIMES, content))
    style = (f' fill="{colour}"' if colour else "") + (f' font-weight="{weight}"' if weight else "")
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"{style}>{content}</text>'


def words(size: Sequence[int]) -> str:
    """Write a size as ``64 x 568 x 568``."""
    return " x ".join(map(str, size))


def file_of(drawing: Drawing) -> Path:
    """Return the file of a drawing, named as the network's file in segmentation/architectures."""
    return Path(__file__).with_name(f"{drawing.network.lower()}.svg")


if __name__ == "__main__":
    for drawing in DRAWINGS:
        file_of(drawing).write_text(svg(drawing), encoding="utf-8")
        print(file_of(drawing))
