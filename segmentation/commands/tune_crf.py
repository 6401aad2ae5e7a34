"""Chooses w1, sigma_alpha and sigma_beta of a DenseCRF on validation images: the command ``lightning tune_crf``.

DeepLab v1 and v2 keep w2 and sigma_gamma fixed and search these three on some images of the validation set (100 in v1),
from coarse to fine.
"""

import csv
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from rich.box import ASCII2
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ..base import SegmentationModule
from ..checkpoints import load_trained
from ..crf import CRF, Backend, need_pydensecrf, refine
from ..errors import UserError
from ..metrics import ConfusionMatrix, confusion_metrics

NAMES = ("w1", "sigma_alpha", "sigma_beta")  # what is searched
SHOWN = 10  # rows of the table


class Search:
    """Scores CRFs on stored probabilities, each once, in processes.

    Args:
        files: as `store` left them.
        num_classes: of the labels, 2 or more.
        backend: see `refine`.
        pool: does the work.
        progress: shows it.
    """

    def __init__(
        self, files: Sequence[Path], num_classes: int, backend: Backend, pool: ProcessPoolExecutor, progress: Progress
    ) -> None:
        self.files, self.num_classes, self.backend = files, num_classes, backend
        self.pool, self.progress = pool, progress
        self.miou: dict[CRF, float] = {}
        self.bar = progress.add_task("DenseCRF", total=0)

    def evaluate(self, candidates: Iterable[CRF]) -> None:
        """Add the mIoU of those that are not known yet."""
        new = [crf for crf in dict.fromkeys(candidates) if crf not in self.miou]
        work = list(itertools.product(new, self.files))
        self.progress.update(self.bar, total=len(self.miou) * len(self.files) + len(work))
        totals = {crf: torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64) for crf in new}
        crfs, files = [crf for crf, _ in work], [file for _, file in work]
        matrices = self.pool.map(confusion, files, crfs, [self.num_classes] * len(work), [self.backend] * len(work))
        for crf, matrix in zip(crfs, matrices, strict=True):
            totals[crf] += matrix
            self.progress.advance(self.bar)
        names = [str(k) for k in range(self.num_classes)]
        self.miou |= {crf: float(confusion_metrics(total, names)["miou"]) for crf, total in totals.items()}

    def best(self) -> CRF:
        """The first of those with the highest mIoU."""
        return max(self.miou, key=lambda crf: self.miou[crf])


def confusion(file: Path, crf: CRF | None, num_classes: int, backend: Backend) -> Tensor:
    """The confusion matrix ``(K, K)`` of a stored image after a CRF, or before it."""
    stored = torch.load(file, weights_only=True)
    probs = stored["probs"].float()
    refined = probs if crf is None else refine(probs, stored["image"], crf, backend)
    labels = (refined[:, 0] > 0.5).long() if refined.shape[1] == 1 else refined.argmax(dim=1)
    matrix = ConfusionMatrix(num_classes)
    matrix.update(labels, stored["mask"].long())
    return matrix.compute()


