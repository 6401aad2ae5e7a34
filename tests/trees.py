"""Tiny trees of images and masks, each in the layout in which a public data set's owner ships it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from conftest import draw_pair
from PIL import Image

from datamodules import VOC

HEIGHT, WIDTH = SHAPE = (40, 52)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, **options)
    else:
        Image.fromarray(pixels).save(path, **options)


def picture(seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return draw_pair(seed, *shape)[0]


def labels(seed: int, values: Sequence[int], shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Draw blocks of 4 x 4 pixels in the given values, each of which occurs."""
    rows, columns = (-(-side // 4) for side in shape)
    blocks = np.random.RandomState(seed).permutation(np.resize(values, rows * columns)).reshape(rows, columns)
    return blocks.astype(np.uint8).repeat(4, 0).repeat(4, 1)[: shape[0], : shape[1]]


def draw_voc(
    root: Path,
    train: Sequence[str] = ("2007_000032", "2007_000039"),
    val: Sequence[str] = ("2007_000033",),
    shape: tuple[int, int] = SHAPE,
) -> None:
    """Draw ``train`` and ``val``, without the further masks of ``trainaug``."""
    base = root / "VOCdevkit/VOC2012"
    for name in [*train, *val]:
        save(base / f"JPEGImages/{name}.jpg", picture(1, shape))
        mask = Image.fromarray(labels(1, [0, 15, 20, 255], shape))
        mask.putpalette([*np.array(VOC.palette).flatten().tolist(), *[7] * (3 * 235)])
        (base / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(base / f"SegmentationClass/{name}.png")
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    for split, names in (("train", train), ("val", val)):
        (base / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")


def draw_voc_aug(root: Path, names: Sequence[str], shape: tuple[int, int] = SHAPE) -> None:
    """Draw masks in ``SegmentationClassAug`` for pictures that exist."""
    for i, name in enumerate(names):
        mask = labels(i, [0, 1, 20, 255], shape)
        save(root / f"VOCdevkit/VOC2012/SegmentationClassAug/{name}.png", mask)


def draw_cityscapes(root: Path, train: int = 1, val: int = 1, shape: tuple[int, int] = SHAPE) -> None:
    """Draw fine labels, as ids and as training ids."""
    for split, city, count in (("train", "aachen", train), ("val", "frankfurt", val)):
        for i in range(count):
            stem = f"{city}/{city}_{i:06d}_000019"
            save(root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", picture(i, shape))
            for kind, count_of_ids in (("labelIds", 34), ("labelTrainIds", 19)):
                mask = labels(i, [*range(count_of_ids), 255], shape)
                save(root / f"gtFine/{split}/{stem}_gtFine_{kind}.png", mask)


def draw_ade20k(root: Path, train: int = 1, val: int = 1, shape: tuple[int, int] = SHAPE) -> None:
    base = root / "ADEChallengeData2016"
    for folder, split, count in (("training", "train", train), ("validation", "val", val)):
        for i in range(1, count + 1):
            name = f"{folder}/ADE_{split}_{i:08d}"
            save(base / f"images/{name}.jpg", picture(i, shape))
            save(base / f"annotations/{name}.png", labels(i, [0, 1, 150], shape))


def draw_camvid(root: Path, splits: dict[str, int], shape: tuple[int, int] = SHAPE, segnet: bool = False) -> None:
    """Draw SegNet's folders and lists, or ``images/`` and ``masks/``; masks hold labels 0 to 10 and void, 11.

    Args:
        root: folder to draw into.
        splits: number of frames of each split.
        shape: height and width of a frame in pixels.
        segnet: draw SegNet's layout.
    """
    for split, count in splits.items():
        images, masks = (split, f"{split}annot") if segnet else (f"images/{split}", f"masks/{split}")
        names = [f"0001TP_{i:06d}.png" for i in range(count)]
        for i, name in enumerate(names):
            save(root / images / name, picture(i, shape))
            save(root / masks / name, labels(i, range(12), shape))
        if segnet:
            lines = [f"/SegNet/CamVid/{images}/{name} /SegNet/CamVid/{masks}/{name}" for name in names]
            (root / f"{split}.txt").write_text("\n".join(lines) + "\n")


def em_slices(count: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume and its masks, each ``(count, size, size)``."""
    masks = np.stack([labels(i, [0, 255, 255, 255, 255], (size, size)) for i in range(count)])
    return np.random.RandomState(0).randint(0, 256, masks.shape).astype(np.uint8), masks


def draw_isbi_em(root: Path, count: int = 30, size: int = 32) -> None:
    """Draw the challenge's two stacks."""
    volume, masks = em_slices(count, size)
    save(root / "train-volume.tif", volume)
    save(root / "train-labels.tif", masks)


def wildfire_patch(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(5000, 60000, (256, 256, 10)).astype(np.uint16)


def draw_wildfire(root: Path, count: int = 10, nested: str = "") -> None:
    """Draw the challenge's two folders; ``nested="/train_{}"`` puts each into a folder of the same name."""
    for i in range(count):
        patch = wildfire_patch(i)
        save(root / f"train_img{nested.format('img')}/train_img_{i}.tif", patch)
        save(root / f"train_mask{nested.format('mask')}/train_mask_{i}.tif", (patch[..., 0] > 40000).astype("u1"))
