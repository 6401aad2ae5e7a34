"""Draw Landsat-8 patches with fires, in the format of the AI SPARK challenge, for a machine without the data.

    python benchmarks/draw_wildfire.py data/wildfire --patches 400
    python benchmarks/compare.py --data Wildfire --data.root data/wildfire --architectures UNet DeepLabV3Plus

A patch shows meadow, forest, bare soil and water with typical reflectances. Fires are small spots and long thin fronts.
They are bright in short-wave infrared, and brightest at 2.2 um (band 7). Smoke blurs the visible bands. Some things
look like fire: bright roofs and sand, which are at least as bright at 1.6 um (band 6), and clouds. Drawn data shows
that a recipe runs. It does not show how well the recipe finds real fires.
"""

from pathlib import Path

import numpy as np
import tifffile
from jsonargparse import auto_cli
from scipy.ndimage import gaussian_filter

SIDE = 256
# coastal, blue, green, red, near infrared, short-wave infrared 1.6 and 2.2 um, cirrus, two thermal
BANDS = ["1", "2", "3", "4", "5", "6", "7", "9", "10", "11"]
SURFACES = np.array([  # reflectance per band; the thermal bands are digital numbers / 65535
    [0.05, 0.05, 0.08, 0.06, 0.34, 0.20, 0.11, 0.002, 0.38, 0.37],  # meadow
    [0.04, 0.04, 0.05, 0.03, 0.26, 0.12, 0.05, 0.002, 0.36, 0.35],  # forest
    [0.11, 0.13, 0.18, 0.23, 0.30, 0.40, 0.36, 0.003, 0.43, 0.41],  # bare soil
    [0.06, 0.06, 0.05, 0.03, 0.02, 0.01, 0.01, 0.002, 0.33, 0.33],  # water
])  # fmt: skip
FIRE = np.array([0.10, 0.11, 0.13, 0.18, 0.35, 0.75, 1.15, 0.003, 0.58, 0.52])
ROOF = np.array([0.30, 0.33, 0.36, 0.40, 0.50, 0.85, 0.75, 0.004, 0.44, 0.42])
CLOUD = np.array([0.60, 0.62, 0.63, 0.65, 0.70, 0.45, 0.35, 0.050, 0.22, 0.21])
SMOKE = np.array([0.45, 0.42, 0.38, 0.33, 0.25, 0.08, 0.04, 0.003, 0.36, 0.35])


def smooth(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Return noise ``(SIDE, SIDE)`` of mean 0 and deviation 1, with structures of about `sigma` pixels."""
    noise = gaussian_filter(rng.normal(size=(SIDE, SIDE)), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def spot(rng: np.random.Generator, size: float) -> np.ndarray:
    """Return the opacity of a spot of about `size` pixels in diameter, 0 to 1: ``(SIDE, SIDE)``."""
    y, x = np.mgrid[:SIDE, :SIDE] - rng.uniform(0, SIDE, (2, 1, 1))
    return np.clip(1.5 - np.hypot(y, x) / size * 2 + 0.3 * smooth(rng, max(1, size / 3)), 0, 1)


def front(rng: np.random.Generator) -> np.ndarray:
    """Return the opacity of a line of fire, 1 to 3 pixels wide and about 50 long, 0 to 1: ``(SIDE, SIDE)``."""
    centre, direction = rng.uniform(30, SIDE - 30, 2), rng.uniform(0, np.pi)
    y, x = np.mgrid[:SIDE, :SIDE] - centre[:, None, None]
    along, across = x * np.cos(direction) + y * np.sin(direction), y * np.cos(direction) - x * np.sin(direction)
    bend = rng.uniform(5, 12) * np.sin(along / rng.uniform(10, 25))
    near = np.clip(rng.uniform(1, 2.2) - np.abs(across - bend), 0, 1)
    return near * (np.abs(along) < rng.uniform(15, 45)) * np.clip(1 + 0.5 * smooth(rng, 2), 0.3, 1)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one patch: image ``(SIDE, SIDE, 10)`` uint16 and mask ``(SIDE, SIDE)`` uint8, 1 for fire."""
    rng = np.random.default_rng(seed)
    cover = np.stack([1.5 * smooth(rng, rng.uniform(10, 25)) + bias for bias in rng.normal(0, 0.8, len(SURFACES))])
    cover = np.exp(3 * cover)
    image = np.einsum("khw,kb->hwb", cover / cover.sum(axis=0), SURFACES)
    image *= 1 + 0.15 * smooth(rng, 1)[..., None]

    def lay(colour: np.ndarray, opacity: np.ndarray) -> None:
        image[:] = image * (1 - opacity[..., None]) + colour * opacity[..., None]

    for _ in range(rng.integers(2, 7)):
        lay(ROOF * rng.uniform(0.7, 1.1), spot(rng, rng.uniform(2, 6)))
    fire = np.zeros((SIDE, SIDE))
    for _ in range(rng.integers(0, 6)):
        fire = np.maximum(fire, spot(rng, rng.uniform(1.5, 7)))
    for _ in range(rng.integers(0, 3)):
        fire = np.maximum(fire, front(rng))
    lay(FIRE * rng.uniform(0.7, 1.0), fire)
    if fire.any():  # the wind moves the smoke to one side
        drift = np.roll(gaussian_filter(fire, (6, 14)), rng.integers(-12, 13, 2), (0, 1))
        lay(SMOKE, 0.7 * np.clip(drift / max(drift.max(), 1e-9), 0, 1))
    for _ in range(rng.integers(0, 3)):
        lay(CLOUD, 0.9 * spot(rng, rng.uniform(15, 50)))
        fire = fire * (image[..., 7] < 0.025)  # clouds hide fires
    image *= rng.uniform(0.6, 1.1)  # height of the sun
    numbers = np.where(np.arange(10) < 8, image / 2e-5 + 5000, image * 65535)  # the scale of Landsat's reflectance
    numbers += rng.normal(0, 120, image.shape)
    return np.clip(numbers, 0, 65535).astype(np.uint16), (fire > 0.4).astype(np.uint8)


def main(root: Path, patches: int = 400, seed: int = 0) -> None:
    """Write patches and masks.

    Args:
        root: folder for ``train_img/`` and ``train_mask/``.
        patches: number of patches.
        seed: another seed draws other patches.
    """
    for folder in ("train_img", "train_mask"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(patches):
        image, mask = draw(seed * 1_000_000 + i)
        tifffile.imwrite(root / f"train_img/train_img_{i}.tif", image, planarconfig="contig", compression="zlib")
        tifffile.imwrite(root / f"train_mask/train_mask_{i}.tif", mask)
    print(f"{patches} patches of {SIDE} x {SIDE} pixels with the bands {', '.join(BANDS)} in {root}")


if __name__ == "__main__":
    auto_cli(main)
