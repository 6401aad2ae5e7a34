"""Checkpoints: what one says about its model, which is the newest or the best, and how its weights are loaded.

A checkpoint holds the key ``segmentation``: the public class path, the plain constructor arguments, class names,
palette, mean and std. That is all that is needed to build the network again and to name its classes.
"""

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule

from .errors import UserError


def read(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's content. Tensors stay on disk until they are used; nothing but plain types is unpickled.

    Raises:
        UserError: if there is no such file.
    """
    if not Path(path).is_file():
        raise UserError(f"the checkpoint {path} does not exist")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_trained(model: LightningModule, path: str | Path) -> None:
    """Load a checkpoint's weights, class names and palette into a model. Every command loads through this function.

    Args:
        model: a `SegmentationModule` of the checkpoint's architecture and sizes.
        path: the checkpoint.

    Raises:
        UserError: if there is no such file, it holds no weights, or it is of another network; the message names both.
    """
    checkpoint = read(path)
    if "state_dict" not in checkpoint:
        raise UserError(f"{path} holds no state_dict: give a checkpoint that `lightning fit` wrote")
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])


def model_of(path: str | Path) -> dict[str, Any]:
    """Return what builds a checkpoint's network: ``class_path`` and ``init_args``.

    Raises:
        UserError: if there is no such file, or the checkpoint does not say it.
    """
    saved = read(path).get("segmentation")
    if saved is None:
        raise UserError(f"the checkpoint {path} does not say how its model is built: give the run's --config too")
    return {"class_path": public_path(saved["class_path"]), "init_args": saved["init_args"]}


def public_path(class_path: str) -> str:
    """Return the public path of a class; older checkpoints name its file too, as in ``segmentation.unet.UNet``."""
    return re.sub(r"^segmentation\..*\.", "segmentation.", class_path)


def newest(folder: Path | None, name: str) -> str:
    """Return the path of the ``last`` or ``best`` checkpoint of the newest run in a folder of versions.

    A resumed run starts its own search for the best, so the best of the runs that it continues count too.

    Raises:
        UserError: if no run has left one.
    """
    found = sorted(folder.glob(f"*/checkpoints/{name}.ckpt"), key=lambda p: p.stat().st_mtime) if folder else []
    if not found:
        where = folder or "a config without a CSVLogger"
        raise UserError(f"--ckpt_path {name}: no run in {where} has left a {name}.ckpt")
    chain, path = [], found[-1] if name == "best" else None
    while path is not None and path not in chain:
        chain.append(path)
        path = _parent_best(path)
    existing = [path for path in chain if path.is_file()]
    return str(max(existing, key=_best_score) if len(existing) > 1 else found[-1])


def _parent_best(checkpoint: Path) -> Path | None:
    """Return the ``best.ckpt`` of the run that this checkpoint's run continued."""
    config = checkpoint.parent.parent / "config.yaml"
    resumed = yaml.safe_load(config.read_text(encoding="utf-8")).get("ckpt_path") if config.is_file() else None
    return Path(resumed).parent / "best.ckpt" if resumed else None


def _best_score(checkpoint: Path) -> float:
    """Return the monitored value for which a ``best.ckpt`` was saved."""
    states = read(checkpoint)["callbacks"].values()
    return max(float(s["best_model_score"]) for s in states if s.get("best_model_score") is not None)
