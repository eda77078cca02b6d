"""Read bytes back from the disk and hash them, on all cores with bounded memory.

One thread hashes one piece, or one whole file; hashlib and preadv release the interpreter lock.
Where the C program of `grokfetch.torrent.lanes` can be used, a thread hashes several pieces of the
page cache at once. Each thread reads into its own buffer of `CHUNK` bytes, so that memory does not
grow with pieces or files. Errors are values, never exceptions: one bad piece does not end a scan.

Files are read, not mapped: if a mapped file is truncated, the process dies, and on one of two
processors hashing through a map was slower, too (`benchmarks/README.md`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Generic, Literal, TypeVar

from grokfetch.process_limits import cores
from grokfetch.torrent.layout import Layout, PieceHasher, Segment

__all__ = [
    "FileResult",
    "Hashers",
    "PieceResult",
    "advise",
    "check_pieces",
    "chunks",
    "in_batches",
    "may_be_on_disk",
    "opened",
    "sha256_of",
]

T = TypeVar("T")

CHUNK = 1 << 20
"""Bytes read at once: whole blocks of 16 KiB that fit into a core's cache."""

BATCH = 4 << 20
"""Bytes of small pieces in one job, so that scheduling jobs costs almost nothing."""

TOGETHER = 128 << 20
"""Bytes of pieces that a thread hashes together at most: it ends them first when interrupted."""

_ZEROS = bytes(CHUNK)

Verdict = Literal["good", "bad", "absent", "unreadable"]


@dataclasses.dataclass(frozen=True, slots=True)
class PieceResult:
    """The result of reading one piece back.

    `absent` if not all of it is on the disk, or its hash is not known yet.
    """

    piece: int
    verdict: Verdict
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class FileResult:
    """The sha256 of a whole file in hexadecimal; None if it could not be read, and why."""

    sha256: str | None
    detail: str = ""


class Hashers(Generic[T]):
    """A pool of threads, one per core that this process may use, each with a buffer."""

    def __init__(self) -> None:
        self._threads = cores()
        self._pool = ThreadPoolExecutor(self._threads, "hash")
        self._local = threading.local()
        self._running: set[Future[T]] = set()

    def __enter__(self) -> Hashers[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, job: Callable[[memoryview], T]) -> None:
        """Run `job` in a thread, with that thread's buffer."""
        self._running.add(self._pool.submit(self._work, job))

    def _work(self, job: Callable[[memoryview], T]) -> T:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(CHUNK))
        return job(self._local.buffer)

    def take(self, timeout_s: float | None = 0) -> list[T]:
        """The results that are there, after waiting for at least one of the running jobs."""
        done, self._running = wait(self._running, timeout_s, FIRST_COMPLETED)
        return [future.result() for future in done]

    @property
    def busy(self) -> bool:
        """Whether results are still to be taken."""
        return bool(self._running)

    def run(self, jobs: Iterable[Callable[[memoryview], T]]) -> Iterator[T]:
        """Results of all jobs as they come, with few jobs waiting at a time."""
        source = iter(jobs)
        while True:
            for job in islice(source, 4 * self._threads - len(self._running)):
                self.submit(job)
            if not self._running:
                return
            yield from self.take(None)


