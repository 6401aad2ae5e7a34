"""Semantic segmentation architectures, one LightningModule and one file per paper."""

from . import inference
from .architectures.deconvnet import DeconvNet
from .architectures.deeplabv1 import DeepLabV1
from .architectures.deeplabv2 import DeepLabV2
from .architectures.deeplabv3 import DeepLabV3
from .architectures.deeplabv3plus import DeepLabV3Plus
from .architectures.fcdensenet import FCDenseNet
from .architectures.fcn import FCN
from .architectures.maskformer import MaskFormer
from .architectures.pspnet import PSPNet
from .architectures.segnet import SegNet
from .architectures.unet import OverlapTile, UNet
from .architectures.unet3plus import UNet3Plus
from .base import SegmentationModule

inference.OverlapTile = OverlapTile  # type: ignore[attr-defined]  # configs of 0.1.0 name it there

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
