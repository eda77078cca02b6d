"""How our own files reach the disk: whole, or not at all."""

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
"""How often a file is written whose bytes read back changed."""

CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What fsync says where there is nothing to force: folders on CIFS, VirtualBox and FUSE. There the
server decides when data is safe. EIO and ENOSPC are other answers: the data is lost."""


def put(path: Path, data: bytes) -> None:
    """Put bytes in the place of a file once they have been read back; written again if they differ.

    Raises:
        OSError: they cannot be written, or differ again; `path` is as it was.
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
        # Otherwise the page cache answers, which has not been to the disk.
        advise(file.fileno(), 0, 0, "DONTNEED")
        return file.read()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and leaves no trace if not.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    with _beside(path) as beside, beside.open("wb") as file:
        yield file
        file.flush()
        _force(file.fileno())


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The name of a file that takes the place of `path` when the block ends well."""
    beside = path.with_name(with_ending(f".{path.name}", f".{os.getpid()}.new"))
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are missing, and flush the new names.

    Raises:
        OSError: a folder cannot be made, or the disk refuses.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        flush(folder.parent)


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk, where the file system can do that.

    Raises:
        OSError: the disk refuses, or it is not there.
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
