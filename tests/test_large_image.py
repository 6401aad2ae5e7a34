"""Prediction from file to file: against the same windows in memory, and files read by tifffile and Pillow."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import tifffile
import torch
from conftest import PROJECT, shake, succeed
from conftest import lightning as run
from PIL import Image

from segmentation import UNet
from segmentation.architectures.unet import OverlapTile
from segmentation.commands import predict_tiff as large_image
from segmentation.commands.predict_tiff import TiffReader, write_labels
from segmentation.inference import MultiScaleFlip, SlidingWindow, Whole

HEIGHT, WIDTH = 301, 433


def scene(bands: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """Waves with noise, ``(H, W, bands)``, over the whole range of 8 bits, of 16, or from 0 to 1."""
    y, x = np.mgrid[:HEIGHT, :WIDTH][..., None]
    waves = np.sin(y / np.arange(20, 20 + bands)) * np.sin(x / np.arange(11, 11 + bands))
    values = (0.5 + 0.4 * waves + np.random.default_rng(0).uniform(-0.1, 0.1, waves.shape)).clip(0, 1)
    return values.astype(dtype) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)


def network(pixels: np.ndarray, **kwargs) -> UNet:
    """A network whose labels are mixed on these pixels ``(H, W, C)``."""
    torch.manual_seed(0)
    model = UNet(4, base_channels=4, in_channels=pixels.shape[2], mean=pixels.shape[2] * [0.5],
                 std=pixels.shape[2] * [0.2], **kwargs)  # fmt: skip
    model.class_names, model.palette = (
        ["sky", "sea", "Wälder", "road"],
        [[9, 8, 7], [200, 0, 0], [0, 90, 0], [1, 1, 255]],
    )
    return shake(model, model.preprocess(image(pixels)[..., :188, :188]))


def image(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]


def labels(model: UNet, inference, pixels: np.ndarray) -> np.ndarray:
    """The prediction in memory."""
    with torch.inference_mode():
        found = model.labels(model.probabilities(inference(model, model.preprocess(image(pixels)))))[0].numpy()
    assert (np.bincount(found.ravel()) > 0.02 * found.size).sum() >= 2  # it has something to get wrong
    return found


# name: how the file is stored
LAYOUTS = {
    "uncompressed": {},
    "big endian, BigTIFF": {"byteorder": ">", "bigtiff": True},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "one strip": {"rowsperstrip": HEIGHT, "compression": "zlib"},
    "tiles": {"tile": (64, 80), "compression": "zlib", "predictor": True},
    "uncompressed tiles": {"tile": (32, 32)},
    "planes": {"planarconfig": "separate"},
    "planes of strips": {"planarconfig": "separate", "rowsperstrip": 16, "compression": "zlib"},
    "planes of tiles": {"planarconfig": "separate", "tile": (64, 80), "compression": "zlib"},
    "pages": {"pages": True},
    "pages of tiles": {"pages": True, "tile": (64, 80), "compression": "zlib", "byteorder": ">"},
}


def write(path: Path, pixels: np.ndarray, pages: bool = False, **layout) -> Path:
    """Store pixels ``(H, W, C)``."""
    if pixels.dtype == np.float32:
        layout.pop("predictor", None)  # of floats, it needs imagecodecs
    if pixels.shape[2] == 1:
        layout.pop("planarconfig", None)
    if pages:
        with tifffile.TiffWriter(path, byteorder=layout.pop("byteorder", None)) as file:
            file.write(pixels.transpose(2, 0, 1), photometric="minisblack", **layout)
        return path
    separate = layout.get("planarconfig") == "separate"
    photometric = layout.pop("photometric", "rgb" if pixels.shape[2] == 3 else "minisblack")
    planar = {} if separate or pixels.shape[2] == 1 else {"planarconfig": "contig"}
    pixels = pixels.transpose(2, 0, 1) if separate else pixels[..., 0] if pixels.shape[2] == 1 else pixels
    tifffile.imwrite(path, pixels, photometric=photometric, **planar, **layout)
    return path


# Reading


KINDS = [(3, np.uint8), (5, np.uint16), (4, np.float32), (1, np.int16)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("bands", "dtype"), KINDS)
def test_windows_are_those_of_the_whole_file(layout, bands, dtype, tmp_path):
    pixels = scene(bands, dtype)
    path = write(tmp_path / "image.tif", pixels, **LAYOUTS[layout])
    chosen = list(range(bands))[::-2]
    with TiffReader(path, chosen) as tiff:
        assert (tiff.height, tiff.width) == (HEIGHT, WIDTH)
        for top, bottom, left, right in ((0, 64, 0, 80), (0, 301, 0, 433), (61, 200, 79, 300), (300, 301, 432, 433)):
            window = tiff.read(top, bottom, left, right)
            expected = pixels[top:bottom, left:right, chosen].transpose(2, 0, 1)[None]
            assert window.dtype == torch.from_numpy(expected.copy()).dtype
            np.testing.assert_array_equal(window.numpy(), expected)


def test_without_bands_images_become_rgb(tmp_path):
    grey, colours, deep = scene(1), scene(4), scene(3, np.uint16)
    files = {
        "grey": (grey, {}, grey.repeat(3, axis=2)),
        "grey and alpha": (scene(2), {"extrasamples": ["unassalpha"]}, scene(2)[..., :1].repeat(3, axis=2)),
        "alpha": (colours, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, colours[..., :3]),
        "16 bits": (deep, {}, deep),
    }
    for name, (pixels, layout, expected) in files.items():
        for compression in ({}, {"compression": "zlib"}):
            path = write(tmp_path / f"{name}.tif", pixels, **layout, **compression)
            with TiffReader(path) as tiff:
                np.testing.assert_array_equal(tiff.read(3, 99, 5, 200)[0], expected[3:99, 5:200].transpose(2, 0, 1))
    with Image.open(tmp_path / "alpha.tif") as picture:  # as Pillow has it
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), colours[..., :3])


def test_only_the_rows_of_a_window_are_held(tmp_path):
    path = write(tmp_path / "image.tif", scene(), **LAYOUTS["tiles"])
    with TiffReader(path) as tiff:
        decoded = []
        decode = tiff._decode
        tiff._decode = lambda page, index: decoded.append(index) or decode(page, index)
        for left in range(0, 400, 50):
            tiff.read(100, 200, left, left + 50)
            assert tiff.pixels.shape == (3, 100, WIDTH)
        assert decoded == list(range(6, 24))  # rows 64 to 256 of tiles, six across, once


# Predicting


@pytest.mark.parametrize("layout", ["uncompressed", "tiles", "planes of strips"])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3])
def test_labels_are_those_of_the_same_windows_in_memory(layout, overlap, tmp_path):
    pixels = scene()
    inference = SlidingWindow(96, overlap)
    model = network(pixels, inference=inference)
    expected = labels(model, inference, pixels)
    write_labels(model, write(tmp_path / "image.tif", pixels, **LAYOUTS[layout]), tmp_path / "labels.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "labels.tif"), expected)
    assert (labels(model, Whole(), pixels) != expected).any()


def test_tiles_of_the_valid_unet_are_its_labels_of_the_whole_image(tmp_path):
    pixels = scene(5, np.uint16)
    model = network(pixels, padding="valid", batch_norm=False, inference=OverlapTile(252))
    path = write(tmp_path / "image.tif", pixels, **LAYOUTS["pages of tiles"])
    write_labels(model, path, tmp_path / "labels.tif", bands=range(5))
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "labels.tif"), labels(model, Whole(), pixels))


def test_without_an_inference_windows_are_of_512(tmp_path, monkeypatch):
    pixels, shown = scene(), []
    for border, side in (("same", HEIGHT), ("valid", 304 + 188)):  # both are cut to what the image needs
        model = network(pixels, padding=border)
        model.down1.register_forward_pre_hook(lambda _, args: shown.append(args[0].shape[-2]))
        write_labels(model, write(tmp_path / "image.tif", pixels), tmp_path / f"{border}.tif")
        assert set(shown) == {side}
        shown.clear()
    monkeypatch.setattr(large_image, "CROP", 64)
    write_labels(network(pixels), tmp_path / "image.tif", tmp_path / "small.tif")
    expected = labels(network(pixels), SlidingWindow(64), pixels)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "small.tif"), expected)


def test_the_file_says_classes_colours_and_where_it_lies(tmp_path):
    pixels = scene()
    place = [
        (33550, "d", 3, (0.5, 0.5, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, 440720.0, 3751320.0, 0.0), True),
        (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32611), True),
        (34736, "d", 2, (6378137.0, 298.257223563), True),
        (34737, "s", 0, "WGS 84 / UTM zone 11N|", True),
    ]
    model = network(pixels, inference=SlidingWindow(96))
    path = write(tmp_path / "image.tif", pixels, extratags=place)
    write_labels(model, path, tmp_path / "deep" / "labels.tif")
    with tifffile.TiffFile(tmp_path / "deep" / "labels.tif") as file:
        page = file.pages[0]
        assert {code: page.tags[code].value for code, *_ in place} == {code: value for code, _, _, value, _ in place}
        assert page.is_tiled and page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE and page.dtype == np.uint8
        assert json.loads(page.description) == {"class_names": ["sky", "sea", "Wälder", "road"]}
    with Image.open(tmp_path / "deep" / "labels.tif") as picture:
        assert picture.mode == "P" and picture.getpalette()[:12] == [9, 8, 7, 200, 0, 0, 0, 90, 0, 1, 1, 255]
        np.testing.assert_array_equal(np.asarray(picture), labels(model, model.inference, pixels))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["labels.tif"]


# What cannot be


def test_nothing_is_overwritten_and_nothing_half_done_is_left(tmp_path):
    pixels = scene()
    model = network(pixels, inference=SlidingWindow(96))
    path, output = write(tmp_path / "image.tif", pixels), tmp_path / "labels.tif"
    output.write_text("mine")
    with pytest.raises(ValueError, match=r"labels.tif exists already: .* --overwrite true"):
        write_labels(model, path, output)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        write_labels(model, path, path, overwrite=True)

    calls = []

    def break_down(module, args):
        calls.append(args)
        if len(calls) == 10:
            raise RuntimeError("power cut")

    model.down1.register_forward_pre_hook(break_down)
    with pytest.raises(RuntimeError, match="power cut"):
        write_labels(model, path, output, overwrite=True)
    assert output.read_text() == "mine" and path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.tif", "labels.tif"]
    write_labels(network(pixels), path, output, overwrite=True)
    assert tifffile.imread(output).shape == (HEIGHT, WIDTH)


def test_what_cannot_be_read_is_named_in_one_sentence(tmp_path, monkeypatch):
    pixels, output = scene(), tmp_path / "labels.tif"
    model = network(pixels)
    good = write(tmp_path / "image.tif", pixels, **LAYOUTS["tiles"])
    (tmp_path / "text.tif").write_text("no picture")
    for length in (4, 8, 100, 300, 5000):
        (tmp_path / f"cut{length}.tif").write_bytes(good.read_bytes()[:length])
    uncompressed = write(tmp_path / "uncompressed.tif", pixels)
    uncompressed.write_bytes(uncompressed.read_bytes()[:-1])
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes(good.read_bytes()[:5000] + bytes(good.stat().st_size - 5000))
    write(tmp_path / "float.tif", scene(5, np.float32))
    holes = scene(3, np.float32)
    holes[40, 50] = np.nan
    write(tmp_path / "holes.tif", holes)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.tif", exif=exif)
    tifffile.imwrite(tmp_path / "volume.tif", np.zeros((2, 30, 40, 3), np.uint8), photometric="rgb")
    Image.fromarray(pixels).quantize(16).save(tmp_path / "palette.tif")
    cases = [
        (tmp_path / "none.tif", None, ValueError, "none.tif does not exist"),
        (tmp_path / "text.tif", None, ValueError, "text.tif cannot be read as a TIFF"),
        (damaged, None, ValueError, "damaged.tif cannot be read .*: replace it"),
        *((tmp_path / f"cut{n}.tif", None, ValueError, "cannot be read .*: replace") for n in (4, 8, 100, 300, 5000)),
        (uncompressed, None, ValueError, "uncompressed.tif cannot be read .*: replace it"),
        (tmp_path / "float.tif", None, ValueError, "float.tif has 5 bands of float32 .* --bands"),
        (
            tmp_path / "holes.tif",
            [0, 1, 2],
            ValueError,
            "holes.tif holds values that are no numbers .* --replace_nan 0",
        ),
        (tmp_path / "turned.tif", None, ValueError, "turned.tif is turned by its EXIF orientation: save it upright"),
        (tmp_path / "palette.tif", None, ValueError, "PALETTE"),
        (tmp_path / "volume.tif", None, ValueError, "one axis of bands"),
        (good, [0, 3], ValueError, "has 3 bands, counted from 0"),
        (good, [], ValueError, "has 3 bands, counted from 0"),
        (good, [0], ValueError, "read as 1 bands, but model.in_channels is 3"),
    ]
    for path, bands, kind, words in cases:
        with pytest.raises(kind, match=words):
            write_labels(model, path, output, bands)
    with pytest.raises(ValueError, match="MultiScaleFlip needs the whole image"):
        write_labels(network(pixels, inference=MultiScaleFlip()), good, output)
    monkeypatch.setattr(large_image, "LARGEST", 64 * 80 * 3 - 1)
    with pytest.raises(ValueError, match=r"pieces of 64 x 80 pixels, .* convert it to tiles"):
        write_labels(model, good, output)
    assert not output.exists()


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs is installed")
def test_a_compression_that_needs_imagecodecs_says_so(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    with pytest.raises(ValueError, match=r"LZW.*'imagecodecs' package.*: install it"):
        write_labels(network(scene()), tmp_path / "lzw.tif", tmp_path / "labels.tif")


@pytest.mark.slow
def test_the_command_takes_the_model_from_its_checkpoint(tmp_path):
    pixels = scene()
    model = network(pixels)
    checkpoint = {"state_dict": model.state_dict(), "pytorch-lightning_version": lightning.__version__}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    write(tmp_path / "image.tif", pixels, **LAYOUTS["strips"])
    command = ["predict_tiff", "--ckpt_path", "model.ckpt", "--image", "image.tif", "--trainer.accelerator", "cpu"]
    windows = ["--model.inference", "SlidingWindow", "--model.inference.crop", 96]
    out = succeed(*command, *windows, "--output", "out/labels.tif", cwd=tmp_path)
    assert "out/labels.tif" in out
    with Image.open(tmp_path / "out/labels.tif") as picture:
        np.testing.assert_array_equal(np.asarray(picture), labels(model, SlidingWindow(96), pixels))
        assert picture.getpalette()[:3] == [9, 8, 7]
    again = run(*command, "--output", "out/labels.tif", cwd=tmp_path)
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.slow
def test_memory_and_time_are_measured():
    command = [sys.executable, "benchmarks/large_image.py", "--sizes", "[700, 1400]"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (line.split("|") for line in done.stdout.splitlines() if line.startswith(("| 700", "| 1,400")))
    assert float(first[2]) == 0.5 and float(second[2]) == 2.0 and float(first[5]) == 1
    assert 0 < float(second[6].replace(",", "")) < 2048
