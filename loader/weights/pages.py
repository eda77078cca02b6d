"""Advice to the kernel about the pages of mapped files: bring, keep, enlarge or drop them.

`madvise` is called through ctypes, which lets other threads run meanwhile; `mmap.madvise` does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from grokfetch.errors import CheckpointInvalid, StorageFailed

__all__ = ["CANNOT_MAP", "Door", "Pages"]

CANNOT_MAP = (errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP)
"""mmap's errors on a file system that cannot map files: some network and FUSE ones."""

LARGE = 4 << 20
"""Bytes from which huge pages of a file are worth asking for."""

LINUX = sys.platform == "linux"
WILL_NEED, DO_NOT_NEED, HUGE, POPULATE_READ = 3, 4, 14, 22
ON_FAULT = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Door(Protocol):
    """Says when bytes of one file may be read, and has missing ones brought."""

    @property
    def gap(self) -> int:
        """Bytes: spans closer to each other than this may as well be asked for as one."""

    def require(self, start: int, length: int) -> None:
        """Return when a span of the file is proven; raises if it will not be."""

    def expect(self, start: int, length: int, *, at_once: bool = False) -> None:
        """Announce that a span will be required, at once or soon."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pages:
    """The pages of `length` bytes of a mapped file, `start` counted from the file's first.

    `door` says when they may be read; None if all of the file was proven before.
    """

    path: Path
    mapped: mmap.mmap
    start: int
    length: int
    door: Door | None = None

    def chunks(self, size: int) -> Iterator[Pages]:
        """The same bytes in pieces of at most `size`."""
        stop = self.start + self.length
        for at in range(self.start, stop, size):
            yield dataclasses.replace(self, start=at, length=min(size, stop - at))

    def check(self) -> None:
        """Notice that the file has been truncated, before a touched page ends the process.

        Raises:
            CheckpointInvalid: it is shorter than its mapping.
        """
        if self.mapped.size() < len(self.mapped):
            raise CheckpointInvalid("it has shrunk on disk while it was in use", path=self.path)

    def expect(self) -> None:
        """Ask for their bytes, which will be required next."""
        if self.door is not None:
            self.door.expect(self.start, self.length, at_once=True)

    def require(self) -> None:
        """Return when their bytes are proven.

        Raises:
            NotProven: they will not be.
        """
        if self.door is not None:
            self.door.require(self.start, self.length)

    def announce(self) -> None:
        """Have the kernel start reading them."""
        # Looking up every page of cached bytes would take a tenth of the time of a copy.
        if not (self.is_cached(self.start) and self.is_cached(self.start + self.length - 1)):
            self.advise(WILL_NEED)

    def bring(self) -> None:
        """Have them read and mapped.

        Raises:
            StorageFailed: the file has been truncated, or its disk fails.
        """
        failed = self.advise(POPULATE_READ) if LINUX else errno.EINVAL
        if failed == errno.EINVAL:  # Linux before 5.14, and other systems: the reading begins only.
            failed = self.advise(WILL_NEED)
        if failed == errno.EFAULT:
            raise StorageFailed(
                "it has become shorter, or its disk fails, while the model is using it",
                path=self.path,
                hint="restore it, then run: grokfetch verify DIR",
            )
        if failed not in (0, errno.EINVAL, errno.ENOMEM):
            raise StorageFailed(f"cannot be read: {os.strerror(failed)}", path=self.path)

    def drop(self) -> None:
        """Drop them from our mapping, then from the page cache. The disk can bring them again."""
        self.advise(DO_NOT_NEED)
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), self.start, self.length, os.POSIX_FADV_DONTNEED)

    def lock(self) -> int:
        """Keep them in memory once they are there; 0 or the number of the error."""
        if not hasattr(_libc, "mlock2"):
            return errno.ENOSYS
        address, length = self._range()
        failed = _libc.mlock2(ctypes.c_void_p(address), ctypes.c_size_t(length), ON_FAULT)
        return ctypes.get_errno() if failed else 0

    def enlarge(self) -> None:
        """Ask for huge pages, if that can save enough."""
        if LINUX and self.length >= LARGE:
            self.advise(HUGE)

    def advise(self, advice: int) -> int:
        """Give the kernel advice; 0 or the number of the error."""
        return ctypes.get_errno() if _libc.madvise(*self._range(), advice) else 0

    def _range(self) -> tuple[int, int]:
        """The address of the first page, and bytes to the end of the last."""
        first = self.start - self.start % mmap.PAGESIZE
        address = np.frombuffer(self.mapped, np.uint8).ctypes.data
        return address + first, self.start + self.length - first

    def is_cached(self, place: int) -> bool:
        """Whether the page of a byte of the file is in memory; False if the system does not say."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            with self.path.open("rb", buffering=0) as file:
                return os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT) == 1
        except OSError:
            return False
