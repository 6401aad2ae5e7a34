"""Where results may be written: names that come from data choose no folder, and no file is lost.

`below` gives a file its path, `writable` looks before anything is built, and `replacing` writes.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

from .errors import UserError


def below(folder: Path, name: str, suffixes: Mapping[str, str]) -> dict[str, Path]:
    r"""Return the paths of the results of an image, which have its name.

    Args:
        folder: the output folder, as the user named it.
        name: a relative path without suffix, from the data.
        suffixes: the kinds of results, which are the folders within `folder`, and the end of the files' names.

    Raises:
        UserError: if the name is empty or absolute, has a drive or ``..``, in the spelling of any system (``C:\x`` is
            refused on Linux too).
    """
    parts = PureWindowsPath(name)  # knows / and \, drives and servers
    if not parts.parts or parts.anchor or ".." in parts.parts or "\0" in name:
        raise UserError(
            f"the data name an image {name!r}, which does not stay in the output folder {folder}: rename the image to "
            "a relative path without '..'"
        )
    return {kind: folder / kind / f"{name}{suffix}" for kind, suffix in suffixes.items()}


def stays_in(folder: Path, parent: Path) -> None:
    """Make sure that no link below a folder leads out of it.

    Args:
        folder: the output folder; it may be a link itself.
        parent: a folder below, which need not exist.

    Raises:
        UserError: if the real path of `parent` is not below that of `folder`.
    """
    if not parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{parent} is a link that leads out of the output folder {folder}: remove the link, or name another folder"
        )


def exists(path: Path) -> bool:
    """Return whether there is a file, a folder or a link, even one that leads nowhere.

    Raises:
        OSError: if this cannot be known, because the name is too long or the folder cannot be searched.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def identities(path: Path) -> set[tuple[int, int]]:
    """Return what tells a file from all others, whatever its path: that of a link and that of its target."""
    found = set()
    for stat in (os.lstat, os.stat):
        try:
            status = stat(path)
        except OSError:
            continue  # a missing file cannot be overwritten
        found.add((status.st_dev, status.st_ino))
    return found


def writable(folder: Path) -> Path:
    """Make sure that files can be written in a folder, which is not created yet.

    Returns:
        the folder, or the nearest one above it that exists.

    Raises:
        UserError: if a file is in the way, or the system refuses.
    """
    try:
        nearest = folder
        while not exists(nearest) and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            raise UserError(f"results cannot be written to {folder}, because {nearest} is a file: name another folder")
        with tempfile.TemporaryFile(dir=nearest):
            return nearest
    except OSError as error:
        raise UserError(f"results cannot be written to {folder} ({reason(error)}): name another folder") from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield the path of a part to write, which becomes the file when it is complete; nothing is written through a link.

    Raises:
        UserError: if the system refuses, as on a full disk.
    """
    part = file.with_name(f".{os.getpid()}.part")  # short, where the file's name may be as long as names can be
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        yield part
        part.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({reason(error)}): make room, or name another folder") from error
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """Return an error of the system in words, without the path."""
    return error.strerror or str(error)
