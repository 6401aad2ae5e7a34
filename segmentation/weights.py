"""Fits weights from a file or from torchvision into a network, and says what it left out."""

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchvision.models import WeightsEnum


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a state dict, seeing through Lightning's and other wrappers; only tensors and plain types are unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no state dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: {path} is neither a file nor one of 'imagenet' and 'coco'")
    content = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights: {path} holds no state dict, that is, no mapping of names to tensors")
    return dict(content)


def download(weights: WeightsEnum) -> dict[str, Tensor]:
    """Fetch one of torchvision's published state dicts, from its cache or the network.

    Raises:
        OSError: without a network; the message says where the file can be put by hand.
    """
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(
            f"cannot download {weights.url} ({error}): put the file into {folder}, or start from random weights with "
            "--model.weights null"
        ) from error


def load_weights(network: nn.Module, state: Mapping[str, Tensor], source: str, heads: tuple[str, ...] = ()) -> None:
    """Copy a state dict into a network in place.

    Args:
        network: receives the weights.
        state: names and tensors; batch norm's ``num_batches_tracked`` may be absent, as in old files.
        source: where they come from, for messages.
        heads: prefixes of layers whose size depends on the classes. One that differs in shape stays fresh, one that
            the network was built without is dropped; both are said in one line.

    Raises:
        ValueError: if any other key is missing, unknown or of another shape; the message lists them.
    """
    own = network.state_dict()
    state = {key: value for key, value in state.items() if key not in ("mean", "std")}  # they stay as configured
    fit = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    optional = [key for key in own if key in ("mean", "std") or key.endswith("num_batches_tracked")]
    left = [key for key in {**state, **own} if key not in fit and key not in optional]
    fresh = [prefix for prefix in heads if any(key.startswith(prefix) for key in left)]
    wrong = [key for key in left if not key.startswith(tuple(fresh))] if fresh else left
    if wrong:
        lines = [
            f"{key}: {tuple(state[key].shape) if key in state else 'absent'} in the file, "
            f"{tuple(own[key].shape) if key in own else 'absent'} in the network"
            for key in wrong
        ]
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise ValueError(f"the weights of {source} do not fit: " + "; ".join(lines[:8]) + more)
    network.load_state_dict(fit, strict=False)
    if fresh:
        rank_zero_info(f"weights of {source}: {', '.join(fresh)} left out, its size depends on the classes")
