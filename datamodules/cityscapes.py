"""Cityscapes: street scenes of fifty cities. M. Cordts et al., CVPR 2016, arXiv 1604.01685."""

from typing import Any, Literal

from .base import SegmentationDataModule
from .decode import Sample
from .files import files_under, folder_of
from .transforms import IGNORE

TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # the label id of each class


class Cityscapes(SegmentationDataModule):
    """Street scenes of 2048 x 1024 pixels; 19 of the 34 label ids are evaluated, the others are ignored.

    Layout, as ``leftImg8bit_trainvaltest.zip``, ``gtFine_trainvaltest.zip`` and ``gtCoarse.zip`` unpack::

        leftImg8bit/{train,val,test,train_extra}/CITY/CITY_000000_000019_leftImg8bit.png
        gtFine/{train,val,test}/CITY/CITY_000000_000019_gtFine_labelIds.png
        gtCoarse/{train,val,train_extra}/CITY/CITY_000000_000019_gtCoarse_labelIds.png

    Get it: cityscapes-dataset.com asks for an account, so `download` cannot fetch it. It takes about 12 GB, and 57 GB
    with the coarse labels.

    Args:
        root: folder that holds ``leftImg8bit/``.
        coarse: whether to train on ``train_extra`` with its coarse labels; validation always uses fine labels.
        labels: which mask files to read: ``labelIds`` of the archives, or ``labelTrainIds``, which the tools of
            cityscapesScripts write.
        **kwargs: arguments of `SegmentationDataModule`; `test_split` is ``val``, as the test labels are not public.
    """

    class_names = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    )  # fmt: skip
    palette = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip
    source = "https://www.cityscapes-dataset.com, with an account: leftImg8bit, gtFine, and gtCoarse for coarse labels"
    licence = "non-commercial use, see the site"
    citation = "Cordts et al., CVPR 2016"
    disk = "about 12 GB, with train_extra and coarse labels 57 GB"

    def __init__(
        self,
        root: str | None = None,
        coarse: bool = False,
        labels: Literal["labelIds", "labelTrainIds"] = "labelIds",
        test_split: str = "val",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, test_split=test_split, **kwargs)
        self.coarse, self.labels = coarse, labels
        self.expected_counts = {"train": 19998 if coarse else 2975, "val": 500}
        if labels == "labelIds":
            self.label_map = dict.fromkeys(range(34), IGNORE) | {value: label for label, value in enumerate(TRAIN_IDS)}

    def samples(self, split: str) -> list[Sample]:
        """List the images of a split with their masks.

        Raises:
            UserError: if a folder is missing.
        """
        root = folder_of(self.root, f"leftImg8bit/ and gtFine/ ({self.source})")
        coarse = self.coarse and split == "train"
        kind, split = ("gtCoarse", "train_extra") if coarse else ("gtFine", split)
        end = f"_{kind}_{self.labels}.png"
        return [
            Sample(name, path, root / kind / split / f"{name}{end}")
            for long, path in files_under(root / "leftImg8bit" / split).items()
            for name in [long.removesuffix("_leftImg8bit")]
        ]
