"""Files of tensors, such as checkpoints: reads them, and runs nothing that they hold.

A pickle may name any function to call. Only tensors and plain types are unpickled here, whatever the file says.
"""

import re
import types
import zipfile
from pathlib import Path
from typing import Any

import torch

from .errors import UserError


def read(path: str | Path, kind: str) -> Any:
    """Return a file's content. Tensors of a zip file, the usual format, stay on disk until they are used.

    Args:
        path: the file, on this machine.
        kind: what the file should be, as ``the checkpoint``, for messages.

    Raises:
        UserError: if there is no such file, it cannot be read, or it holds more than tensors and plain values.
    """
    if "://" in str(path):
        raise UserError(f"{kind} {path} is an address: download the file first, and give its path")
    if not Path(path).is_file():
        raise UserError(f"{kind} {path} " + ("is a folder, not a file" if Path(path).is_dir() else "does not exist"))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # bytes of any kind fail in any way; torch's own advice is to run what they hold
        raise UserError(f"{kind} {path} {reason(Path(path), error)}") from None
    if isinstance(content, dict) and content.get("segmentation") is not None:
        check_saved(content["segmentation"], path)
    return content


def reason(path: Path, error: Exception) -> str:
    """Say in plain words why torch cannot read a file; its own message may advise to run what the file holds."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as closed:
        return f"cannot be read: {closed.strerror}"
    if not start:
        return "is empty: copy it again"
    if start.lstrip().startswith((b"<", b"version https://git-lfs")):
        return "is a text file in place of the download: fetch the file itself"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            names = {name.rpartition("/")[2] for name in members.namelist()}
        if "constants.pkl" in names:
            return "is a TorchScript program, which is not run: give a file of weights"
        if "data.pkl" not in names:
            return "is a zip archive without weights: give a file of weights"
    elif start.startswith(b"PK"):
        return "is cut short, as by a full disk or a broken download: copy it again, or give another"
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"holds more than tensors and plain values ({named[1]}), which could run commands, so it was not loaded: "
            "give a file of weights alone"
        )
    return "is damaged, or holds no weights: copy it again, or give another"


def check_saved(saved: Any, path: str | Path) -> None:
    """Check that the entry ``segmentation``, what a checkpoint says of its model, has the types that `fit` writes.

    Raises:
        UserError: if it has not, or names a class to build; the message names the entry.
    """
    entries = saved if isinstance(saved, dict) else {}
    kinds = {"class_path": str, "init_args": dict, "class_names": list, "palette": list}
    wrong = [] if "class_path" in entries else ["class_path"]
    wrong += [key for key, kind in kinds.items() if not isinstance(entries.get(key, kind()), kind)]
    wrong += [key for key in ("bands", "value_range") if not isinstance(entries.get(key, []), list | types.NoneType)]
    for group, values in (("", entries), ("init_args.", entries.get("init_args"))):
        if isinstance(values, dict):
            wrong += [f"{group}{key}" for key, value in values.items() if key != "init_args" and not is_plain(value)]
    if wrong:
        raise UserError(
            f"{path} was not loaded: its entry segmentation.{wrong[0]} is not the plain value that `lightning fit` "
            "writes: give another file"
        )


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a string, None, or a list or mapping of these that names no class."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return not {"class_path", "init_args", "dict_kwargs"} & value.keys() and all(map(is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)
