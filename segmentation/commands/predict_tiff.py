"""The command ``lightning predict_tiff``: the labels of a TIFF that does not fit in memory, from file to file.

The command reads pixels one row of windows at a time, and writes each tile of labels when it is finished. Besides the
network and one window, an image of width W needs this memory:

    W x crop x bands x bytes of a value                    the pixels of a row of windows
    W x crop x overlap x num_classes x 4 bytes             logits of that row that overlap the next row
    W x (crop + 256)                                       labels that are not yet written

For 20,000 pixels, 21 classes and windows of 512 that overlap by a third this is 0.33 GB for any height. The time grows
with the area.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import tifffile
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from datamodules.dataset import replace_missing
from datamodules.decode import numbers

from .. import geotiff
from ..architectures.unet import OverlapTile, UNet
from ..base import SegmentationModule
from ..checkpoints import compare_bands, load_trained, read
from ..errors import UserError
from ..inference import SlidingWindow, Tiled, Whole, finite_images, why_not_finite
from ..outputs import exists, identities, replacing, writable
from ..pictures import palette_bytes

CROP = 512  # pixels, side of a window for a model without windows
TILE = 256  # pixels, side of a tile in the output
LARGEST = 2**29  # bytes of a strip or tile, which can only be decompressed as a whole
RGB = {"MINISBLACK": (0, 0, 0), "RGB": (0, 1, 2), "YCBCR": (0, 1, 2)}  # which bands are red, green and blue


def predict_tiff(
    trainer: L.Trainer,
    model: SegmentationModule,
    ckpt_path: str | None = None,
    image: str | None = None,
    output: str = "labels.tif",
    bands: list[int] | None = None,
    overwrite: bool = False,
    replace_nan: float | None = None,
) -> None:
    """Write the labels of a TIFF of any size, from file to file.

    Args:
        trainer: chooses the device.
        model: the network; its `inference` lays the windows, by default of 512 pixels, or U-Net's tiles for the valid
            U-Net.
        ckpt_path: the checkpoint of the trained network.
        image: the TIFF to read.
        output: the TIFF to write.
        bands: which bands to read as stored, counted from 0, as in data.bands; by default those that the checkpoint was
            trained on, else RGB.
        overwrite: replace the output of an earlier run.
        replace_nan: the value that pixels get which are no numbers (NaN, Inf), as in data.replace_nan; by default such
            an image is refused.

    Raises:
        UserError: if no image is given; see also `write_labels`.
    """
    if image is None:
        raise UserError("no image given: name a TIFF with --image FILE")
    if ckpt_path is not None:
        if identities(Path(output)) & identities(Path(ckpt_path)):
            raise UserError(f"{output} is the checkpoint: give another --output")
        load_trained(model, ckpt_path)
        if bands is None:
            bands = model.bands
        else:
            compare_bands(read(ckpt_path).get("segmentation", {}), bands)
    write_labels(model.to(trainer.strategy.root_device), Path(image), Path(output), bands, overwrite, replace_nan)


@torch.inference_mode()
def write_labels(
    model: SegmentationModule,
    image: Path,
    output: Path,
    bands: Sequence[int] | None = None,
    overwrite: bool = False,
    replace_nan: float | None = None,
) -> None:
    """Write the labels of a TIFF as a palette TIFF of 8 bits, tiled and compressed.

    The colours are the model's palette, and the description names its classes. Tags that place the image on a map are
    copied. The file appears under its name when it is complete.

    Args:
        model: the network, on its device.
        image: the TIFF to read.
        output: the TIFF to write.
        bands: see `TiffReader`.
        overwrite: replace a file of an earlier run.
        replace_nan: see `TiffReader`.

    Raises:
        UserError: if `output` exists and `overwrite` is false, or is the image; if the image has other bands than the
            network; if `inference` needs the whole image in memory; see also `TiffReader`.
    """
    tiff = TiffReader(image, bands, replace_nan)
    if len(tiff.bands) != model.in_channels:
        raise UserError(
            f"{image} is read as {len(tiff.bands)} bands, but model.in_channels is {model.in_channels}: set --bands"
        )
    writable(output.parent)
    if exists(output) and (not overwrite or identities(output) & identities(image)):
        raise UserError(f"{output} exists already: give another --output, or --overwrite true for an earlier result")
    inference = tiled_inference(model)
    colours = np.frombuffer(palette_bytes(model.palette), np.uint8).reshape(256, 3)
    columns = TextColumn("{task.completed:,.1f} of {task.total:,.1f} Mpx"), TimeRemainingColumn()
    with tiff, Progress(BarColumn(), *columns) as progress, replacing(output) as part:
        tifffile.imwrite(
            part,
            tiles(label_rows(model.eval(), inference, tiff, progress), tiff.height, tiff.width),
            shape=(tiff.height, tiff.width),
            dtype=np.uint8,
            bigtiff=tiff.height * tiff.width > 2**32 - 2**25,  # enough if nothing could be compressed
            tile=(TILE, TILE),
            compression="zlib",
            maxworkers=1,  # else tifffile asks for tiles ahead
            photometric="palette",
            colormap=colours.T.astype(np.uint16) * 257,  # 255 becomes 65535
            description=json.dumps({"class_names": model.class_names}),
            metadata=None,
            extratags=tiff.place,
        )
    print(f"labels       {output}")


def tiled_inference(model: SegmentationModule) -> Tiled:
    """Return the model's inference by windows; a model without one gets windows of 512 pixels, or U-Net's tiles.

    Raises:
        UserError: if the model's `inference` needs the whole image in memory.
    """
    inference = model.inference
    if isinstance(inference, Whole):
        return OverlapTile() if isinstance(model, UNet) and model.padding == "valid" else SlidingWindow(CROP)
    if not isinstance(inference, Tiled):
        raise UserError(
            f"{type(inference).__name__} needs the whole image in memory: set model.inference to SlidingWindow"
        )
    return inference


def label_rows(
    model: SegmentationModule, inference: Tiled, tiff: "TiffReader", progress: Progress
) -> Iterator[np.ndarray]:
    """Yield the labels ``(h, W)`` of each row of blocks, and show the finished area as a bar."""
    task = progress.add_task("", total=tiff.height * tiff.width / 1e6)

    def read(*window: int) -> Tensor:
        return model.preprocess(tiff.read(*window))

    for _, left, logits in inference.blocks(model, read, tiff.height, tiff.width):
        height, width = logits.shape[-2:]
        if not finite_images(logits).all():
            raise UserError(f"no labels are written: {why_not_finite(model, str(tiff.path))}")
        if left == 0:
            labels = np.empty((height, tiff.width), np.uint8)
        labels[:, left : left + width] = model.labels(model.probabilities(logits))[0].cpu().numpy()
        progress.advance(task, height * width / 1e6)
        if left + width == tiff.width:
            yield labels


def tiles(rows: Iterator[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """Yield tiles ``(TILE, TILE)`` cut from rows of labels ``(h, W)`` of any height, with zeros outside the image."""
    waiting = np.empty((0, width), np.uint8)
    for labels in itertools.chain(rows, [np.zeros((-height % TILE, width), np.uint8)]):
        waiting = np.concatenate([waiting, labels])
        done = len(waiting) // TILE * TILE
        whole = np.pad(waiting[:done], ((0, 0), (0, -width % TILE)))
        waiting = waiting[done:]
        for top, left in itertools.product(range(0, done, TILE), range(0, width, TILE)):
            yield np.ascontiguousarray(whole[top : top + TILE, left : left + TILE])


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn an exception of tifffile into a sentence that names the file."""
    try:
        yield
    except Exception as error:  # damaged files and compressions raise exceptions of many classes
        reason = " ".join(str(error).split())
        cure = "install it, or convert the file to deflate" if "imagecodecs" in reason else "replace it"
        raise UserError(f"{path} cannot be read as a TIFF ({reason}): {cure}") from error


