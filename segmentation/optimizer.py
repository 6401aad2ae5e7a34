"""Parameter groups with their own learning rate and weight decay, and the poly schedule."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .errors import UserError

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding)


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
    plan = {"scheduler": schedule, "interval": interval, "monitor": "val/miou"}
    return {"optimizer": optimizer, "lr_scheduler": plan}


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
