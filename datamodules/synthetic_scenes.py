"""SyntheticScenes: small landscapes, drawn by this file and never downloaded; the default data set.

A network must use the context in them, because colour alone does not decide the class:

- Sky, water and road share one grey-blue palette. Roads are straight and banks meander. The same pale strokes are lane
  marks if they form a row, and ripples if they are scattered.
- The same vehicle is a ``boat`` on water and a ``car`` on a road. Plain water or road surrounds it.
- The same woolly puffs are clouds above the horizon (``sky``), and ``sheep`` in the meadow or on the road. They touch,
  and only a thin dark gap separates them.
- A ``pillow`` continues the pattern of its ``sheet``. Only its shaded outline shows it, and folds are shaded alike.
- A ``tree`` has the colour and texture of the meadow; it is large in front and tiny far away. A ``pole`` is one to
  three pixels thin.

An integer hash draws all random numbers and integer arithmetic draws all pixels, so the images are the same on every
machine and with every version of NumPy. A test compares their checksum.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import SegmentationDataModule
from .decode import Sample
from .errors import UserError

SKY, GRASS, WATER, ROAD, TREE, BOAT, CAR, SHEET, PILLOW, SHEEP, POLE = range(11)

SLATE = ((104, 122, 138), (128, 143, 156), (150, 163, 173), (118, 128, 150))  # sky, water and road
CLEAN = {SKY: (168, 204, 232), WATER: (60, 110, 170), ROAD: (120, 118, 116)}  # separate colours at difficulty 0
GREEN = ((88, 128, 66), (102, 138, 74), (80, 118, 74))  # meadows and crowns
BRIGHT = ((200, 62, 54), (226, 172, 50), (232, 228, 216), (52, 116, 168), (222, 120, 56), (70, 150, 132))
CLOTH = ((214, 84, 84), (240, 232, 214), (90, 110, 180), (236, 190, 96), (160, 90, 150), (120, 170, 160))
WOOL, WOOD, GLASS, STROKE = (232, 228, 218), (84, 66, 52), (60, 72, 86), (208, 212, 212)

SEAM = 140  # light along a fold or a pillow's outline, in 256ths
NOISE = (0, 10, 20)  # strength of the sensor noise by difficulty; 10 is a standard deviation of 8 grey levels
STRIDE = (18, 18, 30)  # distance between strokes by difficulty, in 128ths of the shorter side
SPLITS = ("train", "val", "test")
MASK64 = (1 << 64) - 1


def mix(x: Any) -> Any:
    """Hash with splitmix64: a Python int to an int, or a uint64 array to a uint64 array."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


