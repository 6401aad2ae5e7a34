"""Measure time and memory of `lightning predict_tiff` over the area of the image.

    python benchmarks/large_image.py --sizes '[2500, 5000, 10000, 20000]'

The script draws square TIFFs of three bands of 8 bits, tile by tile. It predicts each in a separate process, with a
narrow network of 21 classes on one CPU core. The time should grow in proportion to the area, the memory to the width.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tifffile
from jsonargparse import auto_cli

TILE = 512


def draw(path: Path, size: int) -> None:
    """Write a TIFF of coloured waves with a little noise, in tiles compressed by deflate."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-6, 7, (TILE, TILE, 3))

    def tiles() -> Iterator[np.ndarray]:
        for top in range(0, size, TILE):
            for left in range(0, size, TILE):
                y, x = np.arange(top, top + TILE)[:, None, None], np.arange(left, left + TILE)[:, None]
                waves = np.sin(y / np.array([97, 131, 173])) * np.sin(x / np.array([211, 89, 151]))
                yield (120 + 110 * waves + noise).astype(np.uint8)

    tifffile.imwrite(
        path, tiles(), shape=(size, size, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="rgb", compression="zlib"
    )


def measure(image: Path, crop: int) -> tuple[float, float]:
    """Predict in this process; return CPU seconds, which other programs do not lengthen, and peak memory in MiB."""
    import torch  # not at the top: a child process starts with the memory of its parent in its count

    from segmentation import UNet
    from segmentation.commands.predict_tiff import write_labels
    from segmentation.inference import SlidingWindow

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = UNet(21, base_channels=2, pixel_shuffle=4, inference=SlidingWindow(crop))
    start = time.process_time()
    write_labels(model, image, image.with_suffix(".labels.tif"))
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(sizes: Sequence[int] = (2500, 5000, 10000), crop: int = 512, folder: Path | None = None) -> None:
    """Measure all sizes and print a table.

    Args:
        sizes: sides of the images in pixels; 20000 takes minutes.
        crop: side of the sliding window.
        folder: folder for the images, at most 3 bytes per pixel; by default the system's temporary folder.
    """
    print("| side, px | area, Mpx | CPU seconds | per Mpx | of the first's | peak memory, MiB |")
    print("|---|---|---|---|---|---|", flush=True)
    first = None
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for size in sizes:
            image = Path(temporary) / f"{size}.tif"
            draw(image, size)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                seconds, memory = pool.submit(measure, image, crop).result()
            area = size**2 / 1e6
            first = first or seconds / area
            print(
                f"| {size:,} | {area:,.1f} | {seconds:.1f} | {seconds / area:.3f} | {seconds / area / first:.2f} | "
                f"{memory:,.0f} |",
                flush=True,
            )
            image.unlink()


if __name__ == "__main__":
    auto_cli(main)