class TiffReader:
    """A TIFF of any size that is read by windows. Only the rows of the latest window are in memory.

    The file may have tiles or strips; its bands may be interleaved, planes, or pages. tifffile reads files that are
    not compressed or compressed by deflate; for LZW, JPEG and others it needs the package imagecodecs.

    Args:
        path: the file.
        bands: which bands to read as stored, counted from 0. None reads RGB, as training does: grey becomes three equal
            bands, and alpha is left out.
        replace_nan: the value that pixels get which are no numbers; None refuses them.

    Raises:
        UserError: if the file does not exist, is not a TIFF, lacks a band, is not RGB and no bands are named, is turned
            by its EXIF orientation, or is compressed in one piece; the message names the file.
    """

    def __init__(self, path: Path, bands: Sequence[int] | None = None, replace_nan: float | None = None) -> None:
        if not path.is_file():
            raise UserError(f"the image {path} does not exist")
        self.path, self.replace_nan = path, replace_nan
        with decoding(path):
            self.file = tifffile.TiffFile(path)
            self.series: Any = self.file.series[0]
            self.page: Any = self.series.keyframe
        self.height, self.width = int(self.page.imagelength), int(self.page.imagewidth)
        self.place = geotiff.tags_of(self.page)
        if len(self.series.shape) > 3:
            raise UserError(f"{path} holds {self.series.shape} values: two sides and one axis of bands are needed")
        count = int(np.prod(self.series.shape)) // (self.height * self.width)
        dtype, colours = np.dtype(self.page.dtype), tifffile.PHOTOMETRIC(self.page.photometric).name
        if self.page.tags.valueof(274, 1) != 1:
            raise UserError(f"{path} is turned by its EXIF orientation: save it upright, as `gdal_translate` does")
        if bands is None:
            bands = RGB.get(colours, ())
            if not bands or count - len(set(bands)) not in (0, 1) or dtype.kind not in "iuf":
                raise UserError(
                    f"{path} has {count} bands of {dtype} ({colours}), which are no RGB: name those that the model was "
                    "trained on, as in --bands '[0]'"
                )
        elif not bands or min(bands) < 0 or max(bands) >= count:
            raise UserError(f"{path} has {count} bands, counted from 0, and --bands asks for {list(bands)}")
        self.bands = list(bands)
        self.contiguous = self.series.dataoffset is not None and dtype.kind != "b"
        if not self.contiguous and np.prod(self._piece) * self.page.samplesperpixel * dtype.itemsize > LARGEST:
            raise UserError(
                f"{path} is compressed in pieces of {self._piece[0]} x {self._piece[1]} pixels, too large to read in "
                "part: convert it to tiles, as `gdal_translate -co TILED=YES` does"
            )
        self.held, self.pixels = (0, 0), torch.empty(0)

    def __enter__(self) -> "TiffReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Return the pixels ``(1, C, h, w)`` of a window, as stored.

        Raises:
            UserError: if a value is no number and `replace_nan` is None, or an integer is beyond 32 bits.
        """
        if self.held != (top, bottom):
            self.held, self.pixels = (top, bottom), self._rows(top, bottom)
        return self.pixels[None, :, :, left:right]

    @property
    def _piece(self) -> tuple[int, int]:
        """Return height and width of a tile or strip."""
        if self.page.is_tiled:
            return self.page.tilelength, self.page.tilewidth
        return min(self.page.rowsperstrip, self.height), self.width

    def _rows(self, top: int, bottom: int) -> Tensor:
        rows = self._mapped(top, bottom) if self.contiguous else self._decoded(top, bottom)
        with decoding(self.path):
            pixels = numbers(rows)
        if self.replace_nan is None and pixels.is_floating_point() and not torch.isfinite(pixels).all():
            raise UserError(
                f"{self.path} holds values that are no numbers (NaN or Inf) in the rows {top} to {bottom}: repair the "
                "file, or set --replace_nan 0 to read these pixels as 0"
            )
        return replace_missing(pixels, self.replace_nan, self.path)[0]

    def _mapped(self, top: int, bottom: int) -> np.ndarray:
        """Return rows of an uncompressed file, mapped anew each time so that pages do not stay in memory."""
        dtype = self.page.dtype.newbyteorder(self.file.byteorder)
        with decoding(self.path):
            stored = np.memmap(self.path, dtype, "r", self.series.dataoffset, self.series.shape)
        y, x = (self.series.axes.index(axis) for axis in "YX")
        rows = np.moveaxis(stored, (y, x), (-2, -1)).reshape(-1, self.height, self.width)[:, top:bottom]
        return np.stack([rows[band] for band in self.bands]).astype(self.page.dtype, copy=False)

    def _decoded(self, top: int, bottom: int) -> np.ndarray:
        """Return rows of a compressed file, from the tiles or strips that hold them."""
        rows = np.empty((len(self.bands), bottom - top, self.width), self.page.dtype)
        pages = len(self.series.pages) > 1
        planes = not pages and self.page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
        h, w = self._piece
        down, across = -(-self.height // h), -(-self.width // w)
        for row, column in itertools.product(range(top // h, -(-bottom // h)), range(across)):
            first, last, left = max(top, row * h), min(bottom, row * h + h), column * w
            pieces: dict[tuple[int, int], np.ndarray] = {}
            for i, band in enumerate(self.bands):
                page, plane, sample = (band, 0, 0) if pages else (0, band, 0) if planes else (0, 0, band)
                if (page, plane) not in pieces:
                    pieces[page, plane] = self._decode(page, (plane * down + row) * across + column)
                piece = pieces[page, plane][first - row * h : last - row * h, : self.width - left, sample]
                rows[i, first - top : last - top, left : left + w] = piece
        return rows

    def _decode(self, page: int, index: int) -> np.ndarray:
        """Return a tile or strip, ``(h, w, samples)``."""
        with decoding(self.path):
            stored = self.series.pages[page]
            self.file.filehandle.seek(stored.dataoffsets[index])
            data = self.file.filehandle.read(stored.databytecounts[index])
            piece = self.page.decode(data or None, index, jpegtables=self.page.jpegtables)[0]
        return np.zeros((*self._piece, self.page.samplesperpixel), self.page.dtype) if piece is None else piece[0]
