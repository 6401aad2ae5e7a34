"""Reads weights, ours, torchvision's and those that other projects published, and fits them into a network.

A published file is recognised by its keys, which are brought to ours (published.py). What its arithmetic needs and
its shapes do not tell comes along as arguments, which the architecture takes where its user gave none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from ..errors import UserError
from .published import LAYOUTS, State


@dataclass(frozen=True)
class Weights:
    """A file's tensors under our names.

    Args:
        source: the file, and the project that it was recognised as; for messages.
        state: names and tensors.
        arguments: what the architecture must be told so that equal weights give equal logits.
    """

    source: str = ""
    state: State = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def read_weights(path: str, network: str) -> Weights:
    """Read a file of weights for an architecture.

    Wrappers (``state_dict``, ``model_state``, ...) and prefixes (``module.``, ``model.``, ``_orig_mod.``) are seen
    through. Only tensors, plain types and the NumPy scalars that old checkpoints carry are unpickled.

    Args:
        path: the file.
        network: name of our class.

    Raises:
        UserError: if there is no such file.
        UserError: if the file holds no state dict, or one of another architecture; the message names both.
    """
    if path in ("imagenet", "coco"):
        raise UserError(f"weights: nobody has published '{path}' weights for this {network}: name a file, or null")
    if not Path(path).is_file():
        raise UserError(f"weights: {path} is neither a file nor one of 'imagenet' and 'coco'")
    with torch.serialization.safe_globals(numpy_scalars()):
        content = torch.load(path, map_location="cpu", weights_only=True)
    saved = content.get("segmentation") if isinstance(content, dict) else None
    if saved is not None and saved["class_path"].rpartition(".")[2] != network:
        raise UserError(f"weights: {path} is a checkpoint of {saved['class_path']}, but the model is {network}")
    while isinstance(content, dict):
        inner = [content[key] for key in ("state_dict", "model_state", "model_state_dict", "model") if key in content]
        if not inner or not isinstance(inner[0], dict):
            break
        content = inner[0]
    state = {k: v for k, v in content.items() if k != "mask_values"} if isinstance(content, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights: {path} holds no state dict, that is, no mapping of names to tensors")
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    for prefix in ("module.", "model.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if saved is not None:
        return Weights(path, state, saved["init_args"])
    layout = next((layout for layout in LAYOUTS if layout.matches(state)), None)
    if layout is None:
        return Weights(path, state)
    if layout.network != network:
        raise UserError(
            f"weights: {path} is a file of {layout.project} for {layout.network}, but the model is {network}"
        )
    renamed = {new: value for key, value in state.items() if (new := layout.rename(key)) is not None}
    if layout.pixels:
        rank_zero_info(f"weights of {layout.project} were trained on {layout.pixels}")
    return Weights(f"{path} ({layout.project})", renamed, layout.arguments(state))


def numpy_scalars() -> list[Any]:
    """What a NumPy scalar beside the weights (``best_pred``, ``best_score``) is made of, under old and new names."""
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")]
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def download(weights: WeightsEnum) -> dict[str, Tensor]:
    """Fetch one of torchvision's published state dicts, from its cache or the network.

    Raises:
        UserError: without a network; the message says where the file can be put by hand.
    """
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"cannot download {weights.url} ({error}): put the file into {folder}, or start from random weights with "
            "--model.weights null"
        ) from error


def load_weights(
    network: nn.Module, state: State, source: str, heads: Sequence[str] = (), optional: Sequence[str] = ()
) -> None:
    """Copy a state dict into a network in place.

    A first convolution of other than three channels is inflated from RGB: the sum over red, green and blue for one
    channel, else the three repeated and scaled by 3 / channels, so that equal inputs give equal responses.

    Args:
        network: receives the weights.
        state: names and tensors; batch norm's ``num_batches_tracked`` may be absent, as in old files.
        source: where they come from, for messages.
        heads: beginnings of the keys whose first axis is the classes. Of another class count, such a layer stays
            fresh, and this is said.
        optional: beginnings of the keys of modules that a network may have or not, as an auxiliary head. One that
            only the file has is dropped, one that only the network has stays fresh, and either is said.

    Raises:
        UserError: if any other key is missing, unknown or of another shape; the message lists them.
    """
    own = network.state_dict()
    state = {key: value for key, value in state.items() if key not in ("mean", "std")}  # they stay as configured
    said = []
    for key, value in state.items():
        if key in own and value.dim() == 4 and value.shape[1] == 3 and own[key].shape[1] != 3:
            inflated = inflate(value, own[key].shape[1])
            if inflated.shape == own[key].shape:
                state[key] = inflated
                said.append(f"{key} inflated from 3 to {own[key].shape[1]} channels")
    fit = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    left = [key for key in {**state, **own} if key not in fit]
    left = [key for key in left if key not in ("mean", "std") and not key.endswith("num_batches_tracked")]
    for prefix in heads:
        keys = [key for key in left if key.startswith(prefix) and key in state and key in own]
        if keys and all(state[key].shape[1:] == own[key].shape[1:] for key in keys):
            counts = len(state[keys[0]]), len(own[keys[0]])
            said.append(f"{prefix} left fresh, it has {counts[0]} outputs in the file and {counts[1]} here")
            left = [key for key in left if key not in keys]
    for prefix in optional:
        keys = [key for key in left if key.startswith(prefix)]
        for there, here, what in ((state, own, "dropped, this network has none"), (own, state, "left fresh")):
            if keys and not any(key.startswith(prefix) for key in here):
                said.append(f"{prefix} {what}" + (", the file has none" if there is own else ""))
                left = [key for key in left if key not in keys]
    if left:
        lines = [
            f"{key}: {tuple(state[key].shape) if key in state else 'absent'} in the file, "
            f"{tuple(own[key].shape) if key in own else 'absent'} in the network"
            for key in left
        ]
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise UserError(f"the weights of {source} do not fit: " + "; ".join(lines[:8]) + more)
    network.load_state_dict(fit, strict=False)
    if said:
        rank_zero_info(f"weights of {source}: " + "; ".join(said))


def inflate(weight: Tensor, channels: int) -> Tensor:
    """Turn a convolution's RGB weights into those of other input channels.

    Shape:
        ``(out, 3, h, w)`` -> ``(out, channels, h, w)``.
    """
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [channel % 3 for channel in range(channels)]] * (3 / channels)
