"""A file of an export while it is written, by several threads and at any place.

What is written goes to the disk at once and leaves the page cache as soon as it is there. An export
is read once, to be hashed; in the cache it would push out the shards that it is made from, and new
pages cost more than the disk: on a virtual machine whose memory its host hands out page by page,
4 GB were written at 0.35 to 0.5 GB/s through a growing cache, and at 1.6 to 2.9 GB/s like this.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path
from typing import Final, Self

from grokfetch.torrent.read_back import advise
from loader.export.matrices import Data, bytes_of

__all__ = ["TargetFile"]

CACHED: Final = 64 << 20
"""Bytes of a file that may be on their way to the disk."""


class TargetFile:
    """A file of a known size; its methods raise OSError.

    Args:
        path: the file, which is made if it is not there; what it holds stays.
        size: in bytes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._lock = threading.Lock()
        self._cached: deque[tuple[int, int]] = deque()
        self._cached_bytes = 0
        try:
            os.ftruncate(self._handle, size)
        except OSError:
            os.close(self._handle)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def write(self, data: Data, start: int) -> int:
        """Write all of some bytes or of an array, from byte `start` of the file on; how many."""
        left, offset = bytes_of(data), start
        length = len(left)
        while left:
            count = os.pwrite(self._handle, left, offset)
            left, offset = left[count:], offset + count
        self._send(start, length)
        return length

    def _send(self, start: int, length: int) -> None:
        """Have a span written to the disk, and those before it forgotten that must be there."""
        spans = [(start, length)]
        with self._lock:
            self._cached.append((start, length))
            self._cached_bytes += length
            while self._cached_bytes > CACHED:
                span = self._cached.popleft()
                self._cached_bytes -= span[1]
                spans.append(span)
        # Pages that are not on the disk yet are sent there by this, and stay; others go.
        for at, nbytes in spans:
            advise(self._handle, at, nbytes, "DONTNEED")

    def flush(self) -> None:
        """Return when all that was written is on the disk."""
        os.fsync(self._handle)
