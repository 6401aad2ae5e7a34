"""One split as items: reading, labels, reproducible randomness, what is kept between epochs, and who reads what."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2

from .errors import UserError
from .files import Sample
from .transforms import IGNORE, PixelWeight

Weigh = Callable[[Tensor, Tensor | None], Tensor]  # labels and instances (H, W) to weights (H, W)


class Cache:
    """Keeps what was decoded or computed once, in memory or in a folder, until a budget is used up.

    The memory is filled before training starts and then only read, so loader processes that are forked share it.

    Args:
        folder: for one file per entry; None keeps them in memory.
        gib: budget in GiB; what comes after it is used up is made anew each time.
    """

    def __init__(self, folder: Path | None, gib: float) -> None:
        self.folder, self.budget, self.used = folder, int(gib * 2**30), 0
        self.kept: dict[str, tuple[Any, ...]] = {}  # tensors, or None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.used = sum(file.stat().st_size for file in folder.glob("*.pt"))

    def get(self, key: str, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Give what is kept under a key, and make it first where nothing is."""
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
                part.replace(file)  # at once, so that no other process reads half a file
        return made


class SegmentationDataset(Dataset):
    """One split. Its keys are ``(epoch, index)``, and each item draws its randomness from (seed, epoch, index) alone.

    So a picture's augmentation depends neither on the number of workers or processes nor on what was drawn before it.

    Args:
        samples: what to read.
        labels: label of each stored mask value, -1 where it has none; see `SegmentationDataModule.label_table`.
        transform: joint transform of a ``tv_tensors.Image``, a ``tv_tensors.Mask`` and, with `weigh`, a `PixelWeight`.
        seed: the run's seed.
        weigh: gives the loss's weight of each pixel from labels and instances.
        cache: keeps what was decoded; None decodes anew each time.
        weights: keeps what `weigh` gave.

    Returns:
        items ``{"image": (C, H, W), "mask": int64 (H, W), "name": str, "size": (H, W) as read}``, without ``mask``
        where the sample has none, and with ``weight``, float32 ``(H, W)``, where there is `weigh`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: Tensor,
        transform: v2.Transform | None = None,
        seed: int = 0,
        weigh: Weigh | None = None,
        cache: Cache | None = None,
        weights: Cache | None = None,
    ) -> None:
        self.samples, self.labels, self.transform, self.seed = samples, labels, transform, seed
        self.weigh, self.cache, self.weights = weigh, cache, weights or Cache(None, 0)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def has_masks(self) -> bool:
        """Whether this is a split of a data set; a folder of photos may hold any sizes."""
        return len(self.labels) > 0

    def key(self, index: int) -> str:
        """What a sample's cache entry depends on: how it is read, and when its files were written."""
        sample = self.samples[index]
        files = [path for path in (sample.image, sample.mask) if path is not None]
        return f"{sample!r} {[path.stat().st_mtime_ns for path in files]}"

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Read a pair and bring stored values to labels: 0 to K - 1, or 255 for ignored.

        Raises:
            UserError: for sizes that differ or a value that stands for no class; the message names file and value.
        """
        sample = self.samples[index]
        image, values = self.cache.get(self.key(index), sample.read) if self.cache else sample.read()
        if values is None or not self.has_masks:
            return image, None
        where = sample.mask or sample.name
        if image.shape[-2:] != values.shape:
            raise UserError(
                f"{where} is {values.shape[1]} x {values.shape[0]} pixels but its image {sample.image} is "
                f"{image.shape[2]} x {image.shape[1]}: masks must have their image's size"
            )
        mask = self.labels[values.long().clamp(-1, len(self.labels) - 1)]  # both ends of the table mean: no class
        if (mask < 0).any():
            bad = int(values[mask < 0].max())
            count = int(((self.labels >= 0) & (self.labels != IGNORE)).sum())
            raise UserError(
                f"{where} holds the value {bad}, which stands for none of the {count} classes: name it in "
                "data.void_values to ignore it, or give it a label in data.label_map"
            )
        return image, mask.byte()

    def weight(self, index: int, mask: Tensor, weigh: Weigh) -> Tensor:
        """The loss's weight of each pixel of a mask as read, ``(H, W)``: float32 of the same size, computed once."""
        instances = self.samples[index].instances
        return self.weights.get(f"{self.key(index)} {weigh!r}", lambda: (weigh(mask, instances()),))[0]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        image, mask = self.read(index)
        item: dict[str, Any] = {"name": self.samples[index].name, "size": tuple(image.shape[-2:]), "image": image}
        if mask is not None:
            item["mask"] = mask
        if self.transform is not None and mask is not None:
            parts = {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)}
            if self.weigh is not None:
                parts["pixel_weight"] = PixelWeight(self.weight(index, mask, self.weigh))
            seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0]
            generator = torch.default_generator  # torch.manual_seed would also queue a call for every GPU
            state = generator.get_state()
            generator.manual_seed(int(seed))
            item |= self.transform(parts)
            generator.set_state(state)
        for name in ("image", "mask", "pixel_weight"):
            if name in item:
                item[name] = item[name].as_subclass(torch.Tensor).contiguous()
        if mask is not None:
            item["mask"] = item["mask"].long()
        return item


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack items to a batch: tensors along a new first axis, names and sizes as lists.

    Raises:
        UserError: if the pictures differ in size.
    """
    sizes = sorted({tuple(item["image"].shape[-2:]) for item in items})
    if len(sizes) > 1:
        raise UserError(
            f"pictures of different sizes in one batch (height x width {sizes[0][0]} x {sizes[0][1]} and "
            f"{sizes[1][0]} x {sizes[1][1]}): set data.crop_size for training, and data.eval_batch_size: 1"
        )
    tensors = [key for key in ("image", "mask", "pixel_weight") if key in items[0]]
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
