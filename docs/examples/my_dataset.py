"""A worked example of a data set: its facts as class attributes, and one method that lists its files."""

from datamodules import Sample, SegmentationDataModule
from datamodules.files import folder_of, read_lines


class MyDataset(SegmentationDataModule):
    """Photos of discs and bars on a grey ground. Arguments: see `SegmentationDataModule`.

    Layout::

        photos/NAME.jpg
        labels/NAME_label.png        stored values 0 (ground), 100 (disc), 200 (bar) and 9 (unclear, ignored)
        lists/{train,val,test}.txt   one NAME a line
    """

    class_names = ("ground", "disc", "bar")
    palette = ((110, 110, 110), (190, 60, 50), (50, 70, 180))  # one RGB colour per class, for pictures
    label_map = {0: 0, 100: 1, 200: 2}  # stored value -> label; leave it out where they are the same
    void_values = (9,)  # stored values that are ignored; 255 always is
    mean = (0.43, 0.43, 0.43)  # per channel, of pixels scaled to 0..1; `lightning check_data` measures them
    std = (0.06, 0.06, 0.06)
    source = "drawn by tests/test_examples.py"  # error messages tell the user where the data set is found
    licence = "CC0"
    citation = "none"
    disk = "less than 1 MB"

    def samples(self, split: str) -> list[Sample]:
        """List the files of a split in the order of its list.

        A file that does not exist is listed too: `SegmentationDataModule` names it in an error before training.

        Args:
            split: ``train``, ``val`` or ``test``.

        Raises:
            UserError: if the root or the list is missing.
        """
        root = folder_of(self.root, f"photos/, labels/ and lists/ ({self.source})")
        names = read_lines(root / "lists" / f"{split}.txt")
        return [Sample(name, root / f"photos/{name}.jpg", root / f"labels/{name}_label.png") for name in names]
