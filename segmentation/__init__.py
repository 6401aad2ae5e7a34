"""Semantic segmentation architectures, one LightningModule and one file per paper."""

from .base import SegmentationModule
from .deeplabv1 import DeepLabV1
from .deeplabv3 import DeepLabV3
from .unet import UNet

__all__ = ["DeepLabV1", "DeepLabV3", "SegmentationModule", "UNet"]
