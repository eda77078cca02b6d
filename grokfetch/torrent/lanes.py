"""SHA-1 of several pieces, or SHA-256 of several blocks, at once on one core, by a C program.

Each step of one hash waits for the step before. `lanes.c` hashes as many streams as a vector
register has lanes, and reads the data itself. Without a compiler, or if the processor has no wide
vectors, hashlib does everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import random
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from grokfetch.c_program import OPTIONS, CProgram, digest_of, processor
from grokfetch.cache_folder import cache_folder

__all__ = ["FEWEST", "Lanes", "Shared", "build", "lanes", "load"]

SOURCE = Path(__file__).with_name("lanes.c")

FEWEST = 6
"""With at least this many streams, lanes are much faster than hashing one after another."""

WORTH_BUILDING = 1 << 28
"""Once this process has hashed so many bytes, half a second for compiling soon pays off."""

CHECKED = (0, 1, 55, 56, 63, 64, 65, 119, 120, 127, 128, 4096 + 55, 4096 + 56)
"""Lengths near the limits of blocks and padding, for which the program's hashes are checked."""


class Lanes:
    """The C program, loaded.

    Attributes:
        count: streams at a time.
        blocks: whether SHA-256 is faster in lanes as well.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.count = int(library.grokfetch_lanes())
        self.blocks = bool(self.count) and bool(library.grokfetch_sha256_pays())
        self._library = library

    def sha1(
        self, spans: Sequence[tuple[int, int]], length: int, buffer: memoryview
    ) -> list[bytes | None]:
        """SHA-1 of some spans of open files.

        Args:
            spans: at most `count` of them: file descriptor and offset.
            length: bytes of each.
            buffer: to read into, at least 64 bytes for each lane.

        Returns:
            20 bytes for each span, or None if not all of it could be read.
        """
        if len(spans) > self.count or buffer.nbytes < 64 * self.count:
            raise ValueError(f"{len(spans)} spans and {buffer.nbytes} bytes for {self.count} lanes")
        empty = [-1] * (self.count - len(spans))
        files = (ctypes.c_int * self.count)(*[file for file, _ in spans], *empty)
        offsets = (ctypes.c_int64 * self.count)(*[offset for _, offset in spans])
        digests = (ctypes.c_uint8 * (20 * self.count))()
        room = (ctypes.c_uint8 * buffer.nbytes).from_buffer(buffer)
        self._library.grokfetch_sha1(
            files, offsets, ctypes.c_int64(length), room, ctypes.c_int64(buffer.nbytes), digests
        )
        found = bytes(digests)
        return [
            None if files[lane] < 0 else found[20 * lane : 20 * lane + 20]
            for lane in range(len(spans))
        ]

    def sha256(self, data: memoryview) -> list[bytes]:
        """SHA-256 of `count` consecutive parts of equal length, in writable memory."""
        length = data.nbytes // self.count
        digests = (ctypes.c_uint8 * (32 * self.count))()
        source = (ctypes.c_uint8 * data.nbytes).from_buffer(data)
        self._library.grokfetch_sha256(source, ctypes.c_int64(length), digests)
        found = bytes(digests)
        return [found[start : start + 32] for start in range(0, len(found), 32)]


def load(file: Path) -> Lanes | None:
    """The compiled program, if this processor can run it and it hashes as hashlib does."""
    try:
        program = Lanes(ctypes.CDLL(str(file)))
        return program if program.count and all(_right(program, n) for n in CHECKED) else None
    except (OSError, AttributeError):
        # AttributeError: the home folder was moved to another system.
        return None


def _right(program: Lanes, length: int) -> bool:
    """Whether both hashes of random inputs of a length are the same as from hashlib."""
    data = bytearray(random.randbytes(length * program.count))  # noqa: S311 - no secret
    parts = [data[lane * length : (lane + 1) * length] for lane in range(program.count)]
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data)
        spans = [(file.fileno(), lane * length) for lane in range(program.count)]
        # The buffer has two blocks for each lane, so longer inputs come in parts.
        found = program.sha1(spans, length, memoryview(bytearray(128 * program.count)))
    return found == [
        hashlib.sha1(part, usedforsecurity=False).digest() for part in parts
    ] and program.sha256(memoryview(data)) == [hashlib.sha256(part).digest() for part in parts]


def build(folder: Path, *, compiling: bool) -> Lanes | None:
    """The program in `folder`; if there is none and `compiling`, it is compiled into it."""
    program = CProgram(f"grokfetch_lanes_{digest_of([SOURCE])}", (SOURCE,), OPTIONS)
    with contextlib.suppress(OSError):
        file = program.kept(folder) or (program.compiled(folder) if compiling else None)
        return None if file is None else load(file)
    return None


class Shared:
    """The program for this process: looked up once, and compiled when that is worth it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unbuilt = WORTH_BUILDING
        self._sought = False
        self._program: Lanes | None = None

    def get(self, worth: int) -> Lanes | None:
        """The program, or None while there is none; the caller will hash `worth` bytes now."""
        if self._program is not None or self._unbuilt <= 0:
            return self._program
        # While one thread compiles, the others continue without the program.
        if not self._lock.acquire(blocking=False):
            return None
        try:
            self._unbuilt -= worth
            compiling = self._unbuilt <= 0
            if compiling or not self._sought:
                self._sought = True
                self._program = build(cache_folder() / processor(), compiling=compiling)
        finally:
            self._lock.release()
        return self._program


_shared = Shared()


def lanes(worth: int = 0) -> Lanes | None:
    """The C program, compiled once this process has hashed enough; None without it.

    Args:
        worth: bytes that the caller will hash now.
    """
    return _shared.get(worth)
