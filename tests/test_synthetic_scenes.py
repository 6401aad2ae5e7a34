"""SyntheticScenes draws the same valid images everywhere, and only context distinguishes a boat from a car."""

import ast
import hashlib
import sys

import numpy as np
import pytest
import torch

from datamodules import SyntheticScenes, synthetic_scenes
from datamodules.synthetic_scenes import BOAT, CAR, ROAD, WATER, Canvas, Dice, draw_scene, draw_vehicle

SIZES = [(32, 32), (33, 47), (32, 200), (200, 32), (96, 96), (128, 128), (256, 160)]


def checksum(**arguments):
    """Hash the first four images and masks of each split."""
    data, digest = SyntheticScenes(num_train=4, num_val=4, num_test=4, **arguments), hashlib.sha256()
    for split in ("train", "val", "test"):
        for sample in data.samples(split):
            image, mask = sample.read()
            digest.update(image.permute(1, 2, 0).contiguous().numpy().tobytes() + mask.numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"size": (128, 128)}, "2de60911aac119be"),
        ({"size": (64, 96), "seed": 7}, "98e7b53dde6c6e0f"),
        ({"size": (96, 96), "difficulty": 0}, "95bab8772592cdfb"),
        ({"size": (96, 96), "difficulty": 2}, "48e7182bdab948db"),
    ],
)
def test_pictures_never_change(arguments, expected):
    assert checksum(**arguments) == expected


def test_a_scene_depends_on_nothing_but_its_arguments():
    first, mask = draw_scene(3, 5, (64, 64), 1)
    draw_scene(3, 6, (64, 64), 1)
    np.random.seed(1)
    again, same = draw_scene(3, 5, (64, 64), 1)
    assert (first == again).all() and (mask == same).all()
    for seed, index in ((3, 6), (4, 5), (5, 3)):
        assert (draw_scene(seed, index, (64, 64), 1)[0] != first).any()


def test_splits_share_no_scene():
    data = SyntheticScenes(size=(32, 32), num_train=60, num_val=60, num_test=60)
    samples = [sample for split in ("train", "val", "test") for sample in data.samples(split)]
    assert len({sample.name for sample in samples}) == 180
    assert len({sample.read()[0].numpy().tobytes() for sample in samples}) == 180


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("difficulty", [0, 1, 2])
def test_any_size_gives_valid_labels(size, difficulty):
    data = SyntheticScenes(size=size, num_val=20, difficulty=difficulty)
    for sample in data.samples("val"):
        image, mask = sample.read()
        assert image.shape == (3, *size) and image.dtype == torch.uint8
        assert mask.shape == size and mask.dtype == torch.uint8
        assert int(mask.max()) < data.num_classes


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (128, 256)])
def test_every_class_occurs_often(size):
    data = SyntheticScenes(size=size, num_train=50)
    masks = [sample.read()[1] for sample in data.samples("train")]
    assert len(data.class_names) == len(data.palette) == 11
    for label, name in enumerate(data.class_names):
        assert sum(bool((mask == label).any()) for mask in masks) >= 10, name


def test_boat_and_car_are_the_same_drawing():
    for key in range(50):
        pictures = []
        for surface, label in ((WATER, BOAT), (ROAD, CAR)):
            canvas = Canvas(64, 96)
            canvas.mask[:] = surface
            draw_vehicle(canvas, Dice(key), surface)
            pictures.append((canvas.image, canvas.mask == label))
        assert pictures[0][1].any()
        assert (pictures[0][0] == pictures[1][0]).all() and (pictures[0][1] == pictures[1][1]).all()


def test_surfaces_share_their_colours():
    """The mean colours of sky, water and road differ by less than each does from scene to scene."""
    colours = {0: [], WATER: [], ROAD: []}
    for index in range(150):
        image, mask = draw_scene(0, index, (64, 64), 1)
        for label, found in colours.items():
            if (mask == label).any():
                found.append(np.median(image[mask == label], axis=0))
    means = np.array([np.mean(found, axis=0) for found in colours.values()])
    spread = np.mean([np.std(found, axis=0) for found in colours.values()], axis=0)
    assert (np.ptp(means, axis=0) < spread).all()


def test_drawing_uses_integers_only():
    """No line of the drawing divides or names a float, and no variable in it ever holds one."""
    with open(synthetic_scenes.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Div), "true division makes floats"
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), f"float in line {node.lineno}"
        assert not (isinstance(node, ast.Attribute) and node.attr in ("random", "float32", "float64", "sqrt", "sin"))

    seen, floats = set(), []

    def watch(frame, event, argument):
        if frame.f_code.co_filename != synthetic_scenes.__file__:
            return None
        seen.add(frame.f_code.co_name)
        for name, value in [*frame.f_locals.items(), ("return value", argument)]:
            for item in value if isinstance(value, tuple | list) else [value]:
                inexact = isinstance(item, np.ndarray) and item.dtype.kind not in "iub"
                if inexact or isinstance(item, float | np.floating):
                    floats.append((frame.f_code.co_name, frame.f_lineno, name))
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        for index in range(5):
            draw_scene(0, index, (64, 64), 1)
    finally:
        sys.settrace(before)
    assert {"draw_scene", "draw_land", "draw_sheet", "draw_puffs", "draw_vehicle", "waves", "mix"} <= seen
    assert not floats


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"size": (31, 64)}, "at least 32"),
        ({"size": (64,)}, "at least 32"),
        ({"num_val": 0}, "num_val"),
        ({"num_train": -1}, "num_train"),
        ({"difficulty": 3}, "difficulty"),
        ({"difficulty": -1}, "difficulty"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        SyntheticScenes(**arguments)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="valid"):
        SyntheticScenes().samples("valid")


def test_loaders_deliver_scenes():
    data = SyntheticScenes(size=(32, 48), num_train=4, num_val=2, batch_size=4, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 48) and batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (4, 32, 48) and batch["mask"].dtype == torch.int64
