"""What the command says when it cannot go on: one sentence, not a dump of types."""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L


def plain(message: str, classes: Sequence[type], commands: Sequence[Callable[..., Any]] = ()) -> str:
    """Turn a parser's message into one sentence, with the nearest valid name for an unknown one.

    Args:
        message: what jsonargparse says.
        classes: architectures, data sets and callbacks, whose names and arguments are valid.
        commands: of our own, beside Lightning's, whose names and arguments are valid too.
    """
    patterns = {
        r"ption '([^']+)' is not accepted|not accept option '([^']+)'|[Uu]nrecognized arguments: --([\w.]+)": "key",
        r"Expected a dot import path string: (\S+)|has no attribute '(\w+)'": "class",
        r"invalid choice: '(\w+)'": "command",
    }
    for pattern, kind in patterns.items():
        match = re.search(pattern, message)
        if match is None:
            continue
        wrong = next(group for group in match.groups() if group)
        module = re.search(r"module '([\w.]+)' has no", message)
        if kind == "command":
            names = {"fit", "validate", "test", "predict", *(command.__name__ for command in commands)}
        elif kind == "class":
            names = set(dir(importlib.import_module(module[1]))) if module else {cls.__name__ for cls in classes}
        else:
            names = {"trainer", "model", "data", "seed_everything", "writer", "ckpt_path", "config"}
            for cls in (L.Trainer, *(base for c in classes for base in c.__mro__)):
                names |= set(inspect.signature(vars(cls).get("__init__", object)).parameters)
            for command in commands:
                names |= set(inspect.signature(command).parameters)
        parts = wrong.split(".")
        lower = {name.lower(): name for name in sorted(names)}
        near = [[lower[name] for name in difflib.get_close_matches(part.lower(), lower, n=1)] for part in parts]
        hint = ".".join(match[0] if match else part for match, part in zip(near, parts, strict=True))
        return f"unknown {kind} '{wrong}'" + (f": did you mean '{hint}'?" if hint != wrong else "")
    if "required: " in message and ".model" in message:
        return "no model given: name a config with --config FILE, or an architecture with --model CLASS"
    return " ".join(message.split())[:400]
