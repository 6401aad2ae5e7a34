"""Your own polygons: images with the annotations of a labelling tool, read without any code."""

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from .annotations import IGNORED, Annotations, Color, Picture, read_annotations
from .base import SegmentationDataModule, voc_palette
from .decode import Sample, decoding, read_image
from .errors import UserError
from .files import check_fractions, files_under, folder_of, split_by_hash
from .transforms import IGNORE

BACKGROUND = re.compile(r"_*background_*", re.IGNORECASE)  # as tools spell the class outside all objects
SPLITS = re.compile(r"(?<![a-z])(?:(train(?:ing)?)|(val(?:id(?:ation)?)?)|(test(?:ing)?))(?![a-z])")


@dataclass(frozen=True)
class PolygonSample(Sample):
    """An image whose objects are polygons or run-length codes.

    Args:
        size: height and width in pixels, as stated in the annotations; None where they state none.
        objects: label and segmentation (JSON text) of each object; later objects lie on top of earlier ones.
        ignore_overlap: whether to ignore pixels that belong to two objects.
        source: the file of the annotations.
    """

    size: tuple[int, int] | None = None
    objects: tuple[tuple[int, str], ...] = ()
    ignore_overlap: bool = False
    source: Path | None = None

    def read(self) -> tuple[Tensor, Tensor]:
        """Decode the image ``(C, H, W)`` and draw the mask ``(H, W)`` uint8.

        Raises:
            UserError: if the image cannot be decoded or has another size than its annotations, or an object cannot be
                drawn.
        """
        assert self.image is not None
        image, _ = super().read()
        size = self.size or (image.shape[1], image.shape[2])
        if self.bands is None and image.shape[1:] == size[::-1] != size:  # annotated before EXIF turned it
            image = read_image(self.image, upright=False)
        if image.shape[1:] != size:
            raise UserError(
                f"{self.source} was drawn on {size[1]} x {size[0]} pixels but the image {self.image} has "
                f"{image.shape[2]} x {image.shape[1]}: use the images that were annotated"
            )
        labels, seen, twice = np.zeros(size, np.uint8), np.zeros(size, bool), np.zeros(size, bool)
        for label, text in self.objects:
            with decoding(self.image, f"{size[1]} x {size[0]} pixels with objects"):
                inside = draw(json.loads(text), *size)
            labels[inside] = label
            twice |= seen & inside
            seen |= inside
        if self.ignore_overlap:
            labels[twice] = IGNORE
        return image, torch.from_numpy(labels)

    def missing(self) -> str | None:
        """Return a sentence that names the missing image, or None if it exists."""
        if self.image is None or self.image.is_file():
            return None
        return f"{self.source} names the image {self.image}, which does not exist: add it, or correct data.image_dir"


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
    from pycocotools import mask as rle  # only polygons need it

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


