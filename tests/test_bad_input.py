"""Every bad input ends in one plain sentence, before training, and loses nothing. Real processes, two at a time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import config, draw_pair, draw_tree, lightning
from PIL import Image

pytestmark = pytest.mark.slow


def save(path: Path, labels: np.ndarray) -> None:
    Image.fromarray(labels.astype(np.uint8)).save(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros_and_255(root: Path) -> None:
    for path in root.glob("masks/*/*.png"):
        save(path, (np.asarray(Image.open(path)) == 1) * 255)


def colour(path: Path) -> None:
    colours = np.array([[90, 9, 9], [9, 90, 9], [9, 9, 90]], np.uint8)
    Image.fromarray(colours[np.asarray(Image.open(path)) % 3]).save(path)


# name: (what to break in a fresh tree, lines of the config to exchange, more arguments, words of the sentence)
CASES = {
    "missing root": (None, {"root": "root: /nowhere/at/all"}, [], ["/nowhere/at/all", "does not exist"]),
    "image without mask": (
        lambda root: (root / "masks/train/03.png").unlink(), {}, [], ["images/train/03.jpg", "no partner"]
    ),
    "mask without image": (
        lambda root: (root / "images/val/02.jpg").unlink(), {}, [], ["masks/val/02.png", "no partner"]
    ),
    "sizes differ": (
        lambda root: save(root / "masks/train/05.png", np.zeros((40, 64))), {}, [],
        ["masks/train/05.png is 64 x 40", "64 x 48"],
    ),
    "value outside the classes": (
        lambda root: save(root / "masks/val/01.png", np.full((48, 64), 7)), {}, [],
        ["masks/val/01.png", "none of the 3 classes, 7 (100 %)", "void_values: [7]"],
    ),
    "masks of 0 and 255": (
        zeros_and_255, {"num_classes": "num_classes: 2", "class_names": "class_names: [a, b]",
                        "palette": "palette: null"}, [],
        ["0 and 255", "label_map: {0: 0, 255: 1}"],
    ),
    "masks in colour": (
        lambda root: colour(root / "masks/train/00.png"), {}, [], ["masks/train/00.png is RGB, others are not"]
    ),
    "truncated image": (
        lambda root: truncate(root / "images/train/07.jpg"), {}, [], ["images/train/07.jpg", "cannot be read"]
    ),
    "truncated mask": (
        lambda root: truncate(root / "masks/val/00.png"), {}, [], ["masks/val/00.png", "cannot be read"]
    ),
    "unreadable image": (
        lambda root: (root / "images/val/04.jpg").write_text("no picture"), {}, [], ["images/val/04.jpg", "cannot be"]
    ),
    "classes of model and data": (None, {"num_classes": "num_classes: 5"}, [], ["num_classes is 5", "3 classes"]),
    "empty split": (
        lambda root: [p.unlink() for p in root.glob("*/val/*")], {}, [], ["'val'", "is empty"]
    ),
    "fewer images than a batch": (
        None, {"batch_size": "batch_size: 64"}, [], ["12 training images", "batch of 64", "batch_size: 12"]
    ),
    "one value per channel": (
        None, {"class_path: UNet": "", "batch_size": "batch_size: 1"}, [], ["batch norm", "batch_size to 2 or more"]
    ),
    "misspelt key": (None, {"crop_size": "crop_siz: 32"}, [], ["unknown key 'crop_siz'", "'crop_size'"]),
    "misspelt trainer key": (None, {"max_epochs": "max_epoch: 2"}, [], ["'trainer.max_epochs'"]),
    "misspelt argument": (None, {}, ["--model.base_chanels", "8"], ["'base_chanels'", "'base_channels'"]),
    "misspelt architecture": (None, {}, ["--model", "UNett"], ["unknown class 'UNett'", "'UNet'"]),
    "misspelt data set": (None, {}, ["--data", "Foldr"], ["unknown class 'Foldr'", "'Folder'"]),
    "wrong type": (None, {"base_channels": "base_channels: wide"}, [], ["base_channels", "wide"]),
    "no such config": (None, {}, ["--config", "none.yaml"], ["none.yaml"]),
    "no such checkpoint": (None, {}, ["--ckpt_path", "none.ckpt"], ["none.ckpt"]),
    "unknown mask folder": (
        lambda root: (root / "masks").rename(root / "labels"), {}, [], ["masks/train", "does not exist"]
    ),
    "diverging": (
        None, {"optimizer": "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1.0e+30}}"}, [],
        ["not finite", "at step", "learning rate 8.48666e+29", "images"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    base = tmp_path_factory.mktemp("bad")

    def run(item):
        name, (spoil, replace, args, _) = item
        folder = base / name.replace(" ", "_")
        root = draw_tree(folder / "tree")  # makes the folder too
        if spoil is not None:
            spoil(root)
        replace = dict(replace)
        if replace.pop("class_path: UNet", None) is not None:
            file = config(folder, root, **replace)
            text = file.read_text().replace("class_path: UNet", "class_path: DeepLabV3")
            file.write_text(text.replace("base_channels: 4", "backbone: mobilenet_v3_large"))
        else:
            file = config(folder, root, **replace)
        done = lightning("fit", "--config", file, *args, cwd=folder)
        return name, (done, sorted(folder.rglob("*.ckpt")))

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, CASES.items()))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_sentence(results, name):
    done, checkpoints = results[name]
    words = CASES[name][3]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stderr and len(errors) == 1, done.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert len(errors[0]) < 500 and not checkpoints


def test_a_checkpoint_of_another_architecture_names_both(trained, tree, tmp_path):
    file = config(tmp_path, tree)
    file.write_text(file.read_text().replace("UNet", "DeepLabV1").replace("base_channels: 4", "dropout: channel"))
    best = trained / "logs/config/version_0/checkpoints/best.ckpt"
    for verb in ("test", "fit"):
        done = lightning(verb, "--config", file, "--ckpt_path", best, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "segmentation.UNet" in done.stderr and "segmentation.DeepLabV1" in done.stderr


def test_a_checkpoint_of_another_width_says_what_differs(trained, tree, tmp_path):
    file = config(tmp_path, tree, base_channels="base_channels: 8")
    best = trained / "logs/config/version_0/checkpoints/best.ckpt"
    done = lightning("test", "--config", file, "--ckpt_path", best, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "base_channels 4 there, 8 here" in done.stderr


def test_palette_masks_are_read_as_labels(tmp_path):
    root = draw_tree(tmp_path / "tree", {"train": 4, "val": 2})
    for path in root.glob("masks/*/*.png"):
        mask = Image.open(path)
        mask.putpalette([9, 9, 9, 200, 30, 0, 0, 40, 210] + 759 * [77])
        mask.save(path)
        assert Image.open(path).mode == "P"
    from datamodules import Folder

    data = Folder(root, class_names=["a", "b", "c"])
    data.setup("validate")
    _, mask = data.datasets["val"].read(0)
    expected = draw_pair(100)[1]
    expected[:2] = 255
    np.testing.assert_array_equal(mask.numpy(), expected)
