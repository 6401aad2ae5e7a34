"""Active fires in Landsat-8 patches: ActiveFire, and the AI SPARK challenge, which took its patches from ActiveFire.

G. H. de Almeida Pereira, A. M. Fusioka, B. T. Nassu, R. Minetto, "Active fire detection in Landsat-8 imagery: A
large-scale dataset and a deep-learning study", ISPRS Journal of Photogrammetry and Remote Sensing 178 (2021).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import SegmentationDataModule
from .decode import Sample
from .files import files_under, folder_of, split_by_hash

SCENE = r"^(.*L[CO]08_[^/]*)_p\d+$"  # the name of a patch begins with the name of its scene


class Wildfire(SegmentationDataModule):
    """Patches of 256 x 256 pixels with ten bands of 16 bits, and masks of fire (1).

    The ten bands are Landsat-8's bands 1 to 7, 9, 10 and 11. Counted from 0, number 6 of a file is band 7 (short-wave
    infrared, in which fire is bright), number 5 is band 6 and number 1 is band 2 (blue). Pixels are digital numbers,
    and dark scenes use a small part of the 16 bits, so take mean and std of each band from `check_data`.

    Layout of the challenge::

        train_img/train_img_0.tif  train_mask/train_mask_0.tif      (also train_img/train_img/...)

    Layout of ActiveFire; a mask comes from one algorithm or from the agreement of several::

        images/.../LC08_L1TP_124046_20200810_20200810_01_RT_p00367.tif
        masks/.../LC08_L1TP_124046_20200810_20200810_01_RT_Voting_p00367.tif

    Get it: github.com/pereira-gha/activefire, or the challenge's archives from aifactory.space with an account; 1.3 MB
    per patch, uncompressed.

    There is no public split; images are split by a hash of their names. ActiveFire is split by scene, because patches
    of one scene are neighbours.

    Args:
        root: folder that holds one of the two layouts.
        bands: which of the ten bands to read, counted from 0; (6, 5, 1) is the composite 7-6-2 of the paper.
        algorithm: which of ActiveFire's masks to read: ``Voting``, ``Intersection``, ``Murphy``, ``Schroeder`` or
            ``GOLI_v2``.
        val_fraction: share of the patches for validation, 0 to 1.
        test_fraction: share of the patches for the test, 0 to 1.
        **kwargs: see `SegmentationDataModule`.
    """

    class_names = ("background", "fire")
    palette = ((40, 60, 40), (255, 90, 0))
    label_map = {0: 0, 1: 1, 255: 1}
    mean = ()  # mean and std depend on bands and scenes: take yours from check_data
    std = ()
    source = "https://github.com/pereira-gha/activefire; the challenge: https://aifactory.space, with an account"
    licence = "Landsat-8 is in the public domain; ActiveFire's masks: CC BY 4.0"
    citation = "de Almeida Pereira et al., ISPRS Journal 178 (2021)"
    disk = "1.3 MB per patch, uncompressed"

    def __init__(
        self,
        root: str | None = None,
        bands: Sequence[int] = (6, 5, 1),
        algorithm: str = "Voting",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.bands, self.in_channels = tuple(bands), len(bands)
        self.algorithm, self.fractions = algorithm, (val_fraction, test_fraction)

    def samples(self, split: str) -> list[Sample]:
        """Pair patches and masks by number, or by scene and number.

        Raises:
            UserError: if the root holds neither layout.
        """
        root = folder_of(self.root, f"train_img/ and train_mask/, or images/ and masks/ ({self.source})")
        if (root / "train_img").is_dir():
            images, masks = numbered(root / "train_img"), numbered(root / "train_mask")
        else:
            tag = f"_{self.algorithm}_"
            images = {Path(name).name: path for name, path in files_under(root / "images").items()}
            masks = {Path(n).name.replace(tag, "_"): p for n, p in files_under(root / "masks").items() if tag in n}
        found = [
            Sample(name, images.get(name, root / f"{name}.*"), masks.get(name, root / f"{name}.*"), self.bands)
            for name in sorted(images.keys() | masks.keys())
        ]
        return split_by_hash(found, split, *self.fractions, group=SCENE)


def numbered(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by the number at the end of their names, as six digits."""
    found = ((re.search(r"(\d+)$", name), path) for name, path in files_under(folder).items())
    return {f"{int(match[1]):06d}": path for match, path in found if match}
