"""One sentence for each mistake in a command: what is wrong, and the nearest valid name."""

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .errors import UserError

OURS = ("segmentation", "datamodules")
LIGHTNING = ("fit", "validate", "test", "predict")
OTHER_NAMES = {"train": "fit", "evaluate": "test", "infer": "predict"}  # what other projects call Lightning's commands
CLASSES = {  # where the classes for a key are found, so that a suggestion fits
    "model": ["segmentation"],
    "data": ["datamodules"],
    "callbacks": ["segmentation.callbacks", "lightning.pytorch.callbacks"],
    "logger": ["lightning.pytorch.loggers"],
    "inference": ["segmentation.inference", "segmentation.architectures.unet"],
    "optimizer": ["torch.optim"],
    "lr_scheduler": ["torch.optim.lr_scheduler"],
}
LONGEST = 200  # characters of a wrong value that a message repeats
PROBLEMS = {
    r"ption '([^']+)' is not accepted|not accept option '([^']+)'|[Uu]nrecognized arguments: --([\w.]+)": "key",
    r"Expected a dot import path string: (\S+)|has no attribute '(\w+)'": "class",
    r"invalid choice: '(\w+)'": "command",
}


def plain(
    message: str,
    keys: Iterable[str] = (),
    commands: Sequence[Callable[..., Any]] = (),
) -> str:
    """Turn a message of jsonargparse into one sentence, with the nearest valid name for an unknown one.

    Args:
        message: the message of the parser.
        keys: the keys of the parser that complains, such as ``base_channels`` of U-Net, or ``trainer.max_epochs``.
        commands: our commands, valid beside Lightning's.
    """
    for pattern, kind in PROBLEMS.items():
        match = re.search(pattern, message)
        if match is None:
            continue
        wrong = next(group for group in match.groups() if group)
        if kind == "key":
            hint = nearest_key(wrong, set(keys))
        elif kind == "class":
            hint = nearest(wrong, class_names(message))
        else:
            own = [command.__name__ for command in commands]
            hint = nearest(wrong, OTHER_NAMES | {name: name for name in (*LIGHTNING, *own)})
        return f"unknown {kind} '{wrong}'" + (f": did you mean '{hint}'?" if hint else "")
    if missing := re.search(r"arguments are required: (.+)", message):
        return f"{missing[1]} is missing: a class needs it, as in --KEY CLASS --KEY.{missing[1].split(',')[0]} VALUE"
    return mismatch(message)


def mismatch(message: str) -> str:
    """Say which value does not fit a key. jsonargparse also lists why the value is none of the types it may have."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    types = re.search(r"Subtypes: \[(.*)\]\n", message)
    value = message.rpartition("Given value: ")[2]
    if not (key and types and value):
        return " ".join(message.split())
    listed = message.partition("Errors:\n")[2].rpartition("Given value type")[0]
    reasons = [" ".join(reason.split()) for reason in re.split(r"^ *- ", listed, flags=re.MULTILINE)]
    of_class = [reason for reason in reasons if re.match("Problem with given class_path|Multiple subclasses", reason)]
    if of_class:  # the only type of interest
        return f"{key[1]}: {'; '.join(of_class)}"
    own = [reason for reason in reasons if reason and not re.fullmatch(r"Expected an? (<.*>|typing\..*)", reason)]
    allowed = re.sub(r"<class '(.*?)'>", r"\1", types[1]).replace("NoneType", "null")
    allowed = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])|\btyping\.", "", allowed)
    shown = " ".join(value.split())
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."
    return f"{key[1]} is {shown}, but must be one of {allowed}" + "".join(f"; {reason}" for reason in own)


def nearest(wrong: str, names: Mapping[str, str] | Iterable[str]) -> str:
    """Return the valid name that is written most like a wrong one, whatever its case; "" if none is near."""
    names = names if isinstance(names, Mapping) else {name: name for name in names}
    lower = {name.lower(): valid for name, valid in names.items()}
    return next((lower[name] for name in difflib.get_close_matches(wrong.lower(), lower, n=1)), "")


def nearest_key(wrong: str, keys: set[str]) -> str:
    """Return the nearest valid key: of the same group, as ``trainer``, or with the group's name put right."""
    group, dot, rest = wrong.partition(".")
    groups = {key.partition(".")[0] for key in keys}
    if group in groups:
        return nearest(wrong, [key for key in keys if key.startswith(f"{group}.")])
    right = nearest(group, groups)
    return right and f"{right}{dot}{rest}"


def class_names(message: str) -> list[str]:
    """Return the names of the classes that are valid for the module or the key in a message."""
    module = re.search(r"module '([\w.]+)' has no", message)
    key = re.search(r'Parser key "(?:\w+\.)*(\w+)"', message)
    paths = [module[1]] if module else CLASSES.get(key[1] if key else "", ())
    return [name for path in paths for name in dir(importlib.import_module(path)) if name[0].isupper()]


def sentence(
    error: BaseException, kinds: tuple[type[Exception], ...] = (UserError,), built: type | None = None
) -> str | None:
    """Return the message of an error that the user can mend; None for any other, which keeps its traceback.

    Args:
        error: any exception.
        kinds: the classes of exceptions whose message is for the user.
        built: the class whose constructor raised it, if one did. What another project's class does not take, it says
            by a `ValueError` or a `TypeError`.
    """
    if isinstance(error, kinds):
        return str(error).rpartition("UserError: ")[2].strip()  # a loader's worker puts its traceback before it
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OURS:
        return missing_package(error, built)
    text = " ".join(str(error).split())
    if isinstance(error, MisconfigurationException):
        return text
    theirs = built is not None and (built.__module__.partition(".")[0] not in OURS or issubclass(built, Trainer))
    return f"{built.__name__}: {text}" if built and theirs and isinstance(error, (TypeError, ValueError)) else None


def missing_package(error: ModuleNotFoundError, built: type | None) -> str:
    """Say which package is missing and what installs it.

    Args:
        error: of Python's import, or of a library that advises ``pip install``.
        built: the class that needs the package, if known.
    """
    text = " ".join(str(error).split())
    advised = re.findall(r"pip install (?:-U )?'?([A-Za-z][\w.<>=~!,\[\]-]*)", text) or re.findall(
        r"requires ([\w.<>=-]+)", text
    )
    package = min(advised, key=len) if advised else (error.name or "").partition(".")[0]
    if not package:
        return text
    name = re.split(r"[<>=~!]", package)[0]
    who = f"{built.__name__} needs" if built else "this needs"
    return (
        f"{who} the package {name}, which is not installed: pip install {package if package == name else repr(package)}"
    )
