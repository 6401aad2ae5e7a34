"""The pages of docs/architectures: drawings, tables and links agree with the code."""

import importlib.util
import sys
from itertools import combinations
from types import ModuleType

import matplotlib
import pytest
import torch
from conftest import PROJECT
from PIL import ImageFont
from torch import Tensor, nn

import segmentation

FOLDER = PROJECT / "docs/architectures"


def load_script() -> ModuleType:
    """The script is no package: it is run by its path."""
    spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


draw = load_script()
each_drawing = pytest.mark.parametrize("drawing", draw.DRAWINGS, ids=lambda drawing: drawing.network)


def sizes_in(network: nn.Module, image: Tensor) -> dict[str, tuple[int, ...]]:
    """Sizes of every module's output, by name and run, and of its first input, in one training step's forward pass."""
    found: dict[str, tuple[int, ...]] = {"image": tuple(image.shape)}

    def remember(name: str):
        def hook(module: nn.Module, args: tuple, output) -> None:
            run = sum(key.partition(" (")[0] == name for key in found) + 1
            if isinstance(output, Tensor):
                found[f"{name} ({run})" if run > 1 else name] = tuple(output.shape)
            if args and isinstance(args[0], Tensor):
                found.setdefault(f"{name} in", tuple(args[0].shape))

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(remember(name or "logits"))
    network.train()
    network(image)
    return found


@each_drawing
def test_sizes_in_drawings_are_those_of_the_network(drawing):
    with torch.device("meta"):
        network = getattr(segmentation, drawing.network)(**drawing.arguments)
        image = torch.empty(2, network.in_channels, *drawing.image)
    sizes = sizes_in(network, image)
    shown = [part for part in (*drawing.boxes.values(), *drawing.arrows) if part.size]
    for part in shown:
        if part.module:
            assert sizes[part.module][-len(part.size) :] == part.size, part
    assert len(shown) - sum(bool(part.module) for part in shown) == (drawing.network == "MaskFormer")
    if drawing.network == "MaskFormer":  # a product, and no module's output
        assert drawing.boxes["masks"].size == (sizes["mask_head"][-2], *sizes["pixel_decoder.embedding"][-2:])


@each_drawing
def test_drawings_are_up_to_date(drawing):
    assert draw.file_of(drawing).read_text(encoding="utf-8") == draw.svg(drawing), "run docs/architectures/draw.py"


@each_drawing
def test_boxes_keep_apart_and_hold_their_words(drawing):
    """In DejaVu, which is wider than the fonts that browsers take."""
    fonts = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans"
    bold, plain = ImageFont.truetype(f"{fonts}-Bold.ttf", 12), ImageFont.truetype(f"{fonts}.ttf", 12)
    boxes = drawing.boxes.values()
    for box in boxes:
        assert max(bold.getlength(box.text), plain.getlength(draw.words(box.size))) <= draw.BOX_WIDTH - 4, box
        assert any(first <= box.row <= last for _, first, last in drawing.rows), box
    for one, other in combinations(boxes, 2):
        apart = abs(one.x - other.x) >= draw.BOX_WIDTH + 20 or abs(one.y - other.y) >= draw.BOX_HEIGHT + 10
        assert apart, (one, other)
    reached = {key for arrow in drawing.arrows for key in (arrow.start, arrow.end)}
    assert reached == set(drawing.boxes) and {arrow.kind for arrow in drawing.arrows} <= {*drawing.legend, "flow"}
