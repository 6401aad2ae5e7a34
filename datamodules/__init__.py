"""Public data sets, drawn ones and your own folders as Lightning data modules, one file each."""

from .ade20k import ADE20K
from .base import SegmentationDataModule
from .camvid import CamVid
from .cityscapes import Cityscapes
from .coco import COCO
from .dataset import SegmentationDataset
from .decode import Sample
from .folder import Folder
from .isbi_em import ISBIEM
from .oxford_pets import OxfordPets
from .polygons import Polygons
from .recycling import Recycling
from .synthetic_cells import SyntheticCells
from .synthetic_scenes import SyntheticScenes
from .voc import VOC
from .wildfire import Wildfire

__all__ = [
    "ADE20K",
    "COCO",
    "ISBIEM",
    "VOC",
    "CamVid",
    "Cityscapes",
    "Folder",
    "OxfordPets",
    "Polygons",
    "Recycling",
    "Sample",
    "SegmentationDataModule",
    "SegmentationDataset",
    "SyntheticCells",
    "SyntheticScenes",
    "Wildfire",
]
