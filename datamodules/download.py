"""Archives of public data sets: download (resumed after a break), checksum, and unpacking inside one folder."""

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
    """An archive that its owner lets everyone download.

    Args:
        url: its address.
        checksum: ``md5:...``, ``sha1:...`` or ``sha256:...``, as stated by its owner or by a library that fetches it.
        folder: folder below the data set's root into which it is unpacked.
    """

    url: str
    checksum: str
    folder: str = "."


def fetch(archive: Archive, root: Path) -> None:
    """Download, verify and unpack an archive, unless that was done before.

    The download is written to ``NAME.part`` until it is complete, so that it can be resumed. The archive is deleted
    after unpacking, and an empty file ``.NAME.unpacked`` records that it was unpacked.

    Args:
        archive: what to fetch.
        root: the data set's folder.

    Raises:
        UserError: if the download fails (the part that has arrived is kept), or the archive has another checksum (it
            is deleted).
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
        raise UserError(f"{archive.url} does not have the {method} {expected}: it was deleted, so try again")
    rank_zero_info(f"unpacking {name}")
    unpack(file, root / archive.folder)
    done.touch()
    file.unlink()


def download(url: str, part: Path) -> None:
    """Download to a file, resuming after the bytes that it already holds.

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
        if error.code != 416:  # 416: the file is complete
            raise UserError(f"{url} could not be downloaded ({error}): try again later") from error
        return
    except OSError as error:
        raise UserError(f"{url} could not be downloaded ({error}): run the same command again to resume") from error
    if total and part.stat().st_size < total:
        raise UserError(
            f"the download of {url} broke off after {part.stat().st_size:,} of {total:,} bytes: run the same command "
            "again to resume"
        )


def unpack(file: Path, folder: Path) -> None:
    """Unpack a tar or zip archive, and write nothing outside the folder.

    Raises:
        UserError: if the path of a member leads outside the folder, or the file is no archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as members:
            for name in members.namelist():
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"{file} holds the path {name}, which leads outside {folder}: nothing was unpacked")
            members.extractall(folder)
    elif tarfile.is_tarfile(file):
        with tarfile.open(file) as members:
            try:
                members.extractall(folder, filter="data")
            except tarfile.FilterError as error:
                raise UserError(f"{file} was not unpacked completely: {error}") from error
    else:
        raise UserError(f"{file} is neither a tar nor a zip archive: delete it and download it again")
