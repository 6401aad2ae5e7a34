"""What all data sets share: arguments, checks before training, augmentation and loaders.

A data set is a subclass of `SegmentationDataModule` that states its facts as class attributes and lists its files in
`samples`. `SegmentationDataModule.setup` is the way from a folder to checked splits, `loader` from there to batches.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from torchvision.transforms import v2

from .dataset import Cache, EpochSampler, LabelTable, LateLoader, SegmentationDataset, collate
from .decode import Sample
from .download import Archive, fetch
from .errors import UserError
from .files import list_photos
from .transforms import (
    IGNORE,
    BandJitter,
    ElasticDeformation,
    Extra,
    RandomHorizontalFlip,
    RandomRotation,
    RandomScaleCrop,
    RandomTurn,
    RandomVerticalFlip,
)
from .weight_map import BorderWeight

UNNAMED = "nothing names the classes: name them in data.class_names"


class SegmentationDataModule(L.LightningDataModule):
    """One data set as checked splits and loaders. A subclass states its facts and lists its files in `samples`.

    The facts are the class attributes below. `mean` and `std` belong to pixels scaled to 0..1. A data set that states
    its own (`stated_mean_std`) is compared with the model, because the model normalises the images.

    Args:
        root: the data set's folder.
        batch_size: training images per process and step.
        eval_batch_size: images per step in validation, test and predict; above 1 only if all have one size.
        num_workers: loader processes; 0 reads in the main process.
        crop_size: training window in pixels, one number or (height, width); None trains on whole images.
        scale_range: smallest and largest factor of the random scaling before the crop.
        flip: whether to mirror half of the training images left to right.
        vertical_flip: whether to turn half of the training images upside down by a mirror, for pictures without an up.
        turns: 90 turns each training image by a random multiple of 90 degrees, and 180 half of them upside down; 0
            turns none. The window of `crop_size` is cut afterwards.
        color_jitter: strength of random brightness and contrast, 0 to 1, per band. RGB images of 8 bits also change in
            saturation by this strength, and in hue by a quarter of it.
        rotation: largest random rotation to either side, in degrees (PSPNet: 10).
        blur: share of the training images that get PSPNet's Gaussian blur.
        elastic: standard deviation of U-Net's elastic deformation, in pixels (the paper: 10).
        transforms: further transforms of torchvision's v2, or of your own, by class path. They follow all others, on
            image, mask and pixel weights alike; what they bring in from outside the image is ignored.
        max_class_share: a crop in which one class has more than this share is drawn again (usual: 0.75).
        border_weight: w0 of U-Net's pixel weights (the paper: 10), which each training batch then holds as
            ``pixel_weight``; 0 for none. They balance the classes too, so give the loss no class weights besides.
        border_sigma: sigma of U-Net's pixel weights, in pixels.
        cache: ``memory`` keeps decoded files in memory, a folder's name keeps them there; None decodes them at every
            use.
        cache_budget: budget in GiB of `cache`, and the same again for the weight maps.
        test_split: the split that `test` reads, ``val`` where the test labels are not public.
        predict_dir: folder of images for `predict`, of any sizes and modes, searched with its subfolders, or one image;
            None reads the images of `test_split`.
        check: how many files of a split to decode before a run, evenly spread; None for all, 0 for none. The command
            `check_data` looks at all files, and reports more.
        download: fetch the data set if it is missing and its owner allows that.
        value_range: the stored values that become 0 and 1 when the model scales images. None takes the full range of 8
            bits. For RGB or grey of more than 8 bits, ``fit`` then finds one range for the whole training split, and
            says so: 0 to 2^k - 1 for unsigned integers, the lowest and highest value for others, 0 to 1 for floats
            within.
        resize_masks: whether to bring masks of another size but the proportions of their images to the images' size, by
            the nearest pixel; without it, such masks are refused.
        mask_threshold: reads grey masks of two classes as 0 below this value and as 1 from it on. Masks in JPEG and
            other formats that change values can be read only so.
        replace_nan: the value that pixels of images get which are no numbers (NaN, Inf); the loss and the metrics
            ignore them. None refuses such images.

    Raises:
        UserError: if a batch size is not positive, or `max_class_share` has no crops to choose from.
    """

    class_names: Sequence[str] = ()
    palette: Sequence[Sequence[int]] = ()  # one RGB colour per class
    void_values: Sequence[int] = ()  # stored mask values to ignore, besides 255
    label_map: dict[int, int] | None = None  # stored mask value -> label; None where they are equal
    bands: tuple[int, ...] | None = None  # bands of the files to read as stored; None reads RGB with 8 bits
    in_channels = 3  # of the images; `setup` sets it to what the files hold
    mean: Sequence[float] = (0.485, 0.456, 0.406)  # ImageNet's; also the colour outside the images
    std: Sequence[float] = (0.229, 0.224, 0.225)
    source: str = ""  # where the data set comes from
    licence: str = ""
    citation: str = ""
    disk: str = ""  # space that it needs
    archives: Sequence[Archive] = ()  # what `download` fetches
    expected_counts: dict[str, int] = {}  # images per split as published

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: int | tuple[int, int] | None = None,
        scale_range: tuple[float, float] = (1.0, 1.0),
        flip: bool = True,
        vertical_flip: bool = False,
        turns: Literal[0, 90, 180] = 0,
        color_jitter: float = 0.0,
        rotation: float = 0.0,
        blur: float = 0.0,
        elastic: float = 0.0,
        transforms: Sequence[v2.Transform] | None = None,
        max_class_share: float = 1.0,
        border_weight: float = 0.0,
        border_sigma: float = 5.0,
        cache: str | None = None,
        cache_budget: float = 2.0,
        test_split: str = "test",
        predict_dir: str | os.PathLike | None = None,
        check: int | None = 500,
        download: bool = False,
        value_range: Sequence[float] | None = None,
        resize_masks: bool = False,
        mask_threshold: float | None = None,
        replace_nan: float | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise UserError(f"data.batch_size {batch_size} and data.eval_batch_size {eval_batch_size} must be positive")
        if max_class_share < 1 and crop_size is None:
            raise UserError(f"data.max_class_share {max_class_share} chooses crops: set data.crop_size too")
        self.root = None if root is None else Path(root).expanduser()
        self.root_as_given = root  # reports show it: with ~, no name of a home folder
        self.predict_dir = None if predict_dir is None else Path(predict_dir).expanduser()
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.crop_size, self.scale_range, self.flip, self.color_jitter = crop_size, scale_range, flip, color_jitter
        self.rotation, self.blur, self.elastic, self.max_class_share = rotation, blur, elastic, max_class_share
        self.vertical_flip, self.turns = vertical_flip, turns
        self.extra = Extra(transforms) if transforms else None
        self.border_weight, self.border_sigma = border_weight, border_sigma
        folder = None if cache in (None, "memory") else Path(str(cache)).expanduser()
        self.in_memory = cache == "memory"
        self.cache = Cache(folder, cache_budget) if cache else None
        self.weight_maps = Cache(folder, cache_budget) if border_weight else None
        self.test_split, self.check, self.download = test_split, check, download
        if value_range is not None and (len(value_range) != 2 or not value_range[0] < value_range[1]):
            raise UserError(f"data.value_range is the lowest and the highest value, as [0, 4095], got {value_range}")
        self.value_range = None if value_range is None else [float(value) for value in value_range]
        self.resize_masks, self.mask_threshold, self.replace_nan = resize_masks, mask_threshold, replace_nan
        self.datasets: dict[str, SegmentationDataset] = {}  # by stage: train, val, test, predict

    @property
    def num_classes(self) -> int:
        """Number of classes, without the ignored label."""
        return len(self.class_names)

    @property
    def stated_mean_std(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and std per band that this data set states as its own facts; None where it states none."""
        own = self.mean is not SegmentationDataModule.mean and len(self.mean) > 0
        return (self.mean, self.std) if own else None

    def samples(self, split: str) -> list[Sample]:
        """List a split (``train``, ``val`` or ``test``) in a fixed order. Each data set overrides this method.

        A file without a partner is listed too, with a path that does not exist in place of the partner's.
        """
        if type(self) is SegmentationDataModule:
            raise UserError(
                "no data set is named: add --data CLASS, such as --data Folder for your own images and masks"
            )
        raise NotImplementedError(f"{type(self).__name__} does not override samples()")

    def prepare_data(self) -> None:
        """Fetch the data set if `download` is set; Lightning calls this in one process only.

        Raises:
            UserError: if the data set has no public archive, `root` is not set, a download fails, or an archive is
                damaged.
        """
        if not self.download:
            return
        if not self.archives:
            raise UserError(f"{type(self).__name__} cannot be downloaded for you: {self.source}")
        if self.root is None:
            raise UserError("data.download needs data.root, the folder to put the data set in")
        for archive in self.archives:
            fetch(archive, self.root)

    def setup(self, stage: str) -> None:
        """List, check and keep the splits that a stage reads.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            UserError: if a folder is missing, a split is empty, or `look_at_files` finds an error.
        """
        if stage == "predict" and self.predict_dir is not None:
            splits = {"predict": "predict"}
            self.datasets["predict"] = SegmentationDataset(
                list_photos(self.predict_dir, self.bands), label_table=None, replace_nan=self.replace_nan
            )
        elif not self.class_names:
            raise UserError(UNNAMED)
        else:
            fixed = {"fit": {"train": "train", "val": "val"}, "validate": {"val": "val"}}
            splits = fixed.get(stage, {stage: self.test_split})
            check_names(self.class_names)
            for role, split in splits.items():
                self.open_split(role, split)
        counts = self.look_at_files(splits)
        image, _ = self.datasets[next(iter(splits))].read(0)
        self.in_channels = len(image)
        if "train" in splits:
            self.find_value_range(image)
            self.augment(image, counts["train"])

    def open_split(self, role: str, split: str) -> None:
        """List a split and keep it as the data set of a role.

        Args:
            role: ``train``, ``val``, ``test`` or ``predict``.
            split: name of the split that has this role.
        """
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.datasets[role] = SegmentationDataset(
            self.listed(split),
            self.label_table(),
            seed=seed,
            cache=self.cache,
            weight_maps=self.weight_maps,
            resize_masks=self.resize_masks,
            replace_nan=self.replace_nan,
        )

    def augment(self, image: Tensor, counts: Tensor) -> None:
        """Give the training split its augmentation and its pixel weights.

        Args:
            image: any training image, see `train_transform`.
            counts: pixels of each class in the training split, see `compute_weight_maps`.
        """
        dataset = self.datasets["train"]
        dataset.transform = self.train_transform(image)
        if self.border_weight:
            self.compute_weight_maps(dataset, counts)
        for epoch in range(3 if self.extra else 0):  # a transform that fails should fail now
            dataset[epoch, 0]

    def find_value_range(self, image: Tensor) -> None:
        """Find one range of values for RGB or grey images of more than 8 bits, from files of the training split.

        Args:
            image: any training image.
        """
        if self.bands is not None or self.value_range is not None or image.dtype == torch.uint8:
            return
        dataset = self.datasets["train"]
        indices = range(0, len(dataset), -(-len(dataset) // (self.check or len(dataset))))

        def limits(index: int) -> tuple[float, float]:
            values = dataset.stored(index)[0].numpy()
            values = values[np.isfinite(values)]
            return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)

        with ThreadPoolExecutor(max(2, self.num_workers)) as pool:
            lows, highs = zip(*pool.map(limits, indices), strict=True)
        self.value_range = range_of(image.dtype, min(lows), max(highs))
        rank_zero_info(
            f"the images hold {str(image.dtype).removeprefix('torch.')}, and {len(indices)} of {len(dataset)} training "
            f"images values from {min(lows):g} to {max(highs):g}: data.value_range is {self.value_range}"
        )

    def label_table(self) -> LabelTable:
        """Build the table of the label of each stored mask value: 255 for ignored, -1 for values without a class.

        Raises:
            UserError: if `label_map` names a label that is no class.
        """
        pairs = self.label_map or {label: label for label in range(self.num_classes)}
        for value, label in pairs.items():
            if not (0 <= label < self.num_classes or label == IGNORE):
                raise UserError(
                    f"data.label_map gives the value {value} the label {label}, but the {self.num_classes} classes "
                    f"have the labels 0 to {self.num_classes - 1}"
                )
        voids = (*self.void_values, *(() if IGNORE in pairs else (IGNORE,)))
        return LabelTable({**pairs, **dict.fromkeys(voids, IGNORE)})

    def listed(self, split: str) -> list[Sample]:
        """List a split.

        Raises:
            UserError: if the split is empty, or `mask_threshold` is set for other than two classes.
        """
        if self.mask_threshold is not None and self.num_classes not in (0, 2):
            raise UserError(
                f"data.mask_threshold separates two classes, and data.class_names has {self.num_classes}: leave it out"
            )
        samples = self.samples(split)
        if self.mask_threshold is not None:
            samples = [replace(sample, threshold=self.mask_threshold) for sample in samples]
        if not samples:
            raise UserError(
                f"the split '{split}' of {type(self).__name__} ({self.root}) is empty: put images and masks there"
            )
        return samples

    def look_at_files(self, splits: dict[str, str]) -> dict[str, Tensor]:
        """Decode files by the rules of ``check_data``, so that a bad file ends the run before training starts.

        Args:
            splits: role -> split of the data sets to look at.

        Returns:
            by role, pixels of each class in the decoded files, int64 ``(K,)``.

        Raises:
            UserError: for what ``check_data`` calls an error; its warnings are printed.
        """
        from .check import look_before  # `check` imports this file

        everything = {"train"} if self.border_weight else set()
        wanted = {r: None if self.in_memory or r in everything else self.check for r in splits}
        return {role: torch.from_numpy(counts) for role, counts in look_before(self, splits, wanted).items()}

    def compute_weight_maps(self, dataset: SegmentationDataset, counts: Tensor) -> None:
        """Compute the pixel weights of all training masks, so that no epoch waits for them.

        Args:
            dataset: the training split.
            counts: its pixels per class, ``(K,)``; the class weights are the inverse of the classes' shares.
        """
        present = counts[: self.num_classes].double()
        balance = present.sum() / (present > 0).sum() / present.clamp(min=1)
        rule = BorderWeight(self.border_weight, self.border_sigma, tuple(balance.tolist()))

        def compute(index: int) -> None:
            mask = dataset.read(index)[1]
            if mask is not None:
                dataset.pixel_weight(index, mask, rule)

        rank_zero_info(f"computing {len(dataset)} weight maps")
        with ThreadPoolExecutor(max_workers=max(2, self.num_workers)) as pool:
            list(pool.map(compute, range(len(dataset))))
        dataset.weight_rule = rule

    def train_transform(self, image: Tensor) -> v2.Transform:
        """Build the augmentation: deform, rotate, turn, scale and crop, flip, jitter, blur, and then `transforms`.

        Args:
            image: any image of the data set, ``(C, H, W)``; its number of bands, its type and its size count.

        Raises:
            UserError: if quarter turns would give the images of one batch different sizes.
        """
        fill = self.fill_colour(image)
        steps: list[v2.Transform] = []
        if self.elastic:
            steps.append(ElasticDeformation(self.elastic, fill=fill))
        if self.rotation:
            steps.append(RandomRotation(self.rotation, fill=fill))
        if self.turns:
            steps.append(RandomTurn(self.turns))
        height, width = image.shape[-2:]
        if self.turns == 90 and height != width and not self.crop_size and not self.extra and self.batch_size > 1:
            raise UserError(
                f"data.turns 90 would make some of the images of {width} x {height} pixels {height} x {width}, and a "
                "batch needs one size: set data.crop_size, or data.turns 180"
            )
        if self.crop_size is not None:
            steps.append(RandomScaleCrop(self.crop_size, self.scale_range, fill, self.max_class_share))
        if self.flip:
            steps.append(RandomHorizontalFlip())
        if self.vertical_flip:
            steps.append(RandomVerticalFlip())
        if self.color_jitter and len(image) == 3 and image.dtype == torch.uint8:
            c = self.color_jitter
            steps.append(v2.ColorJitter(brightness=c, contrast=c, saturation=c, hue=c / 4))
        elif self.color_jitter:
            steps.append(BandJitter(self.color_jitter, self.value_range))
        if self.blur:
            steps.append(v2.RandomApply([v2.GaussianBlur(5, 1.1)], p=self.blur))
        if self.extra is not None:
            steps.append(self.extra)
        return v2.Compose(steps or [v2.Identity()])

    def fill_colour(self, image: Tensor) -> list[float]:
        """Return the colour outside the images in their own units: the mean, or 0 where it has other bands."""
        if len(self.mean) != len(image):
            return [0.0] * len(image)
        floats = image.is_floating_point()
        low, high = self.value_range or (0, 1 if floats else torch.iinfo(image.dtype).max)
        colour = [low + (high - low) * m for m in self.mean]
        return colour if floats else [float(round(value)) for value in colour]

    @property
    def world_size(self) -> int:
        """Number of processes of the run, 1 without a trainer."""
        return self.trainer.world_size if self.trainer else 1

    def loader(self, role: str) -> DataLoader:
        """Build the loader of a role: ``train``, ``val``, ``test`` or ``predict``.

        Raises:
            UserError: if the trainer's `overfit_batches` is less than one batch.
            UserError: if there are fewer images than processes. Every process raises it, or the others would wait for
                the one that has no image.
        """
        dataset, train = self.datasets[role], role == "train"
        if len(dataset) < self.world_size:
            raise UserError(
                f"the split for '{role}' has {len(dataset)} images for {self.world_size} processes: use fewer devices"
            )
        rank = self.trainer.global_rank if self.trainer else 0
        sampler: Sampler = EpochSampler(len(dataset), train, dataset.seed, rank, self.world_size)
        batch_size = self.batch_size if train else self.eval_batch_size
        if dataset.label_table is None:
            batch_size = 1  # photos differ in size
        overfit = getattr(self.trainer, "overfit_batches", 0) if role in ("train", "val") else 0
        if overfit:
            sampler = SequentialSampler(dataset)  # Lightning asks for it; the data set takes its keys for epoch 0
            count = len(dataset) // batch_size if train else -(-len(dataset) // batch_size)
            if isinstance(overfit, float) and overfit * count < 1:
                raise UserError(
                    f"trainer.overfit_batches {overfit} of the {count} batches of '{role}' is less than one batch: set "
                    "it to 1"
                )
        return (LateLoader if train else DataLoader)(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=train,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0 and role in ("train", "val"),
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )

    def train_dataloader(self) -> DataLoader:
        """Build the loader of shuffled, augmented images; the last incomplete batch is dropped."""
        return self.loader("train")

    def val_dataloader(self) -> DataLoader:
        """Build the loader of whole validation images in order."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        """Build the loader of whole images of `test_split` in order."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Build the loader of whole images of `predict_dir`, or without it of `test_split`."""
        return self.loader("predict")


def check_names(names: Sequence[str]) -> None:
    """Check that tables, columns and pictures can tell classes apart by their names.

    Raises:
        UserError: if there are more than 255 names, or a name is empty, occurs twice, or holds a slash or a control
            character.
    """
    if len(names) > IGNORE:
        raise UserError(
            f"there are {len(names)} classes, but at most {IGNORE} can be told apart: name fewer in data.class_names, "
            "and give several stored values one label in data.label_map"
        )
    label_of: dict[str, int] = {}
    for label, name in enumerate(str(name).strip() for name in names):
        if not name:
            raise UserError(f"the class of label {label} has no name: name it in data.class_names")
        if any(sign in "/\\\x7f" or sign < " " for sign in name):
            raise UserError(
                f"the class name {name!r} has a slash or a control character, which splits the names of metrics: "
                "write it another way in data.class_names"
            )
        if name in label_of:
            raise UserError(
                f"the classes of the labels {label_of[name]} and {label} are both called '{name}': give each its own "
                "name in data.class_names, or both one label in data.label_map"
            )
        label_of[name] = label


def range_of(dtype: torch.dtype, low: float, high: float) -> list[float]:
    """Return the range of values that a set of images is scaled by.

    Args:
        dtype: type of the images.
        low: the lowest value in the files.
        high: the highest value in the files.
    """
    if dtype in (torch.uint8, torch.uint16):
        return [0.0, float(2 ** max(1, int(high).bit_length()) - 1)]
    if dtype.is_floating_point and low >= 0 and high <= 1:
        return [0.0, 1.0]
    return [low, high if high > low else low + 1]


def voc_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Build distinct colours for any number of classes: PASCAL VOC's map spreads the bits of a label over RGB."""
    colours = []
    for label in range(num_classes):
        red = green = blue = 0
        for position in range(8):
            bits = label >> 3 * position
            red |= (bits & 1) << 7 - position
            green |= (bits >> 1 & 1) << 7 - position
            blue |= (bits >> 2 & 1) << 7 - position
        colours.append((red, green, blue))
    return colours
