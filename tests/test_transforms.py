"""Joint transforms move image, mask and pixel weights together, for any number of bands and any dtype."""

import math
import random

import numpy as np
import pytest
import torch
import yaml
from conftest import config, succeed
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from datamodules import Folder
from datamodules.dataset import SegmentationDataset, random_numbers_of
from datamodules.errors import UserError
from datamodules.transforms import (
    IGNORE,
    BandJitter,
    ElasticDeformation,
    Extra,
    PixelWeight,
    RandomHorizontalFlip,
    RandomRotation,
    RandomScaleCrop,
    RandomTurn,
    RandomVerticalFlip,
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
        RandomVerticalFlip(1.0),
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
@pytest.mark.parametrize("degrees", [90, 180])
def test_turns_are_exact_and_all_are_drawn(degrees, dtype):
    before, drawn = triple(dtype, 20, 30), set()
    for seed in range(20):
        torch.manual_seed(seed)
        image, mask, weight = RandomTurn(degrees)(*before)
        assert image.dtype == dtype and torch.equal(image[4].short(), mask)
        assert_aligned(mask, weight)
        matches = [k for k in range(4) if np.array_equal(mask.numpy(), np.rot90(before[1].numpy(), k))]
        drawn.add(*matches)
    assert drawn == ({0, 1, 2, 3} if degrees == 90 else {0, 2})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vertical_flip_is_numpys(dtype):
    image, mask, _ = triple(dtype, 20, 30)
    flipped, same = RandomVerticalFlip(1.0)(image, mask)
    assert flipped.dtype == dtype and np.array_equal(same.numpy(), np.flipud(mask.numpy()))
    assert torch.equal(flipped[0].short(), same)


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


def item(value: int = 3, size: tuple[int, int] = (40, 40), dtype: torch.dtype = torch.uint8) -> dict:
    """An image of 200 everywhere, a mask of one class, and weights of 2."""
    return {
        "image": tv_tensors.Image(torch.full((3, *size), 200, dtype=dtype)),
        "mask": tv_tensors.Mask(torch.full(size, value, dtype=torch.uint8)),
        "pixel_weight": PixelWeight(torch.full(size, 2.0)),
    }


GEOMETRIC = {
    "affine": lambda: v2.RandomAffine(40, translate=(0.3, 0.3), scale=(0.5, 1.5), shear=10),
    "affine with a colour": lambda: v2.RandomAffine(40, translate=(0.3, 0.3), fill=[9, 8, 7]),
    "affine with the number of a class": lambda: v2.RandomAffine(40, translate=(0.3, 0.3), fill=3),
    "rotation": lambda: v2.RandomRotation(40),
    "rotation that grows": lambda: v2.RandomRotation((30, 40), expand=True),
    "perspective": lambda: v2.RandomPerspective(0.6, p=1.0),
    "crop with a border": lambda: v2.RandomCrop(60, padding=4, pad_if_needed=True),
    "centre crop": lambda: v2.CenterCrop(60),  # has no fill, and pads with 0
    "pad": lambda: v2.Pad(5),
    "zoom out": lambda: v2.RandomZoomOut(p=1.0),
    "elastic": lambda: v2.ElasticTransform(400.0),
    "inside others": lambda: v2.RandomApply([v2.RandomChoice([v2.RandomAffine(0, (0.5, 0.5), fill=[1, 2, 3])])], p=1.0),
}


@pytest.mark.parametrize("name", GEOMETRIC)
def test_what_a_transform_brings_in_from_outside_is_ignored(name):
    """Without this, torchvision gives it the class 0, or the fill colour as a class."""
    ignored = 0
    for seed in range(6):
        torch.manual_seed(seed)
        moved = Extra([GEOMETRIC[name]()])(item())
        mask, weight, image = (moved[key].as_subclass(Tensor) for key in ("mask", "pixel_weight", "image"))
        assert moved.keys() == {"image", "mask", "pixel_weight"} and mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) <= {3, 255}
        assert torch.equal(weight, torch.where(mask == 255, 0.0, 2.0))
        if name not in ("elastic", "perspective"):  # whose images are bilinear
            assert torch.equal((image == 200).all(0), mask == 3)
        ignored += int((mask == 255).sum())
    assert ignored > 100


