"""The files of `predict`: index masks, overlays, probabilities, polygons, and a line of JSON per image."""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from .. import geotiff
from ..errors import UserError
from ..outlines import geojson
from ..outputs import below, exists, identities, replacing, stays_in, writable
from ..pictures import index_mask, overlay, rgb

FULL_SCALE = 65535  # of a probability of 1 in a TIFF
OURS = b'{"info": {"description": "lightning predict'  # how our annotations.json begins


class PredictionWriter(BasePredictionWriter):
    """A writer of ``masks/NAME.png``, ``overlays/NAME.jpg`` and a line of ``predictions.jsonl`` per image ``NAME``.

    A mask is an 8-bit palette PNG at the image's size. Its values are the labels, and its colours are the data set's. A
    line holds the name, the size and each class's share of the pixels. The writer writes image by image, and keeps no
    results in memory. With several processes, each writes the images that it predicts.

    All results stay in the output folder, whatever names the data have, and no file of the data set is overwritten.

    Args:
        output_dir: folder for the results.
        overwrite: replace the files of an earlier run; by default, `predict` stops before it starts if there are any.
        opacity: opacity of the colours in overlays, 0 to 1.
        probabilities: write the probabilities of the classes, ``(K, H, W)``, to ``probabilities/NAME``: ``tiff`` as
            ``.tif`` with a band of 16 bits per class, whose values are round(65535 p), on the map where the image is a
            GeoTIFF; ``npz`` as the arrays ``probabilities``, float32, and ``class_names``. A model of one logit has one
            band, the probability of the class 1.
        polygons: write the labels as shapes: ``coco`` as one ``annotations.json`` in COCO's format, with a run-length
            code per image and class, whose ``category_id`` is the label; ``geojson`` as ``polygons/NAME.geojson``, with
            a polygon per connected region, on the map where the image is a GeoTIFF, or else in pixels from the upper
            left corner.

    Raises:
        UserError: at the start, if a file to be written exists and `overwrite` is false, belongs to the data set, or is
            no result of an earlier run; if a name or a link leads out of the folder, two names differ in case only, or
            the folder cannot be written.
    """

    def __init__(
        self,
        output_dir: str = "predictions",
        overwrite: bool = False,
        opacity: float = 0.5,
        probabilities: Literal["none", "tiff", "npz"] = "none",
        polygons: Literal["none", "coco", "geojson"] = "none",
    ) -> None:
        super().__init__(write_interval="batch")
        self.output_dir, self.overwrite, self.opacity = Path(output_dir).expanduser(), overwrite, opacity
        self.probabilities, self.polygons = probabilities, polygons
        self.listing, self.annotations = self.output_dir / "predictions.jsonl", self.output_dir / "annotations.json"
        self.codes = self.output_dir / ".annotations.part"  # a line per image, until all are written
        self.kinds = {"masks": ".png", "overlays": ".jpg"}  # folder and suffix of the files per image
        if probabilities != "none":
            self.kinds["probabilities"] = ".tif" if probabilities == "tiff" else ".npz"
        if polygons == "geojson":
            self.kinds["polygons"] = ".geojson"

    def files(self, name: str) -> dict[str, Path]:
        """Return the paths of an image's files by their folder.

        Raises:
            UserError: if the name leads out of the output folder.
        """
        return below(self.output_dir, name, self.kinds)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look whether every file may be written, and start an empty list."""
        loader: Any = trainer.predict_dataloaders
        self.samples = {sample.name: sample for sample in getattr(loader.dataset, "samples", ())}
        datasets = [loader.dataset, *getattr(getattr(trainer, "datamodule", None), "datasets", {}).values()]
        self.data = {
            path
            for dataset in datasets
            for sample in getattr(dataset, "samples", ())
            for path in vars(sample).values()
            if isinstance(path, Path)
        }
        self.claimed: dict[str, str] = {}  # names by how a system sees them that knows no letter case
        self.inside: set[Path] = set()  # folders that lie in the output folder
        self.nearest = writable(self.output_dir)
        self.earlier = exists(self.listing)  # a run has written here
        self._keep_apart()
        self._claim_file(self.listing)
        if self.polygons == "coco":
            self._claim_annotations()
        for sample in getattr(loader.dataset, "samples", ()):
            self.claim(sample.name)
        trainer.strategy.barrier("every process has looked")
        if trainer.is_global_zero:
            for file in (self.listing, self.codes) if self.polygons == "coco" else (self.listing,):
                with replacing(file) as part:
                    part.touch()
        trainer.strategy.barrier("the list is empty")

    # What may be written

    def claim(self, name: str) -> None:
        """Make sure that the files of an image may be written.

        Raises:
            UserError: see the class.
        """
        files = self.files(name)
        key = unicodedata.normalize("NFC", PureWindowsPath(name).as_posix()).casefold()
        if key in self.claimed:
            raise UserError(
                f"the images {self.claimed[key]!r} and {name!r} would write the same files in {self.output_dir}, at "
                "least where letter case does not count: rename one of them"
            )
        self.claimed[key] = name
        for file in files.values():
            self._claim_file(file)

    def _claim_file(self, file: Path) -> None:
        try:
            if file.parent not in self.inside:
                stays_in(self.output_dir, file.parent)
                writable(file.parent)
                self.inside.add(file.parent)
            if not exists(file):
                if len(file.name) > 60:  # characters, of up to 4 bytes
                    exists(self.nearest / file.name)  # in a folder that exists, a name that is too long is an error
                return
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}): give a shorter name") from error
        if not self.overwrite:
            raise UserError(f"{file} exists already: give another --writer.output_dir, or --writer.overwrite true")
        if not self.earlier:
            raise UserError(
                f"{file} exists, and no {self.listing.name} in {self.output_dir} says that a prediction wrote it: give "
                "another --writer.output_dir"
            )
        if identities(file) & self._data_identities():
            raise UserError(f"{file} belongs to the data set: give another --writer.output_dir")

    def _data_identities(self) -> set[tuple[int, int]]:
        if not hasattr(self, "_identities"):
            self._identities = set().union(*map(identities, self.data)) if self.data else set()
        return self._identities

    def _claim_annotations(self) -> None:
        self._claim_file(self.annotations)
        if exists(self.annotations):
            with self.annotations.open("rb") as file:
                if file.read(len(OURS)) != OURS:
                    raise UserError(f"{self.annotations} is no result of predict: give another --writer.output_dir")

    def _keep_apart(self) -> None:
        """Make sure that no file of the data set lies in a folder of the results."""
        folders = [(self.output_dir / kind).resolve() for kind in self.kinds]
        for parent in {path.parent for path in self.data}:
            for folder in folders:
                if parent.resolve().is_relative_to(folder):
                    raise UserError(
                        f"files of the data set lie in {parent}, where results would be written: give another "
                        "--writer.output_dir, or leave this folder out of the data"
                    )

    # Writing

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's files."""
        all_labels = pl_module.labels(prediction["probs"]).cpu()  # (N, H, W)
        for image, probs, labels, name in zip(
            batch["image"], prediction["probs"], all_labels, prediction["name"], strict=True
        ):
            if name not in self.samples:  # a data set of your own need not list its names
                self.claim(name)
            self._write(name, image, probs, labels, pl_module.class_names, pl_module.palette)

    def _write(
        self, name: str, image: Tensor, probs: Tensor, labels: Tensor, class_names: list[str], palette: Sequence
    ) -> None:
        files = self.files(name)
        height, width = labels.shape
        with replacing(files["masks"]) as part:
            index_mask(labels, palette).save(part, format="PNG")
        with replacing(files["overlays"]) as part:
            overlay(rgb(image), labels, palette, self.opacity).save(part, format="JPEG", quality=90)
        image_file = getattr(self.samples.get(name), "image", None)
        if self.probabilities != "none":
            tags = geotiff.read(image_file)[1]
            with replacing(files["probabilities"]) as part:
                write_probabilities(part, probs, class_names, self.probabilities, tags)
        if self.polygons == "geojson":
            place = geotiff.read(image_file)[0]
            shapes = geojson(labels.numpy(), class_names, place, name=name, height=height, width=width)
            with replacing(files["polygons"]) as part:
                part.write_text(json.dumps(shapes) + "\n", encoding="utf-8")
        if self.polygons == "coco":
            append(self.codes, {"name": name, "height": height, "width": width, "codes": run_lengths(labels)})
        counts = torch.bincount(labels.flatten(), minlength=len(class_names))
        parts = (round(count / labels.numel(), 6) for count in counts.tolist())
        shares = dict(zip(class_names, parts, strict=True))
        append(self.listing, {"name": name, "height": height, "width": width, "shares": shares})

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Bring the lines into the order of the images, write the annotations, and print the folder."""
        trainer.strategy.barrier("every image is written")
        if not trainer.is_global_zero:
            return
        with replacing(self.listing) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self._in_order(self.listing))
        if self.polygons == "coco":
            with replacing(self.annotations) as part:
                self._write_annotations(part, pl_module.class_names)
            self.codes.unlink()
        written = [*self.kinds, self.listing.name, *([self.annotations.name] if self.polygons == "coco" else [])]
        print(f"predictions  {self.output_dir}/{', '.join(written)}")

    def _in_order(self, lines: Path) -> Iterator[dict[str, Any]]:
        """Yield the lines of a file, of which several processes may have written some, in the order of the images."""
        place = {name: i for i, name in enumerate(self.samples)}
        found, start = [], 0
        with lines.open("rb") as file:
            for line in file:
                found.append((place.get(json.loads(line)["name"], len(place)), start))
                start += len(line)
            for _, start in sorted(found):
                file.seek(start)
                yield json.loads(file.readline())

    def _write_annotations(self, file: Path, class_names: Sequence[str]) -> None:
        """Write ``annotations.json`` from the lines of codes, one image at a time."""
        categories = [{"id": label, "name": name} for label, name in enumerate(class_names)]
        with file.open("w", encoding="utf-8") as out:
            out.write(OURS.decode() + f'"}},\n"categories": {json.dumps(categories)},\n"images": [')
            for i, line in enumerate(self._in_order(self.codes), 1):
                size = {"height": line["height"], "width": line["width"]}
                about = {"id": i, "file_name": self._file_name(line["name"]), **size}
                out.write((",\n" if i > 1 else "\n") + json.dumps(about))
            out.write('],\n"annotations": [')
            number = 0
            for i, line in enumerate(self._in_order(self.codes), 1):
                for label, code in line["codes"].items():
                    number += 1
                    about = {"id": number, "image_id": i, "category_id": int(label), **code, "iscrowd": 0}
                    out.write((",\n" if number > 1 else "\n") + json.dumps(about))
            out.write("]}\n")

    def _file_name(self, name: str) -> str:
        """Return the path of an image below its folder, with its suffix."""
        image = getattr(self.samples.get(name), "image", None)
        return f"{name}.png" if image is None else "/".join(image.parts[-len(Path(name).parts) :])


def append(file: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON in one call of the system, so that those of several processes do not mix."""
    with file.open("ab", buffering=0) as out:
        out.write(json.dumps(line).encode() + b"\n")


