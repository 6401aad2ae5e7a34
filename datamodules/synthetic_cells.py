"""SyntheticCells: touching cells under a microscope, drawn by this file and never downloaded.

They imitate the cells of U-Net's cell tracking task, where it is easy to find cells and hard to separate them:

- Cells crowd in colonies and press each other flat. A gap of one to three pixels of background separates most of them.
  The gap looks like the dark membranes around it and fades in places.
- Cells and open ground have the same mean grey. A cell has grain, a nucleus and light from one side.
- Debris on the open ground has the grey levels of cells and is background.
- Optics blur the image, the corners are dark, and the sensor adds noise.

Each image comes with an instance map that numbers its cells. An integer hash draws all random numbers and integer
arithmetic draws all pixels, so the images are the same on every machine. A test compares their checksum.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import SegmentationDataModule
from .decode import Sample
from .errors import UserError
from .synthetic_scenes import SPLITS, Dice

SUB = 8  # outlines are computed in eighths of a pixel
EDGE = 1 << 12  # a cell's potential on the outline that it would have without neighbours
SMALLEST = 40  # cells with fewer visible pixels are not drawn


def soften(picture: np.ndarray, times: int) -> np.ndarray:
    """Blur ``(H, W)`` by several passes of the kernel 1 2 1; each pass adds a variance of half a pixel."""
    for _ in range(times):
        p = np.pad(picture, 1, mode="edge")
        p = p[:-2] + 2 * p[1:-1] + p[2:]
        picture = (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:] + 8) >> 4
    return picture


def shifted(picture: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Return the values at (y + dy, x + dx), at most 2 pixels away; values outside are those of the edge."""
    height, width = picture.shape
    return np.pad(picture, 2, mode="edge")[2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]


