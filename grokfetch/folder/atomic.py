"""Writes our own files to the disk completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from grokfetch.torrent.names import with_ending
from grokfetch.torrent.read_back import advise

__all__ = ["flush", "make_folder", "put", "replacing"]

ATTEMPTS = 2
"""How often to write a file at most if its bytes do not read back unchanged."""

CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""The errors of fsync where it is not supported: folders on CIFS, VirtualBox and FUSE. There the
server decides when data is safe. EIO and ENOSPC are different: the data is lost."""


def put(path: Path, data: bytes) -> None:
    """Replace a file by bytes that were written and read back, and written again if they differed.

    Raises:
        OSError: they cannot be written, or differed again; `path` is unchanged.
    """
    with _beside(path) as beside:
        for _ in range(ATTEMPTS):
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                _force(file.fileno())
            if _read_back(beside) == data:
                return
        raise OSError(errno.EIO, "what was written there reads back changed", str(path))


def _read_back(path: Path) -> bytes:
    with path.open("rb") as file:
        # Otherwise the bytes would come from the page cache and not from the disk.
        advise(file.fileno(), 0, 0, "DONTNEED")
        return file.read()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that replaces `path` when the block succeeds, and is removed when it fails.

    Raises:
        OSError: it cannot be written; `path` is unchanged.
    """
    with _beside(path) as beside, beside.open("wb") as file:
        yield file
        file.flush()
        _force(file.fileno())


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The path of a file that replaces `path` when the block succeeds."""
    beside = path.with_name(with_ending(f".{path.name}", f".{os.getpid()}.new"))
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents if they are missing, and flush the new names.

    Raises:
        OSError: a folder cannot be made or flushed.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        flush(folder.parent)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, if the file system supports that.

    Raises:
        OSError: flushing fails, or `path` does not exist.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        _force(handle)
    finally:
        os.close(handle)


def _force(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
