"""Joint transforms move image, mask and pixel weights together, for any number of bands and any dtype."""

import math

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from datamodules.transforms import (
    IGNORE,
    BandJitter,
    ElasticDeformation,
    PixelWeight,
    RandomHorizontalFlip,
    RandomRotation,
    RandomScaleCrop,
    outside,
)

DTYPES = [torch.uint8, torch.uint16, torch.int16, torch.float32]
BLANK = {"fill": (255,)}


def triple(dtype: torch.dtype, height: int = 48, width: int = 48, bands: int = 10) -> tuple:
    """Build an image whose bands equal its mask, the mask, and pixel weights of label plus 1; no label is 255."""
    labels = torch.arange(height)[:, None] // 5 * 10 + torch.arange(width) // 7
    image = labels.to(dtype).expand(bands, height, width).clone()
    return tv_tensors.Image(image), tv_tensors.Mask(labels.short()), PixelWeight(labels.float() + 1)


def assert_aligned(mask: Tensor, weight: Tensor) -> None:
    assert type(mask) is tv_tensors.Mask and type(weight) is PixelWeight and weight.dtype == torch.float32
    expected = torch.where(mask == IGNORE, 0, mask + 1).float()
    assert torch.equal(weight.as_subclass(Tensor), expected.as_subclass(Tensor))


def displace(dx: float, dy: float) -> v2.Transform:
    """Build an elastic deformation whose field is the same everywhere."""
    elastic = ElasticDeformation(fill=(255,))
    elastic.make_params = (
        lambda inputs: {  # type: ignore[method-assign]
            "displacement": torch.tensor([dx, dy]).expand(1, *inputs[0].shape[-2:], 2)
        }
    )
    return elastic


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(48, 48), (40, 62)])
@pytest.mark.parametrize(
    "transform",
    [
        RandomHorizontalFlip(1.0),
        v2.RandomVerticalFlip(1.0),
        RandomRotation((90, 90), **BLANK),
        RandomRotation((180, 180), **BLANK),
        RandomRotation((270, 270), **BLANK),
        displace(7, -4),
        displace(-60, 0),
        RandomScaleCrop((44, 70), (1, 1), **BLANK),
        v2.Compose([RandomHorizontalFlip(1.0), RandomRotation((90, 90), **BLANK), displace(3, 3)]),
    ],
    ids=lambda t: type(t).__name__,
)
def test_an_image_that_is_its_own_mask_stays_so(transform, dtype, size):
    before = triple(dtype, *size)
    image, mask, weight = transform(*before)
    assert type(image) is tv_tensors.Image and image.dtype == dtype and mask.dtype == torch.int16
    assert len(image) == 10 and (image.float() - mask.float()).abs().max() < 1e-3
    assert_aligned(mask, weight)
    assert mask.shape != before[1].shape or not torch.equal(mask, before[1])


