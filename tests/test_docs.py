"""The pages of docs: drawings, tables, names and links agree with the code."""

import importlib.util
import io
import re
import shlex
import sys
from itertools import combinations
from types import ModuleType

import matplotlib
import pytest
import torch
import yaml
from conftest import PROJECT
from PIL import ImageFont
from rich.console import Console
from torch import Tensor, nn

import segmentation
from segmentation.commands.receptive_field.fields import network_fields
from segmentation.commands.receptive_field.tables import main_rows, network_table

FOLDER = PROJECT / "docs/architectures"
PAGES = sorted(FOLDER.glob("*.md"))


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


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def build_as(page) -> tuple[nn.Module, tuple[int, int]]:
    """The network of the command that a page shows, and the size that it looks at."""
    command = re.search(r"```sh\n(lightning receptive_field .*?)```", page.read_text("utf-8"), re.S)[1]
    words = shlex.split(command.replace("\\\n", " "))
    options = dict(zip(words[2::2], map(yaml.safe_load, words[3::2]), strict=True))
    size, name = options.pop("--size"), options.pop("--model")
    arguments = {key.removeprefix("--model."): value for key, value in options.items()}
    device = "cpu" if name == "MaskFormer" else "meta"  # its queries are weights, which the fields' linear twin reads
    with torch.device(device):
        network = getattr(segmentation, name)(**arguments)
    return network, (size, size) if isinstance(size, int) else tuple(size)


def test_every_architecture_has_a_page_with_its_drawing():
    modules = {path.stem for path in (PROJECT / "segmentation/architectures").glob("*.py")} - {"__init__"}
    assert {page.stem for page in PAGES} == {draw.file_of(drawing).stem for drawing in draw.DRAWINGS} == modules


@each_page
def test_table_of_a_page_is_what_the_command_prints(page, one_thread):
    network, size = build_as(page)
    output = io.StringIO()
    Console(width=120, file=output).print(network_table(network, main_rows(network_fields(network)), size))
    shown = [line for line in page.read_text("utf-8").splitlines() if line.startswith("|")]
    assert len(shown) >= 8 and shown[0].startswith("| stage ")
    assert set(shown) <= {line.strip() for line in output.getvalue().splitlines()}
    count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert f"{count / 1e6:.1f} million parameters" in " ".join(page.read_text("utf-8").split())


@each_page
def test_names_of_a_page_are_in_the_files_that_it_links(page):
    content = page.read_text("utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", content)
    assert f"{page.stem}.svg" in links and any(link.endswith(f"architectures/{page.stem}.py") for link in links)
    code = "".join((page.parent / link).read_text("utf-8") for link in links if link.endswith((".py", ".yaml")))
    code += (PROJECT / "segmentation/base.py").read_text("utf-8")
    section = content.partition("## Reading order")[2].partition("## Sizes")[0]
    names = {name for words in re.findall(r"`([^`]+)`", section) for name in re.findall(r"[A-Za-z_]\w+", words)}
    missing = sorted(name for name in names - {"true", "false"} if not re.search(rf"\b{name}\b", code))
    assert len(names) > 5 and not missing, missing
    source = (PROJECT / f"segmentation/architectures/{page.stem}.py").read_text("utf-8")
    assert re.findall(r"arxiv.org/abs/([\d.]+)\)", content)[0] in source.partition("import")[0]


@pytest.mark.parametrize("page", [*PAGES, PROJECT / "docs/README.md"], ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8"))
    assert links and [link for link in links if not (page.parent / link).exists()] == []


def test_index_names_every_file_of_the_folder():
    index = (PROJECT / "docs/README.md").read_text("utf-8")
    for path in [*(PROJECT / "docs").iterdir(), *PAGES]:
        assert path.name in index, path


@pytest.fixture
def one_thread():
    """Strips are too thin to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
