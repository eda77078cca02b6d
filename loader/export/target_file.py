"""A file of an export while several threads write it, in any order.

What is written goes to the disk at once and then leaves the page cache. An export is read only
once, to be hashed; in the cache it would displace the shards that it is made from. And new pages
cost more than the disk: on a virtual machine whose host provides memory page by page, 4 GB were
written at 0.35 to 0.5 GB/s through a growing cache, and at 1.6 to 2.9 GB/s in this way.
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
"""Most bytes of a file that may be on their way to the disk."""


class TargetFile:
    """A file of a known size; its methods raise OSError.

    Args:
        path: the file, which is created if it does not exist; its content stays.
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
        """Write bytes, or an array, at byte `start` of the file; returns their number."""
        left, offset = bytes_of(data), start
        length = len(left)
        while left:
            count = os.pwrite(self._handle, left, offset)
            left, offset = left[count:], offset + count
        self._send(start, length)
        return length

    def _send(self, start: int, length: int) -> None:
        """Start writing a span to the disk; drop earlier ones, which are there, from the cache."""
        spans = [(start, length)]
        with self._lock:
            self._cached.append((start, length))
            self._cached_bytes += length
            while self._cached_bytes > CACHED:
                span = self._cached.popleft()
                self._cached_bytes -= span[1]
                spans.append(span)
        # This starts writing pages that are not on the disk yet, and drops the others.
        for at, nbytes in spans:
            advise(self._handle, at, nbytes, "DONTNEED")

    def flush(self) -> None:
        """Return when everything written is on the disk."""
        os.fsync(self._handle)
