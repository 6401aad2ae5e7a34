"""COCO: objects in context. T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import SegmentationDataModule, voc_palette
from .decode import Sample, decoding, read_image
from .download import Archive
from .errors import UserError
from .files import folder_of
from .transforms import IGNORE

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
VOC_CLASSES = (  # in the order of PASCAL VOC
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorcycle", "person", "potted plant", "sheep", "couch", "train", "tv",
)  # fmt: skip


@dataclass(frozen=True)
class CocoSample(Sample):
    """An image whose objects are polygons or run-length codes.

    Args:
        size: height and width in pixels, as stated in the annotations.
        objects: label and segmentation (JSON text) of each object; later objects lie on top of earlier ones.
        ignore_overlap: whether to ignore pixels that belong to two objects.
    """

    size: tuple[int, int] = (0, 0)
    objects: tuple[tuple[int, str], ...] = ()
    ignore_overlap: bool = False

    def read(self) -> tuple[Tensor, Tensor]:
        """Decode the image ``(3, H, W)`` and draw the mask ``(H, W)``, both uint8.

        Raises:
            UserError: if the image cannot be decoded, or an object cannot be drawn.
        """
        assert self.image is not None
        image = read_image(self.image)
        if image.shape[1:] == self.size[::-1] != self.size:  # annotated before EXIF turned it
            image = read_image(self.image, upright=False)
        labels, times = np.zeros(self.size, np.uint8), np.zeros(self.size, np.uint8)
        for label, text in self.objects:
            with decoding(self.image, f"{self.size[1]} x {self.size[0]} pixels with objects"):
                inside = draw(json.loads(text), *self.size)
            labels[inside] = label
            times += inside
        if self.ignore_overlap:
            labels[times > 1] = IGNORE
        return image, torch.from_numpy(labels)


def draw(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Draw the pixels of one object.

    Args:
        segmentation: polygons ``[[x, y, x, y, ...], ...]``, or a run-length code ``{size, counts}`` whose counts are a
            list or compressed text.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        bool ``(height, width)``.
    """
    from pycocotools import mask as rle  # only COCO's format needs it

    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        codes = [segmentation]
    elif isinstance(segmentation, dict):
        codes = [rle.frPyObjects(segmentation, height, width)]
    else:
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # a line has no area
        codes = rle.frPyObjects(polygons, height, width) if polygons else []
    if not codes:
        return np.zeros((height, width), bool)
    return rle.decode(rle.merge(codes)).astype(bool)


class COCO(SegmentationDataModule):
    """Photographs with outlined objects; pixels outside all objects are ``background``.

    Layout::

        train2017/  val2017/  annotations/instances_{train,val}2017.json

    Get it: `download` fetches it. It takes about 20 GB, and 18 GB more while the largest archive is unpacked.

    Args:
        root: folder that holds ``train2017/``, ``val2017/`` and ``annotations/``.
        classes: ``voc`` keeps the twenty classes of PASCAL VOC in its order and ignores pixels of two objects, as in
            the training of torchvision's weights. ``all`` keeps the eighty classes of COCO, a list keeps those that it
            names; with both, the smaller of two objects lies on top.
        min_area: training images are left out if their kept objects do not cover more pixels than this (torchvision:
            1000).
        **kwargs: arguments of `SegmentationDataModule`; `test_split` is ``val``, as the test labels are not public.

    Raises:
        UserError: for a class that COCO does not have.
    """

    source = "https://cocodataset.org: train2017.zip, val2017.zip, annotations_trainval2017.zip"
    licence = "annotations CC BY 4.0; the photographs are from Flickr"
    citation = "Lin et al., ECCV 2014"
    disk = "about 20 GB, and 18 GB more while train2017.zip is unpacked"
    archives: Sequence[Archive] = (
        Archive("http://images.cocodataset.org/zips/train2017.zip", "sha1:10ad623668ab00c62c096f0ed636d6aff41faca5"),
        Archive("http://images.cocodataset.org/zips/val2017.zip", "sha1:4950dc9d00dbe1c933ee0170f5797584351d2a41"),
        Archive(
            "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            "sha1:8551ee4bb5860311e79dace7e79cb91e432e78b3",
        ),
    )
    expected_counts: dict[str, int] = {"val": 5000}  # the classes decide how many of the 118,287 training images remain
    known: Sequence[str] = CLASSES  # the categories that `classes` may name

    def __init__(
        self,
        root: str | None = None,
        classes: str | Sequence[str] = "voc",
        min_area: float = 1000,
        test_split: str = "val",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, test_split=test_split, **kwargs)
        named = {"voc": VOC_CLASSES, "all": self.known}
        kept = named[classes] if isinstance(classes, str) and classes in named else classes
        unknown = [name for name in ([kept] if isinstance(kept, str) else kept) if name not in self.known]
        if unknown:
            raise UserError(f"COCO has no class '{unknown[0]}': set data.classes to voc, all, or names of its classes")
        self.class_names = ("background", *kept)
        self.palette = voc_palette(self.num_classes)
        self.ignore_overlap, self.min_area = classes == "voc", min_area

    def samples(self, split: str) -> list[Sample]:
        """List the images in the annotations of a split.

        Raises:
            UserError: if the root or the annotations are missing.
        """
        root = folder_of(self.root, f"train2017/, val2017/ and annotations/ ({self.source})")
        min_area = self.min_area if split == "train" else 0.0
        return self.annotated(root / f"annotations/instances_{split}2017.json", root / f"{split}2017", min_area)

    def annotated(self, file: Path, images: Path, min_area: float = 0.0) -> list[Sample]:
        """Read annotations, and sort the objects of each image so that the smaller lies on top.

        Args:
            file: annotations in COCO's format.
            images: folder to which the paths of the images are relative.
            min_area: images are left out if their kept objects do not cover more pixels; 0 keeps all images.

        Raises:
            UserError: if the file is missing or not in COCO's format, or lacks a class.
        """
        if not file.is_file():
            raise UserError(f"the file of annotations {file} does not exist: put it there, or correct data.root")
        with decoding(file, "annotations in COCO's format"):
            content = json.loads(file.read_bytes())
            ids = {category["name"]: category["id"] for category in content["categories"]}
            missing = [name for name in self.class_names[1:] if name not in ids]
            if missing:
                raise UserError(
                    f"no category '{missing[0]}' among {', '.join(ids)}; name categories of this file in data.classes"
                )
            label_of = {ids[name]: label for label, name in enumerate(self.class_names) if label}
            objects: dict[int, list[tuple[float, int, str]]] = {}
            for thing in content["annotations"]:
                label = label_of.get(thing["category_id"])
                if label is not None and thing.get("segmentation"):
                    entry = (-float(thing["area"]), label, json.dumps(thing["segmentation"]))
                    objects.setdefault(thing["image_id"], []).append(entry)
            return [
                CocoSample(
                    name=Path(image["file_name"]).with_suffix("").as_posix(),
                    image=images / image["file_name"],
                    size=(image["height"], image["width"]),
                    objects=tuple((label, text) for _, label, text in sorted(found)),
                    ignore_overlap=self.ignore_overlap,
                )
                for image in sorted(content["images"], key=lambda image: image["file_name"])
                for found in [objects.get(image["id"], [])]
                if not min_area or -sum(area for area, _, _ in found) > min_area
            ]
