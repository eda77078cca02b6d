"""How our own files reach the disk: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from grokfetch.torrent.names import with_ending

__all__ = ["make_folder", "replacing"]


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
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are missing, and flush the new names.

    Raises:
        OSError: a folder cannot be made, or the disk refuses.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        _flush_folder(folder.parent)


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
