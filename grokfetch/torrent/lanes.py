"""SHA-1 of several pieces, and SHA-256 of several blocks, at once by a C program, on one core.

A hash of one stream waits for each of its own steps. `lanes.c` hashes as many streams as a vector
register has lanes, and reads what it hashes itself. Where there is no compiler, or the processor
has no wide vectors, everything is hashed by hashlib.
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
"""Streams at a time from which lanes are faster than one stream after another, by far."""

WORTH_BUILDING = 1 << 28
"""Bytes hashed by this process after which compiling, half a second, is soon won back."""

CHECKED = (0, 1, 55, 56, 63, 64, 65, 119, 120, 127, 128, 4096 + 55, 4096 + 56)
"""Lengths about the bounds of blocks and of their padding, of which the program must be right."""


class Lanes:
    """The C program, loaded.

    Attributes:
        count: streams at a time.
        blocks: whether SHA-256 gains by it as well.
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
            Of each span 20 bytes, or None if not all of it could be read.
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
        """SHA-256 of `count` parts of equal length, which follow each other in writable memory."""
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
        # AttributeError: a home that moved to another system.
        return None


def _right(program: Lanes, length: int) -> bool:
    """Whether both hashes of random inputs of a length are those of hashlib."""
    data = bytearray(random.randbytes(length * program.count))  # noqa: S311 - no secret
    parts = [data[lane * length : (lane + 1) * length] for lane in range(program.count)]
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data)
        spans = [(file.fileno(), lane * length) for lane in range(program.count)]
        # A buffer of two blocks for each lane: longer inputs come in parts.
        found = program.sha1(spans, length, memoryview(bytearray(128 * program.count)))
    return found == [
        hashlib.sha1(part, usedforsecurity=False).digest() for part in parts
    ] and program.sha256(memoryview(data)) == [hashlib.sha256(part).digest() for part in parts]


def build(folder: Path, *, compiling: bool) -> Lanes | None:
    """The program as `folder` holds it, or else, if `compiling`, as it is compiled into it."""
    program = CProgram(f"grokfetch_lanes_{digest_of([SOURCE])}", (SOURCE,), OPTIONS)
    with contextlib.suppress(OSError):
        file = program.kept(folder) or (program.compiled(folder) if compiling else None)
        return None if file is None else load(file)
    return None


class Shared:
    """The program of this process: looked for once, compiled once it is worth it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unbuilt = WORTH_BUILDING
        self._sought = False
        self._program: Lanes | None = None

    def get(self, worth: int) -> Lanes | None:
        """The program, or None for as long as there is none; `worth` bytes are hashed now."""
        if self._program is not None or self._unbuilt <= 0:
            return self._program
        # While one thread compiles, the others hash on as they can.
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
        worth: bytes that are hashed now.
    """
    return _shared.get(worth)
