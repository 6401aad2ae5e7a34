"""The Oxford-IIIT Pet Dataset. O. M. Parkhi, A. Vedaldi, A. Zisserman, C. V. Jawahar, "Cats and Dogs", CVPR 2012."""

from collections.abc import Sequence
from typing import Any

from .base import SegmentationDataModule
from .decode import Sample
from .download import Archive
from .files import folder_of, read_lines, split_by_hash
from .transforms import IGNORE


class OxfordPets(SegmentationDataModule):
    """Photographs of one cat or dog each, of all sizes; the animal's border is a third class.

    Layout, which ``torchvision.datasets.OxfordIIITPet`` and `download` both write::

        oxford-iiit-pet/images/NAME.jpg  oxford-iiit-pet/annotations/{trimaps/NAME.png,trainval.txt,test.txt}

    Get it: `download` fetches it. It takes about 0.8 GB.

    Args:
        root: folder that holds ``oxford-iiit-pet/``.
        ignore_border: whether to ignore the border, so that only background and pet remain.
        val_fraction: share of ``trainval`` for validation, drawn by a hash of the names.
        **kwargs: arguments of `SegmentationDataModule`.
    """

    class_names: Sequence[str] = ("background", "pet", "border")
    palette: Sequence[Sequence[int]] = ((20, 20, 60), (250, 170, 30), (240, 240, 240))
    source = "https://www.robots.ox.ac.uk/~vgg/data/pets"
    licence = "CC BY-SA 4.0"
    citation = "Parkhi et al., CVPR 2012"
    disk = "about 0.8 GB"
    archives = tuple(
        Archive(f"https://www.robots.ox.ac.uk/~vgg/data/pets/data/{name}.tar.gz", f"md5:{md5}", "oxford-iiit-pet")
        for name, md5 in (
            ("images", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
            ("annotations", "95a8c909bbe2e81eed6a22bccdf3f68f"),
        )
    )

    def __init__(
        self, root: str | None = None, ignore_border: bool = False, val_fraction: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(root, **kwargs)
        self.val_fraction = val_fraction
        self.label_map = {2: 0, 1: 1, 3: IGNORE if ignore_border else 2}
        if ignore_border:
            self.class_names, self.palette = self.class_names[:2], self.palette[:2]
        held_out = round(3680 * val_fraction)
        self.expected_counts = {"train": 3680 - held_out, "val": held_out, "test": 3669}

    def samples(self, split: str) -> list[Sample]:
        """Read ``trainval.txt``, which is divided into train and val by a hash of the names, or ``test.txt``.

        Raises:
            UserError: if a folder or list is missing.
        """
        base = folder_of(self.root, f"oxford-iiit-pet/ ({self.source}, or data.download: true)") / "oxford-iiit-pet"
        lines = read_lines(base / "annotations" / ("test.txt" if split == "test" else "trainval.txt"))
        names = [line.split()[0] for line in lines if not line.startswith("#")]
        found = [Sample(n, base / f"images/{n}.jpg", base / f"annotations/trimaps/{n}.png") for n in names]
        return found if split == "test" else split_by_hash(found, split, self.val_fraction, 0)
