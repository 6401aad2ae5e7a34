"""Reads weights: ours, torchvision's, and files that other projects published. Fits them into a network.

A published file is recognised by its keys (published.py). What its shapes do not reveal, such as aligned corners, turns
into constructor arguments before the network is built; see `arguments_from_weights`.
"""

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from .. import tensor_file
from ..errors import UserError
from .published import IMAGENET, LAYOUTS, State

NEW = "keeps its random initialisation"


@dataclass(frozen=True)
class Weights:
    """A file's tensors under our names.

    Args:
        source: the file, and the project whose layout it has; for messages.
        state: names and tensors.
        arguments: constructor arguments without which equal weights give other logits.
        defaults: constructor arguments that the user may change.
        pixels: how the images were scaled, where this differs from torchvision's way.
        known: what a checkpoint of ours says about its training, see `checkpoints.identity`.
    """

    source: str = ""
    state: State = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    pixels: str = ""
    known: dict[str, Any] | None = None


def arguments_from_weights(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate a constructor: the file in ``weights`` settles the arguments that its user left at None.

    This happens before the network is built, so the constructor's code does not look into files, and a checkpoint
    stores the settled arguments.

    Raises:
        UserError: from the constructor, if an argument contradicts the file.
    """
    network, signature = init.__qualname__.partition(".")[0], inspect.signature(init)
    left_open = {name for name, parameter in signature.parameters.items() if parameter.default is None}

    @functools.wraps(init)
    def settled(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        weights = given.arguments.get("weights")
        if weights == "imagenet":
            file = Weights(weights, arguments=IMAGENET.get(network, {}))
        else:
            file = Weights() if weights in (None, "coco") else read_weights(weights, network)
        given.arguments.update({k: v for k, v in settle(given.arguments, file).items() if k in left_open})
        init(*given.args, **given.kwargs)

    return settled


def settle(given: Mapping[str, Any], file: Weights) -> dict[str, Any]:
    """Return the constructor arguments that a file settles: those that the user left at None.

    Args:
        given: the user's arguments by name.
        file: as `read_weights` gives it.

    Raises:
        UserError: if one of the user's arguments contradicts the file.
    """
    for name, value in file.arguments.items():
        if given.get(name) not in (None, value):
            raise UserError(
                f"weights: {file.source} needs {name}: {value}, but the model has {name}: {given[name]}: leave "
                f"model.{name} out"
            )
    return {name: value for name, value in {**file.defaults, **file.arguments}.items() if given.get(name) is None}


def read_weights(path: str, network: str) -> Weights:
    """Read a file of weights for an architecture, under our names.

    Wrappers (``state_dict``, ``model_state``, ...) and prefixes (``module.``, ``model.``, ``_orig_mod.``) are taken
    off. Only tensors, plain types and the NumPy scalars of old checkpoints are unpickled.

    Args:
        path: the file.
        network: name of our class.

    Raises:
        UserError: if there is no such file, or it holds no state dict, or one of another architecture; names both.
    """
    if path in ("imagenet", "coco"):
        raise UserError(f"weights: nobody has published '{path}' weights for this {network}: name a file, or null")
    if "://" not in path and not Path(path).exists():
        raise UserError(f"weights: {path} is neither a file nor one of 'imagenet' and 'coco'")
    with torch.serialization.safe_globals(numpy_scalars()):
        content = tensor_file.read(path, "weights:")
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
        return Weights(path, state, defaults=saved.get("init_args", {}), known=saved)
    layout = next((layout for layout in LAYOUTS if layout.matches(state)), None)
    if layout is None:
        return Weights(path, state)
    if layout.network != network:
        raise UserError(
            f"weights: {path} is a file of {layout.project} for {layout.network}, but the model is {network}"
        )
    renamed = {new: value for key, value in state.items() if (new := layout.rename(key)) is not None}
    source = f"{path} ({layout.project})"
    return Weights(source, renamed, layout.arguments(state), layout.defaults(state), layout.pixels)


def numpy_scalars() -> list[Any]:
    """Return the types of which pickle builds a NumPy scalar (``best_pred`` beside the weights), old names too."""
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")]
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def download(weights: WeightsEnum) -> dict[str, Tensor]:
    """Return one of torchvision's published state dicts, from its cache or the network.

    Torchvision publishes the first 8 hex digits of a file's sha256, in its name, and no more. The file is compared with
    them at each use, since any other file of that name may lie in the cache. Tensors and plain types alone are read.

    Raises:
        UserError: if the network is down, or the file is another than the published one; names the file.
    """
    url = weights.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    digits = file.stem.rpartition("-")[2]
    if not url.startswith("https://") or re.fullmatch("[0-9a-f]{8,64}", digits) is None:
        raise UserError(f"{url} is no address of weights with a checksum: name a file by --model.weights FILE")
    if not file.exists():
        try:
            return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
        except (OSError, RuntimeError) as error:  # RuntimeError: the download has another checksum
            raise UserError(
                f"cannot download {url} ({error}): put the file into {file.parent}, or start from random weights with "
                "--model.weights null"
            ) from error
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if not digest.hexdigest().startswith(digits):
        raise UserError(
            f"{file} is not the file that torchvision published: its sha256 begins with "
            f"{digest.hexdigest()[:8]}, not {digits}: delete it, so that it is downloaded again"
        )
    return dict(tensor_file.read(file, "the weights"))


def load_file(network: Any, path: str, new_layers: Sequence[str] = (), optional: Sequence[str] = ()) -> None:
    """Read a file of weights and copy it into a network; see `read_weights` and `load_weights`.

    Args:
        network: a `SegmentationModule`.
        path: the file.
        new_layers: see `load_weights`.
        optional: see `load_weights`.
    """
    papers = (cls for cls in type(network).__mro__ if cls.__module__.startswith("segmentation.architectures."))
    file = read_weights(path, next(papers, type(network)).__name__)  # a subclass reads its paper's files
    if file.pixels:
        rank_zero_info(f"weights of {file.source} were trained on {file.pixels}")
    load_weights(network, file.state, file.source, new_layers, optional)
    network.known = file.known


def load_weights(
    network: nn.Module, state: State, source: str, new_layers: Sequence[str] = (), optional: Sequence[str] = ()
) -> None:
    """Copy a state dict into a network in place, and print one line about every layer that is not copied as it is.

    A first convolution for other than three channels is inflated from RGB: for one channel it is the sum over red,
    green and blue; otherwise the three are repeated and scaled by 3 / channels, so that equal inputs give equal
    responses.

    Args:
        network: receives the weights.
        state: names and tensors; batch norm's ``num_batches_tracked`` may be missing, as in old files.
        source: where the weights come from, for messages.
        new_layers: beginnings of the keys of layers with one output per class. With another number of classes such a
            layer keeps its random initialisation.
        optional: beginnings of the keys of modules that a network may lack, such as an auxiliary head. If only the
            file has the module, it is dropped; if only the network has it, it keeps its random initialisation.

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
    for prefix in new_layers:
        keys = [key for key in left if key.startswith(prefix) and key in state and key in own]
        if keys and all(state[key].shape[1:] == own[key].shape[1:] for key in keys):
            counts = len(state[keys[0]]), len(own[keys[0]])
            said.append(f"{prefix} {NEW}, as it has {counts[0]} outputs in the file and {counts[1]} here")
            left = [key for key in left if key not in keys]
    for prefix in optional:
        keys = [key for key in left if key.startswith(prefix)]
        in_file, in_network = (any(key.startswith(prefix) for key in names) for names in (state, own))
        if keys and in_file != in_network:
            said.append(
                f"{prefix} " + ("dropped, as this network has none" if in_file else f"{NEW}, as the file has none")
            )
            left = [key for key in left if key not in keys]
    if left:
        shapes = [[tuple(names[key].shape) if key in names else "absent" for names in (state, own)] for key in left]
        lines = [f"{key}: {s[0]} in the file, {s[1]} in the network" for key, s in zip(left, shapes, strict=True)]
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise UserError(f"the weights of {source} do not fit: " + "; ".join(lines[:8]) + more)
    network.load_state_dict(fit, strict=False)
    if said:
        rank_zero_info(f"weights of {source}: " + "; ".join(said))


def inflate(weight: Tensor, channels: int) -> Tensor:
    """Turn a convolution's RGB weights into weights for another number of input channels.

    Shape:
        ``(out, 3, h, w)`` -> ``(out, channels, h, w)``.
    """
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [channel % 3 for channel in range(channels)]] * (3 / channels)