class Polygons(SegmentationDataModule):
    """Images with polygons, boxes or masks as labelling tools export them; all other pixels are ``background``.

    It reads COCO's JSON (also of Roboflow), LabelMe's JSON, CVAT for images 1.1, Label Studio's JSON and the JSON of
    VGG Image Annotator. An image is found by the last parts of the path that the tool wrote, so that paths of another
    machine and web addresses do no harm.

    Layout, for example::

        annotations.json  0.jpg  1.jpg           one file for all images
        train/_annotations.coco.json  train/a.jpg  valid/...  test/...     Roboflow
        images/a.jpg  images/a.json              LabelMe
        annotations.xml  images/a.jpg            CVAT

    Get it: export your project in one of these formats, and put the images beside it.

    The splits are the words train, val (or valid, validation) and test in the names of the files of annotations and
    their folders, or as CVAT states them, or else in the folders of the images. Without train and val, a hash of the
    images' names divides them. An image that is annotated with no object is background; an image that no file names is
    left out.

    Objects overlap: the smaller one lies on top, after CVAT's z-order where it is stated.

    Args:
        root: folder that holds annotations and images.
        annotations: file or folder of annotations below the root, or a list of files; None finds them.
        image_dir: folder of the images below the root, searched with its subfolders.
        classes: names of categories, in the order of their labels after ``background``; objects of all others are
            background. None takes all, in the order of their ids in COCO's format, as CVAT lists them, and in
            alphabetical order for other tools. A category called background is the background.
        bands: which bands of the images to read as stored (TIFF, ``.npy``, 16 bits), counted from 0; None reads RGB.
        ignore_overlap: whether to ignore pixels that belong to two objects.
        val_fraction: share of the images for validation, where no split is named.
        test_fraction: share of the images for the test, where no split is named.
        **kwargs: arguments of `SegmentationDataModule`, such as ``batch_size`` and ``crop_size``.

    Raises:
        UserError: if the fractions leave nothing to train on, or there are more classes than labels.
        UserError: in `setup`, if a file is missing or damaged, names no image below `image_dir`, or names one twice.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        annotations: str | Sequence[str] | None = None,
        image_dir: str = ".",
        classes: Sequence[str] | None = None,
        bands: Sequence[int] | None = None,
        ignore_overlap: bool = False,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        check_fractions(val_fraction, test_fraction)
        self.annotations, self.image_dir = annotations, image_dir
        self.bands, self.ignore_overlap = None if bands is None else tuple(bands), ignore_overlap
        self.in_channels = 3 if self.bands is None else len(self.bands)
        self.fractions = (val_fraction, test_fraction)
        self.categories: tuple[str, ...] = ()  # the classes as the files of annotations spell them
        self.divided: dict[str, list[Sample]] | None = None  # the samples of each split, once they are listed
        if classes is not None:
            self.name_classes(classes)

    def name_classes(self, names: Iterable[str], colors: dict[str, Color | None] | None = None) -> None:
        """Set the classes, ``background`` first, and their colours: those of the tool, if all differ, or PASCAL VOC's.

        Raises:
            UserError: for two classes of one name, or more classes than labels.
        """
        kept = [str(name).strip() for name in names]
        ground = next((name for name in kept if BACKGROUND.fullmatch(name)), "background")
        kept = [name for name in kept if name not in (ground, IGNORED)]
        names = [re.sub(r"[/\\\x00-\x1f\x7f]", "-", name) for name in kept]  # which the names of metrics could not hold
        twice = [name for i, name in enumerate(names) if name in names[:i] or BACKGROUND.fullmatch(name)]
        if twice:
            raise UserError(f"two classes are called '{twice[0]}': rename or merge these categories in the annotations")
        if len(kept) >= IGNORE:
            raise UserError(
                f"there are {len(kept)} classes besides the background, but labels end at {IGNORE - 1} and {IGNORE} is "
                "ignored: choose some in data.classes"
            )
        for category, name in zip(kept, names, strict=True):
            if category != name:
                rank_zero_info(f"the class {category!r} is called '{name}'")
        self.categories, self.class_names = (ground, *kept), (ground, *names)
        stated = [(colors or {}).get(name) for name in kept]
        known = [(0, 0, 0), *(color for color in stated if color is not None)]
        self.palette = known if len({*known}) == self.num_classes else voc_palette(self.num_classes)

    def setup(self, stage: str) -> None:
        """Find out the classes if they are not given, then list, check and keep the splits that a stage reads.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            UserError: see the class and `SegmentationDataModule.setup`.
        """
        if not self.class_names and (stage != "predict" or self.predict_dir is None):
            self.samples("train")
        super().setup(stage)

    def samples(self, split: str) -> list[Sample]:
        """Read all annotations once, and return the samples of a split.

        Raises:
            UserError: see the class.
        """
        if self.divided is None:
            root = folder_of(self.root, "annotations and images")
            found = self.read_files(root)
            listed = {name: color for part in found for name, color in part.categories.items()}
            others = sorted({o.category for part in found for p in part.pictures for o in p.outlines} - listed.keys())
            if not self.class_names:
                self.name_classes([*listed, *others], listed)
            images = Images(root / self.image_dir)
            pairs = [(part, p, s) for part in found for p, s in self.outlined(part, images, [*listed, *others])]
            samples = unique([sample for _, _, sample in pairs])
            words = [split_of(root, *pair) for pair in pairs]
            self.divided = self.divide([*zip(words, samples, strict=True)])
            say_what_was_read(samples, images, self.class_names, self.divided)
            say_what_was_left_out(found)
        return self.divided[split]

    def read_files(self, root: Path) -> list[Annotations]:
        """Read the files of annotations that `annotations` names, or those that lie below the root.

        Raises:
            UserError: if there is none, or one is damaged.
        """
        named = [self.annotations] if isinstance(self.annotations, str) else [*(self.annotations or ())]
        folder = root / named[0] if len(named) == 1 else root
        if len(named) > 1 or (named and not folder.is_dir()):
            return [part for name in named if (part := read_annotations(root / name)) is not None]
        files = sorted(files_under(folder, (".json", ".xml")).values())
        if not files:
            raise UserError(
                f"{folder} holds no annotations (.json or .xml): export them there, or set data.annotations"
            )
        parts = [read_annotations(file, required=len(files) == 1) for file in files]
        others = [file for file, part in zip(files, parts, strict=True) if part is None]
        if len(others) == len(files):
            read_annotations(files[0])  # its error says what was expected
        if others:
            rank_zero_info(f"{len(others)} files are no annotations and are left out, such as {others[0]}")
        return [part for part in parts if part is not None]

    def annotated(self, file: Path, folder: Path, min_area: float = 0.0) -> list[Sample]:
        """Read one file of annotations.

        Args:
            file: the annotations.
            folder: folder of the images.
            min_area: see `outlined`.

        Raises:
            UserError: if the file is missing, damaged or lacks a class.
        """
        part = read_annotations(file)
        assert part is not None
        say_what_was_left_out([part])
        return [*unique([s for _, s in self.outlined(part, Images(folder), [*part.categories], min_area)])]

    def outlined(
        self, part: Annotations, images: "Images", known: Sequence[str], min_area: float = 0.0
    ) -> list[tuple[Picture, PolygonSample]]:
        """Find the images of a file of annotations, and sort the objects of each so that the smaller lies on top.

        Args:
            part: the content of the file.
            images: the images below a folder.
            known: names of all categories.
            min_area: images are left out if their kept objects do not cover more pixels; 0 keeps all images.

        Returns:
            the images in the order of the paths that the file writes.

        Raises:
            UserError: if a class is no category, or two images fit a path equally well.
        """
        missing = [name for name in self.categories[1:] if name not in known]
        if missing:
            raise UserError(
                f"{part.file} cannot be read as annotations of these classes: no category '{missing[0]}' among "
                f"{', '.join(known)}; name categories of this file in data.classes"
            )
        label_of = {name: 0 for name in known if BACKGROUND.fullmatch(name)} | {IGNORED: IGNORE}
        label_of |= {name: label for label, name in enumerate(self.categories)}
        found = []
        for picture in sorted(part.pictures, key=lambda picture: picture.path):
            kept = [(o.layer, -o.area, label_of[o.category], json.dumps(o.segmentation)) for o in picture.outlines
                    if o.category in label_of]  # fmt: skip
            if min_area and -sum(area for _, area, _, _ in kept) <= min_area:
                continue
            image = images.find(picture.path, part.file)
            sample = PolygonSample(
                name=image.relative_to(images.folder).with_suffix("").as_posix(),
                image=image,
                bands=self.bands,
                size=picture.size,
                objects=tuple((label, text) for _, _, label, text in sorted(kept)),
                ignore_overlap=self.ignore_overlap,
                source=part.file,
            )
            found.append((picture, sample))
        return found

    def divide(self, samples: Sequence[tuple[str, Sample]]) -> dict[str, list[Sample]]:
        """Divide samples into splits: by their own words for them, or where these do not suffice by a hash.

        Args:
            samples: the word (``train``, ``val``, ``test`` or "") of each sample, and the sample.
        """
        of = {split: [s for word, s in samples if word == split] for split in ("train", "val", "test", "")}
        if of["train"] and (of["val"] or of["test"]):
            if of[""]:
                rank_zero_info(f"{len(of[''])} images are in no split and are left out, such as {of[''][0].image}")
            if not of["val"]:
                rank_zero_info("no split val is named: a share of train becomes val, by a hash of the names")
                train = of["train"]
                of["val"] = split_by_hash(train, "val", self.fractions[0], 0)
                of["train"] = split_by_hash(train, "train", self.fractions[0], 0)
            return {split: sorted(of[split], key=lambda s: s.name) for split in ("train", "val", "test")}
        everything = [sample for _, sample in samples]
        return {split: split_by_hash(everything, split, *self.fractions) for split in ("train", "val", "test")}


class Images:
    """The images below a folder, found by the last parts of any path that a tool writes.

    A path is compared with the files that are there, and never opened, so it leads to no file outside the folder.

    Args:
        folder: folder of the images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, list[Path]] = {}  # folded file name -> relative paths
        for path in files_under(folder).values():
            self.files.setdefault(folded(path.name), []).append(path.relative_to(folder))

    def find(self, text: str, source: Path) -> Path:
        """Return the image that a path means; if there is none, a path below the folder that does not exist.

        Args:
            text: the path or address as a tool wrote it.
            source: the file that holds it. An image beside it is preferred.

        Raises:
            UserError: if two images fit equally well.
        """
        beside = source.parent.relative_to(self.folder) if source.is_relative_to(self.folder) else Path()
        for parts in spellings(text):
            found = self.files.get(folded(parts[-1]), [])
            for exact in (beside.joinpath(*parts), Path(*parts)):
                if exact in found:
                    return self.folder / exact

            def fit(path: Path, parts: Sequence[str] = parts) -> tuple[int, int, bool]:
                tail = common([*map(folded, reversed(path.parts))], [*map(folded, reversed(parts))])
                return tail, common(path.parts, beside.parts), path.name == parts[-1]

            best = [path for path in found if fit(path) == max(map(fit, found))]
            if len(best) > 1:
                raise UserError(
                    f"{source} names the image {text}, and both {best[0]} and {best[1]} in {self.folder} fit: set "
                    "data.image_dir to the folder of its images"
                )
            if best:
                return self.folder / best[0]
        return self.folder.joinpath(*(re.sub(r"[\x00-\x1f]", "_", part)[:120] for part in spellings(text)[0]))


