"""Your own data: a folder of images and masks, read without any code."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from .base import IGNORE, SegmentationDataModule, check_names, voc_palette
from .class_map import CLASS_MAPS, Color, colors_found, read_class_map, read_class_values, shown_in_color
from .decode import Sample
from .errors import UserError
from .files import (
    cells,
    check_fractions,
    difference,
    folded,
    folder_of,
    located,
    pair,
    parts_of,
    read_lines,
    say_once,
    share_of,
    split_folders,
    split_lists,
    stems,
)

VALUES = "_classes.csv"  # Roboflow's
HEADER = ("image", "images", "img", "file", "filename", "path", "image_path", "mask", "masks", "label", "mask_path")


class Folder(SegmentationDataModule):
    """Images in ``images/`` and masks in ``masks/`` that have the same relative path; suffixes may differ.

    The splits come from the first of these that exists:

    - folders ``images/train``, ``masks/train``, ``images/val``, ..., or ``train/images``, ``train/masks``, ...; ``val``
      may be called ``valid``, ``validation`` or ``dev``. Without it, a share of train becomes val.
    - lists ``train.txt``, ``val.txt``, ``test.txt`` in the root, or ``.csv``. A line is a name, or the paths of an
      image and of a mask. Lists are the safest choice for a folder that grows.
    - fractions, drawn by a hash of the names.

    Masks hold labels (grey, palette, 16 bits, ``.npy``) or colours. The classes of colours come from the first of
    these that exists:

    - `palette`
    - a class map in the root: ``class_dict.csv`` (name, r, g, b), ``label_colors.txt`` (r g b name), or CVAT's
      ``labelmap.txt``
    - if `class_names` is not given either, the colours in the masks: each is a class, in the order of its RGB code.

    Args:
        root: folder that holds ``images/`` and ``masks/``.
        class_names: one name per label; None reads ``classes.txt`` in the root, one name per line, a class map, or
            Roboflow's ``_classes.csv``.
        palette: one RGB colour per class, 0 to 255; None takes the colours of masks in colour, else PASCAL VOC's.
        void_values: stored mask values to ignore, besides 255.
        void_colors: colours to ignore in masks in colour.
        label_map: stored mask value -> label, if stored values are not labels, as in ``{0: 0, 255: 1}``.
        bands: which bands of the images to read as stored (TIFF, ``.npy``, 16 bits), counted from 0; None reads RGB.
        image_dir: folder of the images below the root.
        mask_dir: folder of the masks below the root; it may be `image_dir` if a suffix tells images and masks apart.
        image_suffix: end of the images' names that the masks' names lack, such as ``_sat`` or ``.jpg``.
        mask_suffix: end of the masks' names that the images' names lack, such as ``_mask`` or ``.png``.
        val_fraction: share of the images for validation, without folders and lists; 0 validates on the training images.
        test_fraction: share of the images for the test, without folders and lists.
        **kwargs: arguments of `SegmentationDataModule`, such as ``batch_size`` and ``crop_size``.

    Raises:
        UserError: if the fractions leave nothing to train on, images and masks cannot be told apart, or `palette` has
            another number of colours than there are classes.
        UserError: in `setup`, if a folder or a partner is missing, or nothing names the classes.
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
        check_fractions(val_fraction, test_fraction)
        if image_dir == mask_dir and image_suffix == mask_suffix:
            raise UserError(f"images and masks both lie in '{image_dir}': tell them apart by data.mask_suffix")
        self.fractions = (val_fraction, test_fraction)
        self.dirs, self.suffixes = (image_dir, mask_dir), (image_suffix, mask_suffix)
        self.void_values, self.label_map = tuple(void_values), label_map
        self.void_colors = [(int(r), int(g), int(b)) for r, g, b in void_colors]
        self.bands = None if bands is None else tuple(bands)
        self.in_channels = 3 if self.bands is None else len(self.bands)
        self.palette_given = palette is not None
        self.colors: tuple[Color, ...] | None = None  # the colour of each label, if the masks are in colour
        self.looked = False  # whether `look_at_colors` has run
        self.colors_unknown = ""  # why the classes of masks in colour are not known
        self.name_classes(class_names, palette)

    def name_classes(self, names: Sequence[str] | None, palette: Sequence[Sequence[int]] | None) -> None:
        """Set the classes and their colours from the arguments, ``classes.txt`` or a class map."""
        listing = self.root / "classes.txt" if self.root else None
        if names is None and listing is not None and listing.is_file():
            names = read_lines(listing)
        if names is None and self.root is not None:
            folders = [self.root, *split_folders(self.root).values()]
            tables = {str(read_class_values(f / VALUES)): f / VALUES for f in folders if (f / VALUES).is_file()}
            if len(tables) > 1:
                raise UserError(f"{' and '.join(map(str, tables.values()))} name different classes: correct one")
            for table in tables.values():
                names, values = read_class_values(table)
                self.label_map = self.label_map or {value: label for label, value in enumerate(values)}
        if names is None and palette is None and self.class_map is not None:
            names, palette = read_class_map(self.class_map)
        self.class_names = list(names or ())
        check_names(self.class_names)
        self.palette: list[Color] = [(int(r), int(g), int(b)) for r, g, b in palette or voc_palette(self.num_classes)]
        if len(self.palette) != self.num_classes:
            raise UserError(
                f"data.palette has {len(self.palette)} colours for {self.num_classes} classes: give one each"
            )

    @property
    def class_map(self) -> Path | None:
        """The file in the root that names the class of each colour."""
        found = [self.root / name for name in CLASS_MAPS if (self.root / name).is_file()] if self.root else []
        return found[0] if found else None

    def setup(self, stage: str) -> None:
        """Find out the classes of masks in colour, then list, check and keep the splits that a stage reads.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            UserError: if the masks are in colour and their classes are not known.
            UserError: see `SegmentationDataModule.setup`.
        """
        if stage != "predict" or self.predict_dir is None:
            self.look_at_colors()
            if self.colors_unknown:
                raise UserError(self.colors_unknown)
        super().setup(stage)

    def samples(self, split: str) -> list[Sample]:
        """Pair the files of a split.

        Raises:
            UserError: if a folder or a list is missing, or a list names a file that does not exist.
        """
        self.look_at_colors()
        root = folder_of(self.root, f"{self.dirs[0]}/ and {self.dirs[1]}/")
        if folders := self.split_folders():
            return self.in_folders(folders, split)
        images, masks = root / self.dirs[0], root / self.dirs[1]
        if "train" in (lists := split_lists(root)):
            if split not in lists:
                raise UserError(
                    f"{root} holds a {lists['train'].name} but no {split}{lists['train'].suffix}: add that list"
                )
            return self.listed_samples(lists[split], images, masks)
        return share_of(self.paired(images, masks), split, *self.fractions)

    def split_folders(self) -> dict[str, tuple[Path, Path]]:
        """Return the folders of images and masks of each split; none if the splits have no folders.

        They are ``images/train`` and ``masks/train``, or ``train/images`` and ``train/masks``.
        """
        assert self.root is not None
        images, masks = (self.root / name for name in self.dirs)
        found = {}
        if splits := split_folders(images):
            of_masks = split_folders(masks)
            for split, folder in splits.items():
                inner = folder / self.dirs[1]
                found[split] = (folder, of_masks.get(split, inner if inner.is_dir() else masks / folder.name))
            found |= {split: (images / path.name, path) for split, path in of_masks.items() if split not in splits}
            others = {path.name for path in images.iterdir() if path.is_dir() and path not in splits.values()}
            if others := {name for name in others if not name.startswith((".", "__"))}:
                say_once(f"{images} holds folders that are no split and are left out: {', '.join(sorted(others))}")
        elif not images.is_dir():
            for split, folder in split_folders(self.root).items():
                if (folder / self.dirs[0]).is_dir():
                    found[split] = (folder / self.dirs[0], folder / self.dirs[1])
        return found

    def in_folders(self, folders: dict[str, tuple[Path, Path]], split: str) -> list[Sample]:
        """Pair the files in the folders of a split. Without a folder for validation, a share of train is taken.

        Raises:
            UserError: if there is no folder for the split.
        """
        if split in folders and (split != "train" or "val" in folders):
            return self.paired(*folders[split])
        if "train" not in folders or split == "test":
            raise UserError(
                f"{self.root} has folders for {', '.join(folders)} but none for {split}: add "
                f"{folders[next(iter(folders))][0].parent / split}"
                + (", or set data.test_split: val" if split == "test" else "")
            )
        say_once(
            f"{self.root} has no folder for val: a share of train ({self.fractions[0]:g}, data.val_fraction) becomes "
            "val, by a hash of the names"
        )
        return share_of(self.paired(*folders["train"]), split, self.fractions[0], 0)

    def paired(self, images: Path, masks: Path) -> list[Sample]:
        """Pair the files of two folders.

        Raises:
            UserError: if a folder is missing, two files have one name, or an ending that is not known unpairs all.
        """
        samples = pair(images, masks, *self.suffixes, self.bands, self.colors)
        if (sentence := difference(samples)) is not None:
            raise UserError(sentence)
        return samples

    def listed_samples(self, listing: Path, images: Path, masks: Path) -> list[Sample]:
        """Return the samples that a list names, by a name, a file, or an image and a mask.

        Args:
            listing: the list, in the root.
            images: folder of the images.
            masks: folder of the masks.

        Raises:
            UserError: if a line names no sample. In a line of two paths, the files need not exist here.
        """
        root = listing.parent
        by_name: dict[str, Sample] = {}
        for s in self.paired(images, masks) if images.is_dir() and masks.is_dir() else []:
            for file, folder in ((s.image, images), (s.mask, masks)):
                assert file is not None
                for base in (folder, root):
                    if file.is_relative_to(base):
                        path = file.relative_to(base)
                        by_name[folded(path.as_posix())] = by_name[folded(path.with_suffix("").as_posix())] = s
            by_name[folded(s.name)] = s
        found: dict[str, Sample] = {}
        repeated = 0
        for number, line in enumerate(read_lines(listing)):
            sample = self.listed_sample(line, by_name, images, masks, root)
            if sample is None and number == 0 and all(cell.lower() in HEADER for cell in cells(line)):
                continue
            if sample is None:
                raise UserError(f"{listing} names {line}, which is not in {images}: correct or remove that line")
            repeated += sample in found.values()
            name = sample.name
            if sample not in found.values():
                while folded(name) in found:  # paths that differ in a drive, or in folders above the root
                    name += "_"
                found[folded(name)] = replace(sample, name=name)
        if repeated:
            say_once(f"{listing} names {repeated} samples twice: each is taken once")
        return [*found.values()]

    def listed_sample(
        self, line: str, by_name: dict[str, Sample], images: Path, masks: Path, root: Path
    ) -> Sample | None:
        """Return the sample of a line of a list: a name or a file, or an image and a mask; None if there is none.

        Args:
            line: the line.
            by_name: samples by their folded names and paths.
            images: folder of the images.
            masks: folder of the masks.
            root: folder of the list.
        """
        table = [cell for cell in cells(line) if cell]
        whole = parts_of(table[0] if len(table) == 1 else line)
        for start in range(len(whole)):
            if sample := by_name.get(folded("/".join(whole[start:]))):
                return sample
        words = line.split()
        choices = [table] if len(table) == 2 else []
        choices += [[" ".join(words[:i]), " ".join(words[i:])] for i in range(1, len(words))]
        for image_text, mask_text in choices:
            image, mask = located(image_text, images, root), located(mask_text, masks, root)
            known = by_name.get(folded("/".join(parts_of(image_text))))
            if known and known == by_name.get(folded("/".join(parts_of(mask_text)))):
                return known
            if len(choices) == 1 or (image.is_file() and mask.is_file()):
                base = next((base for base in (images, root) if image.is_relative_to(base)), None)
                name = "/".join(parts_of(str(image.relative_to(base) if base else image)))
                return Sample(str(PurePosixPath(name).with_suffix("")), image, mask, self.bands, self.colors)
        return None

    def look_at_colors(self) -> None:
        """Find out once whether the masks are in colour, and which classes they show or why that is not known.

        All files decide. Masks in RGB, and palettes in which a value has the colour of another label, are read by the
        colours of `palette` or a class map.
        """
        if self.looked or self.root is None or not self.root.is_dir():
            return
        self.looked = True
        masks = self.mask_files()
        given = self.given_colors()
        labels = self.label_map or {*range(self.num_classes), *self.void_values, IGNORE}
        if (IGNORE,) * 3 in given and IGNORE not in self.void_values:
            labels = {*labels} - {IGNORE}  # white is a class
        shown = None
        if self.mask_threshold is None:
            shown = shown_in_color(masks, given, labels, all_files=not self.class_names)
        if shown is not None:
            try:
                self.learn_colors(masks, shown[1])
            except UserError as error:
                self.colors_unknown = str(error)

    def mask_files(self) -> list[Path]:
        """List the masks of all splits."""
        assert self.root is not None
        flat = (self.root / self.dirs[0], self.root / self.dirs[1])
        folders = {masks: images for images, masks in self.split_folders().values() or [flat] if masks.is_dir()}
        return [
            path
            for masks, images in folders.items()
            for _, path in stems(masks, self.suffixes[1], images, self.suffixes[0])
        ]

    def given_colors(self) -> list[Color]:
        """Return the colours of `palette` or a class map, and the ignored ones; [] without these."""
        if self.palette_given:
            return [*self.palette, *self.void_colors]
        if self.class_map is None:
            return []
        try:
            return [*read_class_map(self.class_map)[1], *self.void_colors]
        except UserError:
            return []  # an error only if the masks are in colour, see `learn_colors`

    def learn_colors(self, masks: Sequence[Path], shown: str) -> None:
        """Set the classes, the palette and the colour of each label.

        Args:
            masks: all masks.
            shown: a sentence's beginning that says which mask is in colour.

        Raises:
            UserError: if nothing names the classes of the colours, a class map cannot be read or has another number of
                classes than `class_names`, or there are too many colours for classes.
        """
        if self.class_map is not None and not self.palette_given:
            names, colors = read_class_map(self.class_map)
            if self.num_classes and len(names) != self.num_classes:
                raise UserError(
                    f"{self.class_map} has {len(names)} classes but data.class_names has {self.num_classes}: name the "
                    "same classes in both"
                )
            self.class_names, self.palette = self.class_names or names, colors
        elif not self.palette_given and self.num_classes:
            cure = ", or save all masks with one palette" if "the palette" in shown else ""
            raise UserError(
                f"{shown}, and the classes of the colours are not known: give one colour per class in data.palette, or "
                f"a {CLASS_MAPS[0]} in {self.root} (docs/your_data.md){cure}"
            )
        elif not self.palette_given:
            self.palette = [color for color in colors_found(masks) if color not in self.void_colors]
            self.class_names = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in self.palette]
            rank_zero_info(f"each colour of the masks is a class: {', '.join(self.class_names)}")
        else:
            rank_zero_info(f"{shown}: all masks are read by the colours of data.palette")
        self.colors = (*self.palette, *self.void_colors)
        beyond = range(self.num_classes, len(self.colors))  # the labels that `labels_of_colors` gives void colours
        self.void_values = (*self.void_values, *beyond)
