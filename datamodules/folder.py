"""Any folder of images and masks, with no code: the data set of one's own."""

import csv
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from .base import SegmentationDataModule, voc_palette
from .errors import UserError
from .files import Sample, color_codes, decoding, files_under, folder_of, pair, read_lines, split_by_hash

CLASS_MAPS = ("class_dict.csv", "classes.csv", "label_colors.txt", "labelmap.txt")


class Folder(SegmentationDataModule):
    """Pairs of ``images/`` and ``masks/`` with the same relative path; suffixes may differ.

    Splits are, in this order of preference: folders (``images/train``, ``masks/train``, ...); lists (``train.txt``,
    ``val.txt``, ``test.txt`` in the root, a name per line, or an image and a mask by their paths below the root); or
    fractions, drawn by a hash of the names. Lists are the safer choice for a folder that grows.

    Masks hold labels (grey, palette, 16 bits, ``.npy``), or colours. What the colours stand for says `palette`; without
    it a class map in the root (``class_dict.csv`` with name, r, g, b; ``label_colors.txt`` with r g b name; CVAT's
    ``labelmap.txt``); and without names and map the colours found: in the order of their codes, each is a class.

    Args:
        root: folder that holds ``images/`` and ``masks/``.
        class_names: one name per label; None reads ``classes.txt`` in the root, one name per line, or a class map.
        palette: one RGB colour per class, 0 to 255; None takes PASCAL VOC's colours, or those of the masks.
        void_values: stored mask values to ignore, besides 255.
        void_colors: colours to ignore in masks in colour.
        label_map: stored mask value -> label, where values are not labels already, as in ``{0: 0, 255: 1}``.
        bands: which bands of the images to read as stored (TIFF, ``.npy``, 16 bits), counted from 0; None reads RGB.
        image_dir: folder of the images below the root.
        mask_dir: folder of the masks; the same, if a suffix tells them apart.
        image_suffix: end of an image's stem that its mask's lacks, such as ``_sat``.
        mask_suffix: end of a mask's stem that its image's lacks, such as ``_mask``.
        val_fraction: share of the images for validation, where neither folders nor lists say it.
        test_fraction: likewise for the test.
        **kwargs: loaders, crops and the rest, see `SegmentationDataModule`.

    Raises:
        UserError: in `setup`, if the root or a folder in it is missing.
        UserError: in `setup`, if an image has no mask, a mask no image, or the classes are nowhere named.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        class_names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        void_values: Sequence[int] = (),
        void_colors: Sequence[Sequence[int]] = (),
        label_map: dict[int, int] | None = None,
        bands: Sequence[int] | None = None,
        image_dir: str = "images",
        mask_dir: str = "masks",
        image_suffix: str = "",
        mask_suffix: str = "",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise UserError(f"val_fraction {val_fraction} and test_fraction {test_fraction} must leave some to train")
        if image_dir == mask_dir and image_suffix == mask_suffix:
            raise UserError(f"images and masks both lie in '{image_dir}': tell them apart by data.mask_suffix")
        self.fractions = (val_fraction, test_fraction)
        self.dirs, self.suffixes = (image_dir, mask_dir), (image_suffix, mask_suffix)
        self.void_values, self.label_map = tuple(void_values), label_map
        self.void_colors = [(int(r), int(g), int(b)) for r, g, b in void_colors]
        self.bands = None if bands is None else tuple(bands)
        self.in_channels = 3 if self.bands is None else len(self.bands)
        self.given = palette is not None
        self.colors: tuple[tuple[int, int, int], ...] | None = None  # of the masks, once one was looked at
        self.looked, self.colors_unknown = False, ""
        names = self.root / "classes.txt" if self.root else None
        if class_names is None and names is not None and names.is_file():
            class_names = read_lines(names)
        if class_names is None and palette is None and self.class_map is not None:
            class_names, palette = read_class_map(self.class_map)
        self.class_names = list(class_names or ())
        colors = palette or voc_palette(self.num_classes)
        self.palette: list[tuple[int, int, int]] = [(int(r), int(g), int(b)) for r, g, b in colors]
        if len(self.palette) != self.num_classes:
            raise UserError(f"data.palette has {len(self.palette)} colours for {self.num_classes} classes")

    @property
    def class_map(self) -> Path | None:
        """The file in the root that says what colours stand for."""
        found = [self.root / name for name in CLASS_MAPS if (self.root / name).is_file()] if self.root else []
        return found[0] if found else None

    def setup(self, stage: str) -> None:
        """Settle what colours stand for, then as `SegmentationDataModule.setup`."""
        if stage != "predict" or self.predict_dir is None:
            self.look_at_colors()
            if self.colors_unknown:
                raise UserError(self.colors_unknown)
        super().setup(stage)

    def samples(self, split: str) -> list[Sample]:
        """Pair the files of a split."""
        self.look_at_colors()
        root = folder_of(self.root, f"{self.dirs[0]}/ and {self.dirs[1]}/")
        images, masks = root / self.dirs[0], root / self.dirs[1]
        how = (*self.suffixes, self.bands, self.colors)
        if any((images / name).is_dir() for name in ("train", "val", "test")):
            return pair(images / split, masks / split, *how)
        if (root / "train.txt").is_file():
            return self.listed_samples(split, root / f"{split}.txt", [images, root], [masks, root])
        return split_by_hash(pair(images, masks, *how), split, *self.fractions)

    def listed_samples(self, split: str, listing: Path, images: list[Path], masks: list[Path]) -> list[Sample]:
        """The samples that a list names: a stem, a file, or an image and a mask.

        Raises:
            UserError: if there is no such list.
            UserError: for a name that is no file; an image and a mask need not exist here.
        """
        if not listing.is_file():
            raise UserError(f"{listing.parent} has a train.txt but no {split}.txt")
        everything = pair(images[0], masks[0], *self.suffixes, self.bands, self.colors) if images[0].is_dir() else []
        by_name = {key: s for s in everything for key in (s.name, below(s.image, images[0]), below(s.mask, masks[0]))}
        found = []
        for line in read_lines(listing):
            parts = [part.strip() for part in re.split(r"[\t,]", line)] if re.search(r"[\t,]", line) else line.split()
            if line in by_name:
                found.append(by_name[line])
            elif len(parts) == 2:
                image, mask = ((next((f / p for f in places if (f / p).is_file()), places[-1] / p))
                               for p, places in zip(parts, (images, masks), strict=True))  # fmt: skip
                name = Path(parts[0]).with_suffix("").as_posix()
                found.append(Sample(name, image, mask, self.bands, self.colors))
            else:
                raise UserError(f"{listing} names {line}, which is not in {images[0]}")
        return found

    def look_at_colors(self) -> None:
        """Find out, once, whether masks are colours, and what these stand for; or why that is not known."""
        if self.looked or self.root is None or not (self.root / self.dirs[1]).is_dir():
            return
        self.looked = True
        masks = [p for n, p in files_under(self.root / self.dirs[1]).items() if n.endswith(self.suffixes[1])]
        if masks and is_color(masks[0]):
            try:
                self.learn_colors(masks)
            except UserError as error:
                self.colors_unknown = str(error)

    def learn_colors(self, masks: Sequence[Path]) -> None:
        """Settle classes, palette and the colours of masks.

        Raises:
            UserError: if nothing says what the colours stand for, a class map cannot be read or contradicts the names,
                or the colours are too many for classes.
        """
        if self.class_map is not None and not self.given:
            names, colors = read_class_map(self.class_map)
            if self.num_classes and len(names) != self.num_classes:
                raise UserError(f"{self.class_map} has {len(names)} classes, data.class_names {self.num_classes}")
            self.class_names, self.palette = self.class_names or names, colors
        elif not self.given and self.num_classes:
            raise UserError(
                f"{masks[0]} is a mask in colour, and nothing says what its colours stand for: give one colour per "
                f"class in data.palette, or a {CLASS_MAPS[0]} in {self.root} (README, 'Masks in colour')"
            )
        elif not self.given:
            self.palette = [color for color in colors_found(masks) if color not in self.void_colors]
            self.class_names = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in self.palette]
            rank_zero_info(f"each colour of the masks is a class: {', '.join(self.class_names)}")
        self.colors = (*self.palette, *self.void_colors)
        beyond = range(self.num_classes, len(self.colors))  # the labels that `labels_of_colors` gives void colours
        self.void_values = (*self.void_values, *beyond)


def below(path: Path | None, folder: Path) -> str:
    """A path below a folder, suffix and all."""
    return path.relative_to(folder).as_posix() if path is not None and path.is_relative_to(folder) else ""


def is_color(path: Path) -> bool:
    """Whether a mask is stored as colours that are not all grey; False for what cannot be read."""
    try:
        with Image.open(path) as file:
            if file.mode not in ("RGB", "RGBA", "CMYK", "YCbCr"):
                return False
            pixels = np.array(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return False
    return bool((pixels[..., :1] != pixels).any())


def colors_found(paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    """The colours of masks, in the order of their codes.

    Raises:
        UserError: for more than 256, as a lossy format makes them; the message names the first such file.
    """

    def codes(path: Path) -> np.ndarray:
        with decoding(path, "a mask"), Image.open(path) as file:
            return np.unique(color_codes(np.array(file.convert("RGB"))))

    found: set[int] = set()
    with ThreadPoolExecutor() as pool:
        for path, some in zip(paths, pool.map(codes, paths), strict=True):
            found |= set(some.tolist())
            if len(found) > 256:
                raise UserError(
                    f"{path} brings the masks' colours to {len(found)}: more than 256 are no classes, but what JPEG or "
                    "smoothing leaves; save masks as PNG, without resizing"
                )
    return [(code >> 16, code >> 8 & 255, code & 255) for code in sorted(found)]


def read_class_map(path: Path) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Read names and colours: ``name,r,g,b``, ``r g b name`` or ``name:r,g,b::``, a class per line.

    Raises:
        UserError: for a line in none of these forms; the message names it.
    """
    names, colors = [], []
    for line in read_lines(path):
        if line.startswith("#") or re.match(r"name\b.*\br\b", line, re.IGNORECASE):
            continue
        spaced = re.fullmatch(r"(\d+)\s+(\d+)\s+(\d+)\s+(.+)", line)
        cvat = re.match(r"([^:]+):(\d+),(\d+),(\d+)(?::|$)", line)
        if spaced:
            name, color = spaced[4], spaced.groups()[:3]
        elif cvat:
            name, color = cvat[1], cvat.groups()[1:]
        else:
            name, *color = next(csv.reader([line], skipinitialspace=True))  # type: ignore[assignment]
        if len(color) != 3 or not all(part.strip().isdigit() and int(part) < 256 for part in color):
            raise UserError(f"{path} has the line '{line}': a class is 'name,r,g,b', 'r g b name' or 'name:r,g,b::'")
        names.append(name.strip())
        colors.append((int(color[0]), int(color[1]), int(color[2])))
    return names, colors
