"""Checkpoints: what one says about its model, which is the newest or the best, and how its weights are loaded.

A checkpoint holds the key ``segmentation``: the public class path, the plain constructor arguments, class names,
palette, mean, std, bands and value range. That is all that is needed to build the network again, to read images as
training did, and to name the classes. Where a checkpoint meets a data set, the two are compared.
"""

import collections.abc
import inspect
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info

from . import tensor_file
from .errors import UserError

RGB = [0, 1, 2]  # the bands that are read of most images where none are named


def describe(model: Any, checkpoint: dict[str, Any]) -> None:
    """Add the key ``segmentation`` to a checkpoint that is being saved.

    It replaces Lightning's own ``hyper_parameters``, which would silently override the configuration of a command.

    Args:
        model: a `SegmentationModule`.
        checkpoint: its content.
    """
    checkpoint.pop("hyper_parameters", None)
    checkpoint.pop("hparams_name", None)
    checkpoint["segmentation"] = identity(model)


def identity(model: Any) -> dict[str, Any]:
    """Return what builds a network again, names its classes, reads images and scales their pixels, in plain types."""
    return {
        "class_path": class_path(type(model)),
        "init_args": init_args(model),
        "class_names": model.class_names,
        "palette": model.palette,
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "bands": model.bands,
        "value_range": model.value_range,
    }


def accept(model: Any, checkpoint: dict[str, Any]) -> None:
    """Compare a checkpoint with a model before its weights are loaded, and take what training knew.

    If there is a data set at hand, its names and colours win over the checkpoint's, and a line says which names differ.

    Raises:
        UserError: if the checkpoint is of another architecture, of the same with other sizes, or was trained on other
            bands, on another value range or with the classes in another order; names both.
    """
    saved = checkpoint.get("segmentation")
    if saved is not None and saved["class_path"].rpartition(".")[2] != type(model).__name__:
        theirs, ours = public_path(saved["class_path"]), class_path(type(model))
        raise UserError(f"the checkpoint is of {theirs}, but the model is {ours}: give its own config")
    own = {key: value.shape for key, value in model.state_dict().items()}
    stored = {key: value.shape for key, value in checkpoint["state_dict"].items()}
    if own != stored:
        there, here = saved.get("init_args", {}) if saved else {}, init_args(model)
        differ = [f"{k} {there.get(k)} there, {here.get(k)} here" for k in here if there.get(k) != here.get(k)]
        layer = min(key for key in own.keys() | stored.keys() if own.get(key) != stored.get(key))
        raise UserError(f"the checkpoint's layers differ from the model's, as {layer}: {'; '.join(differ)}")
    if saved is None:
        return
    compare_pixels(saved, model)
    if model.met_data:
        compare_bands(saved, model.bands)
        settle_range(saved, model)
    else:
        model.known, model.bands, model.value_range = saved, saved.get("bands"), saved.get("value_range")
    if not model.named_by_data:
        model.class_names, model.palette = saved["class_names"], saved["palette"]
        return
    if moved := moved_names(saved["class_names"], model.class_names):
        raise UserError(
            f"{moved}: name them in the checkpoint's order in data.class_names, and let data.label_map give the stored "
            "values their labels in that order"
        )
    if others := other_names(saved["class_names"], model.class_names):
        rank_zero_info(others)


def compare_pixels(saved: dict[str, Any], model: Any) -> None:
    """Compare how pixels are normalised. The checkpoint's mean and std win, since they are loaded as its weights are.

    Raises:
        UserError: if training gave the network the colours in the other order.
    """
    bgr = saved.get("init_args", {}).get("bgr", model.bgr)
    if bgr != model.bgr:
        raise UserError(f"model.bgr is {model.bgr}, but the checkpoint was trained with {bgr}: set it to that")
    for name in other_scales(saved, model):
        rank_zero_info(
            f"model.{name} {getattr(model, name).flatten().tolist()} is not used: the checkpoint was trained with "
            f"{saved[name]}"
        )


def other_scales(saved: dict[str, Any], model: Any) -> list[str]:
    """Return which of mean and std differ between a checkpoint and a model."""
    both = [(name, getattr(model, name).flatten().cpu()) for name in ("mean", "std") if name in saved]
    return [name for name, own in both if not torch.allclose(own, torch.tensor(saved[name], dtype=own.dtype))]


def say_differences(model: Any) -> None:
    """Say where the data differs from what the model's weights were trained on; new training may well want that."""
    said = []
    try:
        compare_bands(model.known, model.bands)
    except UserError as error:
        said.append(str(error))
    for name in other_scales(model.known, model):
        own = getattr(model, name).flatten().tolist()
        said.append(f"model.{name} is {own}, but the checkpoint was trained with {model.known[name]}")
    there, here = model.known.get("value_range"), model.value_range
    if list(there or ()) != list(here or ()):
        said.append(f"data.value_range is {here}, but the checkpoint was trained with {there}")
    names = model.known["class_names"]
    if model.named_by_data and len(names) == len(model.class_names):
        said += [moved_names(names, model.class_names) or other_names(names, model.class_names)]
    for sentence in filter(None, said):
        rank_zero_info(f"the weights come from a checkpoint: {sentence}")


