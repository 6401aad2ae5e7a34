"""U-Net's border weights, compared with values computed by hand and with a slow loop over whole images."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from datamodules.weight_map import border_weights


def slow(mask: Tensor, instances: Tensor, w0: float, sigma: float, class_weights: list[float]) -> Tensor:
    """Compute equation 2 with one distance transform of the whole image per object."""
    weights = np.zeros(mask.shape)
    for label, factor in enumerate(class_weights):
        weights[mask.numpy() == label] = factor
    numbers = [number for number in instances.unique().tolist() if number]
    if len(numbers) > 1:
        distances = [ndimage.distance_transform_edt(instances.numpy() != number) for number in numbers]
        nearest, second = np.sort(distances, axis=0)[:2]
        border = w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
        weights += np.where(mask.numpy() == 0, border, 0)
    return torch.from_numpy(weights).float()


def discs(seed: int, height: int, width: int, count: int, radius: int) -> tuple[Tensor, Tensor]:
    """Draw a mask of overlapping discs in two classes with an ignored corner, and its instance map."""
    rng = np.random.RandomState(seed)
    y, x = np.ogrid[:height, :width]
    instances = np.zeros((height, width), np.int32)
    for number in range(1, count + 1):
        r = rng.randint(2, radius)
        instances[(y - rng.randint(height)) ** 2 + (x - rng.randint(width)) ** 2 < r * r] = 7 * number + 1000
    mask = (instances > 0) * (1 + instances % 2)
    mask[:9, :14] = 255
    return torch.from_numpy(mask.astype(np.int16)), torch.from_numpy(instances)


def test_by_hand():
    """Three pixels between two cells: d1 + d2 is 1 + 3, 2 + 2 and 3 + 1."""
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 255]], dtype=torch.uint8)
    gap = 1 + 10 * math.exp(-16 / 50)
    weights = border_weights(mask, class_weights=[1, 2])
    assert weights.dtype == torch.float32 and weights.tolist() == [pytest.approx([2, 2, gap, gap, gap, 2, 0])]
    narrow = 1 + 3 * math.exp(-16 / 8)
    weights = border_weights(mask, w0=3, sigma=2, class_weights=[1, 2])
    assert weights.tolist() == [pytest.approx([2, 2, narrow, narrow, narrow, 2, 0])]
    diagonal = torch.zeros(5, 5, dtype=torch.uint8)
    diagonal[0, 0] = diagonal[4, 3] = 1  # from (2, 0): 2 and the root of 4 + 9
    weights = border_weights(diagonal, class_weights=[0, 0])
    assert weights[2, 0] == pytest.approx(10 * math.exp(-((2 + math.sqrt(13)) ** 2) / 50))
    assert weights[0, 0] == 0, "no border term on a cell"


def test_class_balance_has_mean_1():
    mask = torch.tensor([[0, 0, 0, 1, 255, 255]])
    weights = border_weights(mask)  # one cell: no border term
    assert weights.tolist() == [pytest.approx([4 / 6, 4 / 6, 4 / 6, 2, 0, 0])]
    mask, instances = discs(0, 60, 80, 12, 9)
    balance = border_weights(mask, instances, w0=0)
    assert balance[mask != 255].mean() == pytest.approx(1, abs=1e-5)
    sums = [float(balance[mask == label].sum()) for label in (0, 1, 2)]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("w0, sigma", [(10.0, 5.0), (4.0, 2.0), (10.0, 15.0)])
@pytest.mark.parametrize("size, count", [((70, 90), 12), ((120, 64), 40), ((33, 150), 3), ((40, 40), 1)])
def test_equals_the_slow_loop(seed, w0, sigma, size, count):
    mask, instances = discs(seed, *size, count, 10)
    fast = border_weights(mask, instances, w0, sigma, [1.0, 0.5, 2.0])
    expected = slow(mask, instances, w0, sigma, [1.0, 0.5, 2.0])
    assert (fast - expected).abs().max() < 1e-4
    assert (fast[mask == 255] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_objects_are_the_connected_pixels_of_a_class(seed):
    mask, _ = discs(seed, 80, 90, 25, 8)
    parts, count = torch.zeros(80, 90, dtype=torch.int32), 0
    for label in (1, 2):
        found, number = ndimage.label(mask.numpy() == label, [[0, 1, 0], [1, 1, 1], [0, 1, 0]])
        parts += torch.from_numpy(np.where(found > 0, found + count, 0).astype(np.int32))
        count += number
    assert torch.equal(border_weights(mask), border_weights(mask, parts))
    assert not torch.equal(border_weights(mask), border_weights(mask, (mask > 0).int()))


def test_touching_objects_need_an_instance_map():
    mask = torch.ones(3, 7, dtype=torch.uint8)
    mask[1:, 3] = 0
    instances = torch.tensor([1, 1, 1, 1, 2, 2, 2]).expand(3, 7) * (mask > 0)
    assert (border_weights(mask, class_weights=[1, 1]) == 1).all()
    weights = border_weights(mask, instances, class_weights=[1, 1])
    assert weights[2, 3] == pytest.approx(1 + 10 * math.exp(-4 / 50)) and (weights[mask == 1] == 1).all()
    mask[:, 4:] *= 2  # two classes that touch are two objects by themselves
    assert border_weights(mask, class_weights=[1, 1, 1])[2, 3] > 10


def test_weight_falls_as_the_gap_widens():
    middle = []
    for gap in range(1, 40, 2):
        mask = torch.ones(9, 60, dtype=torch.uint8)
        mask[:, 30 - gap // 2 : 31 + gap // 2] = 0
        middle.append(float(border_weights(mask, class_weights=[0, 0])[4, 30]))
    assert middle[0] == pytest.approx(10 * math.exp(-4 / 50))
    assert all(a > b for a, b in itertools.pairwise(middle))
    assert middle[-1] < 1e-6


@pytest.mark.parametrize("value", [0, 1, 255])
def test_masks_of_one_value(value):
    weights = border_weights(torch.full((6, 8), value, dtype=torch.int64))
    assert (weights == (value != 255)).all()
    assert (border_weights(torch.full((6, 8), value), class_weights=[3, 3]) == 3 * (value != 255)).all()


def test_the_arguments_are_left_alone():
    mask, instances = discs(1, 40, 50, 8, 8)
    copies = mask.clone(), instances.clone()
    border_weights(mask, instances)
    border_weights(mask)
    assert torch.equal(mask, copies[0]) and torch.equal(instances, copies[1])


def test_speed():
    """A hundred cells on 512 x 512 pixels take less than half a second."""
    y, x = np.ogrid[:512, :512]
    mask = torch.from_numpy(
        (((y % 51 - 25) ** 2 + (x % 51 - 25) ** 2 < 24**2) & (y < 510) & (x < 510)).astype(np.uint8)
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        border_weights(mask)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"instances": torch.zeros(4, 5)}, r"\(4, 4\).*\(4, 5\)"),
        ({"sigma": 0}, "sigma"),
        ({"class_weights": [1, 1]}, "2 values.* label 2"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[0, 0], mask[1, 1] = 2, 255
    with pytest.raises(ValueError, match=words):
        border_weights(mask, **arguments)
