"""Trash to be sorted: the recycling challenge's data set and TACO, in COCO's format with batches of images.

Recycle Trash Dataset, NAVER Connect Foundation, 2021. P. F. Proença, P. Simões, "TACO: Trash Annotations in Context
for Litter Detection", 2020, arXiv 2003.06975.
"""

from collections.abc import Sequence
from typing import Any

from .coco import COCO
from .files import Sample, folder_of, split_by_hash

CLASSES = (
    "General trash", "Paper", "Paper pack", "Metal", "Glass", "Plastic", "Styrofoam", "Plastic bag", "Battery",
    "Clothing",
)  # fmt: skip


class Recycling(COCO):
    """Photographs of trash in ten classes and background; where objects overlap, the smaller lies on top.

    Layout of the challenge, and of TACO, whose one file is shared out by a hash of the names::

        train.json  val.json  batch_01_vt/0002.jpg  batch_02_vt/...
        annotations.json      batch_1/000006.JPG    batch_2/...

    Get it: github.com/connectfoundation/naverconnect-dataset-trash (the whole, 21,818 photographs, 112 GB; the
    challenge's 3,272 came at 512 x 512), tacodataset.org (1,500 photographs).

    Args:
        root: folder that holds the JSON files and batches.
        classes: names of categories in the JSON files, in the order of their labels after ``background``; what is
            not named is background. TACO has sixty others: name those that count.
        val_fraction: share for validation, where there is no ``val.json``.
        test_fraction: share for the test, where there is no ``test.json`` with labels.
        **kwargs: see `SegmentationDataModule`.
    """

    source = "https://github.com/connectfoundation/naverconnect-dataset-trash; TACO: http://tacodataset.org"
    licence = "CC BY 2.0 (challenge), CC BY 4.0 (TACO, most photographs)"
    citation = "NAVER Connect Foundation, 2021; Proença, Simões, arXiv 2003.06975"
    disk = "3,272 images of 512 x 512; TACO: 1,500 photographs"
    expected_counts = {}
    archives = ()

    def __init__(
        self,
        root: str | None = None,
        classes: Sequence[str] = CLASSES,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        test_split: str = "val",
        **kwargs: Any,
    ) -> None:
        self.known = tuple(classes)
        super().__init__(root, classes, min_area=0, test_split=test_split, **kwargs)
        self.fractions = (val_fraction, test_fraction)

    def samples(self, split: str) -> list[Sample]:
        """Read a split's JSON, or share out the one that holds all.

        Raises:
            UserError: if there is no JSON file.
        """
        root = folder_of(self.root, f"train.json and val.json, or annotations.json ({self.source})")
        if (root / "train.json").is_file():
            return self.annotated(root / f"{split}.json", root)
        everything = root / ("train_all.json" if (root / "train_all.json").is_file() else "annotations.json")
        return split_by_hash(self.annotated(everything, root), split, *self.fractions)
