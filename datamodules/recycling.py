"""Trash for recycling: the data set of the recycling challenge, and TACO. Both use COCO's format.

Recycle Trash Dataset, NAVER Connect Foundation, 2021. P. F. Proença, P. Simões, "TACO: Trash Annotations in Context
for Litter Detection", 2020, arXiv 2003.06975.
"""

from collections.abc import Sequence
from typing import Any

from .decode import Sample
from .files import folder_of, split_by_hash
from .polygons import Polygons

CLASSES = (
    "General trash", "Paper", "Paper pack", "Metal", "Glass", "Plastic", "Styrofoam", "Plastic bag", "Battery",
    "Clothing",
)  # fmt: skip


class Recycling(Polygons):
    """Photographs of trash in ten classes and background; the smaller of two overlapping objects lies on top.

    Layout of the challenge, and of TACO, whose one file is divided into splits by a hash of the names::

        train.json  val.json  batch_01_vt/0002.jpg  batch_02_vt/...
        annotations.json      batch_1/000006.JPG    batch_2/...

    Get it: github.com/connectfoundation/naverconnect-dataset-trash has 21,818 photographs (112 GB), of which the
    challenge used 3,272 at 512 x 512 pixels; tacodataset.org has 1,500 photographs.

    Args:
        root: folder that holds the JSON files and batches.
        classes: names of categories in the JSON files, in the order of their labels after ``background``. All other
            categories are background. TACO has sixty other categories: name those to learn.
        val_fraction: share of the images for validation, if there is one file for all splits.
        test_fraction: share of the images for the test, if there is one file for all splits.
        **kwargs: arguments of `SegmentationDataModule`.
    """

    source = "https://github.com/connectfoundation/naverconnect-dataset-trash; TACO: http://tacodataset.org"
    licence = "CC BY 2.0 (challenge), CC BY 4.0 (TACO, most photographs)"
    citation = "NAVER Connect Foundation, 2021; Proença, Simões, arXiv 2003.06975"
    disk = "3,272 images of 512 x 512 pixels; TACO: 1,500 photographs"

    def __init__(
        self,
        root: str | None = None,
        classes: Sequence[str] = CLASSES,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        test_split: str = "val",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root, None, "", classes, val_fraction=val_fraction, test_fraction=test_fraction, test_split=test_split,
            **kwargs,
        )  # fmt: skip

    def samples(self, split: str) -> list[Sample]:
        """Read the JSON file of a split, or divide the one that holds all images.

        Raises:
            UserError: if there is no JSON file, or it lacks a category.
        """
        root = folder_of(self.root, f"train.json and val.json, or annotations.json ({self.source})")
        if (root / "train.json").is_file():
            return self.annotated(root / f"{split}.json", root)
        everything = root / ("train_all.json" if (root / "train_all.json").is_file() else "annotations.json")
        return split_by_hash(self.annotated(everything, root), split, *self.fractions)
