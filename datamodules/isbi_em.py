"""The ISBI 2012 challenge: neuronal membranes in electron microscopy.

I. Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for connectomics", Frontiers
in Neuroanatomy 2015. The first data set of the U-Net paper.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import SegmentationDataModule
from .decode import Sample, decoding
from .errors import UserError
from .files import folder_of, pair


@dataclass(frozen=True)
class Page(Sample):
    """One page of a stack of images and the same page of a stack of masks."""

    page: int = 0

    def read(self) -> tuple[Tensor, Tensor]:
        """Decode the page: image ``(1, H, W)``, mask ``(H, W)``, both uint8."""
        image, mask = (read_page(path, self.page) for path in (self.image, self.mask))
        return image[None], mask


def read_page(path: Path | None, page: int) -> Tensor:
    """Decode one page of a TIFF stack: ``(H, W)``."""
    import tifffile  # only stacks need it

    assert path is not None
    with decoding(path, f"a stack with a page {page}"):
        return torch.from_numpy(tifffile.imread(path, key=page))


class ISBIEM(SegmentationDataModule):
    """Thirty grey slices of 512 x 512 pixels of a fly's nerve cord: cells (1) and the membranes between them (0).

    Layout, either the challenge's stacks of 30 pages, ``train-volume.tif`` and ``train-labels.tif``; or folders of
    images named by their slice, ``images/`` and ``masks/`` (or ``train/image/`` and ``train/label/``).

    The labels of ``test-volume.tif`` are not public, so the last slices of the training volume are held out.
    Neighbouring slices look alike, so a random choice would leak.

    Get it: imagej.net/events/isbi-2012-segmentation-challenge, for research; 24 MB.

    Args:
        root: folder that holds the stacks or folders.
        held_out: number of slices, the last ones, that form the split ``val``.
        test_split: the split that `test` reads; there is no labelled test split.
        **kwargs: see `SegmentationDataModule`.

    Raises:
        UserError: if `held_out` is below 1.
    """

    class_names = ("membrane", "cell")
    palette = ((30, 30, 30), (250, 240, 200))
    label_map = {0: 0, 255: 1}
    bands = (0,)
    in_channels = 1
    mean = (0.4908,)
    std = (0.1708,)
    source = "https://imagej.net/events/isbi-2012-segmentation-challenge"
    licence = "research use"
    citation = "Arganda-Carreras et al., Frontiers in Neuroanatomy 9 (2015)"
    disk = "24 MB"

    def __init__(self, root: str | None = None, held_out: int = 4, test_split: str = "val", **kwargs: Any) -> None:
        super().__init__(root, test_split=test_split, **kwargs)
        if held_out < 1:
            raise UserError(f"data.held_out must be at least 1, so that validation has a slice, got {held_out}")
        self.held_out = held_out
        self.expected_counts = {"train": 30 - held_out, "val": held_out}

    def samples(self, split: str) -> list[Sample]:
        """List the slices in their order; the last `held_out` form ``val``, the others ``train``.

        Raises:
            UserError: if the root holds neither stacks nor folders.
        """
        root = folder_of(self.root, f"train-volume.tif and train-labels.tif, or images/ and masks/ ({self.source})")
        volume, labels = root / "train-volume.tif", root / "train-labels.tif"
        slices: list[Sample]
        if volume.is_file():
            import tifffile  # only stacks need it

            with decoding(volume, "a stack"), tifffile.TiffFile(volume) as file:
                count = len(file.pages)
            slices = [Page(f"slice_{i:02d}", volume, labels, page=i) for i in range(count)]
        else:
            folders = ("train/image", "train/label") if (root / "train/image").is_dir() else ("images", "masks")
            slices = pair(root / folders[0], root / folders[1], bands=self.bands)
            slices.sort(key=lambda s: (len(s.name), s.name))  # 2 before 10
        return slices[: -self.held_out] if split == "train" else slices[-self.held_out :]