def test_flip_and_quarter_turn_by_hand():
    mask = tv_tensors.Mask(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8))
    image = tv_tensors.Image(mask[None].to(torch.uint16))
    flipped, same = RandomHorizontalFlip(1.0)(image, mask)
    assert flipped.tolist() == [[[2, 1], [4, 3]]] and same.tolist() == [[2, 1], [4, 3]]
    turned, same = RandomRotation((90, 90))(image, mask)  # to the left
    assert turned.tolist() == [[[2, 4], [1, 3]]] and same.tolist() == [[2, 4], [1, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_field_shifts_the_picture(dtype):
    """A pixel comes from (x + dx, y + dy), so the image moves against the field."""
    image, mask, weight = triple(dtype, 20, 30)
    moved, labels, factors = displace(5, -3)(image, mask, weight)
    expected = torch.full((20, 30), 255, dtype=torch.int16)
    expected[3:, :25] = mask[:17, 5:]
    assert torch.equal(labels.as_subclass(Tensor), expected)
    assert (moved.float() - expected).abs().max() < 1e-3
    assert (factors[:3] == 0).all() and (factors[:, 25:] == 0).all() and (factors[3:, :25] > 0).all()


def test_half_a_pixel_is_the_mean_of_two():
    image = tv_tensors.Image(torch.tensor([[[10.0, 20.0, 40.0, 80.0]]]))
    (moved,) = displace(0.5, 0)(image)[None]
    assert moved.flatten().tolist() == pytest.approx([15, 30, 60, (80 + 255) / 2], abs=1e-3)


def test_elastic_equals_a_slow_loop():
    torch.manual_seed(3)
    height, width, colour = 17, 23, (40.0, 200.0)
    image = tv_tensors.Image(torch.rand(2, height, width) * 255)
    mask = tv_tensors.Mask(torch.randint(0, 9, (height, width), dtype=torch.uint8))
    weight = PixelWeight(torch.rand(height, width) + 1)
    elastic = ElasticDeformation(4.0, 3, colour)
    field = elastic.make_params([image, mask, weight])
    bent, labels, factors = (elastic.transform(x, field) for x in (image, mask, weight))

    def at(picture: Tensor, y: int, x: int, border: float) -> float:
        return float(picture[y, x]) if 0 <= y < height and 0 <= x < width else border

    left = 0
    for y in range(height):
        for x in range(width):
            dx, dy = field["displacement"][0, y, x].tolist()
            sy, sx = y + dy, x + dx
            y0, x0 = math.floor(sy), math.floor(sx)
            for band in range(2):
                expected = sum(
                    (1 - abs(sy - v)) * (1 - abs(sx - u)) * at(image[band], v, u, colour[band])
                    for v in (y0, y0 + 1)
                    for u in (x0, x0 + 1)
                )
                assert float(bent[band, y, x]) == pytest.approx(expected, abs=0.02)
            if max(abs(sy - y0 - 0.5), abs(sx - x0 - 0.5)) > 1e-3:  # not between two pixels
                assert labels[y, x] == at(mask, round(sy), round(sx), 255)
                assert factors[y, x] == at(weight, round(sy), round(sx), 0)
                left += labels[y, x] == 255
    assert 5 < left < 200


def test_elastic_grid_has_the_papers_spread():
    """On 33 x 65 pixels the points of a 3 x 3 grid are the pixels in rows 0, 16, 32 and columns 0, 32, 64."""
    torch.manual_seed(0)
    elastic, image = ElasticDeformation(), tv_tensors.Image(torch.zeros(1, 33, 65))
    fields = torch.cat([elastic.make_params([image])["displacement"] for _ in range(400)])
    assert fields.shape == (400, 33, 65, 2)
    points = fields[:, ::16, ::32]
    assert points.shape[1:3] == (3, 3)
    assert (points.std((0, 1, 2)) - 10).abs().max() < 0.4  # standard error 0.12
    assert points.mean().abs() < 0.4 and (points.std(0) - 10).abs().max() < 1.6
    apart = torch.stack([points[:, i, j, k] for i in range(3) for j in range(3) for k in range(2)]).corrcoef()
    assert (apart - torch.eye(18)).abs().max() < 0.25  # points move independently, along x and y
    steps = fields.diff(dim=2).abs().max()
    assert steps < 4, "smooth between the points"
    torch.manual_seed(0)
    assert torch.allclose(points[0].permute(2, 0, 1), 10 * torch.randn(2, 3, 3), atol=1e-4)


@pytest.mark.parametrize(
    "transform",
    [RandomRotation((30, 30), (90, 60)), ElasticDeformation(10.0, 3, (90, 60))],
    ids=["rotation", "elastic"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_is_no_seam_where_the_picture_has_the_colour_outside(transform, dtype):
    torch.manual_seed(0)
    image = torch.tensor([90, 60])[:, None, None].expand(2, 40, 40).to(dtype)
    moved, mask = transform(tv_tensors.Image(image), tv_tensors.Mask(torch.zeros(40, 40, dtype=torch.uint8)))
    assert (mask == 255).any()
    assert (moved.float() - image.float()).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_and_weights_stay_aligned_whatever_is_drawn(dtype):
    everything = v2.Compose(
        [
            ElasticDeformation(6.0),
            RandomRotation(25),
            RandomScaleCrop(40, (0.5, 2.0), max_class_share=0.75),
            RandomHorizontalFlip(),
            BandJitter(0.4),
            v2.RandomApply([v2.GaussianBlur(5, 1.1)]),
        ]
    )
    padded = 0
    for seed in range(12):
        torch.manual_seed(seed)
        image, mask, weight = everything(*triple(dtype))
        assert image.shape == (10, 40, 40) and image.dtype == dtype and mask.shape == (40, 40)
        assert_aligned(mask, weight)
        padded += int((mask == 255).sum())
        torch.manual_seed(seed)
        again = everything(*triple(dtype))
        assert torch.equal(image, again[0]) and torch.equal(mask, again[1]) and torch.equal(weight, again[2])
        torch.manual_seed(seed + 1)
        assert not torch.equal(image, everything(*triple(dtype))[0])
    assert padded > 500


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_keeps_dtype_and_bands(dtype):
    """Integers equal the same image as floats; large values do not wrap around."""
    torch.manual_seed(1)
    top = 60000 if dtype == torch.uint16 else 255 if dtype == torch.uint8 else 30000
    floats = torch.rand(10, 30, 40) * top
    crop = RandomScaleCrop((50, 24), (0.9, 0.9), fill=[float(n) + 0.6 for n in range(10)])
    params = crop.make_params([tv_tensors.Image(floats)])
    ours = crop.transform(tv_tensors.Image(floats.round().to(dtype)), params)
    expected = crop.transform(tv_tensors.Image(floats), params)
    assert ours.dtype == dtype and ours.shape == (10, 50, 24)
    assert (ours.float() - expected).abs().max() <= (2 if dtype == torch.uint8 else 1.01)  # 8 bits in fixed point
    assert params["rows"][:3] == (0, 30, 27)
    border = ours[:, 0, 0] if params["rows"][3] else ours[:, -1, 0]
    assert border.tolist() == pytest.approx([n + (0.6 if dtype == torch.float32 else 1) for n in range(10)])


def two_halves() -> list:
    mask = torch.zeros(60, 200, dtype=torch.uint8)
    mask[:, 100:] = 1
    return [tv_tensors.Image(mask[None]), tv_tensors.Mask(mask)]


def test_rare_classes_come_more_often():
    """A window of 40 columns holds a quarter of both labels at 21 of its 161 places: 13 %, and 78 % in 11 draws."""
    hits = {}
    for share in (1.0, 0.75):
        torch.manual_seed(0)
        crop = RandomScaleCrop(40, (1.0, 1.0), max_class_share=share)
        means = torch.stack([crop(*two_halves())[1].float().mean() for _ in range(200)])
        hits[share] = float(((means >= 0.25) & (means <= 0.75)).float().mean())
    assert 0.06 < hits[1.0] < 0.22 and 0.68 < hits[0.75] < 0.88


@pytest.mark.parametrize("share, draws", [(1.0, 1), (0.75, 11)])
def test_a_window_of_one_class_is_drawn_again_ten_times_then_kept(share, draws, monkeypatch):
    crop, count, window = RandomScaleCrop(8, (1.0, 1.0), max_class_share=share), [], RandomScaleCrop._window
    monkeypatch.setattr(crop, "_window", lambda *arguments: count.append(1) or window(*arguments))
    mask = torch.zeros(20, 20, dtype=torch.int16)
    _, mask = crop(tv_tensors.Image(torch.zeros(3, 20, 20)), tv_tensors.Mask(mask))
    assert len(count) == 2 * draws and mask.shape == (8, 8)
    assert crop(tv_tensors.Image(torch.zeros(3, 20, 20))).shape == (3, 8, 8)  # without a mask, no label is counted


@pytest.mark.parametrize(
    "labels, varied",
    [
        ([0, 0, 0, 1], True),  # exactly three quarters
        ([0, 0, 0, 0, 1], False),
        ([0, 0, 0, 1, 255, 255, 255, 255], True),  # ignored pixels do not count
        ([255, 255, 255, 1, 255, 255, 255, 255], False),
        ([255, 255], False),
        ([3, 3, 7, 7], True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_share_of_a_class(labels, varied, dtype):
    crop = RandomScaleCrop(1, max_class_share=0.75)
    mask = tv_tensors.Mask(torch.tensor([[9, *labels]] * 2, dtype=dtype))
    assert crop._is_varied(mask, (0, 1, 1, 0), (1, len(labels), 1, 0)) is varied


def test_band_jitter_by_hand():
    image = torch.tensor([[[0, 100]], [[0, 200]]], dtype=torch.uint8)
    factors = {
        "brightness": torch.tensor([1.2, 1.0])[:, None, None],
        "contrast": torch.tensor([0.5, 2.0])[:, None, None],
    }
    jitter = BandJitter(0.5)

    def jittered(dtype: torch.dtype) -> list:
        return jitter.transform(tv_tensors.Image(image.to(dtype)), factors).tolist()

    assert jittered(torch.uint8) == [[[30, 90]], [[0, 255]]]
    assert jittered(torch.uint16) == [[[30, 90]], [[0, 300]]]
    assert jittered(torch.int16) == [[[30, 90]], [[-100, 300]]]
    assert jittered(torch.float32) == [[[pytest.approx(30), pytest.approx(90)]], [[-100, 300]]]
    image = torch.tensor([[[-30000, 30000]]], dtype=torch.int16)
    double = {"brightness": torch.tensor(2.0), "contrast": torch.tensor(1.0)}
    assert jitter.transform(tv_tensors.Image(image), double).tolist() == [[[-32768, 32767]]]
    holes = jitter.transform(tv_tensors.Image(torch.tensor([[[1.0, 3.0, math.nan]]])), double)
    assert holes[0, 0, :2].tolist() == [2, 6] and holes[0, 0, 2].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_band_jitter_draws_each_band_by_itself(dtype):
    torch.manual_seed(0)
    before = triple(dtype)
    image, mask, weight = BandJitter(0.3)(*before)
    assert image.dtype == dtype and torch.equal(mask, before[1]) and torch.equal(weight, before[2])
    assert len(image.float().flatten(1).mean(1).round(decimals=1).unique()) > 7
    assert torch.equal(BandJitter(0.0)(before[0]).float().round(), before[0].float())
    drawn = torch.stack(list(BandJitter(0.3).make_params([image]).values()))
    assert drawn.shape == (2, 10, 1, 1) and drawn.min() >= 0.7 and drawn.max() <= 1.3
    assert BandJitter(5.0).make_params([image])["contrast"].min() >= 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_blur_leaves_labels_and_weights_alone(dtype):
    image, mask, weight = triple(dtype)
    blurred, labels, factors = v2.GaussianBlur(5, 1.1)(image, mask, weight)
    assert blurred.dtype == dtype and not torch.equal(blurred, image)
    assert (blurred.float() - v2.GaussianBlur(5, 1.1)(tv_tensors.Image(image.float()))).abs().max() <= 0.51
    assert torch.equal(labels, mask) and torch.equal(factors, weight)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: RandomScaleCrop(8, max_class_share=0), "max_class_share"),
        (lambda: RandomScaleCrop(8, max_class_share=1.5), "max_class_share"),
        (lambda: ElasticDeformation(-1.0), "sigma"),
        (lambda: ElasticDeformation(1.0, 1), "grid"),
        (lambda: BandJitter(-0.1), "strength"),
        (lambda: outside(tv_tensors.Image(torch.zeros(10, 4, 4)), (1, 2, 3)), "fill has 3 values.* 10 channels"),
    ],
)
def test_bad_arguments_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()
