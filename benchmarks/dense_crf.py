"""Measure the time of DenseCRF: a plain loop over pydensecrf, and the faster ways of the callback.

    python benchmarks/dense_crf.py                                  # drawn pictures
    python benchmarks/dense_crf.py --images FOLDER --workers 2      # photographs
    python benchmarks/dense_crf.py --device cuda                    # also the torch backend on a GPU

Each picture is 500 x 375 with 21 classes, as in VOC 2012, of which few occur. The probabilities imitate a network of
stride 8 that is sure of some regions and unsure of their borders. The plain loop refines one picture after another with
all classes. Other rows leave out classes that are nowhere probable; with workers, they refine several pictures at once.
The rows are measured in turn, several times, and the shortest time of each is reported.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.multiprocessing
import torch.nn.functional as F
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import v2

from datamodules import SyntheticScenes
from segmentation.crf import PRESETS, refine

HEIGHT, WIDTH, CLASSES = 375, 500, 21
CRF = PRESETS["deeplabv2"]


def pictures(folder: str | None, count: int) -> list[Tensor]:
    """Return photographs of a folder or drawn scenes, each uint8 ``(1, 3, 375, 500)``."""
    if folder is None:
        data = SyntheticScenes()
        data.setup("test")
        found = [data.datasets["test"].read(i)[0] for i in range(count)]
    else:
        files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not files:
            raise ValueError(f"the folder {folder} holds no JPEG or PNG")
        found = [v2.functional.pil_to_tensor(Image.open(f).convert("RGB")) for f in files[:: -(-len(files) // count)]]
    return [v2.functional.resize(picture, [HEIGHT, WIDTH], antialias=True)[None] for picture in found]


def probabilities(picture: Tensor, seed: int, occurring: int) -> Tensor:
    """Imitate a network of stride 8 on regions of similar colour: probabilities ``(1, 21, 375, 500)``."""
    generator = torch.Generator().manual_seed(seed)
    small = F.interpolate(picture.float(), scale_factor=1 / 8, mode="area")
    centres = small.flatten(2)[0, :, torch.randperm(small[0, 0].numel(), generator=generator)[:occurring]]  # (3, n)
    distance = (small[0, :, None] - centres[:, :, None, None]).square().sum(dim=0).sqrt()  # (n, h, w)
    logits = -12 + torch.randn(1, CLASSES, *small.shape[2:], generator=generator)
    nearer = (distance.amin(dim=0) - distance) / 10  # 0 for the nearest centre
    logits[0, :occurring] = nearer + torch.randn(distance.shape, generator=generator)
    return F.interpolate(logits, size=(HEIGHT, WIDTH), mode="bilinear").softmax(dim=1)


def ways(args: Namespace, probs: list[Tensor], images: list[Tensor]) -> dict[str, Callable[[], list[Tensor]]]:
    """Return the ways to refine all pictures, by the name of their row; the first is the plain loop."""
    context = torch.multiprocessing.get_context()
    pool = ProcessPoolExecutor(args.workers, context, torch.set_num_threads, (1,))

    def alone(backend: str, bound: float) -> list[Tensor]:
        return [refine(p, image, CRF, backend, bound) for p, image in zip(probs, images, strict=True)]

    def together(backend: str) -> list[Tensor]:
        n = len(images)
        return list(pool.map(refine, probs, images, [CRF] * n, [backend] * n, [args.bound] * n))

    def on_device() -> list[Tensor]:
        moved = torch.cat(probs).to(args.device), torch.cat(images).to(args.device)
        refined = refine(*moved, CRF, "torch", args.bound)
        return list(refined.cpu().split(1))

    rows: dict[str, Callable[[], list[Tensor]]] = {
        "pydensecrf, plain loop": lambda: alone("pydensecrf", 0),
        "pydensecrf, classes left out": lambda: alone("pydensecrf", args.bound),
        f"pydensecrf, {args.workers} workers": lambda: together("pydensecrf"),
        "torch, all classes": lambda: alone("torch", 0),
        "torch, classes left out": lambda: alone("torch", args.bound),
        f"torch, {args.workers} workers": lambda: together("torch"),
    }
    if args.device != "cpu":
        rows[f"torch, one batch on {args.device}"] = on_device
    return rows


def measure(
    rows: dict[str, Callable[[], list[Tensor]]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Run all rows in turn; return the seconds of each repeat, and the labels, both by the name of the row."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    labels = {}
    for repeat in range(repeats + 1):  # the first run only starts the processes and the GPU
        for name, run in rows.items():
            start = time.perf_counter()
            result = run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            labels[name] = torch.cat(result).argmax(dim=1)
    return seconds, labels


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=str | None, default=None, help="folder of photographs")
    parser.add_argument("--count", type=int, default=8, help="number of pictures")
    parser.add_argument("--occurring", type=int, default=3, help="number of classes that occur")
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    parser.add_argument("--bound", type=float, default=0.05, help="leave out classes that are nowhere more probable")
    parser.add_argument("--repeats", type=int, default=3, help="how many times every row is measured")
    parser.add_argument("--device", type=str, default="cpu", help="device of one more row")
    args = parser.parse_args()
    images = pictures(args.images, args.count)
    probs = [probabilities(image, seed, args.occurring) for seed, image in enumerate(images)]
    torch.set_num_threads(1)
    seconds, labels = measure(ways(args, probs, images), args.repeats)
    kept = sum(int((p.amax(dim=(0, 2, 3)) > args.bound).sum()) for p in probs) / len(probs)
    title = f"{len(images)} pictures, {WIDTH} x {HEIGHT}, {CLASSES} classes, {kept:.1f} of them above {args.bound}"
    table = Table("", "s per picture", "times as fast", "labels equal", title=title, box=ASCII2)
    first = next(iter(seconds))
    for name, times in seconds.items():
        equal = (labels[name] == labels[first]).float().mean().item()
        ratio = min(seconds[first]) / min(times)
        table.add_row(name, f"{min(times) / len(images):.3f}", f"{ratio:.2f}", f"{equal:.3%}")
    Console(width=100).print(table)
    changed = (torch.cat(probs).argmax(dim=1) != labels[first]).float().mean().item()
    sys.stdout.write(f"the CRF changed {changed:.2%} of the labels\n")


if __name__ == "__main__":
    main()
