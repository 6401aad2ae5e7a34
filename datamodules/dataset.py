"""One split of a data set as a PyTorch data set, its cache, its sampler, and the function that builds a batch."""

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2

from .decode import Sample
from .errors import UserError
from .transforms import IGNORE, PixelWeight

WeightRule = Callable[[Tensor, Tensor | None], Tensor]  # labels and instances (H, W) -> the loss's weights (H, W)


class Cache:
    """Tensors that are computed once and kept, in memory or in a folder, until a budget is used up.

    The memory is filled before training starts and only read afterwards, so forked loader processes share it.

    Args:
        folder: folder that gets one file per entry; None keeps the entries in memory.
        gib: budget in GiB. Entries that do not fit are computed again at every use.
    """

    def __init__(self, folder: Path | None, gib: float) -> None:
        self.folder, self.budget, self.used = folder, int(gib * 2**30), 0
        self.kept: dict[str, tuple[Any, ...]] = {}  # tensors, or None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.used = sum(file.stat().st_size for file in folder.glob("*.pt"))

    def get(self, key: str, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Return the cached value, computing it first if it is missing."""
        if key in self.kept:
            return self.kept[key]
        file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.pt" if self.folder else None
        if file is not None and file.is_file():
            return torch.load(file, weights_only=True)
        made = make()
        size = sum(part.nbytes for part in made if part is not None)
        if self.used + size <= self.budget and (file is not None or get_worker_info() is None):
            self.used += size
            if file is None:
                self.kept[key] = made
            else:
                part = file.with_suffix(f".{os.getpid()}")
                torch.save(made, part)
                part.replace(file)  # in one step, so that no other process reads half a file
        return made


class LabelTable:
    """The label of each stored mask value: 255 for ignored values, -1 for values without a class.

    Args:
        labels: stored value -> label; any integers are values.
    """

    def __init__(self, labels: dict[int, int]) -> None:
        self.table = torch.full((65537,), -1, dtype=torch.int16)  # the last entry is for the values beyond
        self.beyond = {value: label for value, label in labels.items() if not 0 <= value < 65536}
        self.count = sum(label != IGNORE for label in labels.values())
        for value, label in labels.items():
            if value not in self.beyond:
                self.table[value] = label

    def __call__(self, values: Tensor) -> Tensor:
        """Return the labels of stored values of any shape, int16."""
        labels = self.table[values.long().clamp(-1, 65536)]
        for value, label in self.beyond.items():
            labels[values == value] = label
        return labels


class SegmentationDataset(Dataset):
    """One split of a data set. Its keys are ``(epoch, index)``; an index alone is one of epoch 0.

    Each item draws its random numbers from (seed, epoch, index) alone. So the augmentation of an image does not depend
    on the number of workers or processes, nor on the images that were read before it.

    Args:
        samples: the images and masks of the split.
        label_table: label of each stored mask value; None reads images without masks.
        transform: joint transform of a ``tv_tensors.Image``, a ``tv_tensors.Mask`` and, with `weight_rule`, a
            `PixelWeight`. It needs a mask.
        seed: the run's seed.
        weight_rule: computes the loss's weight of each pixel from labels and instances.
        cache: keeps decoded files; None decodes them at every use.
        weight_maps: keeps the results of `weight_rule`; None computes them at every use.
        resize_masks: whether to bring a mask of its image's proportions to the image's size.
        replace_nan: the value that pixels get which are no numbers (NaN, Inf); their labels are ignored. None refuses
            such images.

    Returns:
        items ``{"image": (C, H, W), "mask": int64 (H, W), "name": str, "size": (H, W) as read}``. ``mask`` is absent
        where the sample has none. ``pixel_weight``, float32 ``(H, W)``, is present with a `weight_rule`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        label_table: LabelTable | None,
        transform: v2.Transform | None = None,
        seed: int = 0,
        weight_rule: WeightRule | None = None,
        cache: Cache | None = None,
        weight_maps: Cache | None = None,
        resize_masks: bool = False,
        replace_nan: float | None = None,
    ) -> None:
        self.samples, self.label_table, self.transform, self.seed = samples, label_table, transform, seed
        self.weight_rule, self.cache, self.weight_maps = weight_rule, cache, weight_maps
        self.resize_masks, self.replace_nan = resize_masks, replace_nan

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        epoch, index = (0, key) if isinstance(key, int) else key
        image, mask = self.read(index)
        item: dict[str, Any] = {"name": self.samples[index].name, "size": tuple(image.shape[-2:])}
        if mask is None:
            return item | {"image": image.contiguous()}
        parts = {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)}
        if self.transform is not None:
            if self.weight_rule is not None:
                parts["pixel_weight"] = PixelWeight(self.pixel_weight(index, mask, self.weight_rule))
            with random_numbers_of(self.seed, epoch, index):
                parts = self.transform(parts)
        item |= {name: part.as_subclass(torch.Tensor).contiguous() for name, part in parts.items()}
        item["mask"] = item["mask"].long()
        return item

    def stored(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Decode an image and its mask as stored, or take them from the cache."""
        sample = self.samples[index]
        return self.cache.get(self.cache_key(index), sample.read) if self.cache else sample.read()  # type: ignore[return-value]

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Read an image and its mask, and turn stored mask values into labels.

        Returns:
            image ``(C, H, W)`` in its storage type, and mask ``(H, W)`` uint8 with labels 0 to K - 1 and 255 for
            ignored pixels, or None without a mask.

        Raises:
            UserError: if image and mask differ in size, a value has no class, or pixels are no numbers; the message
                names file and value.
        """
        sample = self.samples[index]
        image, values = self.stored(index)
        image, missing = replace_missing(image, self.replace_nan, sample.image or sample.name)
        if values is None or self.label_table is None:
            return image, None
        where = sample.mask or sample.name
        if image.shape[-2:] != values.shape:
            fits = same_proportions(values.shape, image.shape[-2:])
            if not (fits and self.resize_masks):
                cure = ", or set data.resize_masks: true" if fits else ""
                raise UserError(
                    f"{where} is {values.shape[1]} x {values.shape[0]} pixels but its image {sample.image} is "
                    f"{image.shape[2]} x {image.shape[1]}: save the mask at the image's size{cure}"
                )
            values = resize_nearest(values, image.shape[-2:])
        mask = self.label_table(values)
        if (mask < 0).any():
            raise UserError(
                f"{where} holds the value {int(values[mask < 0].max())}, which belongs to none of the "
                f"{self.label_table.count} classes: add it to data.void_values to ignore it, or give it a label in "
                "data.label_map"
            )
        mask = mask.byte()
        if missing is not None:
            mask[missing] = IGNORE
        return image, mask

    def pixel_weight(self, index: int, mask: Tensor, rule: WeightRule) -> Tensor:
        """Return the loss's weight of each pixel, computing it first if it is not cached.

        Args:
            index: of the sample.
            mask: the sample's labels as read, ``(H, W)``.
            rule: computes the weights.

        Returns:
            float32 ``(H, W)``.
        """
        sample = self.samples[index]
        if self.weight_maps is None:
            return rule(mask, sample.instances())
        key = f"{self.cache_key(index)} {rule!r}"
        return self.weight_maps.get(key, lambda: (rule(mask, sample.instances()),))[0]

    def cache_key(self, index: int) -> str:
        """Describe how a sample is read and when its files were written; a new file gets a new cache entry."""
        sample = self.samples[index]
        files = [path for path in (sample.image, sample.mask) if path is not None]
        return f"{sample!r} {[path.stat().st_mtime_ns for path in files]}"


def replace_missing(image: Tensor, value: float | None, where: object) -> tuple[Tensor, Tensor | None]:
    """Replace pixels that are no numbers (NaN, Inf).

    Args:
        image: ``(C, H, W)`` as stored.
        value: what they become in all bands; None refuses them.
        where: the image's file, for the error message.

    Returns:
        the image, and where pixels were replaced, bool ``(H, W)``, or None if nowhere.

    Raises:
        UserError: if there are such pixels and `value` is None.
    """
    if not image.is_floating_point():
        return image, None
    missing = ~torch.isfinite(image).all(dim=0)
    if not missing.any():
        return image, None
    if value is None:
        raise UserError(
            f"{where} holds values that are no numbers (NaN or Inf) in {missing.float().mean():.2%} of its pixels: "
            "repair the file, or set data.replace_nan: 0 to read these pixels as 0 and to ignore their labels"
        )
    return torch.where(missing, torch.tensor(value, dtype=image.dtype), image), missing


def same_proportions(size: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two sizes (height, width) have one aspect ratio, but for rounding to whole pixels."""
    (h, w), (height, width) = size, other
    return abs(h * width - w * height) <= max(h, w, height, width)


def resize_nearest(values: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a mask ``(H, W)`` of any integers to (height, width): each pixel takes the value at its centre."""
    rows, columns = (((torch.arange(n) + 0.5) * (old / n)).long() for n, old in zip(size, values.shape, strict=True))
    return values[rows[:, None], columns]


@contextmanager
def random_numbers_of(*key: int) -> Iterator[None]:
    """Draw random numbers from a key alone: those of torch, numpy and Python, since transforms may use any of them."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    generator = torch.default_generator  # torch.manual_seed would also queue a call for every GPU
    states = generator.get_state(), np.random.get_state(), random.getstate()
    generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Build a batch: stack tensors along a new first axis, and list names and sizes.

    Raises:
        UserError: if the images differ in size, type or number of bands.
    """
    kinds = {(len(item["image"]), str(item["image"].dtype).removeprefix("torch.")): item["name"] for item in items}
    if len(kinds) > 1:
        parts = [f"{name} has {bands} bands of {dtype}" for (bands, dtype), name in kinds.items()]
        raise UserError(f"one batch holds images of different types, as {' and '.join(parts)}: save all in one type")
    sizes = sorted({tuple(item["image"].shape[-2:]) for item in items})
    if len(sizes) > 1:
        raise UserError(
            f"one batch holds images of different sizes (height x width {sizes[0][0]} x {sizes[0][1]} and "
            f"{sizes[1][0]} x {sizes[1][1]}): set data.crop_size for training and data.eval_batch_size: 1"
        )
    tensors = [key for key in ("image", "mask", "pixel_weight") if key in items[0]]
    batch: dict[str, Any] = {key: torch.stack([item[key] for item in items]) for key in tensors}
    return batch | {key: [item[key] for item in items] for key in ("name", "size")}


class EpochSampler(DistributedSampler):
    """A sampler of ``(epoch, index)``, because persistent workers never learn that a new epoch has begun.

    In training, every process gets the same number of samples, and the rest of the shuffled list is left out of this
    epoch. In evaluation, every sample is read exactly once, so metrics are exact: Lightning's own sampler repeats
    images until every process has the same number. The class extends ``DistributedSampler`` because Lightning would
    replace any other sampler.

    Args:
        length: number of samples.
        train: whether to shuffle; the order is drawn from (seed, epoch).
        seed: the run's seed.
        rank: index of this process.
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


class LateLoader(DataLoader):
    """A loader whose workers begin when the first batch is asked for.

    A resumed run makes the iterator before Lightning tells the sampler which epoch it is. Workers that begin at once
    would then read the first batches of epoch 0 again.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()
