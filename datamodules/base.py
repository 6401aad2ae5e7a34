"""What every data set shares: its facts, joint transforms, loaders, and checks before training.

A data set is a subclass of `SegmentationDataModule` that states its facts as class attributes and lists its files in
`samples`. A `Sample` knows how to read itself, so an odd file format is a small subclass of it.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from .dataset import Cache, EpochSampler, SegmentationDataset, collate
from .download import Archive, fetch
from .errors import UserError
from .files import Sample, list_photos
from .transforms import (
    IGNORE,
    BandJitter,
    ElasticDeformation,
    RandomHorizontalFlip,
    RandomRotation,
    RandomScaleCrop,
)
from .weight_map import border_weights


@dataclass(frozen=True)
class BorderWeight:
    """`border_weights` with its constants, for one data set."""

    w0: float
    sigma: float
    class_weights: tuple[float, ...]

    def __call__(self, mask: Tensor, instances: Tensor | None) -> Tensor:
        return border_weights(mask, instances, self.w0, self.sigma, self.class_weights)


class SegmentationDataModule(L.LightningDataModule):
    """Loaders for one data set. Subclasses state its facts and list its files in `samples`.

    Args:
        root: the data set's folder.
        batch_size: training images per process and step.
        eval_batch_size: images per step in validation, test and predict; above 1 only if all have one size.
        num_workers: loader processes; 0 reads in the main process.
        crop_size: training window in pixels, one number or (height, width); None trains on whole images.
        scale_range: random scaling before the crop, smallest and largest factor.
        flip: mirror half of the training images left to right.
        color_jitter: strength of random brightness and contrast, 0 to 1, per band; pictures of three bands of 8 bits
            also change in saturation, and in hue by a quarter of it.
        rotation: largest random rotation to either side, in degrees (PSPNet: 10).
        blur: share of the training images that get PSPNet's Gaussian blur.
        elastic: standard deviation of U-Net's elastic deformation in pixels (the paper: 10).
        max_class_share: a crop in which one class has more than this share is drawn again (usual: 0.75).
        border_weight: w0 of U-Net's weight map (the paper: 10), which the batch then holds as ``weight``; 0 for none.
            It balances the classes too: do not give the loss class weights besides.
        border_sigma: its sigma, in pixels.
        cache: keep decoded files in ``memory``, or as files in the folder named; None decodes them at every use.
        cache_budget: for `cache`, and again for weight maps, in GiB.
        test_split: the split that `test` reads, ``val`` where the test labels are not public.
        predict_dir: folder of images for `predict`, any sizes and modes, searched with its subfolders; without it
            `predict` reads the test split's images.
        check: how many files of a split are decoded and looked at before a run, evenly spread; None for all, 0 for
            none. The command `check_data` looks at all, and at more.
        download: fetch the data set if it is not there, where its owner allows that.
    """

    class_names: Sequence[str] = ()
    palette: Sequence[Sequence[int]] = ()  # one RGB colour per class
    void_values: Sequence[int] = ()  # stored values that are ignored, besides 255
    label_map: dict[int, int] | None = None  # stored value -> label, where they are not the same
    bands: tuple[int, ...] | None = None  # of the files, as stored; None: RGB with 8 bits
    in_channels = 3  # of the images; follows `bands`, and the files once they are read
    mean: Sequence[float] = (0.485, 0.456, 0.406)  # of pixels scaled to 0..1; the colour around crops
    std: Sequence[float] = (0.229, 0.224, 0.225)
    source: str = ""  # how to get it
    licence: str = ""
    citation: str = ""
    disk: str = ""  # what it takes
    archives: Sequence[Archive] = ()  # what may be fetched
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
        color_jitter: float = 0.0,
        rotation: float = 0.0,
        blur: float = 0.0,
        elastic: float = 0.0,
        max_class_share: float = 1.0,
        border_weight: float = 0.0,
        border_sigma: float = 5.0,
        cache: str | None = None,
        cache_budget: float = 2.0,
        test_split: str = "test",
        predict_dir: str | os.PathLike | None = None,
        check: int | None = 500,
        download: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise UserError(f"batch sizes must be positive, got {batch_size} and {eval_batch_size}")
        if max_class_share < 1 and crop_size is None:
            raise UserError(f"data.max_class_share {max_class_share} chooses crops: set data.crop_size too")
        self.root = None if root is None else Path(root).expanduser()
        self.predict_dir = None if predict_dir is None else Path(predict_dir).expanduser()
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.crop_size, self.scale_range, self.flip, self.color_jitter = crop_size, scale_range, flip, color_jitter
        self.rotation, self.blur, self.elastic, self.max_class_share = rotation, blur, elastic, max_class_share
        self.border_weight, self.border_sigma = border_weight, border_sigma
        folder = None if cache in (None, "memory") else Path(str(cache)).expanduser()
        self.in_memory = cache == "memory"
        self.cache = Cache(folder, cache_budget) if cache else None
        self.weights = Cache(folder, cache_budget) if border_weight else None
        self.test_split, self.check, self.download = test_split, check, download
        self.datasets: dict[str, SegmentationDataset] = {}  # by stage: train, val, test, predict

    @property
    def num_classes(self) -> int:
        """Number of classes, without the ignored label."""
        return len(self.class_names)

    def samples(self, split: str) -> list[Sample]:
        """List a split (``train``, ``val`` or ``test``) in a fixed order. Each data set overrides this.

        A file without its partner is listed too, beside the path where the partner should be.
        """
        raise NotImplementedError(f"{type(self).__name__} lists no samples")

    def prepare_data(self) -> None:
        """Fetch what `download` asks for, in one process.

        Raises:
            UserError: if the data set may not be fetched, or came damaged.
            UserError: if the network does not let it through.
        """
        if not self.download:
            return
        if not self.archives:
            raise UserError(f"{type(self).__name__} cannot be downloaded for you: {self.source}")
        if self.root is None:
            raise UserError("data.download needs data.root: the folder to put it in")
        for archive in self.archives:
            fetch(archive, self.root)

    def train_transform(self, image: Tensor) -> v2.Transform:
        """Deform, rotate, scale and crop, flip, jitter, blur, as the arguments say; override for more.

        Args:
            image: any of the data set, for its number of bands and type.
        """
        scale = 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
        fill = [scale * m for m in self.mean] if len(self.mean) == len(image) else [0.0] * len(image)
        fill = fill if image.is_floating_point() else [float(round(value)) for value in fill]
        steps: list[v2.Transform] = []
        if self.elastic:
            steps.append(ElasticDeformation(self.elastic, fill=fill))
        if self.rotation:
            steps.append(RandomRotation(self.rotation, fill=fill))
        if self.crop_size is not None:
            steps.append(RandomScaleCrop(self.crop_size, self.scale_range, fill, self.max_class_share))
        if self.flip:
            steps.append(RandomHorizontalFlip())
        if self.color_jitter and len(image) == 3 and image.dtype == torch.uint8:
            c = self.color_jitter
            steps.append(v2.ColorJitter(brightness=c, contrast=c, saturation=c, hue=c / 4))
        elif self.color_jitter:
            steps.append(BandJitter(self.color_jitter))
        if self.blur:
            steps.append(v2.RandomApply([v2.GaussianBlur(5, 1.1)], p=self.blur))
        return v2.Compose(steps or [v2.Identity()])

    def label_table(self) -> Tensor:
        """The label of each stored mask value from 0 to 65535: 255 for ignored, -1 for values without a class.

        Returns:
            int16 ``(65537,)``; the last entry, -1, is for values beyond.
        """
        table = torch.full((65537,), -1, dtype=torch.int16)
        pairs = self.label_map or {label: label for label in range(self.num_classes)}
        for value, label in pairs.items():
            if not (0 <= label < self.num_classes or label == IGNORE):
                raise UserError(f"data.label_map gives {value} the label {label}, but there are {self.num_classes}")
        voids = (*self.void_values, *(() if IGNORE in pairs else (IGNORE,)))
        beyond = [value for value in (*pairs, *voids) if not 0 <= value < 65536]
        if beyond:
            raise UserError(f"data.void_values and data.label_map take values from 0 to 65535, got {beyond[0]}")
        for value, label in {**pairs, **dict.fromkeys(voids, IGNORE)}.items():
            table[value] = label
        return table

    def setup(self, stage: str) -> None:
        """List, check and keep the splits that a stage reads.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            UserError: if a folder or file is missing.
            UserError: if a split is empty or smaller than one batch, the training masks hold 0 and 255 only, or a
                file is bad; the message names it.
        """
        if stage == "predict" and self.predict_dir is not None:
            nothing = torch.empty(0, dtype=torch.int16)
            self.datasets["predict"] = SegmentationDataset(list_photos(self.predict_dir, self.bands), nothing)
            self.in_channels = len(self.datasets["predict"].read(0)[0])
            self.look_at_files("predict")
            return
        if not self.class_names:
            raise UserError(f"{type(self).__name__} knows no classes: name them in data.class_names")
        wanted = {
            "fit": {"train": "train", "val": "val"},
            "validate": {"val": "val"},
            "test": {"test": self.test_split},
            "predict": {"predict": self.test_split},
        }[stage]
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        labels = self.label_table()
        for role, split in wanted.items():
            samples = self.listed(split)
            dataset = SegmentationDataset(samples, labels, seed=seed, cache=self.cache, weights=self.weights)
            self.datasets[role] = dataset
            image, _ = dataset.read(0)
            self.in_channels = len(image)
            counts = self.look_at_files(role)
            if role == "train":
                dataset.transform = self.train_transform(image)
                if self.border_weight:
                    self.weigh(dataset, counts)
        share = len(self.datasets["train"]) // self.world_size if stage == "fit" else self.batch_size
        if share < self.batch_size:
            raise UserError(
                f"the split 'train' has {share} images per process, fewer than one batch of {self.batch_size}: "
                "lower data.batch_size"
            )

    def listed(self, split: str) -> list[Sample]:
        """List a split whose files are all there, and say where it differs from the published one.

        Raises:
            UserError: if it is empty, or a file of it has no partner; the message names the first.
        """
        samples = self.samples(split)
        if not samples:
            raise UserError(f"the split '{split}' of {type(self).__name__} ({self.root}) is empty")
        lonely = [text for sample in samples if (text := sample.missing()) is not None]
        if lonely:
            raise UserError(lonely[0] + (f" (and {len(lonely) - 1} more like it)" if len(lonely) > 1 else ""))
        expected = self.expected_counts.get(split, len(samples))
        if len(samples) != expected:
            rank_zero_info(
                f"the split '{split}' of {type(self).__name__} has {len(samples)} images, {expected} are published"
            )
        return samples

    def look_at_files(self, role: str) -> Tensor:
        """Decode files of a split in threads before any training time is spent, and raise what is wrong with them.

        Returns:
            pixels per label, int64 ``(256,)``, of the files looked at.
        """
        dataset = self.datasets[role]
        everything = self.check is None or self.in_memory or (role == "train" and self.border_weight > 0)
        counted = len(dataset) if everything else self.check or 0
        on_disk = [i for i, sample in enumerate(dataset.samples) if sample.image is not None or everything]
        if not on_disk or counted == 0:
            return torch.zeros(256, dtype=torch.int64)
        picked = on_disk[:: -(-len(on_disk) // counted)]
        if len(picked) > 2000:
            rank_zero_info(f"looking at {len(picked)} files of '{role}'; data.check: 500 looks at so many")

        def count(index: int) -> Tensor:
            mask = dataset.read(index)[1]
            return torch.bincount(torch.empty(0, dtype=torch.int64) if mask is None else mask.flatten(), minlength=256)

        with ThreadPoolExecutor(max_workers=max(2, self.num_workers)) as pool:
            counts = sum(pool.map(count, picked), torch.zeros(256, dtype=torch.int64))
        seen = set(counts.nonzero()[:, 0].tolist())
        if role == "train" and seen == {0, IGNORE} and self.num_classes > 1:  # nothing to learn; elsewhere it may be so
            raise UserError(
                f"the masks of {dataset.samples[0].mask} and its split hold 0 and 255 only, and 255 means 'ignored': "
                "if 255 is your foreground, set data.label_map: {0: 0, 255: 1}"
            )
        return counts

    def weigh(self, dataset: SegmentationDataset, counts: Tensor) -> None:
        """Compute the weight maps of the training masks, balanced by the training set's pixels per class."""
        present = counts[: self.num_classes].double()
        balance = present.sum() / (present > 0).sum() / present.clamp(min=1)
        weigh = BorderWeight(self.border_weight, self.border_sigma, tuple(balance.tolist()))

        def compute(index: int) -> None:
            mask = dataset.read(index)[1]
            if mask is not None:
                dataset.weight(index, mask, weigh)

        rank_zero_info(f"computing {len(dataset)} weight maps")
        with ThreadPoolExecutor(max_workers=max(2, self.num_workers)) as pool:
            list(pool.map(compute, range(len(dataset))))
        dataset.weigh = weigh

    @property
    def world_size(self) -> int:
        """Number of processes of the run, 1 without a trainer."""
        return self.trainer.world_size if self.trainer else 1

    def loader(self, role: str) -> DataLoader:
        """Build the loader of a role: train, val, test or predict.

        Raises:
            UserError: if there are fewer images than processes.
        """
        dataset, train = self.datasets[role], role == "train"
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = EpochSampler(len(dataset), train, dataset.seed, rank, self.world_size)
        if len(dataset) < self.world_size:  # on every process, else the others would wait for the one that has none
            raise UserError(f"the split for '{role}' has {len(dataset)} images for {self.world_size} processes")
        return DataLoader(
            dataset,
            batch_size=self.batch_size if train else 1 if not dataset.has_masks else self.eval_batch_size,
            sampler=sampler,
            drop_last=train,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0 and role in ("train", "val"),
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented; the last incomplete batch is dropped."""
        return self.loader("train")

    def val_dataloader(self) -> DataLoader:
        """Whole images in order."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        """Whole images of `test_split` in order."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Whole images of `predict_dir`, or of `test_split` without it."""
        return self.loader("predict")


def voc_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Distinct colours for any number of classes: PASCAL VOC's colour map, which spreads a label's bits over RGB."""
    colours = []
    for label in range(num_classes):
        bits = [[(label >> (3 * position + channel)) & 1 for position in range(8)] for channel in range(3)]
        red, green, blue = (sum(bit << (7 - position) for position, bit in enumerate(channel)) for channel in bits)
        colours.append((red, green, blue))
    return colours
