"""How many files a process may have open at once, and mapping files without using them up.

Before Python 3.13 a mapped file keeps a descriptor. Grok-1 has 770 files, and macOS allows 256
until a process asks for more.
"""

from __future__ import annotations

import contextlib
import mmap
import resource
import sys
from typing import IO

__all__ = ["OPEN_FILES", "allow_open_files", "map_file", "most_open_files", "open_files_for"]

OPEN_FILES = 128
"""What a command needs besides mapped files: connections, libraries, files being written."""

UNLIMITED = 2**63 - 1


def open_files_for(mapped: int) -> int:
    """How many files are open at once while `mapped` files are mapped."""
    return OPEN_FILES if sys.version_info >= (3, 13) else OPEN_FILES + mapped


def most_open_files() -> int:
    """The highest limit that `allow_open_files` can set."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if hard == resource.RLIM_INFINITY else hard


def allow_open_files(count: int) -> None:
    """Raise the soft limit to `count` files, or as far as the system allows; never lower it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    count = count if hard == resource.RLIM_INFINITY else min(count, hard)
    # A system may allow fewer than its hard limit; a shortage is then reported when it occurs.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def map_file(file: IO[bytes]) -> mmap.mmap:
    """The whole file, read-only; from Python 3.13 on no descriptor stays open.

    Raises:
        OSError: the file system cannot map it, or too many files are open.
        ValueError: the file is empty.
    """
    if sys.version_info >= (3, 13):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
