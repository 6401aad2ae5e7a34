"""SegmentationModule: the four steps that every architecture shares. A subclass adds the layers and `score_maps`."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from . import checkpoints
from .errors import UserError
from .inference import Inference, Whole, evaluate, finite_images, resize, why_not_finite
from .losses import CrossEntropy, batch_norm_errors, finite_sum
from .metrics import ConfusionMatrix, confusion_metrics
from .optimizer import Plateau, Schedule, configure, frozen_norms, sgd

Batch = dict[str, Any]


class SegmentationModule(L.LightningModule):
    """Training, validation, test and prediction of a semantic segmentation network.

    Who calls what: training calls `losses`, which calls `score_maps`. Validation, test and predict call `inference`,
    which calls `forward`, which calls `score_maps` and `upsample`. Export calls `preprocess`, `forward` and
    `probabilities`. A subclass defines `score_maps`, and overrides the others where its paper differs.

    Args:
        num_classes: number of output channels; 1 is a binary model with one logit, for data of two classes.
        in_channels: number of channels of the image.
        mean: mean of each channel, of pixels scaled to 0..1; checkpoints carry it. Default: ImageNet's RGB.
        std: standard deviation of each channel, in the same unit.
        bgr: give the network blue first, as weights from Caffe need; mean and std keep the image's order.
        loss: a `Loss`; None is `CrossEntropy` with `class_weights`.
        class_weights: one factor per class for the default loss.
        optimizer: builds the optimizer from parameter groups, whose ``lr_mult`` scales its learning rate.
        lr_scheduler: builds a scheduler from the optimizer; None is poly, lr * (1 - step / steps) ** lr_power.
        lr_interval: when `lr_scheduler` steps, after each ``step`` or ``epoch``; ReduceLROnPlateau after a validation.
        lr_power: exponent of poly.
        warmup_steps: optimizer steps over which poly grows linearly from 0.
        head_lr_mult: factor on the learning rate of `new_layers`; 10 in DeepLab.
        bias_lr_mult: further factor on the learning rate of convolution biases; 2 in Caffe recipes.
        bias_weight_decay: weight decay of convolution biases; None keeps the optimizer's. 0 in Caffe recipes.
        norm_weight_decay: weight decay of normalisation layers and embeddings; 0 in MaskFormer.
        freeze_bn: keep batch norm at its loaded statistics, and its scale and shift out of the optimizer.
        channels_last: store images and weights with channels innermost, the faster order on CPUs and tensor cores.
        compile: run the network through ``torch.compile``.
        inference: how logits are computed for a whole image in validation, test and predict; None is `Whole`.

    Raises:
        UserError: if `num_classes` is below 1, `mean` or `std` has another length, or two arguments contradict.
    """

    mean: Tensor
    std: Tensor
    compiled = "score_maps"  # the method that `losses` and `forward` both call

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        bgr: bool = False,
        loss: nn.Module | None = None,
        class_weights: Sequence[float] | None = None,
        optimizer: OptimizerCallable = sgd,
        lr_scheduler: Plateau | Schedule | None = None,
        lr_interval: Literal["step", "epoch"] = "step",
        lr_power: float = 0.9,
        warmup_steps: int = 0,
        head_lr_mult: float = 1.0,
        bias_lr_mult: float = 1.0,
        bias_weight_decay: float | None = None,
        norm_weight_decay: float | None = None,
        freeze_bn: bool = False,
        channels_last: bool = True,
        compile: bool = False,
        inference: Inference | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["loss", "optimizer", "lr_scheduler", "inference"])
        if num_classes < 1:
            raise UserError(f"num_classes must be at least 1, got {num_classes}")
        if not len(mean) == len(std) == in_channels:
            raise UserError(f"mean and std need one number for each of {in_channels} channels, got {mean} and {std}")
        if loss is not None and class_weights is not None:
            raise UserError("class_weights are for the default loss: give them to the injected loss instead")
        if lr_scheduler is not None and warmup_steps:
            raise UserError("warmup_steps is for the default poly schedule, not for an injected lr_scheduler")
        self.num_classes, self.in_channels, self.bgr = num_classes, in_channels, bgr
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.loss = loss or CrossEntropy(class_weights)
        self.loss_weights: dict[str, float] = {}  # factors on the terms of `losses`, 1 for those without an entry
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.lr_power, self.warmup_steps = lr_power, warmup_steps
        self.lr_mults = {"head": head_lr_mult, "bias": bias_lr_mult}
        self.weight_decays = {"bias": bias_weight_decay, "norm": norm_weight_decay}
        self.freeze_bn, self.channels_last, self.compile_network = freeze_bn, channels_last, compile
        self.inference = inference or Whole()
        labels = range(max(2, num_classes))
        self.met_data = False  # the data's bands are compared with a checkpoint's; without data they are taken from it
        self.bands: list[int] | None = None  # which bands of the files are read as stored; None is RGB
        self.value_range: list[float] | None = None  # stored values that become 0 and 1; None is their type's range
        self.known: dict[str, Any] | None = None  # what the checkpoint of its weights says, see `checkpoints.identity`
        self.named_by_data = False  # the data's names win over a checkpoint's, and both over these numbers
        self.class_names = [str(label) for label in labels]
        self.palette = [[37 * label % 256, 91 * label % 256, 173 * label % 256] for label in labels]
        self.confusion = ConfusionMatrix(len(labels))  # of the split that is being evaluated, as is the next
        self.mean_loss = MeanMetric()  # over labelled pixels
        self.finite: list[Tensor] = []  # whether all logits of an image are finite, of the split that is evaluated
        self.evaluated: list[str] = []  # the names of these images

    # What an architecture defines
    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Run the network: image ``(N, C, H, W)`` -> score maps ``(N, num_classes, h, w)`` by name, ``main`` first."""
        raise NotImplementedError

    def upsample(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """Bring score maps ``(N, K, h, w)`` to an image's (height, width): bilinear, corners not aligned."""
        return resize(scores, size)

    def new_layers(self) -> list[nn.Module]:
        """Return the modules that start from random weights; `head_lr_mult` scales their learning rate."""
        return []

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes, H, W)`` of a normalised image ``(N, C, H, W)``."""
        return self.upsample(self.score_maps(image)["main"], image.shape[-2:])

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms whose sum is optimised: the loss of each score map, brought to the image's size."""
        maps = self.score_maps(self.preprocess(batch["image"]))
        size, factors = batch["image"].shape[-2:], self.loss_weights
        return {k: factors.get(k, 1.0) * self.criterion(self.upsample(x, size), batch) for k, x in maps.items()}

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of logits ``(N, K, h, w)`` at the mask's size, with the batch's ``pixel_weight`` if any."""
        pixel_weight = (batch["pixel_weight"],) if "pixel_weight" in batch else ()
        return self.loss(resize(logits, batch["mask"].shape[-2:]), batch["mask"], *pixel_weight)

    def evaluation_loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the loss that validation and test report for logits at the mask's size."""
        return self.loss(logits, mask)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax over classes, or the sigmoid of one logit: ``(N, num_classes, H, W)``."""
        return logits.float().sigmoid() if self.num_classes == 1 else logits.float().softmax(dim=1)

    def logits_of(self, probs: Tensor) -> Tensor:
        """Return the inverse of `probabilities`, ``(N, num_classes, H, W)``."""
        limits = torch.finfo(torch.float32)
        return probs.logit(limits.eps) if self.num_classes == 1 else probs.clamp(min=limits.tiny).log()

    # What all share
    def preprocess(self, image: Tensor) -> Tensor:
        """Normalise stored pixels ``(N, C, H, W)`` on the device: `value_range` to 0..1, minus mean, over std.

        Without a `value_range`, integers are divided by the largest value of their type.

        Raises:
            UserError: if the image does not have `in_channels` channels, or has 8 bits and `value_range` more.
        """
        if image.shape[1] != self.in_channels:
            count = f"the image has {image.shape[1]} channels, the model has in_channels {self.in_channels}"
            raise UserError(f"{count}: data.bands says which are read")
        if self.value_range is None:
            low, full_scale = 0.0, 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
        else:
            low, full_scale = self.value_range[0], self.value_range[1] - self.value_range[0]
            if image.dtype == torch.uint8 and self.value_range[1] > 255:
                raise UserError(
                    f"the image has 8 bits, but the network was trained on values from {low:g} to "
                    f"{self.value_range[1]:g}: give images of the type that it was trained on (for "
                    "export, --dtype uint16 or float32)"
                )
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        image = image.to(device=self.mean.device, dtype=torch.float32, memory_format=order)  # 65535 overflows in half
        image = image if low == 0 else image - low
        image = ((image / full_scale - self.mean.float()) / self.std.float()).to(self.mean.dtype)
        return image.flip(1) if self.bgr else image

    def labels(self, probs: Tensor) -> Tensor:
        """Return the most probable class per pixel: ``(N, K, H, W)`` -> int64 ``(N, H, W)``."""
        return (probs[:, 0] > 0.5).long() if self.num_classes == 1 else probs.argmax(dim=1)

    def setup(self, stage: str) -> None:
        """Compare model and data, see `checkpoints.agree`; set the memory format; compile."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "class_names"):
            checkpoints.agree(self, data)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        if self.compile_network and self.compiled not in self.__dict__:
            self.compile_in_place()

    def compile_in_place(self) -> None:
        """Compile the network: for training one graph per size, as torch 2.14 fails on one graph for any size."""
        network = getattr(self, self.compiled)
        train, evaluate = torch.compile(network, dynamic=False), torch.compile(network)
        setattr(self, self.compiled, lambda image: train(image) if torch.is_grad_enabled() else evaluate(image))

    def train(self, mode: bool = True) -> "SegmentationModule":
        """Switch to training or evaluation; frozen batch norm stays in evaluation."""
        super().train(mode)
        for norm in frozen_norms(self):
            norm.eval()
        return self

    def on_train_start(self) -> None:
        """Freeze batch norm: Lightning does not call `train`, but keeps the modes in which it finds the layers."""
        for norm in frozen_norms(self):
            norm.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the losses, and log each.

        Raises:
            UserError: if the loss is not finite, or batch norm meets one value per channel.
        """
        with batch_norm_errors(len(batch["name"])):
            losses = self.losses(batch)
        rate, names = self.trainer.optimizers[0].param_groups[0]["lr"], ", ".join(batch["name"])
        loss = finite_sum(losses, f"step {self.global_step}, learning rate {rate:g}, images {names}")
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["name"]), sync_dist=True)
        if len(losses) > 1:
            terms = {f"train/loss_{k}": v for k, v in losses.items()}
            self.log_dict(terms, batch_size=len(batch["name"]), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Count a batch in the split's confusion matrix; return ``loss`` and ``logits`` ``(N, K, H, W)``."""
        mask = batch["mask"]
        logits = resize(self.inference(self, self.preprocess(batch["image"])), mask.shape[-2:])
        loss, weight, labels = evaluate(self, logits, mask)
        self.mean_loss.update(loss, weight=weight)
        self.confusion.update(labels, mask)
        self.finite.append(finite_images(logits))
        self.evaluated += batch.get("name", [])
        return {"loss": loss, "logits": logits}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation split as ``val/miou`` and so on, and ``val/loss``."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test split as ``test/...``."""
        self._log_metrics("test")

    def _log_metrics(self, split: str) -> None:
        finite = torch.cat(self.finite).tolist() if self.finite else []
        first = next((name for name, good in zip(self.evaluated, finite, strict=False) if not good), "")
        self.finite, self.evaluated = [], []
        if self.trainer.strategy.reduce_boolean_decision(not all(finite), all=False):
            raise UserError(f"{split} has no scores: {why_not_finite(self, first)}")
        values = confusion_metrics(self.confusion.compute(), self.class_names, self.confusion.image_iou())
        values["loss"] = self.mean_loss.compute()
        self.log_dict({f"{split}/{k}": v.to(self.device, torch.float32) for k, v in values.items()}, sync_dist=True)
        self.confusion.reset()
        self.mean_loss.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Return ``probs`` ``(N, num_classes, H, W)`` at the images' size, ``name`` and ``size``."""
        logits = self.inference(self, self.preprocess(batch["image"]))
        finite = finite_images(logits).tolist()  # the labels follow at once, so this wait costs nothing
        if not all(finite):
            raise UserError(f"no labels are written: {why_not_finite(self, batch['name'][finite.index(False)])}")
        return {"probs": self.probabilities(logits), "name": batch["name"], "size": batch["size"]}

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule."""
        return configure(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what builds this network again and names its classes."""
        checkpoints.describe(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare a checkpoint with this network, and take its class names and palette where no data gave them."""
        checkpoints.accept(self, checkpoint)
