"""Pixels come out as they were written, or one sentence says why not. tifffile, Pillow and numpy write the files."""

import io
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps
from torchvision import tv_tensors

from datamodules import Folder, SegmentationDataset
from datamodules.base import range_of
from datamodules.dataset import LabelTable, collate, resize_nearest, same_proportions
from datamodules.decode import read_bands, read_image, read_mask
from datamodules.errors import UserError
from datamodules.transforms import BandJitter
from segmentation import UNet
from segmentation.checkpoints import agree

INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")
SIDES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=5, max_side=9)
several = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MASKS = st.sampled_from(INTEGERS).flatmap(lambda dtype: arrays.arrays(np.dtype(dtype), SIDES))


@several
@given(mask=MASKS, order=st.sampled_from("<>"), compression=st.sampled_from([None, "lzw", "deflate", "zstd"]))
def test_masks_of_any_integers_come_back_equal(mask, order, compression, tmp_path):
    tifffile.imwrite(tmp_path / "m.tif", mask, byteorder=order, compression=None if mask.dtype == bool else compression)
    np.save(tmp_path / "m.npy", mask.astype(mask.dtype.newbyteorder(order)))
    for name in ("m.tif", "m.npy"):
        np.testing.assert_array_equal(read_mask(tmp_path / name).numpy(), mask)
    if mask.dtype.name in ("bool", "uint8", "uint16"):
        Image.fromarray(mask).save(tmp_path / "m.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png").numpy(), mask)


TYPES = ("uint8", "uint16", "int16", "int32", "float32")
IMAGES = st.tuples(st.sampled_from(TYPES), st.integers(10, 40), st.integers(10, 40), st.integers(0, 2**32 - 1))
CODECS = st.sampled_from([None, "lzw", "deflate", "zstd", "packbits", "lzma"])


