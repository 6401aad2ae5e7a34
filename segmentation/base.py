"""SegmentationModule: the loop that every architecture shares. A subclass adds the layers and `score_maps`."""

import sys
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from .errors import UserError
from .inference import Inference, Whole, resize
from .losses import IGNORE, CrossEntropy
from .metrics import ConfusionMatrix, confusion_metrics

Batch = dict[str, Any]


def sgd(params: Any) -> torch.optim.Optimizer:
    """The optimizer of the DeepLab and PSPNet papers, at v3's learning rate."""
    return torch.optim.SGD(params, lr=0.007, momentum=0.9, weight_decay=1e-4)


class SegmentationModule(L.LightningModule):
    """Training, validation, test and prediction of a semantic segmentation network.

    Subclasses define `score_maps`, and override `losses`, `forward` or `new_layers` where their paper differs.

    Args:
        num_classes: output channels; 1 is a binary model with one logit, for data of two classes.
        in_channels: channels of the image.
        mean: per channel, of pixels scaled to 0..1; a buffer, so checkpoints carry it. Default: ImageNet's RGB.
        std: likewise.
        bgr: show the network blue first, as weights from Caffe need; mean and std stay in the image's order.
        loss: takes (logits, mask); None is `CrossEntropy` with `class_weights`.
        class_weights: one factor per class for the default loss.
        optimizer: takes parameter groups; the groups' own ``lr_mult`` scales its learning rate.
        lr_scheduler: takes the optimizer; None is poly, lr * (1 - step / steps) ** lr_power (DeepLab v2, section 4.1).
        lr_interval: how often an injected scheduler steps, ``step`` or ``epoch``.
        lr_power: exponent of poly.
        warmup_steps: optimizer steps over which poly starts linearly from 0.
        head_lr_mult: factor on the learning rate of `new_layers`; 10 in DeepLab.
        bias_lr_mult: factor on that of convolution biases, on top of the head's; 2 in Caffe recipes.
        bias_weight_decay: weight decay of convolution biases; None leaves the optimizer's, 0 in Caffe recipes.
        norm_weight_decay: weight decay of normalisation layers and embeddings; 0 in MaskFormer.
        freeze_bn: keep batch norm at its loaded statistics, and its scale and shift out of the optimizer.
        channels_last: store images and weights with channels innermost, the faster order on CPUs and tensor cores.
        compile: run `score_maps` through ``torch.compile``.
        inference: how validation, test and predict see an image: None is `Whole`, at once.

    Raises:
        UserError: if `num_classes` is below 1, mean and std are not one number per channel, or an argument is given
            that another one makes void.
    """

    mean: Tensor
    std: Tensor
    border = 0  # pixels that `score_maps` loses on each side; see `OverlapTile`

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
        lr_scheduler: LRSchedulerCallable | None = None,
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
        no_part = ["loss", "optimizer", "lr_scheduler", "inference"]  # of the network, which a checkpoint builds again
        self.save_hyperparameters(logger=False, ignore=no_part)  # of the subclass too
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
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.lr_power, self.warmup_steps = lr_power, warmup_steps
        self.head_lr_mult, self.bias_lr_mult = head_lr_mult, bias_lr_mult
        self.weight_decays = {"bias": bias_weight_decay, "norm": norm_weight_decay}
        self.freeze_bn, self.channels_last, self.compile_network = freeze_bn, channels_last, compile
        self.inference = inference or Whole()
        self.class_names = [str(label) for label in range(max(2, num_classes))]
        self.palette = [[37 * k % 256, 91 * k % 256, 173 * k % 256] for k in range(max(2, num_classes))]
        self.knows_classes = False  # names and colours are the data's or a checkpoint's
        self.confusion = ConfusionMatrix(max(2, num_classes))
        self.mean_loss = MeanMetric()  # over labelled pixels; both are of the split that is being evaluated

    # What an architecture defines

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Run the network: ``(N, C, H, W)`` to score maps ``(N, K, h, w)`` by name, ``main`` first."""
        raise NotImplementedError

    def new_layers(self) -> list[nn.Module]:
        """Modules that start from random weights, trained at `head_lr_mult` times the learning rate."""
        return []

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a normalised image, at its size.

        Shape:
            image ``(N, C, H, W)`` float -> logits ``(N, num_classes, H, W)``.
        """
        return resize(self.score_maps(image)["main"], image.shape[-2:])

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms whose sum is optimised, each at the mask's size."""
        maps = self.score_maps(self.preprocess(batch["image"]))
        return {name: self.criterion(scores, batch) for name, scores in maps.items()}

    def criterion(self, scores: Tensor, batch: Batch) -> Tensor:
        """The loss of score maps ``(N, K, h, w)`` brought to the mask's size, weighed by a batch's ``weight``."""
        logits = resize(scores, batch["mask"].shape[-2:])
        weight = (batch["pixel_weight"],) if "pixel_weight" in batch else ()
        return self.loss(logits, batch["mask"], *weight)

    def evaluation_loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The loss that validation and test report for logits at the mask's size."""
        return self.loss(logits, mask)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over classes, or sigmoid of one logit: ``(N, num_classes, H, W)``."""
        return logits.float().sigmoid() if self.num_classes == 1 else logits.float().softmax(dim=1)

    def logits_of(self, probs: Tensor) -> Tensor:
        """Logits that `probabilities` makes these probabilities of, ``(N, num_classes, H, W)``."""
        limits = torch.finfo(torch.float32)
        return probs.logit(limits.eps) if self.num_classes == 1 else probs.clamp(min=limits.tiny).log()

    # Shared by all

    def preprocess(self, image: Tensor) -> Tensor:
        """Normalise stored pixels on the device: integers to 0..1, minus mean, over std.

        Shape:
            image ``(N, C, H, W)`` of an integer or float type -> the same in the module's type.

        Raises:
            UserError: if the channels are not `in_channels`.
        """
        if image.shape[1] != self.in_channels:
            raise UserError(
                f"the image has {image.shape[1]} channels, the model has in_channels {self.in_channels}: data.bands "
                "says which are read"
            )
        full_scale = 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        image = image.to(device=self.mean.device, dtype=torch.float32, memory_format=order)  # 65535 overflows in half
        image = ((image / full_scale - self.mean.float()) / self.std.float()).to(self.mean.dtype)
        return image.flip(1) if self.bgr else image

    def labels(self, probs: Tensor) -> Tensor:
        """The most probable class per pixel: ``(N, K, H, W)`` to int64 ``(N, H, W)``."""
        return (probs[:, 0] > 0.5).long() if self.num_classes == 1 else probs.argmax(dim=1)

    def setup(self, stage: str) -> None:
        """Take class names and palette from the data, and check that model and data agree.

        Raises:
            UserError: if the numbers of channels or classes differ; a binary model has 1 where its data has 2.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and len(getattr(data, "class_names", ())) > 0:
            if max(2, self.num_classes) != data.num_classes:
                raise UserError(
                    f"model.num_classes is {self.num_classes} but the data has {data.num_classes} classes "
                    f"({', '.join(data.class_names)}): set model.num_classes to {data.num_classes}"
                )
            if self.in_channels != data.in_channels:
                raise UserError(
                    f"model.in_channels is {self.in_channels} but the images have {data.in_channels} channels: set "
                    f"model.in_channels to {data.in_channels}, and model.mean and model.std to as many values"
                )
            self.class_names = [str(name) for name in data.class_names]
            if len(data.palette) == data.num_classes:
                self.palette = [[int(value) for value in colour] for colour in data.palette]
            self.knows_classes = True
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        if self.compile_network and "score_maps" not in self.__dict__:
            self._compile()

    def _compile(self) -> None:
        """Compile `score_maps`: a graph per size for training, graphs of any size for evaluation.

        Training shows crops of one size. A training graph of any size is not asked for: torch 2.14 fails to order the
        symbolic strides of what it keeps for the backward pass ("cannot determine truth value of Relational").
        """
        network = self.score_maps
        train, evaluate = torch.compile(network, dynamic=False), torch.compile(network)

        def score_maps(image: Tensor) -> dict[str, Tensor]:
            return train(image) if torch.is_grad_enabled() else evaluate(image)

        self.score_maps = score_maps  # type: ignore[method-assign]

    def train(self, mode: bool = True) -> "SegmentationModule":
        """Switch to training or evaluation; frozen batch norm stays in evaluation."""
        super().train(mode)
        for norm in self._frozen():
            norm.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if self.freeze_bn else []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum and log the losses.

        Raises:
            UserError: if the loss is not finite, or batch norm meets one value per channel.
        """
        try:
            losses = self.losses(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"batch norm cannot train on a batch of {len(batch['name'])} where a feature map is 1x1: "
                "set data.batch_size to 2 or more, or model.freeze_bn: true"
            ) from error
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            terms = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
            raise UserError(
                f"the loss is not finite ({terms}) at step {self.global_step}, learning rate {rate:g}, "
                f"images {', '.join(batch['name'])}: lower the learning rate, or look at these files"
            )
        size = len(batch["name"])
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        if len(losses) > 1:
            self.log_dict({f"train/loss_{name}": value for name, value in losses.items()}, batch_size=size)
        return loss

    def _evaluate(self, batch: Batch) -> dict[str, Tensor]:
        mask = batch["mask"]
        logits = resize(self.inference(self, self.preprocess(batch["image"])), mask.shape[-2:])
        # Of windows, they are in the CPU's memory, where there may be more of them than the device could take.
        rows = mask.shape[1] if logits.device == mask.device else 256
        losses, weights, labels = [], [], []
        for part, truth in zip(logits.split(rows, dim=2), mask.split(rows, dim=1), strict=True):
            part = part.to(mask.device)
            weight = self.loss.weight(truth) if isinstance(self.loss, CrossEntropy) else truth != IGNORE
            losses.append(self.evaluation_loss(part, truth))
            weights.append(weight.sum())
            self.mean_loss.update(losses[-1], weight=weights[-1])
            ordered = part if self.num_classes > 1 else self.probabilities(part)  # softmax would change no order
            labels.append(self.labels(ordered))
        self.confusion.update(torch.cat(labels, dim=1), mask)  # whole images, of which it also takes each one's IoU
        share = torch.stack(weights) / torch.stack(weights).sum().clamp(min=torch.finfo(torch.float32).tiny)
        return {"loss": (torch.stack(losses) * share).sum(), "logits": logits}

    def _log_scores(self, split: str) -> None:
        values = confusion_metrics(self.confusion.compute(), self.class_names, self.confusion.image_iou())
        values["loss"] = self.mean_loss.compute()
        self.log_dict({f"{split}/{k}": v.to(self.device, torch.float32) for k, v in values.items()}, sync_dist=True)
        self.confusion.reset()
        self.mean_loss.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the split's confusion matrix; gives ``loss`` and ``logits`` ``(N, K, H, W)`` to callbacks."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        return self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log what `scores` returns as ``val/miou`` and so on, and ``val/loss``."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the same as ``test/...``."""
        self._log_scores("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Give ``probs`` ``(N, num_classes, H, W)`` at the images' own size, ``name`` and ``size``."""
        logits = self.inference(self, self.preprocess(batch["image"]))
        return {"probs": self.probabilities(logits), "name": batch["name"], "size": batch["size"]}

    @property
    def class_path(self) -> str:
        """The public import path of this architecture, such as ``segmentation.UNet``, so that its file may move."""
        cls = type(self)
        package = cls.__module__.partition(".")[0]
        public = getattr(sys.modules[package], cls.__name__, None) is cls
        return f"{package if public else cls.__module__}.{cls.__qualname__}"

    @property
    def init_args(self) -> dict[str, Any]:
        """The plain arguments that build this network again; its weights then come from a checkpoint."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.hparams.items()}
        return {key: value for key, value in plain.items() if key != "weights"}

    def param_groups(self) -> list[dict[str, Any]]:
        """Sort trainable parameters into groups for the optimizer.

        Returns:
            up to six groups, weights, biases and norms of the backbone and of `new_layers`, each with ``name``,
            ``params`` and ``lr_mult``, and with ``weight_decay`` where it differs from the optimizer's. Biases are those of
            convolutions and linear layers, norms include embeddings; frozen batch norm is in no group.
        """
        normalising = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
        frozen = {id(p) for norm in self._frozen() for p in norm.parameters()}
        in_head = {id(p) for head in self.new_layers() for p in head.parameters()}
        norms = {id(p) for m in self.modules() if isinstance(m, normalising) for p in m.parameters()}
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad or id(parameter) in frozen:
                continue
            head = id(parameter) in in_head
            kind = "norm" if id(parameter) in norms else "bias" if name.endswith("bias") else "weight"
            key = f"{'head' if head else 'backbone'}_{kind}"
            if key not in groups:
                mult = (self.head_lr_mult if head else 1.0) * (self.bias_lr_mult if kind == "bias" else 1.0)
                groups[key] = {"name": key, "params": [], "lr_mult": mult}
                if self.weight_decays.get(kind) is not None:
                    groups[key]["weight_decay"] = self.weight_decays[kind]
            groups[key]["params"].append(parameter)
        return list(groups.values())

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule; poly steps once per optimizer step over the whole run.

        Raises:
            UserError: if poly has no end to reach, because only ``max_time`` limits the run.
        """
        optimizer = self.optimizer(self.param_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_mult"]
        if self.lr_scheduler is not None:
            schedule, interval = self.lr_scheduler(optimizer), self.lr_interval
        else:
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise UserError("the poly schedule needs an end: set trainer.max_epochs or trainer.max_steps")
            schedule, interval = torch.optim.lr_scheduler.LambdaLR(optimizer, self.poly(int(steps))), "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval, "monitor": "val/miou"},
        }

    def poly(self, steps: int) -> Any:
        """The factor on the learning rate as a function of the optimizer step, 0 to ``steps``."""

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
            return warm * max(0.0, 1 - step / steps) ** self.lr_power

        return factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the key ``segmentation``: what `predict` needs to build this network again and name its classes.

        It replaces Lightning's own ``hyper_parameters``, which would silently override a command's configuration.
        """
        checkpoint.pop("hyper_parameters", None)
        checkpoint.pop("hparams_name", None)
        checkpoint["segmentation"] = {
            "class_path": self.class_path,
            "init_args": self.init_args,
            "class_names": self.class_names,
            "palette": self.palette,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take class names and palette where the data gave none.

        Raises:
            UserError: if the checkpoint is of another architecture, or of the same with other sizes; names both.
        """
        saved = checkpoint.get("segmentation")
        if saved is not None and saved["class_path"].rpartition(".")[2] != type(self).__name__:
            raise UserError(
                f"the checkpoint is of {saved['class_path']}, but the model is {self.class_path}: give its own config"
            )
        own = {key: value.shape for key, value in self.state_dict().items()}
        stored = {key: value.shape for key, value in checkpoint["state_dict"].items()}
        if own != stored:
            theirs, ours = saved["init_args"] if saved else {}, self.init_args
            differ = [f"{k} {theirs.get(k)} there, {ours.get(k)} here" for k in ours if theirs.get(k) != ours.get(k)]
            layer = min(key for key in own.keys() | stored.keys() if own.get(key) != stored.get(key))
            raise UserError(f"the checkpoint's layers differ from the model's, as {layer}: {'; '.join(differ)}")
        if saved is not None and not self.knows_classes:
            self.class_names, self.palette = saved["class_names"], saved["palette"]