def folded(name: str) -> str:
    """Return a name in one case and one form of its accents, in which systems and tools differ."""
    return unicodedata.normalize("NFC", name).lower()


def common(first: Sequence[str], second: Sequence[str]) -> int:
    """Count the equal items at the beginning of two sequences."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def spellings(text: str) -> list[list[str]]:
    """List the ways to read a path that a tool wrote, each as folders and a file name, none of them ``..``.

    As it stands, without the codes of web addresses (``%20``), and without the eight letters that Label Studio puts
    before the name of an uploaded file.
    """
    if local := re.search(r"[?&]d=([^&#]+)", text):  # Label Studio's local files
        text = local[1]
    elif address := re.match(r"\w+://[^/?#]*/([^?#]+)", text):
        text = address[1]
    readings = []
    for way in (text, unquote(text)):
        parts = [part for part in re.split(r"[/\\]+", way) if part not in ("", ".", "..")]
        readings.append([part for part in parts if not re.fullmatch(r"[A-Za-z]:", part)] or ["unnamed"])
    last = readings[-1]
    readings.append([*last[:-1], re.sub(r"^[0-9a-f]{8}-(?=\w)", "", last[-1])])
    return readings


def split_of(root: Path, part: Annotations, picture: Picture, sample: Sample) -> str:
    """Return ``train``, ``val`` or ``test`` as the file of annotations, the tool or the image's folder says, or ""."""
    assert sample.image is not None
    own = part.file.relative_to(root) if part.file.is_relative_to(root) else part.file
    folder = sample.image.parent.relative_to(root) if sample.image.is_relative_to(root) else sample.image.parent
    for path in (own.parent if part.one_image else own, PurePath(picture.split), folder):
        for name in reversed(path.parts):
            if found := SPLITS.search(name.lower()):
                return ("train", "val", "test")[(found.lastindex or 1) - 1]
    return ""


