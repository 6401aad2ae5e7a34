"""Parameter groups with their own learning rate and weight decay, and the poly schedule."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoringPlateau
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .errors import UserError

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding)


class ReduceLROnPlateau(MonitoringPlateau):
    """Lower the learning rate when a metric of the validation no longer gets better.

    Args:
        optimizer: its learning rates are lowered.
        monitor: the metric, as ``val/loss`` or ``val/miou``.
        mode: whether the metric is to be small or large; None is min for a loss and max for any other metric.
        factor: the learning rate is multiplied by this.
        patience: how many validations in a row may be no better.
        threshold: smallest difference that is better.
        threshold_mode: whether `threshold` is a share of the best value (rel) or a difference (abs).
        cooldown: validations after a lowering during which none is counted.
        min_lr: the learning rate does not fall below this.
        eps: smaller changes of the learning rate are left out.

    Raises:
        UserError: if a loss is to be large or another metric small.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] | None = None,
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        mode = mode or better(monitor)
        super().__init__(optimizer, monitor, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr, eps)


# Three classes are called ReduceLROnPlateau; the parser tries ours first.
Plateau = Callable[[torch.optim.Optimizer], ReduceLROnPlateau]
Schedule = Callable[[torch.optim.Optimizer], LRScheduler]


def better(metric: str) -> Literal["min", "max"]:
    """Return ``min`` for a metric that gets better by falling, a loss or an error, and ``max`` for any other."""
    return "min" if "loss" in metric or "error" in metric else "max"


def sgd(params: Any) -> torch.optim.Optimizer:
    """Return the optimizer of the DeepLab and PSPNet papers, at v3's learning rate."""
    return torch.optim.SGD(params, lr=0.007, momentum=0.9, weight_decay=1e-4)


def configure(model: Any) -> dict[str, Any]:
    """Build a `SegmentationModule`'s optimizer and schedule, as ``configure_optimizers`` returns them.

    Poly steps once per optimizer step over the whole run.

    Raises:
        UserError: if poly has no end to reach, because only ``max_time`` limits the run.
    """
    optimizer = model.optimizer(parameter_groups(model))
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_mult"]
    if model.lr_scheduler is not None:
        schedule, interval = model.lr_scheduler(optimizer), model.lr_interval
    else:
        steps = model.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("the poly schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        factor = poly(int(steps), model.lr_power, model.warmup_steps)
        schedule, interval = torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "step"
    plan = {"scheduler": schedule, "interval": interval}
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        plan |= after_validation(schedule, model.trainer)
    return {"optimizer": optimizer, "lr_scheduler": plan}


def after_validation(schedule: torch.optim.lr_scheduler.ReduceLROnPlateau, trainer: Any) -> dict[str, Any]:
    """Return which metric lowers the learning rate, and after which epochs it is there.

    Raises:
        UserError: if the mode is wrong for the metric, or no validation gives the metric.
    """
    metric = getattr(schedule, "monitor", "val/loss" if schedule.mode == "min" else "val/miou")
    if schedule.mode != better(metric):
        raise UserError(
            f"ReduceLROnPlateau watches {metric} in the mode {schedule.mode}, as if it got better by "
            f"{'growing' if schedule.mode == 'max' else 'falling'}: set the mode to {better(metric)}"
        )
    if metric.startswith("val/") and trainer.limit_val_batches == 0:
        raise UserError(f"ReduceLROnPlateau watches {metric}, which trainer.limit_val_batches 0 never gives: raise it")
    every = trainer.check_val_every_n_epoch  # None where validation counts steps
    return {"interval": "epoch", "monitor": metric, "frequency": every or 1, "strict": every is not None}


def parameter_groups(model: Any) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups for the optimizer.

    Args:
        model: a `SegmentationModule`. Its `new_layers` are the head, all else is the backbone.

    Returns:
        up to six groups, ``backbone_weight``, ``backbone_bias``, ``backbone_norm``, ``head_weight``, ``head_bias`` and
        ``head_norm``, each with ``name``, ``params``, ``lr_mult`` and, where the model sets it, ``weight_decay``.
        Biases are those of convolutions and linear layers, norms include embeddings; frozen norms are in no group.
    """
    in_head = {id(p) for module in model.new_layers() for p in module.parameters()}
    frozen = {id(p) for norm in frozen_norms(model) for p in norm.parameters()}
    norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in frozen:
            continue
        part = "head" if id(parameter) in in_head else "backbone"
        kind = "norm" if id(parameter) in norms else "bias" if name.endswith("bias") else "weight"
        key = f"{part}_{kind}"
        if key not in groups:
            mult = model.lr_mults.get(part, 1.0) * model.lr_mults.get(kind, 1.0)
            groups[key] = {"name": key, "params": [], "lr_mult": mult}
            if (decay := model.weight_decays.get(kind)) is not None:
                groups[key]["weight_decay"] = decay
        groups[key]["params"].append(parameter)
    return list(groups.values())


def frozen_norms(model: Any) -> list[nn.Module]:
    """Return the batch norms that ``freeze_bn`` keeps at their loaded statistics."""
    return [m for m in model.modules() if model.freeze_bn and isinstance(m, nn.modules.batchnorm._BatchNorm)]


def poly(steps: int, power: float = 0.9, warmup_steps: int = 0) -> Callable[[int], float]:
    """Return the poly schedule: the factor on the learning rate at an optimizer step (DeepLab v2, section 4.1).

    Args:
        steps: optimizer steps of the whole run; the factor is then 0.
        power: exponent of (1 - step / steps).
        warmup_steps: steps over which the factor also grows linearly from 0.
    """

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        return warm * max(0.0, 1 - step / steps) ** power

    return factor
