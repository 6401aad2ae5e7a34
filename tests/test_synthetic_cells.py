"""SyntheticCells draws the same valid images everywhere, and most cells nearly touch a neighbour."""

import ast
import hashlib
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from datamodules import synthetic_cells
from datamodules.synthetic_cells import SyntheticCells, draw_cells
from datamodules.weight_map import border_weights

SIZES = [(64, 64), (65, 97), (64, 300), (300, 64), (256, 256)]


@pytest.mark.parametrize(
    "arguments, expected", [({}, "d4d05e45db39912b"), ({"size": (96, 130), "seed": 7}, "a0a669781f86fd4f")]
)
def test_pictures_never_change(arguments, expected):
    data, digest = SyntheticCells(num_train=3, num_val=3, num_test=3, **arguments), hashlib.sha256()
    for split in ("train", "val", "test"):
        for sample in data.samples(split):
            image, mask = sample.read()
            assert torch.equal(image, image[:1].expand(3, -1, -1))
            parts = image[0].numpy(), mask.numpy(), sample.instances().numpy().astype("<i4")
            digest.update(b"".join(part.tobytes() for part in parts))
    assert digest.hexdigest()[:16] == expected


def test_a_picture_depends_on_nothing_but_its_arguments():
    first, cells = draw_cells(3, 5, (96, 96))
    draw_cells(3, 6, (96, 96))
    np.random.seed(1)
    again, same = draw_cells(3, 5, (96, 96))
    assert (first == again).all() and (cells == same).all()
    for seed, index in ((3, 6), (4, 5), (5, 3)):
        assert (draw_cells(seed, index, (96, 96))[0] != first).any()


def test_splits_share_no_picture():
    data = SyntheticCells(size=(64, 64), num_train=20, num_val=20, num_test=20)
    samples = [sample for split in ("train", "val", "test") for sample in data.samples(split)]
    assert len({sample.name for sample in samples}) == 60
    assert len({sample.read()[0].numpy().tobytes() for sample in samples}) == 60


@pytest.mark.parametrize("size", SIZES)
def test_instances_and_mask_agree(size):
    """Every cell is one connected piece of at least 40 pixels and has one number, and no two cells touch."""
    data = SyntheticCells(size=size, num_val=4)
    for sample in data.samples("val"):
        image, mask = sample.read()
        cells = sample.instances()
        assert image.shape == (3, *size) and image.dtype == torch.uint8
        assert mask.shape == cells.shape == size and mask.dtype == torch.uint8 and cells.dtype == torch.int32
        assert torch.equal(mask == 1, cells > 0) and int(mask.max()) <= 1
        numbers, counts = cells.unique(return_counts=True)
        assert numbers.tolist() == list(range(len(numbers))) and counts.min() >= 40
        pieces, found = ndimage.label(mask.numpy(), np.ones((3, 3)))  # corners connect: no gap is broken
        assert found == cells.max()
        assert len(np.unique(np.stack([pieces, cells.numpy()]).reshape(2, -1), axis=1).T) == found + 1
        assert torch.equal(border_weights(mask), border_weights(mask, cells))


def test_most_cells_nearly_touch_another():
    """At most 3 pixels of background lie between four cells of five and their nearest neighbour; gaps of 1, 2, 3."""
    near, total, touching = 0, 0, []
    for index in range(8):
        cells = draw_cells(0, index, (256, 256))[1]
        for number in range(1, cells.max() + 1):
            window = ndimage.find_objects(cells)[number - 1]
            window = tuple(slice(max(side.start - 12, 0), side.stop + 12) for side in window)
            other = (cells[window] > 0) & (cells[window] != number)
            distance = ndimage.distance_transform_edt(~other) if other.any() else np.full(other.shape, 99)
            gap = int(distance[cells[window] == number].min()) - 1
            near, total = near + (gap <= 3), total + 1
            touching.append(gap)
    assert total > 8 * 25
    assert near > 0.8 * total
    assert min(touching) >= 0 and {1, 2} <= set(touching)


def test_grey_alone_does_not_tell_cells():
    """Cells and ground take turns at being brighter, and on average they differ by few grey levels."""
    differences, shares = [], []
    for index in range(12):
        image, cells = draw_cells(0, index, (256, 256))
        differences.append(image[cells > 0].mean() - image[cells == 0].mean())
        shares.append((cells > 0).mean())
    assert min(differences) < 0 < max(differences) and abs(np.mean(differences)) < 12
    assert min(shares) > 0.15 and max(shares) < 0.9 and np.ptp(shares) > 0.2


def test_drawing_uses_integers_only():
    """No line of the drawing divides or names a float, and no variable in it ever holds one."""
    with open(synthetic_cells.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Div), "true division makes floats"
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), f"float in line {node.lineno}"

    seen, floats = set(), []

    def watch(frame, event, argument):
        if frame.f_code.co_filename != synthetic_cells.__file__:
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
        draw_cells(0, 0, (64, 96))
    finally:
        sys.settrace(before)
    assert {"draw_cells", "grow_cells", "part_cells", "draw_debris", "soften", "shifted"} <= seen
    assert not floats


@pytest.mark.parametrize(
    "arguments, words",
    [({"size": (63, 64)}, "at least 64"), ({"size": (64,)}, "at least 64"), ({"num_val": 0}, "num_val")],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        SyntheticCells(**arguments)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="valid"):
        SyntheticCells().samples("valid")


def test_loaders_deliver_cells():
    data = SyntheticCells(size=(64, 80), num_train=4, num_val=2, batch_size=4, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 64, 80) and batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (4, 64, 80) and batch["mask"].dtype == torch.int64
