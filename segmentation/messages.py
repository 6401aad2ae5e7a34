"""One sentence for each mistake in a command: what is wrong, and the nearest valid name."""

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import UserError

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
    return " ".join(message.split())[:400]


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


def sentence(error: BaseException, kinds: tuple[type[Exception], ...] = (UserError,)) -> str | None:
    """Return the message of an error that the user can mend; None for any other, which keeps its traceback.

    Args:
        error: any exception.
        kinds: the classes of exceptions whose message is for the user.
    """
    if not isinstance(error, kinds):
        return None
    return str(error).rpartition("UserError: ")[2].strip()  # a loader's worker puts its traceback before the message
