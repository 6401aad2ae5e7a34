"""Fetching archives that may be fetched: goes on where it broke off, checks what came, unpacks inside its folder."""

import hashlib
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from .errors import UserError

BLOCK = 1 << 20


class Archive(NamedTuple):
    """An archive that its owner lets anyone fetch.

    Args:
        url: where it is.
        checksum: ``md5:...``, ``sha1:...`` or ``sha256:...`` as its owner, or a library that fetches it, states.
        folder: below the data set's root, where it is unpacked.
    """

    url: str
    checksum: str
    folder: str = "."


def fetch(archive: Archive, root: Path) -> None:
    """Download, verify and unpack an archive, unless that was done before.

    The download lies in ``NAME.part`` until it is complete, and goes on from there after a break. The archive is
    deleted once it is unpacked; an empty file ``.NAME.unpacked`` remembers it.

    Raises:
        UserError: if what came has another checksum; it is deleted then.
        UserError: if the network does not let it through; what has arrived is kept.
    """
    name = archive.url.rpartition("/")[2]
    done, file, part = root / f".{name}.unpacked", root / name, root / f"{name}.part"
    if done.is_file():
        return
    root.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        download(archive.url, part)
        part.rename(file)
    method, _, expected = archive.checksum.partition(":")
    digest = hashlib.new(method)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected:
        file.unlink()
        raise UserError(f"{archive.url} came with another {method} than {expected}: it was deleted, try again")
    rank_zero_info(f"unpacking {name}")
    unpack(file, root / archive.folder)
    done.touch()
    file.unlink()


def download(url: str, part: Path) -> None:
    """Download to a file, after what it holds already.

    Raises:
        UserError: if the server cannot be reached or the connection breaks.
    """
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = answer.status == 206
            total = int(answer.headers.get("Content-Length", 0)) + (have if resumed else 0)
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            with part.open("ab" if resumed else "wb") as out, Progress(*columns, transient=True) as bar:
                task = bar.add_task(url, total=total or None, completed=have if resumed else 0)
                while block := answer.read(BLOCK):
                    out.write(block)
                    bar.advance(task, len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to fetch
            raise UserError(f"{url} could not be fetched ({error}): try again later") from error
        return
    except OSError as error:
        raise UserError(f"{url} could not be fetched ({error}): the same command goes on with it") from error
    if total and part.stat().st_size < total:
        raise UserError(f"{url} broke off after {part.stat().st_size:,} of {total:,} bytes: the same command goes on")


def unpack(file: Path, folder: Path) -> None:
    """Unpack a tar or zip archive; nothing leaves the folder.

    Raises:
        UserError: if a member's path leads outside, or the file is no archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as members:
            for name in members.namelist():
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"{file} holds {name}, which leads outside {folder}: nothing was unpacked")
            members.extractall(folder)
    elif tarfile.is_tarfile(file):
        with tarfile.open(file) as members:
            try:
                members.extractall(folder, filter="data")
            except tarfile.FilterError as error:
                raise UserError(f"{file} was not unpacked to its end: {error}") from error
    else:
        raise UserError(f"{file} is neither a tar nor a zip archive: delete it and fetch it again")