def unique(samples: Sequence[PolygonSample]) -> list[PolygonSample]:
    """Make sure that no image is annotated twice, and let images of one name but for the suffix keep their suffix.

    Raises:
        UserError: if an image is annotated twice, because one of the two annotations would be lost.
    """
    seen: dict[Path | None, Path | None] = {}
    for sample in samples:
        if sample.image in seen:
            raise UserError(
                f"the image {sample.image} is annotated twice, in {seen[sample.image]} and in {sample.source}: keep "
                "one entry, or name the files to read in data.annotations"
            )
        seen[sample.image] = sample.source
    names = Counter(sample.name.lower() for sample in samples)
    return [
        s if names[s.name.lower()] == 1 or s.image is None else replace(s, name=s.name + s.image.suffix)
        for s in samples
    ]


def say_what_was_read(
    samples: Sequence[PolygonSample], images: Images, classes: Sequence[str], divided: dict[str, list[Sample]]
) -> None:
    """Say in one line each what is annotated, what is all background, and which images no file names."""
    counts = ", ".join(f"{len(some)} {split}" for split, some in divided.items())
    objects = sum(len(sample.objects) for sample in samples)
    rank_zero_info(f"{len(samples)} annotated images ({counts}), {objects} objects, classes: {', '.join(classes)}")
    empty = [sample for sample in samples if not sample.objects]
    if empty:
        rank_zero_info(f"{len(empty)} images have no object and are all background, such as {empty[0].image}")
    named = {sample.image for sample in samples}
    rest = [path for paths in images.files.values() for path in paths if images.folder / path not in named]
    if rest:
        rank_zero_info(f"{len(rest)} images are not annotated and are left out, such as {images.folder / rest[0]}")


def say_what_was_left_out(parts: Sequence[Annotations]) -> None:
    """Say in one line for each kind of thing that is not drawn how many there are and where the first one is."""
    left_out: dict[str, list[str]] = {}
    for part in parts:
        for kind, places in part.left_out.items():
            left_out.setdefault(kind, []).extend(places)
    for kind, places in left_out.items():
        rank_zero_info(f"left out: {len(places)} {kind}, such as {places[0]}")
