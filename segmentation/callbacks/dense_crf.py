"""DenseCRF behind any network: refined results beside the plain ones, in the time that the network takes anyway."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.multiprocessing
from PIL import Image
from torch import Tensor

from ..base import SegmentationModule
from ..crf import PRESETS, Backend, need_pydensecrf, refine
from ..errors import UserError
from ..metrics import ConfusionMatrix, TrimapIoU, confusion_metrics
from ..pictures import changes, index_mask, panel, rgb
from .report import run_folder


class DenseCRF(L.Callback):
    """Refines probabilities at the image's size by the fully connected CRF of DeepLab v1 and v2.

    `validate` and `test` log the scores of the refined labels as ``test/crf/miou``, ``test/crf/iou/<class>`` and so on
    beside the plain ``test/miou``, and both within some pixels of true contours as ``test/crf/trimap_miou/<width>``
    and ``test/trimap_miou/<width>``; `test` also leaves ``crf.png``. `predict` hands the refined probabilities on, so
    a writer must stand later in the list of callbacks. In `fit` it does nothing.

    Arguments that are not given are the preset's. In brackets the names that pydensecrf gives them.

    Args:
        preset: one of `PRESETS`, the settings released for VOC 2012.
        w1: weight of the bilateral kernel (``compat`` of ``addPairwiseBilateral``).
        sigma_alpha: its reach in pixels (``sxy``).
        sigma_beta: its tolerance to colour, in steps of 255 (``srgb``).
        w2: weight of the smoothness kernel (``compat`` of ``addPairwiseGaussian``).
        sigma_gamma: its reach in pixels (``sxy``).
        iterations: of mean field.
        backend: ``torch``, on the network's device, or ``pydensecrf``, which must be installed.
        bound: classes whose probability is nowhere above it are left out; 0 keeps all.
        workers: processes that refine images while the network goes on; None takes one per core on a CPU, and none
            where a GPU does it; 0 refines in the main process.
        trimap_widths: see `TrimapIoU`; none are measured if it is empty.
        num_images: rows of ``crf.png``, spread evenly over the split; 0 draws none.

    Raises:
        UserError: for an unknown preset or backend, or values that make no energy.
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
            raise UserError(f"DenseCRF: preset is one of {', '.join(PRESETS)}, backend torch or pydensecrf")
        given: dict[str, Any] = {"w1": w1, "sigma_alpha": sigma_alpha, "sigma_beta": sigma_beta}
        given |= {"w2": w2, "sigma_gamma": sigma_gamma, "iterations": iterations}
        self.crf = replace(PRESETS[preset], **{key: value for key, value in given.items() if value is not None})
        self.backend, self.bound, self.workers = backend, bound, workers
        self.trimap_widths, self.num_images = trimap_widths, num_images
        self.pool: ProcessPoolExecutor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look for pydensecrf before the network starts.

        Raises:
            UserError: if it is wanted and not installed.
        """
        if self.backend == "pydensecrf" and stage != "fit":
            need_pydensecrf()

    # The processes

    def _start(self, module: SegmentationModule) -> None:
        on_gpu = self.backend == "torch" and module.device.type == "cuda"
        workers = (0 if on_gpu else torch.get_num_threads()) if self.workers is None else self.workers
        if workers and self.pool is None:
            context = torch.multiprocessing.get_context()  # passes tensors through shared memory
            self.pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
        self.room = 2 * workers  # images that wait, at most
        self.place = module.device if on_gpu and not workers else torch.device("cpu")
        classes = max(2, module.num_classes)
        self.confusion = ConfusionMatrix(classes).to(module.device)
        widths = self.trimap_widths
        self.trimaps = [TrimapIoU(classes, widths).to(module.device) for _ in ("before", "after")] if widths else []
        self.waiting: deque[tuple[Any, ...]] = deque()
        self.rows: list[list[Image.Image]] = []
        self.seen = 0

    def _submit(self, probs: Tensor, image: Tensor) -> Future[Tensor]:
        """Refine one image, ``(K, H, W)`` and ``(C, H, W)``, here or in a process."""
        raw = image if image.dtype == torch.uint8 and len(image) == 3 else torch.from_numpy(rgb(image)).permute(2, 0, 1)
        probs, raw = probs[None].to(self.place), raw[None].to(self.place)
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

    # Validation and test

    def _add(self, module: SegmentationModule, outputs: Any, batch: Any, loader: Any) -> None:
        probs = module.probabilities(outputs["logits"])
        labels = module.labels(probs)
        last = len(loader.sampler) - 1
        wanted = {round(i * last / max(1, self.num_images - 1)) for i in range(self.num_images)}
        for i, name in enumerate(batch["name"]):
            future = self._submit(probs[i], batch["image"][i])
            drawn = batch["image"][i].cpu() if self.seen in wanted else None
            self.waiting.append((future, name, batch["mask"][i], labels[i], drawn))
            self.seen += 1
            while len(self.waiting) > self.room or (self.waiting and self.waiting[0][0].done()):
                self._take(module)

    def _take(self, module: SegmentationModule) -> None:
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

    def _finish(self, trainer: L.Trainer, module: SegmentationModule, split: str) -> None:
        while self.waiting:
            self._take(module)
        values = confusion_metrics(self.confusion.compute(), module.class_names, self.confusion.image_iou())
        values = {f"crf/{key}": value for key, value in values.items()}
        for prefix, trimap in zip(("", "crf/"), self.trimaps, strict=False):
            for width, matrix in zip(trimap.widths, trimap.compute(), strict=True):
                values[f"{prefix}trimap_miou/{width:g}"] = confusion_metrics(matrix, module.class_names)["miou"]
        for key, value in values.items():
            module.log(f"{split}/{key}", value.to(module.device, torch.float32), sync_dist=True)
        folder = run_folder(trainer) if trainer.is_global_zero else None
        if self.rows and folder is not None:
            titles = ("image", "truth", "before", "after", "fixed green, broken red, other yellow")
            folder.mkdir(parents=True, exist_ok=True)
            panel(titles, self.rows, module.palette, module.class_names).save(folder / "crf.png")

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the processes."""
        self._start(pl_module)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Hand a batch over, and take what is ready."""
        self._add(pl_module, outputs, batch, trainer.test_dataloaders)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the rest, log the scores and draw the panel."""
        self._finish(trainer, pl_module, "test")

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the processes, in `validate`."""
        if trainer.state.fn == "validate":
            self._start(pl_module)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Hand a batch over, and take what is ready, in `validate`."""
        if trainer.state.fn == "validate":
            self._add(pl_module, outputs, batch, trainer.val_dataloaders)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the rest, log the scores and draw the panel, in `validate`."""
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module, "val")

    # Prediction

    def on_predict_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the processes."""
        self._start(pl_module)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Put refined probabilities in the place of the network's."""
        probs = outputs["probs"]
        futures = [self._submit(*pair) for pair in zip(probs, batch["image"], strict=True)]
        results = [self._result(*pair) for pair in zip(futures, batch["name"], strict=True)]
        outputs["probs"] = torch.stack(results).to(probs.device)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop the processes."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop the processes."""
        self._stop()