def grow_cells(dice: Dice, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Place cells and give each pixel to the cell with the lowest potential there, so that neighbours press flat.

    Args:
        dice: draws all random numbers.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        the cell of each pixel, int32 ``(H, W)``, 0 for open ground and 1, 2, ... for cells; and the lowest potential,
        int64 ``(H, W)``, 0 in the middle of a cell and `EDGE` on its free outline.
    """
    crowd = dice.waves(height, width, 72) + dice.between(0, 70)  # cells settle where it is positive
    y, x = (
        axis * SUB + dice.waves(height, width, 18) * 4 * SUB // 128 + dice.waves(height, width, 7) * SUB // 128
        for axis in np.ogrid[:height, :width]  # ripples of 4 pixels and of 1 pixel make all outlines different
    )
    owner, lowest = np.zeros((height, width), np.int32), np.full((height, width), EDGE, np.int64)
    cells: list[tuple[int, int, int]] = []
    for _ in range(height * width // 80):
        r = dice.between(12, 25)
        cy, cx = dice.between(-r // 2, height + r // 2), dice.between(-r // 2, width + r // 2)
        if crowd[min(max(cy, 0), height - 1), min(max(cx, 0), width - 1)] < 0:
            continue
        if any((cy - qy) ** 2 + (cx - qx) ** 2 < ((r + q) * 21 // 32) ** 2 for qy, qx, q in cells):
            continue
        cells.append((cy, cx, r))
        # an ellipse: half axes r + stretch along (uy, ux) and r - stretch across
        uy, ux, stretch = dice.between(-32, 32), dice.between(1, 32), dice.between(0, r // 4)
        long, short = (r + stretch) * SUB, (r - stretch) * SUB
        top, left, reach = max(cy - r * 3 // 2 - 6, 0), max(cx - r * 3 // 2 - 6, 0), r * 3 // 2 + 7
        window = slice(top, max(cy + reach, 0)), slice(left, max(cx + reach, 0))
        dy, dx = y[window] - cy * SUB, x[window] - cx * SUB
        along, across = dy * uy + dx * ux, dx * uy - dy * ux
        potential = (along**2 * short**2 + across**2 * long**2) * EDGE // ((uy * uy + ux * ux) * long**2 * short**2)
        mine = potential < lowest[window]
        lowest[window][mine] = potential[mine]
        owner[window][mine] = len(cells)
    return owner, lowest


def part_cells(dice: Dice, owner: np.ndarray) -> np.ndarray:
    """Open a gap of one to three pixels between neighbouring cells, and remove very small cells.

    Args:
        dice: draws the widths of the gaps.
        owner: the cell of each pixel, from `grow_cells`.

    Returns:
        the cells numbered 1, 2, 3, ..., 0 for the ground, int32 ``(H, W)``; each cell is one connected piece.
    """
    from scipy import ndimage

    count = int(owner.max())
    gaps = (dice.bits(count + 1, count + 1) % np.uint64(3)).astype(np.int32) + 1
    cut = np.zeros(owner.shape, bool)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            other = shifted(owner, dy, dx)
            low, high = np.minimum(owner, other), np.maximum(owner, other)
            gap = np.where((low > 0) & (low < high), gaps[low, high], 0)
            # a gap takes its first and third pixel from the cell of the lower number, its second from the other
            needed = np.where(owner < other, 1, 2) if max(abs(dy), abs(dx)) < 2 else np.where(owner < other, 3, 9)
            cut |= gap >= needed
    parted = np.where(cut, 0, owner)
    cells, number = np.zeros_like(owner), 0
    for value, box in enumerate(ndimage.find_objects(parted), 1):
        if box is None:
            continue
        pieces, _ = ndimage.label(parted[box] == value)
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        if sizes.max() >= SMALLEST:
            number += 1
            cells[box][pieces == sizes.argmax()] = number
    return cells


def draw_debris(dice: Dice, image: np.ndarray, cells: np.ndarray) -> None:
    """Draw specks with a bright rim on the open ground."""
    height, width = image.shape
    for _ in range(height * width // 6000 + 1):
        r = dice.between(2, 5)
        cy, cx = dice.between(r + 1, height - 2 - r), dice.between(r + 1, width - 2 - r)
        window = slice(cy - r - 1, cy + r + 2), slice(cx - r - 1, cx + r + 2)
        dy, dx = np.ogrid[-r - 1 : r + 2, -r - 1 : r + 2]
        far = dy * dy * dice.between(2, 6) + dx * dx * dice.between(2, 6) + dy * dx * dice.between(-2, 2)
        tone = dice.between(-50, 30)
        if not cells[window].any():
            image[window] += np.where(far <= 4 * r * r, tone, np.where(far <= 4 * (r + 1) ** 2, 24, 0))


def draw_cells(seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image and its instance map.

    Args:
        seed: seed of the data set.
        index: index of the image.
        size: height and width in pixels, at least 64.

    Returns:
        grey image ``(H, W)`` uint8, and instance map ``(H, W)`` int32 with the number of each cell, 0 for background.
    """
    height, width = size
    dice = Dice(seed, index)
    owner, potential = grow_cells(dice, height, width)
    cells = part_cells(dice, owner)
    inside, count = cells > 0, int(cells.max())

    tones = (dice.bits(1, count + 1)[0] % np.uint64(25)).astype(np.int32) - 12
    tones[0] = 0
    image = 144 + dice.waves(height, width, 40) // 14 + dice.waves(height, width, 9) // 24 + tones[cells]
    image = image + np.where(inside, dice.waves(height, width, 3) // 5 + dice.waves(height, width, 5) // 7, 0)

    # each cell has a nucleus with dark nucleoli in its middle
    core = inside & (potential < EDGE // 6 + dice.waves(height, width, 12) * 2)
    image += np.where(core, np.where(dice.waves(height, width, 5) > 60, -40, 14), 0)
    rim = soften(core * 256, 1)
    image -= np.minimum(rim, 256 - rim) // 8

    # light comes from one side, as in differential interference contrast
    dome = soften(np.where(inside, EDGE - np.minimum(potential, EDGE), 0) // 8, 3)
    ly, lx = dice.pick(((1, 1), (1, 0), (1, -1), (0, 1), (-1, 1), (-1, -1)))
    image += np.clip((shifted(dome, ly, lx) - shifted(dome, -ly, -lx)) // 3, -56, 56)
    draw_debris(dice, image, cells)

    # membranes are dark lines of varying strength at the cells' ends
    ends = sum((shifted(cells, *step) != cells).astype(np.int32) for step in ((0, 1), (1, 0), (0, -1), (-1, 0)))
    strength = 90 + dice.waves(height, width, 14) * 80 // 128
    image -= soften(np.minimum(ends, 2) * 128, 2) * strength >> 8

    image = soften(image * 16, 2)
    cy, cx = height * dice.between(40, 60) // 100, width * dice.between(40, 60) // 100
    y, x = np.ogrid[:height, :width]
    far = (y - cy) ** 2 + (x - cx) ** 2
    image = image * (256 - far * 110 // (cy * cy + cx * cx + height * width // 4)) >> 12
    noise = dice.bits(height, width).astype("<u8").view(np.uint8).reshape(height, width, 8)  # eight bytes per pixel
    grain = noise[..., :4].astype(np.int32).sum(axis=2) - 510
    return np.clip(image + grain * 7 // 128, 0, 255).astype(np.uint8), cells


@dataclass(frozen=True)
class CellSample(Sample):
    """An image of cells that is drawn when it is read.

    Args:
        seed: seed of the data set.
        index: index of the image; no two splits share an index.
        size: height and width in pixels.
    """

    seed: int = 0
    index: int = 0
    size: tuple[int, int] = (256, 256)

    def read(self) -> tuple[Tensor, Tensor]:
        """Draw the image ``(3, H, W)`` with three equal channels and the mask ``(H, W)``, both uint8."""
        image, cells = draw_cells(self.seed, self.index, self.size)
        return torch.from_numpy(image).repeat(3, 1, 1), torch.from_numpy((cells > 0).astype(np.uint8))

    def instances(self) -> Tensor:
        """Draw the instance map, int32 ``(H, W)``: the number of each cell, 0 for background."""
        return torch.from_numpy(draw_cells(self.seed, self.index, self.size)[1])


class SyntheticCells(SegmentationDataModule):
    """Touching cells, drawn when they are read; U-Net's border weights teach a network to separate them.

    Args:
        size: height and width in pixels, at least 64; a larger image shows more cells, not larger ones.
        num_train: number of training images.
        num_val: number of validation images.
        num_test: number of test images.
        seed: seed of the drawing; another seed draws other cells.
        **kwargs: arguments of `SegmentationDataModule`.

    Raises:
        UserError: for a size below 64 pixels or a number of images below 1.
    """

    class_names = ("background", "cell")
    palette = ((40, 44, 52), (120, 200, 140))
    source = "drawn by datamodules/synthetic_cells.py"
    licence = "the licence of this project"

    def __init__(
        self,
        size: tuple[int, int] = (256, 256),
        num_train: int = 200,
        num_val: int = 50,
        num_test: int = 50,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if len(size) != 2 or min(size) < 64:
            raise UserError(f"data.size needs a height and a width of at least 64 pixels, got {tuple(size)}")
        if min(num_train, num_val, num_test) < 1:
            raise UserError(
                f"data.num_train, data.num_val and data.num_test must be at least 1, got {num_train, num_val, num_test}"
            )
        self.size, self.seed = (size[0], size[1]), seed
        self.counts = {"train": num_train, "val": num_val, "test": num_test}

    def samples(self, split: str) -> list[Sample]:
        """List the images of a split (``train``, ``val`` or ``test``); the splits share no index.

        Raises:
            UserError: for another split.
        """
        if split not in SPLITS:
            raise UserError(f"there is no split '{split}': the splits are {', '.join(SPLITS)}")
        start = SPLITS.index(split) << 32
        return [
            CellSample(f"{split}_{i:05d}", seed=self.seed, index=start + i, size=self.size)
            for i in range(self.counts[split])
        ]
