"""PASCAL VOC 2012 segmentation, with the extra annotations of SBD.

M. Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", IJCV 2015. Extra annotations:
B. Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import SegmentationDataModule, voc_palette
from .decode import Sample, decoding, read_image
from .download import Archive
from .errors import UserError
from .files import folder_of, read_lines

SBD = "benchmark_RELEASE/dataset"


@dataclass(frozen=True)
class SBDSample(Sample):
    """An image whose mask is a ``.mat`` file of SBD."""

    def read(self) -> tuple[Tensor, Tensor]:
        """Decode the image ``(3, H, W)`` and the mask ``(H, W)``, both uint8."""
        from scipy.io import loadmat  # only SBD needs it

        assert self.image is not None and self.mask is not None
        with decoding(self.mask, "a mask of SBD"):
            labels = loadmat(self.mask, mat_dtype=True, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
        return read_image(self.image), torch.from_numpy(labels.astype("uint8"))


class VOC(SegmentationDataModule):
    """Photographs in twenty classes of objects and background; the borders of objects are 255 and ignored.

    Layout, as ``VOCtrainval_11-May-2012.tar`` unpacks::

        VOCdevkit/VOC2012/JPEGImages/  SegmentationClass/  ImageSets/Segmentation/{train,val}.txt

    The split ``trainaug`` holds all images in the lists of VOC and of SBD but those in VOC's ``val``. It needs one of

    - the masks ``VOCdevkit/VOC2012/SegmentationClassAug/`` that several projects distribute, with or without a list
      ``trainaug.txt``
    - SBD, as its ``benchmark.tgz`` unpacks: ``benchmark_RELEASE/dataset/{img,cls,train.txt,val.txt}``

    Get it: `download` fetches VOC (about 2 GB on disk), and SBD (1.5 GB) if `train_split` needs it.

    Args:
        root: folder that holds ``VOCdevkit/``.
        train_split: ``trainaug``, the 10,582 images on which the papers train, or ``train``, 1,464 images.
        **kwargs: arguments of `SegmentationDataModule`; `test_split` is ``val``, as the test labels are not public.

    Raises:
        UserError: for another `train_split`.
    """

    class_names = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )  # fmt: skip
    palette = voc_palette(21)
    source = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012; SBD: http://home.bharathh.info/pubs/codes/SBD"
    licence = "research use; the photographs are from Flickr"
    citation = "Everingham et al., IJCV 111 (2015); Hariharan et al., ICCV 2011"
    disk = "about 2 GB, and 1.5 GB for SBD"
    archives: Sequence[Archive] = (
        Archive(
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
        ),
    )
    sbd = Archive(
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "md5:82b4d87ceb2ed10f6038a1cba92111cb",
    )

    def __init__(
        self, root: str | None = None, train_split: str = "trainaug", test_split: str = "val", **kwargs: Any
    ) -> None:
        super().__init__(root, test_split=test_split, **kwargs)
        if train_split not in ("train", "trainaug"):
            raise UserError(f"data.train_split must be 'trainaug' or 'train', got '{train_split}'")
        self.train_split = train_split
        self.expected_counts = {"train": {"train": 1464, "trainaug": 10582}[train_split], "val": 1449}
        if train_split == "trainaug":
            self.archives = (*VOC.archives, VOC.sbd)

    def samples(self, split: str) -> list[Sample]:
        """List VOC's ``train`` or ``val``, or build ``trainaug`` from VOC and SBD.

        Raises:
            UserError: if a folder or list is missing.
        """
        base = folder_of(self.root, f"VOCdevkit/ ({self.source})") / "VOCdevkit/VOC2012"
        lists = base / "ImageSets/Segmentation"
        split = self.train_split if split == "train" else split

        def voc(name: str, masks: str = "SegmentationClass") -> Sample:
            return Sample(name, base / f"JPEGImages/{name}.jpg", base / f"{masks}/{name}.png")

        if split != "trainaug":
            return [voc(name) for name in read_lines(lists / f"{split}.txt")]
        if (lists / "trainaug.txt").is_file():
            lines = [line.split() for line in read_lines(lists / "trainaug.txt")]  # names, or two paths
            return [voc(line[0].rpartition("/")[2].removesuffix(".jpg"), "SegmentationClassAug") for line in lines]
        held_out = set(read_lines(lists / "val.txt"))
        if (base / "SegmentationClassAug").is_dir():
            names = {path.stem for path in (base / "SegmentationClassAug").glob("*.png")} - held_out
            return [voc(name, "SegmentationClassAug") for name in sorted(names)]
        own = read_lines(lists / "train.txt")
        sbd = folder_of(self.root, "") / SBD
        if not sbd.is_dir():
            raise UserError(
                f"trainaug needs the folder {base / 'SegmentationClassAug'} or {sbd}: get one of them "
                "(data.download: true fetches SBD), or set data.train_split: train"
            )
        extra = {*read_lines(sbd / "train.txt"), *read_lines(sbd / "val.txt")} - held_out - set(own)
        more = [SBDSample(name, sbd / f"img/{name}.jpg", sbd / f"cls/{name}.mat") for name in extra]
        return sorted([*(voc(name) for name in own), *more], key=lambda sample: sample.name)
