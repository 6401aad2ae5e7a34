"""Public data sets and folders of one's own as Lightning data modules, one file each."""

from .base import Sample, SegmentationDataModule, SegmentationDataset
from .camvid import CamVid
from .folder import Folder
from .synthetic_scenes import SyntheticScenes

__all__ = ["CamVid", "Folder", "Sample", "SegmentationDataModule", "SegmentationDataset", "SyntheticScenes"]
