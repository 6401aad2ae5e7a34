"""COCO: objects in context. T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014."""

from collections.abc import Sequence
from typing import Any

from .decode import Sample
from .download import Archive
from .errors import UserError
from .files import folder_of
from .polygons import Polygons

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
VOC_CLASSES = (  # in the order of PASCAL VOC
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorcycle", "person", "potted plant", "sheep", "couch", "train", "tv",
)  # fmt: skip


class COCO(Polygons):
    """Photographs with outlined objects; pixels outside all objects are ``background``.

    Layout::

        train2017/  val2017/  annotations/instances_{train,val}2017.json

    Get it: `download` fetches it. It takes about 20 GB, and 18 GB more while the largest archive is unpacked.

    Args:
        root: folder that holds ``train2017/``, ``val2017/`` and ``annotations/``.
        classes: ``voc`` keeps the twenty classes of PASCAL VOC in its order and ignores pixels of two objects, as in
            the training of torchvision's weights. ``all`` keeps the eighty classes of COCO, a list keeps those that it
            names; with both, the smaller of two objects lies on top.
        min_area: training images are left out if their kept objects do not cover more pixels than this (torchvision:
            1000).
        **kwargs: arguments of `SegmentationDataModule`; `test_split` is ``val``, as the test labels are not public.

    Raises:
        UserError: for a class that COCO does not have.
    """

    source = "https://cocodataset.org: train2017.zip, val2017.zip, annotations_trainval2017.zip"
    licence = "annotations CC BY 4.0; the photographs are from Flickr"
    citation = "Lin et al., ECCV 2014"
    disk = "about 20 GB, and 18 GB more while train2017.zip is unpacked"
    archives: Sequence[Archive] = (
        Archive("http://images.cocodataset.org/zips/train2017.zip", "sha1:10ad623668ab00c62c096f0ed636d6aff41faca5"),
        Archive("http://images.cocodataset.org/zips/val2017.zip", "sha1:4950dc9d00dbe1c933ee0170f5797584351d2a41"),
        Archive(
            "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            "sha1:8551ee4bb5860311e79dace7e79cb91e432e78b3",
        ),
    )
    expected_counts: dict[str, int] = {"val": 5000}  # the classes decide how many of the 118,287 training images remain
    known: Sequence[str] = CLASSES  # the categories that `classes` may name

    def __init__(
        self,
        root: str | None = None,
        classes: str | Sequence[str] = "voc",
        min_area: float = 1000,
        test_split: str = "val",
        **kwargs: Any,
    ) -> None:
        named = {"voc": VOC_CLASSES, "all": self.known}
        kept = named[classes] if isinstance(classes, str) and classes in named else classes
        unknown = [name for name in ([kept] if isinstance(kept, str) else kept) if name not in self.known]
        if unknown:
            raise UserError(f"COCO has no class '{unknown[0]}': set data.classes to voc, all, or names of its classes")
        super().__init__(
            root, None, "", kept, ignore_overlap=classes == "voc", val_fraction=0, test_fraction=0,
            test_split=test_split, **kwargs,
        )  # fmt: skip
        self.min_area = min_area

    def samples(self, split: str) -> list[Sample]:
        """List the images in the annotations of a split.

        Raises:
            UserError: if the root or the annotations are missing.
        """
        root = folder_of(self.root, f"train2017/, val2017/ and annotations/ ({self.source})")
        min_area = self.min_area if split == "train" else 0.0
        return self.annotated(root / f"annotations/instances_{split}2017.json", root / f"{split}2017", min_area)
