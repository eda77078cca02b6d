"""How our own files reach the disk: whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from grokfetch.torrent.names import with_ending

__all__ = ["flush", "make_folder", "replacing"]

CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What fsync says where there is nothing to force: folders on CIFS, VirtualBox and FUSE. There the
server decides when data is safe. EIO and ENOSPC are other answers: the data is lost."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and leaves no trace if not.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    beside = path.with_name(with_ending(f".{path.name}", f".{os.getpid()}.new"))
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            _force(file.fileno())
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
