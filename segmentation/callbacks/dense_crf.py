"""DenseCRF behind any network: refined results beside the plain ones, computed while the network runs."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.multiprocessing
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from ..base import SegmentationModule
from ..crf import PRESETS, Backend, need_pydensecrf, refine
from ..errors import UserError
from ..metrics import ConfusionMatrix, TrimapIoU, confusion_metrics
from ..pictures import changes, index_mask, panel, rgb
from .boundary_scores import trimap_miou
from .evaluation import EvaluationCallback, evenly_spread, run_folder


class DenseCRF(EvaluationCallback):
    """The fully connected CRF of DeepLab v1 and v2, applied to probabilities at the image's size.

    `validate` and `test` log the metrics of the refined labels as ``test/crf/miou``, ``test/crf/iou/<class>`` and so on
    beside the plain ``test/miou``. Within some pixels of true contours, they log both as
    ``test/crf/trimap_miou/<width>`` and ``test/trimap_miou/<width>``. They also draw ``crf.png`` in the run's folder.
    `predict` passes the refined probabilities on, so a writer must stand later in the list of callbacks. In `fit`
    DenseCRF does nothing.

    The preset gives the values of arguments that are None. pydensecrf's names for the parameters stand in brackets.

    Args:
        preset: one of `PRESETS`, the settings released for VOC 2012.
        w1: weight of the bilateral kernel (``compat`` of ``addPairwiseBilateral``).
        sigma_alpha: its standard deviation in pixels (``sxy``).
        sigma_beta: its standard deviation in colour, in steps of 0..255 (``srgb``).
        w2: weight of the smoothness kernel (``compat`` of ``addPairwiseGaussian``).
        sigma_gamma: its standard deviation in pixels (``sxy``).
        iterations: number of mean-field iterations.
        backend: ``torch``, on the network's device, or ``pydensecrf``, which must be installed.
        bound: a class is left out if its probability is nowhere above this; 0 keeps all classes.
        workers: number of processes that refine images while the network runs. None starts one per core where a CPU
            refines, and none where a GPU does; 0 refines in the main process.
        trimap_widths: see `TrimapIoU`; an empty list measures no trimaps.
        num_images: number of rows in ``crf.png``, spread evenly over the split; 0 draws no picture.

    Raises:
        UserError: for an unknown preset or backend, or for negative weights or iterations or a sigma that is not
            positive; in a run, if pydensecrf is missing or a writer stands before DenseCRF.
    """

    def __init__(
        self,
        preset: str = "deeplabv2",
        w1: float | None = None,
        sigma_alpha: float | None = None,
        sigma_beta: float | None = None,
        w2: float | None = None,
        sigma_gamma: float | None = None,
        iterations: int | None = None,
        backend: Backend = "torch",
        bound: float = 0.05,
        workers: int | None = None,
        trimap_widths: Sequence[int] = (1, 2, 5, 10, 20, 40),
        num_images: int = 4,
    ) -> None:
        if preset not in PRESETS or backend not in ("torch", "pydensecrf"):
            raise UserError(
                f"DenseCRF: preset is one of {', '.join(PRESETS)}, and backend is torch or pydensecrf, "
                f"got {preset} and {backend}"
            )
        given: dict[str, Any] = {"w1": w1, "sigma_alpha": sigma_alpha, "sigma_beta": sigma_beta}
        given |= {"w2": w2, "sigma_gamma": sigma_gamma, "iterations": iterations}
        self.crf = replace(PRESETS[preset], **{key: value for key, value in given.items() if value is not None})
        self.backend, self.bound, self.workers = backend, bound, workers
        self.trimap_widths, self.num_images = trimap_widths, num_images
        self.pool: ProcessPoolExecutor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the backend and the order of callbacks before the network runs."""
        if self.backend == "pydensecrf" and stage != "fit":
            need_pydensecrf()
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        if stage == "predict" and any(isinstance(callback, BasePredictionWriter) for callback in before):
            raise UserError(
                "DenseCRF stands after PredictionWriter, which would write probabilities that are not refined: put "
                "DenseCRF before it in trainer.callbacks"
            )

    # The processes

    def _start(self, module: SegmentationModule) -> None:
        on_gpu = self.backend == "torch" and module.device.type == "cuda"
        workers = (0 if on_gpu else torch.get_num_threads()) if self.workers is None else self.workers
        if workers and self.pool is None:
            context = torch.multiprocessing.get_context()  # passes tensors through shared memory
            self.pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
        self.queue_length = 2 * workers  # images that wait, at most
        self.device = module.device if on_gpu and not workers else torch.device("cpu")

    def _submit(self, probs: Tensor, image: Tensor) -> Future[Tensor]:
        """Refine one image, ``(K, H, W)`` and ``(C, H, W)``, here or in a process."""
        raw = image if image.dtype == torch.uint8 and len(image) == 3 else torch.from_numpy(rgb(image)).permute(2, 0, 1)
        probs, raw = probs[None].to(self.device), raw[None].to(self.device)
        if self.pool is not None:
            return self.pool.submit(refine, probs, raw, self.crf, self.backend, self.bound)
        done: Future[Tensor] = Future()
        try:
            done.set_result(refine(probs, raw, self.crf, self.backend, self.bound))
        except UserError as error:
            done.set_exception(error)
        return done

    def _result(self, future: Future[Tensor], name: str) -> Tensor:
        try:
            return future.result()[0]
        except UserError as error:
            raise UserError(f"DenseCRF, image {name}: {error}") from error

    def _stop(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop the processes."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop the processes."""
        self._stop()

    # Validation and test

    def begin(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Start the processes."""
        self._start(module)
        classes, widths = max(2, module.num_classes), self.trimap_widths
        self.confusion = ConfusionMatrix(classes).to(module.device)
        self.trimaps = [TrimapIoU(classes, widths).to(module.device) for _ in ("before", "after")] if widths else []
        self.waiting: deque[tuple[Any, ...]] = deque()
        self.wanted = evenly_spread(trainer, split, self.num_images)
        self.rows: list[list[Image.Image]] = []
        self.seen = 0

    def update(self, trainer: L.Trainer, module: SegmentationModule, outputs: Any, batch: Any) -> None:
        """Submit the images of a batch, and count those that are refined."""
        probs = module.probabilities(outputs["logits"])
        labels = module.labels(probs)
        for i, name in enumerate(batch["name"]):
            future = self._submit(probs[i], batch["image"][i])
            drawn = batch["image"][i].cpu() if self.seen in self.wanted else None
            self.waiting.append((future, name, batch["mask"][i], labels[i], drawn))
            self.seen += 1
            while len(self.waiting) > self.queue_length or (self.waiting and self.waiting[0][0].done()):
                self._count_next(module)

    def _count_next(self, module: SegmentationModule) -> None:
        future, name, mask, before, drawn = self.waiting.popleft()
        before = before.to(mask.device)
        after = module.labels(self._result(future, name)[None].to(mask.device))[0]
        self.confusion.update(after[None], mask[None])
        for trimap, labels in zip(self.trimaps, (before, after), strict=False):
            trimap.update(labels[None], mask[None])
        if drawn is not None:
            pixels = rgb(drawn)
            masks = [index_mask(labels, module.palette).convert("RGB") for labels in (mask, before, after)]
            self.rows.append([Image.fromarray(pixels), *masks, changes(pixels, mask, before, after)])

    def end(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        """Wait for the last images, log the metrics and draw the panel."""
        while self.waiting:
            self._count_next(module)
        refined = confusion_metrics(self.confusion.compute(), module.class_names, self.confusion.image_iou())
        values = {f"crf/{key}": value for key, value in refined.items()}
        for prefix, trimap in zip(("", "crf/"), self.trimaps, strict=False):
            values |= {f"{prefix}{key}": value for key, value in trimap_miou(trimap, module.class_names).items()}
        self.log_values(module, split, values)
        folder = run_folder(trainer) if trainer.is_global_zero else None
        if self.rows and folder is not None:
            titles = ("image", "truth", "before", "after", "fixed green, broken red, other yellow")
            folder.mkdir(parents=True, exist_ok=True)
            panel(titles, self.rows, module.palette, module.class_names).save(folder / "crf.png")

    # Prediction

    def on_predict_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the processes."""
        self._start(pl_module)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *indices: int) -> None:
        """Replace the network's probabilities by the refined ones."""
        probs = outputs["probs"]
        futures = [self._submit(*pair) for pair in zip(probs, batch["image"], strict=True)]
        results = [self._result(*pair) for pair in zip(futures, batch["name"], strict=True)]
        outputs["probs"] = torch.stack(results).to(probs.device)