def in_batches(layout: Layout, pieces: Iterable[int]) -> Iterator[list[int]]:
    """Pieces in groups that are each worth a thread's while."""
    from grokfetch.torrent.lanes import lanes

    source = iter(pieces)
    usual = max(1, BATCH // layout.piece_length)

    def size() -> int:
        program = lanes() if layout.version == 1 else None
        together = min(program.count, TOGETHER // layout.piece_length) if program else 1
        return max(usual, together)

    while batch := list(islice(source, size())):
        yield batch


def check_pieces(
    root: Path, layout: Layout, pieces: Iterable[int], buffer: memoryview
) -> list[PieceResult]:
    """Read pieces back and compare their hashes with the torrent's."""
    numbers = list(pieces)
    good = _good_together(root, layout, numbers, buffer)
    return [
        PieceResult(piece, "good") if piece in good else _check(root, layout, piece, buffer)
        for piece in numbers
    ]


def _good_together(root: Path, layout: Layout, pieces: list[int], buffer: memoryview) -> set[int]:
    """Those pieces that are right as several are hashed at once; nothing is said of the others."""
    from grokfetch.torrent.lanes import FEWEST, lanes

    good: set[int] = set()
    if layout.version != 1:
        return good
    program = lanes(len(pieces) * layout.piece_length)
    if program is None or len(pieces) < FEWEST:
        return good
    parts = [(piece, list(layout.segments(piece))) for piece in pieces]
    # Of a piece in one file the length says that it is a whole one.
    whole = [
        (piece, segments[0])
        for piece, segments in parts
        if len(segments) == 1
        and segments[0].length == layout.piece_length
        and not segments[0].file.pad
    ]
    for start in range(0, len(whole), program.count):
        group = whole[start : start + program.count]
        if len(group) < FEWEST:
            break
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            paths = dict.fromkeys(root / segment.file.path for _, segment in group)
            handles = {path: stack.enter_context(opened(path)) for path in paths}
            spans = [(handles[root / part.file.path], part.offset) for _, part in group]
            # A disk is read faster one piece after another, and hashlib on all cores keeps up.
            if not all(_cached(handle, offset) for handle, offset in spans):
                continue
            digests = program.sha1(spans, layout.piece_length, buffer)
            good.update(
                piece
                for (piece, _), digest in zip(group, digests, strict=True)
                if digest == layout.expected(piece)
            )
    return good


def _check(root: Path, layout: Layout, piece: int, buffer: memoryview) -> PieceResult:
    if not layout.provable(piece):
        return PieceResult(piece, "absent")
    hasher = layout.hasher(piece)
    try:
        for segment in layout.segments(piece):
            if not _feed(root, segment, hasher, buffer):
                return PieceResult(piece, "absent")
    except (FileNotFoundError, NotADirectoryError):
        return PieceResult(piece, "absent")
    except OSError as error:
        return PieceResult(piece, "unreadable", error.strerror or str(error))
    return PieceResult(piece, "good" if hasher.digest() == layout.expected(piece) else "bad")


def _feed(root: Path, segment: Segment, hasher: PieceHasher, buffer: memoryview) -> bool:
    """Hash a segment; False if the file ends before it does."""
    if segment.file.pad:
        for start in range(0, segment.length, CHUNK):
            hasher.update(_ZEROS[: segment.length - start])
        return True
    left = segment.length
    with opened(root / segment.file.path) as handle:
        for data in chunks(handle, segment.offset, segment.offset + segment.length, buffer):
            hasher.update(data)
            left -= len(data)
    return not left


def chunks(handle: int, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of a span of an open file, each chunk in the same buffer.

    Yields:
        Fewer bytes than the span has if the file ends before it does.

    Raises:
        OSError: the file cannot be read.
    """
    while start < stop:
        count = os.preadv(handle, [buffer[: stop - start]], start)
        if not count:
            return
        yield buffer[:count]
        start += count


def sha256_of(
    path: Path,
    buffer: memoryview,
    *,
    keep: bool = True,
    beside: Callable[[memoryview], object] | None = None,
) -> FileResult:
    """The sha256 of a whole file.

    Args:
        path: the file.
        buffer: to read into.
        keep: whether what is read may stay in the page cache.
        beside: is given every chunk in order, in a thread of its own while we hash the chunk.
    """
    hasher = hashlib.sha256()
    offset = 0
    try:
        with opened(path) as handle, contextlib.ExitStack() as stack:
            pool = None if beside is None else stack.enter_context(ThreadPoolExecutor(1, "beside"))
            # The system then reads further ahead: 1.3 GB/s of a disk of 2, instead of 0.9.
            advise(handle, 0, 0, "SEQUENTIAL")
            while count := os.preadv(handle, [buffer], offset):
                other = pool.submit(beside, buffer[:count]) if pool and beside else None
                hasher.update(buffer[:count])
                if other is not None:
                    other.result()
                if not keep:
                    advise(handle, offset, count, "DONTNEED")
                offset += count
    except OSError as error:
        return FileResult(None, error.strerror or str(error))
    return FileResult(hasher.hexdigest())


def advise(handle: int, start: int, length: int, what: Literal["SEQUENTIAL", "DONTNEED"]) -> None:
    """Give the system advice on the pages of an open file, where it takes any: macOS does not."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, start, length, getattr(os, f"POSIX_FADV_{what}"))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A regular file, opened for reading.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    # A named pipe in the payload's place must not block us.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is not a regular file")
        yield handle
    finally:
        os.close(handle)


def _cached(handle: int, offset: int) -> bool:
    """Whether reading there need not wait for the disk; True where the system cannot tell."""
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        return True
    try:
        os.preadv(handle, [bytearray(1)], offset, flag)
    except BlockingIOError:
        return False
    except OSError as error:
        # Not every file system can read without waiting.
        return error.errno == errno.EOPNOTSUPP
    return True


def may_be_on_disk(root: Path, layout: Layout, pieces: Iterable[int]) -> Iterator[int]:
    """Of some pieces those that are worth hashing: present to the last byte, and no mere hole.

    The files of a torrent client are sparse; what it has not written reads as zeros. Such a piece
    is hashed only if zeros are what the torrent wants there.
    """
    sizes: dict[Path, int] = {}
    zeros = _zero_hash(layout)
    for piece in filter(layout.provable, pieces):
        segments = [segment for segment in layout.segments(piece) if not segment.file.pad]
        if not all(_reaches(root, segment, sizes) for segment in segments):
            continue
        if layout.expected(piece) == zeros or any(_has_data(root, part) for part in segments):
            yield piece


def _reaches(root: Path, segment: Segment, sizes: dict[Path, int]) -> bool:
    path = root / segment.file.path
    if path not in sizes:
        try:
            sizes[path] = path.stat().st_size
        except OSError:
            sizes[path] = -1
    return sizes[path] >= segment.offset + segment.length


def _has_data(root: Path, segment: Segment) -> bool:
    if not hasattr(os, "SEEK_DATA"):
        return True
    try:
        with opened(root / segment.file.path) as handle:
            data_at = os.lseek(handle, segment.offset, os.SEEK_DATA)
    except OSError:
        # ENXIO says that no data follows. Any other error shows again when the piece is read.
        return False
    return data_at < segment.offset + segment.length


def _zero_hash(layout: Layout) -> bytes:
    """The hash of a whole piece of zeros."""
    if not layout.piece_count:
        return b""
    hasher = layout.hasher(0)
    for start in range(0, layout.piece_size(0), CHUNK):
        hasher.update(_ZEROS[: layout.piece_size(0) - start])
    return hasher.digest()
