"""Semantic segmentation architectures, one LightningModule and one file per paper."""

from .base import SegmentationModule
from .deconvnet import DeconvNet
from .deeplabv1 import DeepLabV1
from .deeplabv2 import DeepLabV2
from .deeplabv3 import DeepLabV3
from .deeplabv3plus import DeepLabV3Plus
from .fcdensenet import FCDenseNet
from .fcn import FCN
from .maskformer import MaskFormer
from .pspnet import PSPNet
from .segnet import SegNet
from .unet import UNet
from .unet3plus import UNet3Plus

__all__ = [
    "FCN",
    "DeconvNet",
    "DeepLabV1",
    "DeepLabV2",
    "DeepLabV3",
    "DeepLabV3Plus",
    "FCDenseNet",
    "MaskFormer",
    "PSPNet",
    "SegNet",
    "SegmentationModule",
    "UNet",
    "UNet3Plus",
]