@several
@given(
    drawn=IMAGES,
    compression=CODECS,
    predictor=st.booleans(),
    order=st.sampled_from("<>"),
    big=st.booleans(),
    tile=st.sampled_from([None, (16, 16)]),
    planes=st.booleans(),
    count=st.sampled_from([1, 2, 3, 4, 7]),
)
def test_images_of_any_tiff_come_back_equal(drawn, compression, predictor, order, big, tile, planes, count, tmp_path):
    dtype, height, width, seed = drawn
    noise = np.random.default_rng(seed).integers(0, 256, (count, height, width * np.dtype(dtype).itemsize), np.uint8)
    image = np.nan_to_num(noise.view(dtype), posinf=1, neginf=0)
    pixels = image if planes or count == 1 else np.moveaxis(image, 0, -1)
    tifffile.imwrite(
        tmp_path / "i.tif",
        pixels[0] if count == 1 else pixels,
        photometric="rgb" if count == 3 else "minisblack",
        planarconfig=None if count == 1 else "separate" if planes else "contig",
        compression=compression,
        predictor=predictor and compression not in (None, "packbits"),
        byteorder=order,
        bigtiff=big,
        tile=tile,
    )
    np.testing.assert_array_equal(read_bands(tmp_path / "i.tif", range(count)).numpy(), image)
    if count in (1, 3):
        read = read_image(tmp_path / "i.tif").numpy()
        assert read.dtype == image.dtype
        np.testing.assert_array_equal(read, np.broadcast_to(image, (3, height, width)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_are_not_spread(bits, tmp_path):
    labels = np.arange(12).reshape(3, 4) % 2**bits
    path = tmp_path / "m.png"
    Image.fromarray((labels * (255 // (2**bits - 1))).astype(np.uint8)).save(path)
    if bits > 1:
        rows = b"".join(
            b"\0" + int("".join(f"{v:0{bits}b}" for v in row), 2).to_bytes(bits // 2, "big") for row in labels
        )
        path.write_bytes(png(4, 3, bits, 0, rows))
    else:
        Image.fromarray(labels.astype(bool)).save(path)
    assert read_mask(path).tolist() == labels.tolist()
    assert read_image(path)[0].tolist() == (labels * (255 // (2**bits - 1))).tolist()  # a picture uses the full scale


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """Write a PNG by hand: kind 0 is grey; each row begins with the number of its filter."""
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("count", [2, 3, 4])
def test_16_bits_of_a_png_stay_16_bits(count, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, count), np.uint16)
    (tmp_path / "i.png").write_bytes(imagecodecs.png_encode(pixels))
    image = read_image(tmp_path / "i.png")
    assert image.dtype == torch.uint16
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels[..., [0, 0, 0] if count == 2 else [0, 1, 2]])


@pytest.mark.parametrize("top", [1, 20, 255, 300, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_pgm_values_are_as_stored(top, plain, tmp_path):
    labels = np.linspace(0, top, 12).astype(int).reshape(3, 4)
    head = f"P{2 if plain else 5}\n# drawn\n4 3\n{top}\n".encode()
    body = (
        " ".join(map(str, labels.flatten())).encode()
        if plain
        else labels.astype("u1" if top < 256 else ">u2").tobytes()
    )
    (tmp_path / "m.pgm").write_bytes(head + body)
    assert read_mask(tmp_path / "m.pgm").tolist() == labels.tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_each_file_is_turned_by_its_own_tag(orientation, suffix, tmp_path):
    exif, path = Image.Exif(), tmp_path / f"i.{suffix}"
    exif[0x0112] = orientation
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    for file in (path, tmp_path / "known.png", path if suffix == "jpg" else tmp_path / "known.png"):
        picture.save(file, exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(file)))  # Pillow's own
    assert read_image(path)[1].tolist() == read_bands(path, [0])[0].tolist() == expected.tolist()
    if suffix != "jpg":
        assert read_mask(path).tolist() == expected.tolist()


def test_white_is_zero_in_some_tiffs(tmp_path):
    grey = np.array([[0, 100], [4000, 65535]], np.uint16)
    tifffile.imwrite(tmp_path / "i.tif", grey, photometric="miniswhite")
    assert read_image(tmp_path / "i.tif")[0].tolist() == (65535 - grey.astype(int)).tolist()
    assert read_mask(tmp_path / "i.tif").tolist() == grey.tolist()


def test_reduced_copies_are_no_bands(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        file.write(image, photometric="rgb")
        for k in (2, 4):
            file.write(image[::k, ::k].copy(), photometric="rgb", subfiletype=1)
    with tifffile.TiffWriter(tmp_path / "inside.tif") as file:
        file.write(image, photometric="rgb", subifds=1)
        file.write(image[::2, ::2].copy(), photometric="rgb", subfiletype=1)
    with tifffile.TiffWriter(tmp_path / "thumbnail.tif") as file:
        file.write(image, photometric="rgb")
        file.write(image[::8, ::8, 0].copy(), photometric="minisblack")
    for name in ("pages", "inside", "thumbnail"):
        assert torch.equal(read_image(tmp_path / f"{name}.tif"), torch.from_numpy(image).permute(2, 0, 1))
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        file.write(image, photometric="rgb")
        file.write(np.zeros((90, 90), np.uint8), photometric="minisblack")
    with pytest.raises(UserError, match=r"two.tif .*\(64, 48, 3\) and \(90, 90\): save each in its own file"):
        read_image(tmp_path / "two.tif")


def test_palettes_and_cmyk_are_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    picture.putpalette([9, 9, 9, 200, 30, 0, 0, 40, 210])
    for suffix in ("png", "tif", "bmp", "gif"):
        picture.save(tmp_path / f"p.{suffix}")
        assert (
            read_image(tmp_path / f"p.{suffix}").permute(1, 2, 0).tolist() == np.array(picture.convert("RGB")).tolist()
        )
        assert read_mask(tmp_path / f"p.{suffix}").shape == (2, 2)
    ink = Image.new("CMYK", (3, 2), (10, 200, 30, 40))
    ink.save(tmp_path / "c.tif")
    assert read_image(tmp_path / "c.tif").permute(1, 2, 0).tolist() == np.array(ink.convert("RGB")).tolist()


# Masks that are refused


def saved(pixels: np.ndarray, path: Path, **how) -> Path:
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, **how)
    else:
        Image.fromarray(pixels).save(path, **how)
    return path


def test_transparency_is_left_out_only_where_it_says_nothing(tmp_path):
    labels = np.array([[0, 1], [2, 1]], np.uint8)
    for alpha in (np.full_like(labels, 255), labels * 9):  # constant, or known from the label
        path = saved(np.stack([labels, labels, labels, alpha], -1), tmp_path / "m.png")
        assert read_mask(path).tolist() == labels.tolist()
        assert read_mask(saved(np.stack([labels, alpha], -1), tmp_path / "m.png")).tolist() == labels.tolist()
    hidden = np.stack([labels * 0] * 3 + [labels * 100], -1)
    with pytest.raises(UserError, match=r"m\.png .* alpha band holds values such as 0, 200 .* in one band"):
        read_mask(saved(hidden, tmp_path / "m.png"))
    with pytest.raises(UserError, match="alpha band holds values"):
        read_mask(tmp_path / "m.png", [(0, 0, 0)])


def test_further_bands_are_refused_by_number_and_value(tmp_path):
    labels = np.array([[0, 1], [2, 1]], np.uint8)
    where = {"photometric": "minisblack", "planarconfig": "separate"}
    for other in (labels, labels * 0 + 7):
        path = saved(np.stack([labels, other]), tmp_path / "m.tif", **where)
        assert read_mask(path).tolist() == labels.tolist()
    for other in (labels.T, 1 - (labels == 0)):
        with pytest.raises(UserError, match=r"m\.tif .* band 1 holds other values than band 0"):
            read_mask(saved(np.stack([labels, other.astype(np.uint8)]), tmp_path / "m.tif", **where))


@pytest.mark.parametrize("value", [0.5, -1.25, np.nan, np.inf])
@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_fractions_are_refused_by_value(value, suffix, tmp_path):
    mask, path = np.array([[0, 1], [2, 281]], np.float32), tmp_path / f"m.{suffix}"
    write = (lambda: np.save(path, mask)) if suffix == "npy" else (lambda: tifffile.imwrite(path, mask))
    write()
    assert read_mask(path).tolist() == [[0, 1], [2, 281]]
    mask[1, 0] = value
    write()
    with pytest.raises(UserError, match=f"m.{suffix} is a mask of float32 and holds the value {value}"):
        read_mask(path)


@pytest.mark.parametrize(
    ("suffix", "kind", "how"),
    [
        ("jpg", "JPEG", {"quality": 100}),
        ("png", "JPEG", {"format": "JPEG"}),
        ("webp", "WEBP", {"quality": 100}),
        ("jp2", "JPEG2000", {}),
        ("tif", "TIFF with JPEG", {"format": "TIFF", "compression": "jpeg"}),
    ],
)
def test_formats_that_change_values_hold_no_labels(suffix, kind, how, tmp_path):
    path = tmp_path / f"m.{suffix}"
    disc = (np.hypot(*np.mgrid[-20:20, -20:20]) < 9) * np.uint8(255)
    Image.fromarray(disc).save(path, **how)
    with pytest.raises(UserError, match=rf"m\.{suffix} is a mask in {kind}, .* data\.mask_threshold: 128"):
        read_mask(path)
    assert read_mask(path, threshold=128).tolist() == (disc > 0).tolist()


def test_lossless_webp_holds_labels(tmp_path):
    labels = np.random.default_rng(0).integers(0, 21, (9, 11), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 1
    for more in ({}, {"exif": exif}):  # the second has another kind of header
        Image.fromarray(labels).convert("RGB").save(tmp_path / "m.webp", lossless=True, **more)
        assert read_mask(tmp_path / "m.webp").tolist() == labels.tolist()


def test_a_damaged_tiff_is_one_sentence(tmp_path):
    content = io.BytesIO()
    tifffile.imwrite(content, np.arange(4096, dtype=np.uint16).reshape(64, 64), compression="lzw")
    (tmp_path / "i.tif").write_bytes(content.getvalue()[:900])
    with pytest.raises(UserError, match=r"i\.tif cannot be read as an image"):
        read_image(tmp_path / "i.tif")


def test_a_missing_codec_is_named_with_the_package(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "i.tif", np.zeros((8, 8, 3), np.uint16), photometric="rgb", compression="lzw")

    def missing(*_):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", missing)
    with pytest.raises(UserError, match=r"i\.tif .*pip install imagecodecs, or convert the file to deflate"):
        read_image(tmp_path / "i.tif")


# The set: one scale, labels of any value, pixels without a number


def tree(root: Path, write_image, write_mask, n: int = 6) -> Path:
    """Write pairs into ``images/`` and ``masks/``, four of six for training."""
    for i in range(n):
        for kind, write in (("images", write_image), ("masks", write_mask)):
            folder = root / kind / ("train", "train", "train", "train", "val", "test")[i % 6]
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / f"{i}", i)
    return root


def disc(i: int) -> np.ndarray:
    return (np.hypot(*np.mgrid[-20:20, -24:24]) < 8 + i).astype(np.uint8)


def png_mask(path: Path, i: int) -> None:
    Image.fromarray(disc(i)).save(f"{path}.png")


def deep_png(path: Path, i: int) -> None:
    Image.fromarray(((disc(i) + np.uint16(1)) * 100 * (i + 1)).astype(np.uint16)).save(f"{path}.png")


def data_of(root: Path, **more) -> Folder:
    return Folder(root, **({"class_names": ["bg", "a"], "batch_size": 2, "num_workers": 0} | more))


def test_deep_grey_has_one_scale_for_the_set_and_the_model_takes_it(tmp_path, caplog):
    data = data_of(tree(tmp_path, deep_png, png_mask), crop_size=32)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert data.value_range == [0, 1023]  # the largest value of the four training images is 800
    assert "4 of 4 training images values from 100 to 800: data.value_range is [0.0, 1023.0]" in caplog.text
    image = next(iter(data.train_dataloader()))["image"]
    assert image.dtype == torch.uint16 and len(image[0].long().unique()) == 2
    model = UNet(2, base_channels=4)
    agree(model, data)
    assert model.value_range == [0, 1023]
    ours = model.preprocess(torch.tensor([0, 1023, 512], dtype=torch.uint16).view(1, 1, 1, 3).expand(1, 3, 1, 3))
    expected = (torch.tensor([0, 1, 512 / 1023]) - model.mean) / model.std
    torch.testing.assert_close(ours[0], expected)
    with pytest.raises(ValueError, match="the image has 8 bits, but the network was trained on values from 0 to 1023"):
        model.preprocess(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("dtype", "low", "high", "expected"),
    [
        (torch.uint16, 3, 4080, [0, 4095]),
        (torch.uint16, 0, 65535, [0, 65535]),
        (torch.uint16, 0, 1, [0, 1]),
        (torch.int16, -1024, 3071, [-1024, 3071]),
        (torch.float32, 0.1, 0.9, [0, 1]),
        (torch.float32, -5, 2.5, [-5, 2.5]),
        (torch.float32, 7, 7, [7, 8]),
    ],
)
def test_the_scale_follows_from_type_and_values(dtype, low, high, expected):
    assert range_of(dtype, low, high) == expected


def test_8_bits_and_chosen_bands_keep_their_scale(tmp_path):
    picture = lambda path, i: Image.fromarray(disc(i) * 90).save(f"{path}.png")  # noqa: E731
    data = data_of(tree(tmp_path / "grey", picture, png_mask))
    data.setup("fit")
    assert data.value_range is None
    data = data_of(tree(tmp_path / "deep", deep_png, png_mask), bands=[0])
    data.setup("fit")
    assert data.value_range is None
    data = data_of(tmp_path / "deep", bands=[0], value_range=[0, 4095])
    data.setup("fit")
    assert data.value_range == [0, 4095] and data.fill_colour(torch.zeros(3, 2, 2, dtype=torch.uint16))[0] == 1986
    with pytest.raises(UserError, match=r"value_range is the lowest and the highest value, as \[0, 4095\]"):
        data_of(tmp_path, value_range=[5, 5])


def test_jitter_stays_within_the_range_and_keeps_grey_grey():
    image = tv_tensors.Image(torch.randint(-900, 3000, (1, 20, 20), dtype=torch.int16).repeat(3, 1, 1))
    torch.manual_seed(0)
    changed = BandJitter(0.9, [-1000, 3000])(image)
    assert not torch.equal(changed, image) and changed.min() >= -1000 and changed.max() <= 3000
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])


@several
@given(values=st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=6, unique=True))
def test_any_integer_may_be_a_label_or_void(values):
    table = LabelTable({value: k if k % 2 else 255 for k, value in enumerate(values)})
    assert table(torch.tensor(values)).tolist() == [k if k % 2 else 255 for k in range(len(values))]
    others = {value + 1 for value in values} - {*values}
    assert set(table(torch.tensor([*others])).tolist()) <= {-1}


def test_negative_labels_can_be_ignored_as_the_sentence_says(tmp_path):
    write = lambda path, i: tifffile.imwrite(f"{path}.tif", np.where(disc(i) == 1, -1, 0).astype(np.int16))  # noqa: E731
    root = tree(tmp_path, lambda path, i: Image.fromarray(disc(i) * 90).save(f"{path}.png"), write)
    with pytest.raises(UserError, match=r"data\.void_values: \[-1\]"):
        data_of(root).setup("fit")
    for how in ({"void_values": [-1]}, {"label_map": {-1: 255, 0: 1}}):
        data = data_of(root, **how)
        data.setup("validate")
        label = 0 if "void_values" in how else 1
        assert data.datasets["val"].read(0)[1].tolist() == np.where(disc(4) == 1, 255, label).tolist()


def test_more_than_255_classes_are_refused_before_a_file_is_read(tmp_path):
    with pytest.raises(UserError, match="there are 256 classes, but at most 255 can be told apart"):
        Folder(tmp_path / "nowhere", class_names=[str(k) for k in range(256)])
    assert Folder(tmp_path, class_names=[str(k) for k in range(255)]).num_classes == 255


def test_pixels_without_a_number_are_refused_or_replaced_and_ignored(tmp_path):
    def write(path: Path, i: int) -> None:
        pixels = np.tile(disc(i).astype(np.float32), (3, 1, 1))
        pixels[1, :5, :7] = np.nan if i % 2 else np.inf
        tifffile.imwrite(f"{path}.tif", pixels, photometric="rgb", planarconfig="separate")

    root = tree(tmp_path, write, png_mask)
    dataset = SegmentationDataset(data_of(root).samples("val"), data_of(root).label_table())
    with pytest.raises(UserError, match=r"val/4\.tif holds .* no numbers .* 1\.82% .*data\.replace_nan: 0"):
        dataset.read(0)
    data = data_of(root, replace_nan=0)
    data.setup("fit")
    image, mask = data.datasets["val"].read(0)
    assert (image[:, :5, :7] == 0).all() and (mask[:5, :7] == 255).all() and (mask == 255).sum() == 35
    assert data.value_range == [0, 1]
    data = data_of(root, replace_nan=0, predict_dir=root / "images/test")
    data.setup("predict")
    assert data.datasets["predict"].read(0)[0].isfinite().all()


def test_masks_of_the_images_proportions_are_resized_on_request(tmp_path):
    def write(path: Path, i: int) -> None:
        Image.fromarray(disc(i).repeat(2, 0).repeat(2, 1)).save(f"{path}.png")

    root = tree(tmp_path, write, png_mask)
    with pytest.raises(UserError, match=r"masks? of another size.*data\.resize_masks: true"):
        data_of(root).setup("fit")
    data = data_of(root, resize_masks=True)
    data.setup("fit")
    assert data.datasets["val"].read(0)[1].tolist() == disc(4).repeat(2, 0).repeat(2, 1).tolist()
    tall = SegmentationDataset(data.samples("val"), data.label_table(), resize_masks=True)
    Image.fromarray(disc(4).T).save(root / "masks/val/4.png")
    with pytest.raises(UserError, match=r"4\.png is 40 x 48 .* 96 x 80: save the mask at the image's size$"):
        tall.read(0)


@pytest.mark.parametrize("size", [(375, 500), (101, 100), (33, 1000), (480, 640)])
@pytest.mark.parametrize("factor", [0.25, 0.5, 0.73, 2, 3.1])
def test_proportions_agree_up_to_rounding(size, factor):
    scaled = [max(1, round(side * factor)) for side in size]
    assert same_proportions(scaled, size) and same_proportions(size, scaled)
    assert not same_proportions(size[::-1], size)
    assert resize_nearest(torch.arange(size[0] * size[1]).view(size), size).tolist() == (
        torch.arange(size[0] * size[1]).view(size).tolist()
    )


def test_grey_masks_of_two_classes_are_read_by_a_threshold(tmp_path):
    write = lambda path, i: Image.fromarray(disc(i) * np.uint8(255)).save(f"{path}.jpg")  # noqa: E731
    root = tree(tmp_path, lambda path, i: Image.fromarray(disc(i) * 90).save(f"{path}.png"), write)
    with pytest.raises(UserError, match=r"\.jpg is a mask in JPEG.*data\.mask_threshold: 128"):
        data_of(root).setup("fit")
    data = data_of(root, mask_threshold=128)
    data.setup("fit")
    assert data.datasets["val"].read(0)[1].tolist() == disc(4).tolist()
    with pytest.raises(UserError, match=r"mask_threshold separates two classes, and data\.class_names has 3"):
        data_of(root, mask_threshold=128, class_names=["bg", "a", "b"]).setup("fit")


def test_a_batch_of_two_types_names_both():
    items = [{"image": torch.zeros(3, 4, 4, dtype=t), "name": n} for t, n in ((torch.uint8, "a"), (torch.uint16, "b"))]
    with pytest.raises(UserError, match="a has 3 bands of uint8 and b has 3 bands of uint16"):
        collate(items)


# Masks in colour: all files decide

BLACK, WHITE, RED, GREY = (0, 0, 0), (255, 255, 255), (255, 0, 0), (128, 128, 128)


def three(i: int) -> np.ndarray:
    labels = disc(i)
    labels[30:, 40:] = 2
    return labels


def colour_tree(root: Path, colours, first=None, mode: str = "RGB") -> Path:
    """Write masks in colours; `first` changes the labels of the first file."""

    def write(path: Path, i: int) -> None:
        labels = first(three(i)) if first and i == 0 else three(i)
        Image.fromarray(np.array(colours, np.uint8)[labels]).convert(mode).save(f"{path}.png")

    return tree(root, lambda path, i: Image.fromarray(disc(i) * 90).save(f"{path}.png"), write)


@pytest.mark.parametrize("colours", [[BLACK, WHITE, RED], [BLACK, WHITE, GREY]])
@pytest.mark.parametrize("first", [None, lambda m: m % 2, lambda m: m * 0])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_given_colours_are_used_whatever_the_first_mask_shows(colours, first, mode, tmp_path):
    root = colour_tree(tmp_path, colours, first, mode)
    data = data_of(root, class_names=["bg", "a", "b"], palette=colours)
    data.setup("fit")
    found = {s.name: data.datasets["train"].read(i)[1] for i, s in enumerate(data.datasets["train"].samples)}
    assert found["0"].tolist() == (first(three(0)) if first else three(0)).tolist()
    assert found["3"].tolist() == three(3).tolist()


def test_grey_masks_are_read_by_given_colours_that_are_all_grey(tmp_path):
    root = colour_tree(tmp_path, [BLACK, WHITE, GREY], mode="L")
    data = data_of(root, class_names=["bg", "a", "b"], palette=[BLACK, WHITE, GREY])
    data.setup("validate")
    assert data.datasets["val"].read(0)[1].tolist() == three(4).tolist()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_labels_stay_labels_where_the_palette_colours_pictures_alone(mode, tmp_path):
    root = colour_tree(tmp_path, [(k, k, k) for k in range(3)], mode=mode)
    for palette in ([BLACK, WHITE, RED], [BLACK, WHITE, GREY]):
        data = data_of(root, class_names=["bg", "a", "b"], palette=palette)
        data.setup("validate")
        assert data.datasets["val"].read(0)[1].tolist() == three(4).tolist()


def palette_tree(root: Path, order) -> Path:
    def write(path: Path, i: int) -> None:
        place = np.array(order(i), np.uint8)
        picture, table = Image.fromarray(place[three(i)]), np.zeros((3, 3), np.uint8)
        table[place] = [BLACK, RED, (0, 0, 255)]
        picture.putpalette(table.flatten().tolist())
        picture.save(f"{path}.png")

    return tree(root, lambda path, i: Image.fromarray(disc(i) * 90).save(f"{path}.png"), write)


@pytest.mark.parametrize("order", [lambda i: np.roll([0, 1, 2], i), lambda i: [0, 2, 1], lambda i: [0, 1, 2]])
def test_palettes_are_read_by_the_colours_of_a_class_map(order, tmp_path):
    root = palette_tree(tmp_path, order)
    (root / "class_dict.csv").write_text("name,r,g,b\nbg,0,0,0\na,255,0,0\nb,0,0,255\n")
    data = data_of(root, class_names=None)
    data.setup("fit")
    for role in ("train", "val"):
        for k, sample in enumerate(data.datasets[role].samples):
            assert data.datasets[role].read(k)[1].tolist() == three(int(sample.name)).tolist()


def test_palettes_that_differ_need_colours(tmp_path):
    root = palette_tree(tmp_path / "differ", lambda i: np.roll([0, 1, 2], i))
    words = r"the palettes of .*\.png and .*\.png give the value \d different colours.*data\.palette"
    with pytest.raises(UserError, match=words):
        data_of(root, class_names=["bg", "a", "b"]).setup("fit")
    data = data_of(root, class_names=["bg", "a", "b"], palette=[BLACK, RED, (0, 0, 255)])
    data.setup("validate")
    assert data.datasets["val"].read(0)[1].tolist() == three(4).tolist()
    data = data_of(root, class_names=None)
    data.setup("validate")  # each colour is a class, in the order of the codes
    assert data.class_names == ["#000000", "#0000ff", "#ff0000"]
    assert data.datasets["val"].read(0)[1].tolist() == np.array([0, 2, 1])[three(4)].tolist()


def test_palettes_that_agree_hold_labels(tmp_path):
    root = palette_tree(tmp_path, lambda i: [0, 1, 2])
    for palette in (None, [(9, 9, 9), RED, (1, 2, 3)]):
        data = data_of(root, class_names=["bg", "a", "b"], palette=palette)
        data.setup("validate")
        assert data.datasets["val"].read(0)[1].tolist() == three(4).tolist()