def store(model: SegmentationModule, dataset: Any, num_images: int, folder: Path, progress: Progress) -> list[Path]:
    """Run the network on images spread evenly over a split, and keep what it says as files of half precision.

    Raises:
        UserError: if the images are not RGB of 8 bits.
    """
    count = min(num_images, len(dataset))
    files = []
    for i in progress.track(range(count), description="probabilities"):
        item = dataset[0, i * len(dataset) // count]
        image = item["image"][None]
        if image.dtype != torch.uint8 or image.shape[1] != 3:
            raise UserError(f"tune_crf takes RGB images of 8 bits, and {item['name']} is none: it is {image.dtype}")
        probs = model.predict_step({"image": image, "name": [item["name"]], "size": [item["size"]]}, 0)["probs"]
        files.append(folder / f"{i}.pt")
        torch.save({"probs": probs.half().cpu(), "image": image, "mask": item["mask"][None].byte()}, files[-1])
    return files


def tune(
    model: SegmentationModule,
    datamodule: Any,
    checkpoint: str,
    num_images: int,
    axes: Sequence[Sequence[float]],
    fixed: dict[str, Any],
    backend: Backend,
    grid: bool,
    workers: int | None,
    device: torch.device,
    output_dir: Path,
) -> None:
    """Search, print the table and the YAML to paste, and write every score to ``search.csv``.

    Args:
        model: the network.
        datamodule: its split ``val`` is read.
        checkpoint: with the network's weights.
        num_images: of the split.
        axes: values of w1, of sigma_alpha and of sigma_beta.
        fixed: the CRF's other arguments.
        backend: see `refine`.
        grid: try all combinations, and not every second value and then the neighbours of the best until none is better.
        workers: processes; None takes one per core.
        device: of the network.
        output_dir: for the scores.

    Raises:
        UserError: if an axis has no values, or `num_images` is below 1.
    """
    if num_images < 1 or not all(axes):
        raise UserError("tune_crf needs one image or more, and values for each of w1, sigma_alpha and sigma_beta")
    if backend == "pydensecrf":
        need_pydensecrf()
    axes = [sorted(set(values)) for values in axes]

    def candidates(places: Iterable[tuple[int, ...]]) -> list[CRF]:
        return [CRF(axes[0][i], axes[1][j], axes[2][k], **fixed) for i, j, k in places]

    load_trained(model, checkpoint)
    model.to(device).eval()
    datamodule.prepare_data()
    datamodule.setup("validate")
    classes = max(2, model.num_classes)
    context = torch.multiprocessing.get_context()
    pool = ProcessPoolExecutor(workers or torch.get_num_threads(), context, torch.set_num_threads, (1,))
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, pool, Progress(*columns) as progress:
        with torch.inference_mode():
            files = store(model, datamodule.datasets["val"], num_images, Path(folder), progress)
        search = Search(files, classes, backend, pool, progress)
        before = torch.stack([confusion(file, None, classes, backend) for file in files]).sum(dim=0)
        steps = [range(0, len(axis), 1 if grid else 2) for axis in axes]
        search.evaluate(candidates(itertools.product(*steps)))
        looked_around: list[CRF] = []
        while not grid and search.best() not in looked_around:
            best = search.best()
            looked_around.append(best)
            centre = [axis.index(getattr(best, name)) for axis, name in zip(axes, NAMES, strict=True)]
            around = [range(max(0, i - 1), min(len(axis), i + 2)) for axis, i in zip(axes, centre, strict=True)]
            search.evaluate(candidates(itertools.product(*around)))
    report(search, float(confusion_metrics(before, [str(k) for k in range(classes)])["miou"]), len(files), output_dir)


def report(search: Search, before: float, images: int, output_dir: Path) -> None:
    """Print the best settings as a table, the best of them as YAML, and write all to ``search.csv``."""
    ranked = sorted(search.miou.items(), key=lambda pair: -pair[1])
    table = Table(*NAMES, "mIoU", title=f"DenseCRF on {images} images of split 'val'", box=ASCII2)
    table.add_row("without", "", "", f"{before:.4f}")
    table.add_section()
    for crf, miou in ranked[:SHOWN]:
        table.add_row(*(f"{getattr(crf, name):g}" for name in NAMES), f"{miou:.4f}")
    Console(width=100).print(table)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "search.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow((*NAMES, "miou"))
        rows.writerows((*(getattr(crf, name) for name in NAMES), miou) for crf, miou in ranked)
    best = search.best()
    values = ", ".join(f"{name}: {getattr(best, name):g}" for name in (*NAMES, "w2", "sigma_gamma", "iterations"))
    print(f"scores       {output_dir / 'search.csv'}, {len(ranked)} settings\n\ncallbacks:  # of the trainer")
    print(f"    - class_path: segmentation.callbacks.DenseCRF\n      init_args: {{{values}}}")