def run_lengths(labels: Tensor) -> dict[int, dict[str, Any]]:
    """Encode labels ``(H, W)`` as COCO does: for each label that occurs ``segmentation``, ``area`` and ``bbox``."""
    from pycocotools import mask as rle  # only this format needs it

    codes = {}
    for label in labels.unique().tolist():
        code = rle.encode(np.asfortranarray((labels == label).numpy().astype(np.uint8)))
        area, box = int(rle.area(code)), rle.toBbox(code).tolist()
        code["counts"] = code["counts"].decode()
        codes[label] = {"segmentation": code, "area": area, "bbox": box}
    return codes


def write_probabilities(
    file: Path, probs: Tensor, class_names: Sequence[str], kind: str, tags: Sequence[tuple]
) -> None:
    """Write probabilities ``(K, H, W)``; see `PredictionWriter`.

    Args:
        file: where to write.
        probs: the probabilities.
        class_names: one name per class.
        kind: ``tiff`` or ``npz``.
        tags: tags of the TIFF that place it on a map.
    """
    values = probs.float().cpu().numpy()
    names = list(class_names) if len(class_names) == len(values) else list(class_names)[1:]  # one logit: the class 1
    if kind == "npz":
        with file.open("wb") as out:
            np.savez_compressed(out, probabilities=values, class_names=np.array(names))
        return
    import tifffile  # only this format needs it

    tifffile.imwrite(
        file,
        (values.clip(0, 1) * FULL_SCALE).round().astype(np.uint16),
        photometric="minisblack",
        planarconfig="separate" if len(values) > 1 else None,
        compression="zlib",
        description=json.dumps({"class_names": names, "full_scale": FULL_SCALE}),
        metadata=None,
        extratags=list(tags),
    )