class Dice:
    """A generator of random integers that depends on its keys alone."""

    def __init__(self, *keys: int) -> None:
        self.state = 0
        for key in keys:
            self.state = mix(self.state ^ key)

    def between(self, low: int, high: int) -> int:
        """Draw an integer from low to high, both included; return low if high is smaller."""
        self.state = mix(self.state)
        return low + self.state % (max(high - low, 0) + 1)

    def pick(self, choices: tuple) -> Any:
        """Draw one of the choices."""
        return choices[self.between(0, len(choices) - 1)]

    def bits(self, height: int, width: int) -> np.ndarray:
        """Draw a uint64 array ``(height, width)``."""
        self.state = mix(self.state)
        return mix(np.arange(height * width, dtype=np.uint64) + np.uint64(self.state)).reshape(height, width)

    def waves(self, height: int, width: int, cell: int) -> np.ndarray:
        """Draw smooth noise ``(height, width)`` from -128 to 127, with one random value every `cell` pixels."""
        knots = (self.bits(height // cell + 2, width // cell + 2) & 255).astype(np.int32) - 128
        ramp = np.arange(cell, dtype=np.int64)
        ramp = (ramp * ramp * (3 * cell - 2 * ramp) // (cell * cell)).astype(np.int32)  # smoothstep, 0 to cell
        knots = knots.repeat(cell, axis=1)
        ramps = np.resize(ramp, width)
        rows = knots[:, :width] * (cell - ramps) + knots[:, cell : cell + width] * ramps
        rows = rows.repeat(cell, axis=0)
        ramps = np.resize(ramp, height)[:, None]
        return (rows[:height] * (cell - ramps) + rows[cell : cell + height] * ramps) // (cell * cell)


class Canvas:
    """An image with its mask, and the tools to find a place in it and to draw there.

    Args:
        height: height in pixels.
        width: width in pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.image = np.zeros((height, width, 3), dtype=np.int32)
        self.mask = np.zeros((height, width), dtype=np.uint8)

    def px(self, length: int) -> int:
        """Convert 128ths of the shorter side to pixels, at least 1, so that a scene has one layout at any size."""
        return max(1, (length * min(self.height, self.width) + 64) // 128)

    def window(self, cy: int, cx: int, ry: int, rx: int) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
        """Return the part of the canvas within (ry, rx) of (cy, cx).

        Returns:
            the window as two slices, and the offsets of its pixels from the centre, dy ``(h, 1)`` and dx ``(1, w)``.
        """
        top, bottom = max(cy - ry, 0), max(min(cy + ry + 1, self.height), 0)
        left, right = max(cx - rx, 0), max(min(cx + rx + 1, self.width), 0)
        dy, dx = np.arange(top - cy, bottom - cy), np.arange(left - cx, right - cx)
        return (slice(top, bottom), slice(left, right)), dy[:, None], dx[None, :]

    def find(self, dice: Dice, label: int, ry: int, rx: int, tries: int = 40) -> tuple[int, int] | None:
        """Find a centre whose whole window shows only `label`; return None after so many tries."""
        for _ in range(tries):
            cy, cx = dice.between(ry, self.height - 1 - ry), dice.between(rx, self.width - 1 - rx)
            if self.mask[cy, cx] == label and (self.mask[cy - ry : cy + ry + 1, cx - rx : cx + rx + 1] == label).all():
                return cy, cx
        return None

    def paint(self, window: tuple, inside: np.ndarray, colour: Any, label: int | None = None) -> None:
        """Set the colour of the pixels inside, and their label if one is given."""
        np.copyto(self.image[window], colour, where=inside[..., None])
        if label is not None:
            self.mask[window][inside] = label

    def shade(self, window: tuple, inside: np.ndarray, light: Any) -> None:
        """Multiply the pixels inside by light / 256; light is one number or one per pixel."""
        self.paint(window, inside, self.image[window] * np.asarray(light)[..., None] >> 8)


def ellipse(dy: np.ndarray, dx: np.ndarray, ry: int, rx: int) -> np.ndarray:
    """Return which offsets lie within an ellipse, bool ``(h, w)``."""
    return dy * dy * (rx * rx) + dx * dx * (ry * ry) <= ry * ry * rx * rx


def draw_land(canvas: Canvas, dice: Dice, difficulty: int) -> list[tuple[int, np.ndarray]]:
    """Paint the sky, the meadow and one or two bands of water or road across it.

    Returns:
        for the sky and each band, its label and the row of its centre line in every column, ``(W,)``.
    """
    height, width, px = canvas.height, canvas.width, canvas.px
    whole, y, x = (slice(None), slice(None)), np.arange(height)[:, None], np.arange(width)

    def slate(label: int) -> list[int]:
        shift = dice.between(-10, 10)
        return [value + shift for value in (CLEAN[label] if difficulty == 0 else dice.pick(SLATE))]

    canvas.image[:], canvas.mask[:] = slate(SKY), SKY
    horizon = height * dice.between(22, 30) // 100
    skyline = horizon + dice.waves(1, width, px(40))[0] * px(4) // 128
    canvas.paint(whole, y >= skyline, dice.pick(GREEN), GRASS)
    canvas.shade(whole, (y < skyline) & (y >= skyline - px(2)), 216)  # haze, which looks like a bank
    bands = [(SKY, skyline)]

    count, label = dice.pick((1, 1, 1, 2)), dice.pick((WATER, ROAD))
    room = (height - horizon - px(6)) // count
    for top in range(horizon + px(6), horizon + px(6) + count * room, room):
        half = min(px(dice.between(17, 20)), room // 2 - px(2))
        centre = dice.between(top + half, min(top + room - half, top + half + px(14)))
        line = centre + (x - width // 2) * dice.between(-px(8), px(8)) // width
        upper, lower = line - half, line + half
        if label == WATER:
            upper = upper + dice.waves(1, width, px(20))[0] * px(5) // 128
            lower = lower + dice.waves(1, width, px(20))[0] * px(5) // 128
        inside = (y >= upper) & (y <= lower)
        canvas.paint(whole, inside, slate(label), label)
        canvas.shade(whole, inside & ((y < upper + px(2)) | (y > lower - px(2))), 216)  # bank or kerb
        bands.append((label, line))
        label = WATER + ROAD - label
    return bands


def draw_sheet(canvas: Canvas, dice: Dice) -> None:
    """Draw a patterned sheet with two folds in the meadow, and a pillow of the same cloth on it."""
    px = canvas.px
    ry, rx = px(dice.between(16, 19)), px(dice.between(33, 40))
    if not (place := canvas.find(dice, GRASS, ry, rx)):
        return
    window, dy, dx = canvas.window(*place, ry, rx)
    half = rx - ry // 2
    sheet = abs(dx + dy // 2) <= half
    patch = px(dice.between(4, 6))
    pattern = (dx // patch + dy // patch * dice.between(0, 1)) % 2 == 0  # checks or stripes
    canvas.paint(window, sheet, dice.pick(CLOTH), SHEET)
    canvas.paint(window, sheet & pattern, dice.pick(CLOTH))

    ry, rx, corner = px(dice.between(10, 12)), px(dice.between(14, 18)), px(5)
    slack = max(0, half - rx - ry // 2)
    py, qx = abs(dy - dice.between(-px(1), px(1))), abs(dx - dice.between(-slack, slack))
    far = np.maximum(py - ry + corner, 0) ** 2 + np.maximum(qx - rx + corner, 0) ** 2  # a rectangle with round corners
    pillow = far <= corner**2
    canvas.mask[window][pillow] = PILLOW
    for _ in range(2):
        fold = abs(dx + dy * dice.between(-2, 2) // 4 - dice.between(-half, half)) <= px(1)
        canvas.shade(window, fold & sheet & ~pillow, SEAM)
    canvas.shade(window, (far <= (corner + px(1)) ** 2) & (far > (corner - px(1)) ** 2), SEAM)


def draw_puffs(canvas: Canvas, dice: Dice, ground: int, label: int) -> None:
    """Draw a row of touching woolly puffs on a ground: a cloud in the sky, sheep elsewhere."""
    px = canvas.px
    r = px(dice.between(6, 9))
    if not (place := canvas.find(dice, ground, r + px(2), 2 * r)):
        return
    cy, cx = place
    for step in range(-dice.between(1, 2), dice.between(1, 3)):
        ry, rx = r - dice.between(0, px(1)), r + dice.between(0, px(2))
        y, x = cy + dice.between(-px(2), px(2)), cx + step * 2 * r + dice.between(-px(2), px(1))
        window, dy, dx = canvas.window(y, x, ry + 1, rx + 1)
        below = canvas.mask[window]
        if ((below != ground) & (below != label)).any():
            continue
        puff, gap = ellipse(dy, dx, ry, rx), ellipse(dy, dx, ry + 1, rx + 1)
        canvas.shade(window, gap, 130)
        below[gap] = ground
        canvas.paint(window, puff, WOOL, label)
        canvas.shade(window, puff, 246 - (dy + dx) * 60 // (rx + ry))


def draw_vehicle(canvas: Canvas, dice: Dice, surface: int) -> None:
    """Draw a hull with a cabin well inside a band: a boat on water, a car on a road; only the label differs."""
    px = canvas.px
    half, deck, island = px(dice.between(13, 17)), px(8), px(5)
    if not (place := canvas.find(dice, surface, deck + island, half + island)):
        return
    window, dy, dx = canvas.window(*place, deck + px(1), half)
    hull = (dy >= 0) & (dy <= deck) & (abs(dx) <= half - dy // 2)
    seat = dx + dice.pick((-1, 1)) * px(2)
    cabin = (dy < 0) & (dy >= -deck) & (abs(seat) <= half // 2 + dy // 3 + px(1))
    glass = cabin & (dy >= -px(6)) & (dy < -px(1)) & (abs(seat) <= half // 2 + dy // 3 - px(1)) & (seat != 0)
    canvas.shade(window, (dy > deck) & (abs(dx) <= half - px(2)), 170)
    canvas.paint(window, hull | cabin, dice.pick(BRIGHT), BOAT if surface == WATER else CAR)
    canvas.shade(window, hull & (dy >= px(5)), 150)
    canvas.paint(window, glass, GLASS)


def draw_strokes(canvas: Canvas, dice: Dice, label: int, line: np.ndarray, stride: int) -> None:
    """Draw short pale strokes away from edges and vehicles: lane marks in a row on a road, ripples all over water."""
    px = canvas.px
    thick, half, margin = px(2) // 2, px(4), px(4)
    for x in range(dice.between(0, stride), canvas.width, stride):
        place = (int(line[x]), x) if label == ROAD else canvas.find(dice, label, thick + margin, half, tries=4)
        if place and (canvas.mask[canvas.window(*place, thick + margin, half + margin)[0]] == label).all():
            canvas.image[canvas.window(*place, thick // 2, half)[0]] = STROKE


def draw_tree(canvas: Canvas, dice: Dice, r: int) -> None:
    """Draw a tree with a crown of radius r in the meadow, where it hides no smaller object."""
    if not (place := canvas.find(dice, GRASS, 1, 1)):
        return
    foot, cx = place
    cy = foot - r - r // 2
    crown, dy, dx = canvas.window(cy, cx, r, r)
    if (canvas.mask[crown] > TREE).any():
        return
    trunk = slice(max(cy, 0), foot), slice(max(cx - r // 6, 0), cx + r // 6 + 1)
    canvas.image[trunk], canvas.mask[trunk] = WOOD, TREE
    inside = ellipse(dy, dx, r, r)
    canvas.paint(crown, inside, dice.pick(GREEN), TREE)
    canvas.shade(crown, inside, 250 - (dy + dx) * 56 // r)


def draw_pole(canvas: Canvas, dice: Dice) -> None:
    """Draw a pole with a crossbar in the meadow, in front of everything else."""
    if not (place := canvas.find(dice, GRASS, 1, 1)):
        return
    (foot, x), thick, arm = place, dice.between(1, 3), canvas.px(4)
    top = max(0, foot - canvas.px(dice.between(28, 60)))
    for part in (
        (slice(top, foot + 1), slice(x, x + thick)),
        (slice(top + arm // 2, top + arm // 2 + 1), slice(max(x - arm, 0), x + thick + arm)),
    ):
        canvas.image[part], canvas.mask[part] = WOOD, POLE


def draw_scene(seed: int, index: int, size: tuple[int, int], difficulty: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene, distant objects first.

    Args:
        seed: seed of the data set.
        index: index of the scene.
        size: height and width in pixels, at least 32.
        difficulty: see `SyntheticScenes`.

    Returns:
        image ``(H, W, 3)`` uint8 and mask ``(H, W)`` uint8.
    """
    height, width = size
    canvas, dice = Canvas(height, width), Dice(seed, index)
    px, times = canvas.px, max(size) // min(size)  # a panorama holds more objects
    bands = draw_land(canvas, dice, difficulty)
    for _ in range(times):
        draw_puffs(canvas, dice, SKY, SKY)
        draw_sheet(canvas, dice)
    for _ in range(2 * times):
        draw_puffs(canvas, dice, GRASS, SHEEP)
    for label, line in bands:
        for _ in range(times * dice.between(1, 2) if label != SKY else 0):
            draw_vehicle(canvas, dice, label)
        if label == ROAD and dice.between(0, 1):
            draw_puffs(canvas, dice, ROAD, SHEEP)
        draw_strokes(canvas, dice, label, line, px(STRIDE[difficulty]))
    for _ in range(times * dice.between(2, 4)):
        draw_tree(canvas, dice, px(dice.between(2, 4)))
    for _ in range(times * dice.between(1, 2)):
        draw_tree(canvas, dice, px(dice.between(9, 15)))
    for _ in range(times * dice.between(1, 2)):
        draw_pole(canvas, dice)

    slope_y, slope_x = dice.between(-48, 48), dice.between(-48, 48)
    light = 256 + np.arange(height)[:, None] * slope_y // height + np.arange(width) * slope_x // width
    light = light.astype(np.int32) + dice.waves(height, width, px(16)) // 10
    tufts = np.where((canvas.mask == GRASS) | (canvas.mask == TREE), 3, 1).astype(np.int32)
    light += dice.waves(height, width, px(3)) * tufts // 10
    noise = dice.bits(height, width).astype("<u8").view(np.uint8).reshape(height, width, 8)  # eight bytes per pixel
    grain = noise[..., 0:3].astype(np.int32) + noise[..., 3:6] - 255
    image = (canvas.image * light[..., None] >> 8) + (grain * NOISE[difficulty] >> 7)
    return np.clip(image, 0, 255).astype(np.uint8), canvas.mask


@dataclass(frozen=True)
class Scene(Sample):
    """A scene that is drawn when it is read.

    Args:
        seed: seed of the data set.
        index: index of the scene; no two splits share an index.
        size: height and width in pixels.
        difficulty: see `SyntheticScenes`.
    """

    seed: int = 0
    index: int = 0
    size: tuple[int, int] = (128, 128)
    difficulty: int = 1

    def read(self) -> tuple[Tensor, Tensor]:
        """Draw the image ``(3, H, W)`` and the mask ``(H, W)``, both uint8."""
        image, mask = draw_scene(self.seed, self.index, self.size, self.difficulty)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)


class SyntheticScenes(SegmentationDataModule):
    """Small landscapes in which context decides the class, drawn when they are read.

    Args:
        size: height and width in pixels, at least 32. Lengths scale with the shorter side, noise and poles do not.
        num_train: number of training scenes.
        num_val: number of validation scenes.
        num_test: number of test scenes.
        seed: seed of the drawing; another seed draws other scenes.
        difficulty: 0 gives sky, water and road different colours and no noise; 1 is the default; 2 doubles the noise
            and draws fewer lane marks and ripples.
        **kwargs: arguments of `SegmentationDataModule`.

    Raises:
        UserError: for a size below 32 pixels, a number of scenes below 1, or an unknown difficulty.
    """

    class_names = ("sky", "grass", "water", "road", "tree", "boat", "car", "sheet", "pillow", "sheep", "pole")
    palette = (
        (152, 196, 232), (126, 176, 92), (52, 104, 184), (112, 108, 116), (42, 104, 60), (250, 140, 40),
        (214, 40, 60), (236, 196, 210), (168, 84, 176), (250, 244, 220), (90, 60, 40),
    )  # fmt: skip
    source = "drawn by datamodules/synthetic_scenes.py"
    licence = "the licence of this project"

    def __init__(
        self,
        size: tuple[int, int] = (128, 128),
        num_train: int = 2000,
        num_val: int = 100,
        num_test: int = 100,
        seed: int = 0,
        difficulty: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if len(size) != 2 or min(size) < 32:
            raise UserError(f"data.size needs a height and a width of at least 32 pixels, got {tuple(size)}")
        if min(num_train, num_val, num_test) < 1:
            raise UserError(
                f"data.num_train, data.num_val and data.num_test must be at least 1, got {num_train, num_val, num_test}"
            )
        if difficulty not in (0, 1, 2):
            raise UserError(f"data.difficulty must be 0 (clean), 1 or 2 (hard), got {difficulty}")
        self.size, self.seed, self.difficulty = (size[0], size[1]), seed, difficulty
        self.counts = {"train": num_train, "val": num_val, "test": num_test}

    def samples(self, split: str) -> list[Sample]:
        """List the scenes of a split (``train``, ``val`` or ``test``); the splits share no index.

        Raises:
            UserError: for another split.
        """
        if split not in SPLITS:
            raise UserError(f"there is no split '{split}': the splits are {', '.join(SPLITS)}")
        start = SPLITS.index(split) << 32
        return [
            Scene(f"{split}_{i:05d}", seed=self.seed, index=start + i, size=self.size, difficulty=self.difficulty)
            for i in range(self.counts[split])
        ]
