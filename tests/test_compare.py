"""The comparison of all architectures: its counts, its files, and how it continues after a stop."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, PROJECT
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

import segmentation
from segmentation import SegmentationModule

sys.path.append(str(PROJECT / "benchmarks"))
compare = importlib.import_module("compare")
pictures = importlib.import_module("compare_pictures")


class OneConvolution(SegmentationModule):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.conv = nn.Conv2d(3, num_classes, 3, stride=2, padding=1)

    def score_maps(self, image):
        return {"main": self.conv(image)}


def test_every_architecture_takes_part_and_is_narrow():
    classes = {name for name in segmentation.__all__ if issubclass(getattr(segmentation, name), SegmentationModule)}
    assert set(compare.VARIANTS) == classes - {"SegmentationModule"}
    for name, variant in compare.VARIANTS.items():
        with torch.device("meta"):
            narrow = getattr(segmentation, name)(11, **variant.arguments)
        assert sum(p.numel() for p in narrow.parameters()) < 4e6, name  # a tenth of the paper's at most


def test_macs_of_one_convolution():
    image = torch.zeros(1, 3, 10, 14, dtype=torch.uint8)
    assert compare.macs(OneConvolution(5), image) == (5 * 7) * 5 * (3 * 3 * 3)  # places, outputs, weights of each


def test_macs_count_attention():
    class Attention(OneConvolution):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.attention = nn.MultiheadAttention(num_classes, 1, batch_first=True)

        def score_maps(self, image):
            x = self.conv(image)
            tokens = x.flatten(2).transpose(1, 2)
            tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
            return {"main": tokens.transpose(1, 2).unflatten(2, x.shape[-2:])}

    n, c = 4 * 4, 8
    expected = n * c * 27 + 4 * n * c * c + 2 * n * n * c  # convolution, four projections, scores and their use
    assert compare.macs(Attention(c), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)) == expected


def test_near_edges_is_a_band_of_two_pixels_on_each_side():
    mask = torch.zeros(1, 9, 12, dtype=torch.int64)
    mask[..., 6:] = 4
    near = compare.near_edges(mask)
    assert near.shape == mask.shape and near[0].all(dim=0).tolist() == [4 <= x < 8 for x in range(12)]
    assert near[0].any(dim=0).tolist() == [4 <= x < 8 for x in range(12)]
    assert not compare.near_edges(torch.full((1, 9, 9), 3)).any()


def test_confusions_are_counted_near_edges_and_inside():
    mask = torch.zeros(2, 9, 12, dtype=torch.int64)
    mask[..., 6:] = 2
    mask[1, :, 11] = 255
    prediction = torch.zeros_like(mask)
    prediction[0, :, 6:] = 1
    model = SimpleNamespace(probabilities=lambda logits: logits, labels=lambda probs: probs.argmax(dim=1))
    logits = nn.functional.one_hot(prediction, 3).permute(0, 3, 1, 2).float()
    looker = compare.Looker(3)
    batch = {"image": torch.zeros(2, 3, 9, 12, dtype=torch.uint8), "mask": mask}
    looker.on_test_batch_end(None, model, {"logits": logits}, batch, 0)
    # Columns near an edge: 4 to 7 in both, and 9 and 10 before the ignored column of the second.
    assert looker.near.tolist() == [[2 * 18, 0, 0], [0, 0, 0], [18 + 18, 18, 0]]
    assert looker.inside.tolist() == [[2 * 36, 0, 0], [0, 0, 0], [9, 36, 0]]
    assert looker.images == 2


@pytest.mark.parametrize("spread", [1.0, 0.15])
def test_names_cover_neither_each_other_nor_points(spread):
    figure = Figure(figsize=(5, 4), dpi=110)
    axes = figure.subplots()
    generator = torch.Generator().manual_seed(0)
    spots = 10 ** (spread * torch.rand(len(compare.VARIANTS), 2, generator=generator))
    axes.scatter(*spots.T)
    axes.set(xscale="log", xlim=(0.5, 20), ylim=(0, 11))
    figure.draw_without_rendering()
    pictures.write_names(axes, dict(zip(compare.VARIANTS, spots.tolist(), strict=True)))
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # of the words, without the line to the point
    assert len(boxes) == len(compare.VARIANTS)
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i]), axes.texts[i]
        assert not any(box.contains(x, y) for x, y in axes.transData.transform(spots))
        assert axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)


def run(*args: object, status: int = 0) -> str:
    """Run the script as a user does; return what it printed."""
    command = [sys.executable, str(PROJECT / "benchmarks/compare.py"), *map(str, args)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


SMALL = ["--data.size", "[32, 40]", "--data.num_test", 8, "--data.num_workers", 0, "--minutes", 0.03]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    text = run("--architectures", "UNet", "DeepLabV3", "--output_dir", folder, *SMALL)
    return folder, text


@pytest.mark.slow
def test_a_comparison_leaves_results_a_table_and_pictures(compared):
    folder, text = compared
    results = json.loads((folder / "results.json").read_text())["results"]
    assert set(results) == {"UNet", "DeepLabV3"}
    for name, result in results.items():
        with torch.device("meta"):
            model = getattr(segmentation, name)(11, **compare.VARIANTS[name].arguments)
        assert result["parameters"] == sum(p.numel() for p in model.parameters())
        assert torch.tensor([result["near"], result["inside"]]).sum() == 8 * 32 * 40  # every pixel of the test split
        assert result["image_size"] == [32, 40] and result["steps"] >= 1
        assert 0.001 < result["step_seconds"] < 30 and 1 < result["memory_mib"] < 2000
        assert 1 / 20 < result["minutes"] / 0.03 < 20  # a busy machine stretches it; a mistaken unit is a factor of 60
    table = (folder / "compare.md").read_text()
    assert table in text and "boat called car" in table and " missed |" in table
    for name in results:
        assert table.count(f"| {name} |") == 2
    for picture in ("compare.png", "confusions.png", "predictions.png"):
        with Image.open(folder / picture) as image:
            assert image.width == 1100
    assert {path.name for path in (folder / "shown").iterdir()} == {
        f"{i}_{what}.png" for i in range(2) for what in ("image", "truth", "UNet", "DeepLabV3")
    }


@pytest.mark.slow
def test_what_is_done_is_drawn_again_and_not_repeated(compared):
    folder, _ = compared
    before = (folder / "results.json").read_bytes()
    table = (folder / "compare.md").read_text()
    for file in ("compare.png", "confusions.png", "predictions.png", "compare.md"):
        (folder / file).unlink()
    assert table in run("--draw_only", "--output_dir", folder)
    assert (folder / "compare.md").read_text() == table and (folder / "compare.png").is_file()
    text = run("--architectures", "DeepLabV3", "UNet", "--output_dir", folder, *SMALL)
    assert "UNet: done already" in text and "DeepLabV3: done already" in text
    assert (folder / "results.json").read_bytes() == before
    text = run("--architectures", "UNet", "--output_dir", folder, *SMALL, "--seed", 1, status=1)
    assert "holds a comparison with seed 0" in text and "Traceback" not in text
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.slow
def test_any_data_takes_part(tree, tmp_path):
    data = ["--data", "Folder", "--data.root", tree, "--data.class_names", "[ground, disc, bar]"]
    data += ["--data.batch_size", 2, "--data.num_workers", 0, "--data.crop_size", 32]
    text = run("--architectures", "UNet", "--output_dir", tmp_path, "--minutes", 0.02, *data)
    assert "disc called ground" in text and "ground missed" not in text
    result = json.loads((tmp_path / "results.json").read_text())["results"]["UNet"]
    assert torch.tensor([result["near"], result["inside"]]).sum() == 3 * 46 * 64  # two rows of each mask are ignored