OTHERS = {
    "resize": lambda: v2.Resize((30, 20)),
    "resized crop": lambda: v2.RandomResizedCrop(32),
    "scale jitter": lambda: v2.ScaleJitter((48, 48)),
    "erasing": lambda: v2.RandomErasing(p=1.0),
    "noise": lambda: v2.GaussianNoise(),
    "colours": lambda: v2.RandomPhotometricDistort(p=1.0),
    "grey": lambda: v2.RandomGrayscale(1.0),
    "sharpness": lambda: v2.RandomAdjustSharpness(2.0, p=1.0),
    "equalize": lambda: v2.RandomEqualize(1.0),
    "posterize": lambda: v2.RandomPosterize(3, p=1.0),
    "solarize": lambda: v2.RandomSolarize(100, p=1.0),
    "channels": lambda: v2.RandomChannelPermutation(),
    "jpeg": lambda: v2.JPEG((10, 30)),
    "mirrored border": lambda: v2.RandomCrop(60, padding=15, padding_mode="reflect"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:RandomErasing")  # leaves the mask as it is, which is meant
def test_other_transforms_ignore_no_pixel(name):
    torch.manual_seed(0)
    moved = Extra([OTHERS[name]()])(item())
    assert (moved["mask"] == 3).all() and (moved["pixel_weight"] == 2).all() and moved["image"].dtype == torch.uint8
    assert moved["mask"].shape == moved["image"].shape[-2:]


@pytest.mark.parametrize("name", ["affine", "resized crop", "inside others", "mirrored border"])
def test_image_and_mask_move_together(name):
    """A bright square on black is the class 1: after any movement, what is bright is 1, but for blurred borders."""
    parts = item(0)
    parts["image"][:] = 0
    parts["image"][:, 8:30, 14:32] = 255
    parts["mask"][8:30, 14:32] = 1
    for seed in range(5):
        torch.manual_seed(seed)
        moved = Extra([(GEOMETRIC | OTHERS)[name]()])(parts)
        bright, inside = moved["image"][2].float(), moved["mask"] != 255
        assert ((bright > 254) & inside & (moved["mask"] != 1)).float().mean() < 0.03
        assert ((bright < 1) & inside & (moved["mask"] == 1)).float().mean() < 0.03


def test_extra_transforms_keep_labels_that_they_change_themselves():
    class Merge(v2.Transform):
        def transform(self, inpt, params):
            return tv_tensors.wrap(inpt.masked_fill(inpt == 3, 1), like=inpt) if type(inpt) is tv_tensors.Mask else inpt

    assert (Extra([Merge()])(item())["mask"] == 1).all()


class Broken(v2.Transform):
    def transform(self, inpt, params):
        raise KeyError("nothing\nmore")


class ImageAlone(v2.Transform):
    def transform(self, inpt, params):
        return inpt if isinstance(inpt, tv_tensors.Mask) else inpt[:, 1:]


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: v2.Normalize([0.5], [0.5]), "Normalize.*leave it out"),
        (lambda: v2.Compose([v2.RandomApply([v2.Normalize([0.5], [0.5])])]), "Normalize.*leave it out"),
        (lambda: v2.ToDtype(torch.float32, scale=True), "ToDtype .* 3 bands of uint8 into .* 3 bands of float32"),
        (lambda: v2.Grayscale(1), "Grayscale .* 3 bands of uint8 into an image of 1 bands"),
        (lambda: v2.ToPILImage(), "ToPILImage .* a Image"),
        (lambda: v2.FiveCrop(8), "FiveCrop of data.transforms fails .* not supported"),
        (lambda: v2.RandAugment(), "RandAugment .* fails"),
        (Broken, "Broken of data.transforms fails on an image of 3 bands of uint8: 'nothing"),
        (ImageAlone, "ImageAlone .* changes the size of the image but not"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_transform_that_does_not_fit_is_named(build, words):
    with pytest.raises(UserError, match=words):
        Extra([build()])(item())


@pytest.mark.parametrize("name", GEOMETRIC | OTHERS)
@pytest.mark.filterwarnings("ignore:RandomErasing")
def test_the_same_numbers_give_the_same_sample(name):
    """A sample depends on its key alone, whatever was drawn before; numpy's and Python's numbers are fixed too."""

    class Shift(v2.Transform):
        def transform(self, inpt, params):
            drawn = np.random.randint(50) + random.randint(0, 50)
            return inpt if isinstance(inpt, tv_tensors.Mask) else tv_tensors.wrap(inpt - drawn, like=inpt)

    extra, results = Extra([(GEOMETRIC | OTHERS)[name](), Shift()]), []
    for epoch in (0, 0, 1):
        torch.rand(7), random.random(), np.random.rand(3)
        before = torch.default_generator.get_state(), random.getstate()
        with random_numbers_of(5, epoch, 2):
            moved = extra(item())
        assert torch.equal(before[0], torch.default_generator.get_state()) and before[1] == random.getstate()
        results.append(moved["image"])
    assert torch.equal(results[0], results[1])
    assert results[0].shape != results[2].shape or not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: RandomTurn(45), "90 or 180.*45"),
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


def train_split(tree, **arguments) -> SegmentationDataset:
    data = Folder(tree, class_names=["a", "b", "c"], num_workers=0, **arguments)
    data.setup("fit")
    return data.datasets["train"]


def test_quarter_turns_come_before_a_window_that_is_no_square(tree):
    turned = train_split(tree, batch_size=4, crop_size=(20, 40), turns=90, flip=False)
    assert {turned[epoch, 0]["image"].shape[-2:] for epoch in range(8)} == {(20, 40)}
    whole = train_split(tree, batch_size=1, turns=90, flip=False)
    assert {tuple(whole[epoch, 0]["image"].shape[-2:]) for epoch in range(8)} == {(48, 64), (64, 48)}
    with pytest.raises(UserError, match=r"turns 90 .* 64 x 48 .* set data.crop_size, or data.turns 180"):
        train_split(tree, batch_size=4, turns=90)
    assert len(train_split(tree, batch_size=4, turns=180)) == 12  # what the sentence advises


def test_mirrors_and_turns_show_all_eight_views(tree):
    """Flips and turns of an image give its eight symmetries, of the mask as of the image."""
    dataset = train_split(tree, batch_size=1, turns=90, vertical_flip=True)
    image, mask = (x.numpy() for x in dataset.read(0))
    views = [np.rot90(m, k, (-2, -1)) for m in (image, image[..., ::-1]) for k in range(4)]
    labels = [np.rot90(m, k) for m in (mask, mask[..., ::-1]) for k in range(4)]
    seen = set()
    for epoch in range(60):
        part = dataset[epoch, 0]
        (view,) = (i for i, m in enumerate(views) if np.array_equal(m, part["image"].numpy()))
        assert np.array_equal(labels[view], part["mask"].numpy())
        seen.add(view)
    assert seen == set(range(8))


def test_a_transform_that_fails_ends_setup_in_one_sentence(tree):
    with pytest.raises(UserError, match=r"ToDtype of data.transforms turns .* uint8 into .* float32: leave it out"):
        train_split(tree, batch_size=4, crop_size=32, transforms=[v2.ToDtype(torch.float32, scale=True)])


@pytest.mark.slow
def test_transforms_are_named_in_a_config_and_written_into_the_runs_own(tree, tmp_path):
    listed = """crop_size: 32
    transforms:
      - {class_path: RandomAffine, init_args: {degrees: 10, fill: [124, 116, 104]}}
      - class_path: torchvision.transforms.v2.RandomApply
        init_args: {p: 0.5, transforms: [{class_path: torchvision.transforms.v2.GaussianNoise}]}"""
    file = config(tmp_path, tree, crop_size=listed, max_epochs="max_epochs: 1")
    succeed("fit", "--config", file, cwd=tmp_path)
    written = yaml.safe_load((tmp_path / "logs/config/version_0/config.yaml").read_text())
    affine, noise = written["data"]["init_args"]["transforms"]
    assert affine["init_args"]["degrees"] == 10 and affine["init_args"]["fill"] == [124, 116, 104]
    assert noise["init_args"]["transforms"][0]["class_path"] == "torchvision.transforms.v2.GaussianNoise"