def compare_bands(saved: dict[str, Any], bands: Sequence[int] | None) -> None:
    """Compare the bands that training read with those that are to be read.

    Args:
        saved: what a checkpoint says; older ones do not say their bands.
        bands: as data.bands; None is RGB.

    Raises:
        UserError: if they differ; names both.
    """
    there = saved.get("bands")
    if "bands" in saved and list(there or RGB) != list(bands or RGB):
        trained = f"with data.bands {there}: set bands to that" if there else "on RGB: leave bands out"
        raise UserError(f"bands is {bands and list(bands)}, but the checkpoint was trained {trained}")


def settle_range(saved: dict[str, Any], model: Any) -> None:
    """Compare the value range by which training scaled pixels with that of the data at hand. The checkpoint's wins.

    Raises:
        UserError: if the checkpoint has another; names both.
    """
    there, here = saved.get("value_range"), model.value_range
    if there is None and here is not None:
        rank_zero_info(
            f"the checkpoint scales pixels by the full range of their type: data.value_range {list(here)} is not used"
        )
        model.value_range = None
    elif there is not None and list(there) != list(here or ()):
        raise UserError(
            f"data.value_range is {here and list(here)}, but the checkpoint was trained with {list(there)}: set it to "
            "that"
        )


def moved_names(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Say that classes which a checkpoint and the data share have other labels; "" if none has."""
    there, here = ([name.strip().casefold() for name in names] for names in (theirs, ours))
    if max(len(there) - len(set(there)), len(here) - len(set(here))):  # case tells some apart
        there, here = list(theirs), list(ours)
    if theirs == numbers(theirs) or not any(n in here and here.index(n) != k for k, n in enumerate(there)):
        return ""
    return f"the classes of the checkpoint are [{', '.join(theirs)}], but the data has [{', '.join(ours)}]"


def other_names(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Say which names of classes differ between a checkpoint and the data; "" if none does."""
    differ = [f"{a} is now {b}" for a, b in zip(theirs, ours, strict=False) if a != b]
    if theirs == numbers(theirs) or not differ:
        return ""
    shown = ", ".join(differ[:5]) + (", ..." if len(differ) > 5 else "")
    return f"{len(differ)} of {len(theirs)} class names differ from the checkpoint's: {shown}"


def numbers(names: Sequence[str]) -> list[str]:
    """Return the names that classes have if nobody named them."""
    return [str(label) for label in range(len(names))]


def agree(model: Any, data: Any) -> None:
    """Check that a model fits a data set, and give it the data set's bands, class names and palette.

    Photos to predict name no classes; then only the bands count. A line says so if the model normalises pixels by
    another mean or std than those that the data set states; weights from elsewhere may need that.

    Args:
        model: a `SegmentationModule`.
        data: a `SegmentationDataModule`.

    Raises:
        UserError: if the numbers of channels or classes differ; a binary model has 1 where its data has 2.
    """
    model.met_data, model.bands = True, None if data.bands is None else [int(band) for band in data.bands]
    model.value_range = None if data.value_range is None else [float(value) for value in data.value_range]
    if len(data.class_names):
        agree_on_classes(model, data)
    if model.known is not None:
        say_differences(model)


def agree_on_classes(model: Any, data: Any) -> None:
    """Check a model against data with classes, see `agree`, and give it the data's class names and palette."""
    if max(2, model.num_classes) != data.num_classes:
        raise UserError(
            f"model.num_classes is {model.num_classes} but the data has {data.num_classes} classes "
            f"({', '.join(data.class_names)}): set model.num_classes to {data.num_classes}"
        )
    if model.in_channels != data.in_channels:
        raise UserError(
            f"model.in_channels is {model.in_channels} but the images have {data.in_channels} channels: set "
            f"model.in_channels to {data.in_channels}, and model.mean and model.std to as many values"
        )
    if getattr(data, "border_weight", 0) and not hasattr(model.loss, "weight_of"):
        raise UserError(
            f"data.border_weight weighs pixels, which model.loss {type(model.loss).__name__} cannot: set it to 0, or "
            "leave model.loss out"
        )
    for name, stated in zip(("mean", "std"), getattr(data, "stated_mean_std", None) or ((), ()), strict=True):
        own = getattr(model, name).flatten()
        if len(stated) and not torch.allclose(own.cpu(), torch.tensor(stated, dtype=own.dtype)):
            values = [round(value, 6) for value in own.tolist()]
            rank_zero_info(
                f"model.{name} is {values}, but {type(data).__name__} states {list(stated)}: the images are "
                f"normalised by model.{name}"
            )
    model.named_by_data, model.class_names = True, [str(name) for name in data.class_names]
    if len(data.palette) == data.num_classes:
        model.palette = [[int(value) for value in colour] for colour in data.palette]


def class_path(cls: type) -> str:
    """Return the public import path of an architecture, such as ``segmentation.UNet``, so that its file may move."""
    package = cls.__module__.partition(".")[0]
    public = getattr(sys.modules[package], cls.__name__, None) is cls
    return f"{package if public else cls.__module__}.{cls.__qualname__}"


def init_args(model: Any) -> dict[str, Any]:
    """Return the plain arguments that build a network again; its weights then come from a checkpoint."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in model.hparams.items()}
    return {key: value for key, value in plain.items() if key != "weights"}


def read(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's content: tensors and plain values. Nothing of it is run or imported.

    Raises:
        UserError: if there is no such file, or it is no checkpoint.
    """
    content = tensor_file.read(path, "the checkpoint")
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint, but a {type(content).__name__}: give one that `lightning fit` wrote")
    return content


def check_state(path: str | Path, command: str) -> None:
    """Check that a checkpoint holds what one of Lightning's commands restores.

    Raises:
        UserError: if it holds no weights, or weights alone where the command needs more.
    """
    content = read(path)
    weights_of(content, path)
    needed = {"pytorch-lightning_version"} | (
        {"loops", "optimizer_states", "lr_schedulers"} if command == "fit" else set()
    )
    if needed - content.keys():
        raise UserError(
            f"{path} holds weights, but not the state of a run: give --model.weights {path} in place of --ckpt_path"
        )


def weights_of(content: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors by name.

    Raises:
        UserError: if it holds none.
    """
    state = content.get("state_dict")
    if isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values()):
        return state
    alone = content and all(isinstance(value, torch.Tensor) for value in content.values())
    more = f", or these weights alone by --model.weights {path} and a config" if alone else ""
    raise UserError(f"{path} holds no state_dict: give a checkpoint that `lightning fit` wrote{more}")


def plain_arguments(cls: type) -> set[str]:
    """Return the constructor arguments of a network that a checkpoint may set: those whose types are plain.

    A string for any other argument, as ``optimizer``, would name a class or a file. ``weights`` would name a file too.
    """
    found: dict[str, bool] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base) and base.__module__.partition(".")[0] not in ("lightning", "torch", "builtins"):
            try:
                hints = typing.get_type_hints(base.__init__)  # type: ignore[misc]
            except NameError:  # of a type that only a type checker imports
                hints = {}
            names = list(inspect.signature(base.__init__).parameters)[1:]  # type: ignore[misc]
            found = {name: is_plain_type(hints.get(name, Any)) for name in names} | found
    return {name for name, plain in found.items() if plain} - {"weights", "kwargs"}


def is_plain_type(kind: Any) -> bool:
    """Return whether a type has plain values only, as ``int | None`` or ``Sequence[float]``."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return True
    if origin in (typing.Union, types.UnionType, list, tuple, collections.abc.Sequence):
        return all(is_plain_type(part) for part in typing.get_args(kind) if part is not Ellipsis)
    return kind in (bool, int, float, str, type(None))


def load_trained(model: Any, path: str | Path) -> None:
    """Load a checkpoint's weights, class names and palette into a model. Every command loads through this function.

    Args:
        model: a `SegmentationModule` of the checkpoint's architecture and sizes.
        path: the checkpoint.

    Raises:
        UserError: if there is no such file, it holds no weights, or it is of another network; the message names both.
    """
    checkpoint = read(path)
    state = weights_of(checkpoint, path)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(state)


def model_of(path: str | Path) -> dict[str, Any]:
    """Return what builds a checkpoint's network: ``class_path``, one of ours, and plain ``init_args``.

    Raises:
        UserError: if there is no such file, the checkpoint does not say it, or names another class or argument.
    """
    saved = read(path).get("segmentation")
    if saved is None:
        raise UserError(f"the checkpoint {path} does not say how its model is built: give the run's --config too")
    public = public_path(saved["class_path"])
    package, _, name = public.rpartition(".")
    ours = sys.modules[__package__]
    if package != __package__ or name not in set(ours.__all__) - {"SegmentationModule"}:
        raise UserError(
            f"the checkpoint {path} is of {public}, which is no network of this package, and is imported only if you "
            "name it: give the run's --config too"
        )
    init_args = {key: value for key, value in saved.get("init_args", {}).items() if key != "weights"}
    if odd := sorted(init_args.keys() - plain_arguments(getattr(ours, name))):
        raise UserError(
            f"the checkpoint {path} sets the argument {odd[0]}, which it may not set for {public}: give the run's "
            "--config too"
        )
    return {"class_path": public, "init_args": init_args}


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
