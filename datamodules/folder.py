"""Any folder of images and masks, with no code: the data set of one's own."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Sample, SegmentationDataModule, files_under, voc_palette


class Folder(SegmentationDataModule):
    """Pairs of ``images/`` and ``masks/`` with the same relative path; suffixes may differ.

    Splits are, in this order of preference: folders (``images/train``, ``masks/train``, ...); lists of names
    (``train.txt``, ``val.txt``, ``test.txt`` in the root, one per line, with or without suffix); or fractions, drawn
    by a hash of the names: the same files give the same split on every machine. Lists are the safer choice for a
    folder that grows.

    Args:
        root: folder that holds ``images/`` and ``masks/``.
        class_names: one name per label; None reads ``classes.txt`` in the root, one name per line.
        palette: one RGB colour per class, 0 to 255; None takes PASCAL VOC's colours.
        void_values: stored mask values to ignore, besides 255.
        label_map: stored mask value -> label, where values are not labels already, as in ``{0: 0, 255: 1}``.
        val_fraction: share of the images for validation, where neither folders nor lists say it.
        test_fraction: likewise for the test.
        **kwargs: loaders, crops and the rest, see `SegmentationDataModule`.

    Raises:
        FileNotFoundError: in `setup`, if the root or a folder in it is missing.
        ValueError: in `setup`, if an image has no mask, a mask no image, or the classes are nowhere named.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        class_names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        void_values: Sequence[int] = (),
        label_map: dict[int, int] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} must leave some to train")
        self.fractions = {"val": val_fraction, "test": test_fraction}
        names = self.root / "classes.txt" if self.root else None
        if class_names is None and names is not None and names.is_file():
            class_names = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
        self.class_names = list(class_names or ())
        self.palette = [tuple(colour) for colour in palette or voc_palette(self.num_classes)]
        if len(self.palette) != self.num_classes:
            raise ValueError(f"data.palette has {len(self.palette)} colours for {self.num_classes} classes")
        self.void_values, self.label_map = tuple(void_values), label_map

    def samples(self, split: str) -> list[Sample]:
        """Pair the files of a split."""
        if self.root is None:
            raise ValueError("data.root is not set: it names the folder that holds images/ and masks/")
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root {self.root} does not exist")
        images, masks = self.root / "images", self.root / "masks"
        if any((images / name).is_dir() for name in ("train", "val", "test")):
            return pair(images / split, masks / split)
        samples = pair(images, masks)
        listing = self.root / f"{split}.txt"
        if (self.root / "train.txt").is_file():
            if not listing.is_file():
                raise FileNotFoundError(f"{self.root} has a train.txt but no {split}.txt")
            by_name = {key: sample for sample in samples for key in (sample.name, file_name(sample, images))}
            wanted = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
            unknown = [name for name in wanted if name not in by_name]
            if unknown:
                raise ValueError(f"{listing} names {unknown[0]}, which is not in {images} ({len(unknown)} such names)")
            return [by_name[name] for name in wanted]
        shuffled = sorted(samples, key=lambda sample: hashlib.sha256(sample.name.encode()).digest())
        shares = (self.fractions[name] for name in ("val", "test"))
        val, test = (max(round(share * len(samples)), int(share > 0)) for share in shares)
        bounds = {"val": (0, val), "test": (val, val + test), "train": (val + test, len(samples))}
        return sorted(shuffled[slice(*bounds[split])], key=lambda sample: sample.name)


def file_name(sample: Sample, folder: Path) -> str:
    """The image's path below a folder, suffix and all."""
    return sample.image.relative_to(folder).as_posix() if sample.image else sample.name


def pair(images: Path, masks: Path) -> list[Sample]:
    """Match images and masks by relative path without suffix.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if a file of one has no partner in the other.
    """
    image_of, mask_of = files_under(images), files_under(masks)
    for what, other, lonely in (
        ("image", masks, sorted(image_of.keys() - mask_of.keys())),
        ("mask", images, sorted(mask_of.keys() - image_of.keys())),
    ):
        if lonely:
            path = (image_of if what == "image" else mask_of)[lonely[0]]
            more = f" (and {len(lonely) - 1} more)" if len(lonely) > 1 else ""
            raise ValueError(f"the {what} {path}{more} has no partner of the same name in {other}")
    return [Sample(name, path, mask_of[name]) for name, path in image_of.items()]
