"""What every data set shares: reading pairs, joint transforms, samplers, loaders, and checks before training.

A data set is a subclass of `SegmentationDataModule` that states its facts as class attributes and lists its files in
`samples`. A `Sample` knows how to read itself, so an odd file format is a small subclass of it.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from .transforms import IGNORE, RandomScaleCrop

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif")


def read_image(path: Path) -> Tensor:
    """Decode a picture of any mode as RGB, turned upright by its EXIF orientation.

    Returns:
        ``(3, H, W)`` uint8; a palette, grey, alpha or CMYK picture is converted, deeper grey as `to_8_bits` says.

    Raises:
        ValueError: if the file cannot be decoded; the message names it.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode[0] in "IF":  # more than 8 bits
                picture = Image.fromarray(to_8_bits(np.asarray(picture)))
            pixels = np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): replace it or take it out") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Bring deep grey to uint8: floats of at most 1 times 255, integers above 255 by their upper byte of 16 bits."""
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = pixels * 255 if pixels.max(initial=0) <= 1 else pixels
    elif pixels.dtype == np.uint16 or pixels.max(initial=0) > 255:
        pixels = pixels >> 8
    return pixels.clip(0, 255).round().astype(np.uint8)


def read_mask(path: Path) -> Tensor:
    """Decode a mask whose pixel values are labels; the indices of a palette picture count as labels.

    Returns:
        ``(H, W)`` uint8, or int32 where the file holds more than 8 bits, the values as stored.

    Raises:
        ValueError: if the file cannot be decoded, or holds colours instead of labels; the message names it.
    """
    try:
        with Image.open(path) as file:
            mode, values = file.mode, np.array(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a mask ({error}): replace it or take it out") from error
    if values.ndim != 2:
        raise ValueError(
            f"{path} is a mask in colour (mode {mode}), not in labels: save it with one number per class and pixel "
            "(README, 'Masks in colour', has the lines that convert a folder by its class map)"
        )
    return torch.from_numpy(values if values.dtype == np.uint8 else values.astype(np.int32))


@dataclass(frozen=True)
class Sample:
    """One picture and its labels, as files. Subclasses override `read` where they come from elsewhere.

    Args:
        name: unique within its split, and a relative path without suffix: predictions are written under it.
        image: the picture's file.
        mask: the labels' file; None where nothing is labelled.
    """

    name: str
    image: Path | None = None
    mask: Path | None = None

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Decode both files: image ``(C, H, W)`` in its storage type, mask ``(H, W)`` with the values as stored."""
        if self.image is None:
            raise ValueError(f"sample {self.name} has no image file")
        return read_image(self.image), None if self.mask is None else read_mask(self.mask)


class SegmentationDataset(Dataset):
    """One split. Its keys are ``(epoch, index)``, and each item draws its randomness from (seed, epoch, index) alone.

    So a picture's augmentation depends neither on the number of workers or processes nor on what was drawn before it.

    Args:
        samples: what to read.
        labels: label of each stored mask value, -1 where it has none; see `SegmentationDataModule.label_table`.
        transform: joint transform of a ``tv_tensors.Image`` and a ``tv_tensors.Mask``.
        seed: the run's seed.

    Returns:
        items ``{"image": (C, H, W), "mask": int64 (H, W), "name": str, "size": (H, W) as read}``, without ``mask``
        where the sample has none.
    """

    def __init__(
        self, samples: Sequence[Sample], labels: Tensor, transform: v2.Transform | None = None, seed: int = 0
    ) -> None:
        self.samples, self.labels, self.transform, self.seed = samples, labels, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def has_masks(self) -> bool:
        """Whether this is a split of a data set; a folder of photos may hold any sizes."""
        return len(self.labels) > 0

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Read a pair and bring stored values to labels: 0 to K - 1, or 255 for ignored.

        Raises:
            ValueError: for sizes that differ or a value that stands for no class; the message names file and value.
        """
        sample = self.samples[index]
        image, values = sample.read()
        if values is None:
            return image, None
        where = sample.mask or sample.name
        if image.shape[-2:] != values.shape:
            raise ValueError(
                f"{where} is {values.shape[1]} x {values.shape[0]} pixels but its image {sample.image} is "
                f"{image.shape[2]} x {image.shape[1]}: masks must have their image's size"
            )
        mask = self.labels[values.long().clamp(-1, len(self.labels) - 1)]  # both ends of the table mean: no class
        if (mask < 0).any():
            bad = int(values[mask < 0].max())
            count = int(((self.labels >= 0) & (self.labels != IGNORE)).sum())
            raise ValueError(
                f"{where} holds the value {bad}, which stands for none of the {count} classes: name it in "
                "data.void_values to ignore it, or give it a label in data.label_map"
            )
        return image, mask.byte()

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        image, mask = self.read(index)
        item: dict[str, Any] = {"name": self.samples[index].name, "size": tuple(image.shape[-2:])}
        if self.transform is not None and mask is not None:
            seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0]
            generator = torch.default_generator  # torch.manual_seed would also queue a call for every GPU
            state = generator.get_state()
            generator.manual_seed(int(seed))
            image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
            generator.set_state(state)
        item["image"] = image.as_subclass(torch.Tensor).contiguous()
        if mask is not None:
            item["mask"] = mask.as_subclass(torch.Tensor).long()
        return item


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack items to a batch: tensors along a new first axis, names and sizes as lists.

    Raises:
        ValueError: if the pictures differ in size.
    """
    sizes = sorted({tuple(item["image"].shape[-2:]) for item in items})
    if len(sizes) > 1:
        raise ValueError(
            f"pictures of different sizes in one batch (height x width {sizes[0][0]} x {sizes[0][1]} and "
            f"{sizes[1][0]} x {sizes[1][1]}): set data.crop_size for training, and data.eval_batch_size: 1"
        )
    tensors = [key for key in ("image", "mask") if key in items[0]]
    batch: dict[str, Any] = {key: torch.stack([item[key] for item in items]) for key in tensors}
    return batch | {key: [item[key] for item in items] for key in ("name", "size")}


class EpochSampler(DistributedSampler):
    """Yields ``(epoch, index)``, because persistent workers never learn of a new epoch.

    In training every process gets the same number of samples, the rest of the shuffled list is left out of this epoch.
    In evaluation nothing is repeated and nothing is left out, so metrics are exact: Lightning's own sampler repeats
    pictures to make the processes' shares even. A subclass of ``DistributedSampler`` so that Lightning lets it stand.

    Args:
        length: number of samples.
        train: shuffle, with the order drawn from (seed, epoch).
        seed: the run's seed.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, length: int, train: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(length), world_size, rank, shuffle=train, seed=seed)  # type: ignore[arg-type]
        self.length, self.train = length, train

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        order = list(range(self.length))
        if self.train:
            generator = torch.Generator()
            generator.manual_seed(int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]))
            order = torch.randperm(self.length, generator=generator).tolist()
            order = order[: self.length // self.num_replicas * self.num_replicas]
        return iter([(self.epoch, index) for index in order[self.rank :: self.num_replicas]])

    def __len__(self) -> int:
        if self.train:
            return self.length // self.num_replicas
        return len(range(self.rank, self.length, self.num_replicas))


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
        color_jitter: strength of random brightness, contrast and saturation, 0 to 1; hue gets a quarter of it.
        test_split: the split that `test` reads, ``val`` where the test labels are not public.
        predict_dir: folder of images for `predict`, any sizes and modes, searched with its subfolders; without it
            `predict` reads the test split's images.
        check: how many files of a split are decoded and looked at before a run, evenly spread; None for all, 0 for
            none.
    """

    class_names: Sequence[str] = ()
    palette: Sequence[Sequence[int]] = ()  # one RGB colour per class
    void_values: Sequence[int] = ()  # stored values that are ignored, besides 255
    label_map: dict[int, int] | None = None  # stored value -> label, where they are not the same
    mean: Sequence[float] = (0.485, 0.456, 0.406)  # of pixels scaled to 0..1; the colour around crops
    std: Sequence[float] = (0.229, 0.224, 0.225)
    source: str = ""
    licence: str = ""
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
        test_split: str = "test",
        predict_dir: str | os.PathLike | None = None,
        check: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise ValueError(f"batch sizes must be positive, got {batch_size} and {eval_batch_size}")
        self.root = None if root is None else Path(root).expanduser()
        self.predict_dir = None if predict_dir is None else Path(predict_dir).expanduser()
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.crop_size, self.scale_range, self.flip, self.color_jitter = crop_size, scale_range, flip, color_jitter
        self.test_split, self.check = test_split, check
        self.datasets: dict[str, SegmentationDataset] = {}  # by stage: train, val, test, predict

    @property
    def num_classes(self) -> int:
        """Number of classes, without the ignored label."""
        return len(self.class_names)

    def samples(self, split: str) -> list[Sample]:
        """List a split (``train``, ``val`` or ``test``) in a fixed order. Each data set overrides this."""
        raise NotImplementedError(f"{type(self).__name__} lists no samples")

    def train_transform(self) -> v2.Transform:
        """Scale and crop, flip, colour jitter, as the arguments say; override for more."""
        steps: list[v2.Transform] = []
        if self.crop_size is not None:
            fill = [round(255 * m) for m in self.mean]
            steps.append(RandomScaleCrop(self.crop_size, self.scale_range, fill))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.color_jitter:
            c = self.color_jitter
            steps.append(v2.ColorJitter(brightness=c, contrast=c, saturation=c, hue=c / 4))
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
                raise ValueError(f"data.label_map gives {value} the label {label}, but there are {self.num_classes}")
        voids = (*self.void_values, *(() if IGNORE in pairs else (IGNORE,)))
        beyond = [value for value in (*pairs, *voids) if not 0 <= value < 65536]
        if beyond:
            raise ValueError(f"data.void_values and data.label_map take values from 0 to 65535, got {beyond[0]}")
        for value, label in {**pairs, **dict.fromkeys(voids, IGNORE)}.items():
            table[value] = label
        return table

    def setup(self, stage: str) -> None:
        """List, check and keep the splits that a stage reads.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            FileNotFoundError: if a folder or file is missing.
            ValueError: if a split is empty or smaller than one batch, the training masks hold 0 and 255 only, or a
                file is bad; the message names it.
        """
        if stage == "predict" and self.predict_dir is not None:
            nothing = torch.empty(0, dtype=torch.int16)
            self.datasets["predict"] = SegmentationDataset(list_photos(self.predict_dir), nothing)
            self.look_at_files("predict")
            return
        if not self.class_names:
            raise ValueError(f"{type(self).__name__} knows no classes: name them in data.class_names")
        wanted = {
            "fit": {"train": "train", "val": "val"},
            "validate": {"val": "val"},
            "test": {"test": self.test_split},
            "predict": {"predict": self.test_split},
        }[stage]
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        labels = self.label_table()
        for role, split in wanted.items():
            samples = self.samples(split)
            if not samples:
                raise ValueError(f"the split '{split}' of {type(self).__name__} ({self.root}) is empty")
            transform = self.train_transform() if role == "train" else None
            self.datasets[role] = SegmentationDataset(samples, labels, transform, seed)
            self.look_at_files(role)
        share = len(self.datasets["train"]) // self.world_size if stage == "fit" else self.batch_size
        if share < self.batch_size:
            raise ValueError(
                f"the split 'train' has {share} images per process, fewer than one batch of {self.batch_size}: "
                "lower data.batch_size"
            )

    def look_at_files(self, role: str) -> None:
        """Decode files of a split in threads before any training time is spent, and raise what is wrong with them."""
        dataset = self.datasets[role]
        on_disk = [i for i, sample in enumerate(dataset.samples) if sample.image is not None]
        if not on_disk or self.check == 0:
            return
        picked = on_disk[:: -(-len(on_disk) // (self.check or len(on_disk)))]
        if len(picked) > 2000:
            rank_zero_info(f"looking at {len(picked)} files of '{role}'; data.check: 2000 looks at so many")

        def labels_of(index: int) -> set[int]:
            mask = dataset.read(index)[1]
            return set() if mask is None else set(torch.bincount(mask.flatten()).nonzero()[:, 0].tolist())

        with ThreadPoolExecutor(max_workers=max(2, self.num_workers)) as pool:
            seen = set().union(*pool.map(labels_of, picked))
        if role == "train" and seen == {0, IGNORE} and self.num_classes > 1:  # nothing to learn; elsewhere it may be so
            raise ValueError(
                f"the masks of {dataset.samples[0].mask} and its split hold 0 and 255 only, and 255 means 'ignored': "
                "if 255 is your foreground, set data.label_map: {0: 0, 255: 1}"
            )

    @property
    def world_size(self) -> int:
        """Number of processes of the run, 1 without a trainer."""
        return self.trainer.world_size if self.trainer else 1

    def loader(self, role: str) -> DataLoader:
        """Build the loader of a role: train, val, test or predict.

        Raises:
            ValueError: if there are fewer images than processes.
        """
        dataset, train = self.datasets[role], role == "train"
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = EpochSampler(len(dataset), train, dataset.seed, rank, self.world_size)
        if len(dataset) < self.world_size:  # on every process, else the others would wait for the one that has none
            raise ValueError(f"the split for '{role}' has {len(dataset)} images for {self.world_size} processes")
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


def files_under(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Find the pictures below a folder by name: relative path without suffix, or with it for all if two would collide.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist")
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    names = [p.relative_to(folder).with_suffix("").as_posix() for p in paths]
    if len({name.lower() for name in names}) < len(names):
        names = [p.relative_to(folder).as_posix() for p in paths]
    return dict(zip(names, paths, strict=True))


def voc_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Distinct colours for any number of classes: PASCAL VOC's colour map, which spreads a label's bits over RGB."""
    colours = []
    for label in range(num_classes):
        bits = [[(label >> (3 * position + channel)) & 1 for position in range(8)] for channel in range(3)]
        red, green, blue = (sum(bit << (7 - position) for position, bit in enumerate(channel)) for channel in bits)
        colours.append((red, green, blue))
    return colours


def list_photos(folder: Path) -> list[Sample]:
    """List a folder of unlabelled images for `predict`.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it holds no image.
    """
    photos = files_under(folder)
    if not photos:
        raise ValueError(f"the folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return [Sample(name, path) for name, path in photos.items()]
