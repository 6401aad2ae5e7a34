"""The command ``lightning tune_crf``: search w1, sigma_alpha and sigma_beta of a DenseCRF on validation images.

DeepLab v1 and v2 keep w2 and sigma_gamma fixed and search the other three on some validation images (100 in v1), from
coarse to fine.
"""

import csv
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.multiprocessing
from rich.box import ASCII2
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ..base import SegmentationModule
from ..checkpoints import agree, load_trained
from ..crf import CRF, Backend, need_pydensecrf, refine
from ..errors import UserError
from ..metrics import ConfusionMatrix, confusion_metrics

NAMES = ("w1", "sigma_alpha", "sigma_beta")  # the arguments that the search varies
SHOWN = 10  # rows of the table


class Search:
    """The mIoU of CRFs on stored probabilities, measured in several processes, each CRF once.

    Args:
        files: probabilities, images and masks, as written by `store`.
        num_classes: number of labels, 2 or more.
        backend: see `refine`.
        pool: the processes.
        progress: gets a bar.
    """

    def __init__(
        self, files: Sequence[Path], num_classes: int, backend: Backend, pool: ProcessPoolExecutor, progress: Progress
    ) -> None:
        self.files, self.num_classes, self.backend = files, num_classes, backend
        self.pool, self.progress = pool, progress
        self.miou: dict[CRF, float] = {}
        self.bar = progress.add_task("DenseCRF", total=0)

    def evaluate(self, candidates: Iterable[CRF]) -> None:
        """Measure the mIoU of the candidates without one."""
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
        """Return the CRF with the highest mIoU, the first of several."""
        return max(self.miou, key=lambda crf: self.miou[crf])

    def run(self, axes: Sequence[Sequence[float]], fixed: dict[str, Any], grid: bool) -> None:
        """Measure all combinations, or every second value and then neighbours of the best until none is better.

        Args:
            axes: sorted values of w1, of sigma_alpha and of sigma_beta.
            fixed: the CRF's other arguments.
            grid: measure all combinations.
        """

        def candidates(places: Iterable[tuple[int, ...]]) -> list[CRF]:
            return [CRF(axes[0][i], axes[1][j], axes[2][k], **fixed) for i, j, k in places]

        self.evaluate(candidates(itertools.product(*(range(0, len(axis), 1 if grid else 2) for axis in axes))))
        looked_around: list[CRF] = []
        while not grid and self.best() not in looked_around:
            best = self.best()
            looked_around.append(best)
            centre = [axis.index(getattr(best, name)) for axis, name in zip(axes, NAMES, strict=True)]
            around = [range(max(0, i - 1), min(len(axis), i + 2)) for axis, i in zip(axes, centre, strict=True)]
            self.evaluate(candidates(itertools.product(*around)))


def confusion(file: Path, crf: CRF | None, num_classes: int, backend: Backend) -> Tensor:
    """Return the confusion matrix ``(K, K)`` of a stored image after a CRF; None measures the network alone."""
    stored = torch.load(file, weights_only=True)
    probs = stored["probs"].float()
    refined = probs if crf is None else refine(probs, stored["image"], crf, backend)
    labels = (refined[:, 0] > 0.5).long() if refined.shape[1] == 1 else refined.argmax(dim=1)
    matrix = ConfusionMatrix(num_classes)
    matrix.update(labels, stored["mask"].long())
    return matrix.compute()


@torch.inference_mode()
def store(model: SegmentationModule, dataset: Any, num_images: int, folder: Path, progress: Progress) -> list[Path]:
    """Run the network on images spread evenly over a split, and write its probabilities in half precision to files.

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


def tune_crf(
    trainer: L.Trainer,
    model: SegmentationModule,
    datamodule: Any,
    ckpt_path: str | None = None,
    num_images: int = 100,
    w1: Sequence[float] = (3, 4, 5, 6),
    sigma_alpha: Sequence[float] = (30, 40, 50, 60, 70, 80, 90, 100),
    sigma_beta: Sequence[float] = (3, 4, 5, 6),
    w2: float = 3.0,
    sigma_gamma: float = 1.0,
    iterations: int = 10,
    backend: Backend = "torch",
    grid: bool = False,
    workers: int | None = None,
    output_dir: str = "tune_crf",
) -> None:
    """Search the DenseCRF that gives a trained network the highest mIoU on images of the validation split.

    Args:
        trainer: chooses the device.
        model: the network.
        datamodule: the data set, a `SegmentationDataModule`.
        ckpt_path: the network's weights.
        num_images: how many images of the split `val`, evenly spread.
        w1: values to try; the defaults of these three lists are DeepLab v2's.
        sigma_alpha: values to try, in pixels.
        sigma_beta: values to try, in steps of 255.
        w2: the weight of the smoothness kernel, the same in all candidates.
        sigma_gamma: the width of the smoothness kernel in pixels, the same in all candidates.
        iterations: steps of mean field.
        backend: torch or pydensecrf.
        grid: try all combinations instead of a search from coarse to fine.
        workers: number of processes; by default one per core.
        output_dir: folder for search.csv with the mIoU of every candidate.

    Raises:
        UserError: if no checkpoint is given, `num_images` is below 1, or a list of values is empty.
    """
    if ckpt_path is None:
        raise UserError("tune_crf needs a trained network: give --ckpt_path")
    axes = [sorted(set(values)) for values in (w1, sigma_alpha, sigma_beta)]
    if num_images < 1 or not all(axes):
        raise UserError("tune_crf needs one image or more, and values for each of w1, sigma_alpha and sigma_beta")
    if backend == "pydensecrf":
        need_pydensecrf()
    datamodule.prepare_data()
    datamodule.setup("validate")
    agree(model, datamodule)
    load_trained(model, ckpt_path)
    model.to(trainer.strategy.root_device).eval()
    classes = max(2, model.num_classes)
    context = torch.multiprocessing.get_context()
    pool = ProcessPoolExecutor(workers or torch.get_num_threads(), context, torch.set_num_threads, (1,))
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, pool, Progress(*columns) as progress:
        files = store(model, datamodule.datasets["val"], num_images, Path(folder), progress)
        without = torch.stack([confusion(file, None, classes, backend) for file in files]).sum(dim=0)
        fixed = {"w2": w2, "sigma_gamma": sigma_gamma, "iterations": iterations}
        search = Search(files, classes, backend, pool, progress)
        search.run(axes, fixed, grid)
    report(search, float(confusion_metrics(without, [str(k) for k in range(classes)])["miou"]), Path(output_dir))


def report(search: Search, without: float, output_dir: Path) -> None:
    """Print the best settings as a table and the first of them as YAML, and write all to ``search.csv``.

    Args:
        search: a finished search.
        without: the mIoU of the network alone.
        output_dir: folder for ``search.csv``.
    """
    ranked = sorted(search.miou.items(), key=lambda pair: -pair[1])
    table = Table(*NAMES, "mIoU", title=f"DenseCRF on {len(search.files)} images of split 'val'", box=ASCII2)
    table.add_row("without", "", "", f"{without:.4f}")
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
    print(f"scores       {output_dir / 'search.csv'}, {len(ranked)} settings\n\ncallbacks+:  # of the trainer")
    print(f"    - class_path: segmentation.callbacks.DenseCRF\n      init_args: {{{values}}}")
