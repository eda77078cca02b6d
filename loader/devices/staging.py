"""Host memory through which bytes go to devices with their own memory.

There are several buffers, each filled and sent while others are in flight. They are pinned if the
runtime can do that: then a GPU reads them directly, and the runtime need not copy them first.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

__all__ = ["ALIGNMENT", "Staging", "fresh_memory", "pinned"]

HUGE_PAGE = 2**21
ALIGNMENT = 64
"""Bytes; JAX takes over host memory with this alignment."""

ASKEW = ALIGNMENT // 4
"""Bytes by which a buffer begins after such an address, so that it is not taken over."""


class Staging:
    """Buffers that several threads fill, and refill once the devices have their contents.

    Args:
        client: JAX's, of the devices that will be sent to.
        size: bytes of a buffer; one becomes larger if more is asked for.
        in_flight: the most bytes of host memory, though there is at least one buffer. If buffers
            cannot be pinned, this includes the copy that the runtime may have of each.

    Attributes:
        most: the most buffers that there can be.
    """

    def __init__(self, client: Any, size: int, in_flight: int) -> None:
        self._client, self._size = client, size
        with pinned(client, fresh_memory(mmap.PAGESIZE)) as possible:
            copies = 1 if possible else 2
        self.most = max(1, in_flight // (copies * size))
        self._change = threading.Condition()
        self._idle: deque[tuple[_Buffer, list[Array]]] = deque()
        self._made = 0

    @contextlib.contextmanager
    def buffer(self, nbytes: int) -> Iterator[tuple[np.ndarray[Any, Any], list[Array]]]:
        """Memory that nothing reads any more, and a list; add the arrays made from it to the list.

        The memory is refilled once these arrays are ready; they must not be donated.
        """
        buffer, sent = self._taken()
        waiting: list[Array] = []
        try:
            jax.block_until_ready(sent)  # type: ignore[no-untyped-call]
            buffer.enlarge(max(nbytes, self._size))
            yield buffer.memory[:nbytes], waiting
        finally:
            with self._change:
                self._idle.append((buffer, waiting))
                self._change.notify()

    def _taken(self) -> tuple[_Buffer, list[Array]]:
        """A buffer and the arrays it waits for: one that is ready, or a new one, or the oldest."""
        with self._change:
            self._change.wait_for(lambda: self._idle or self._made < self.most)
            ready = self._idle and all(map(_is_ready, self._idle[0][1]))
            if ready or self._made == self.most:
                return self._idle.popleft()
            self._made += 1
            return _Buffer(self._client), []

    def close(self) -> None:
        """Wait until the devices have everything, and free the memory."""
        with contextlib.ExitStack() as buffers:
            for buffer, _ in self._idle:
                buffers.callback(buffer.free)
            for _, sent in self._idle:
                jax.block_until_ready(sent)  # type: ignore[no-untyped-call]


def _is_ready(array: Array) -> bool:
    ready: bool = array.is_ready()  # type: ignore[attr-defined]
    return ready


class _Buffer:
    """Memory of one buffer, pinned if that can be done."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._held = contextlib.ExitStack()
        self.memory: np.ndarray[Any, Any] = np.empty(0, np.uint8)

    def enlarge(self, nbytes: int) -> None:
        """Make room for so many bytes; the buffer's contents are lost."""
        if self.memory.size < nbytes:
            self.free()
            whole = fresh_memory(nbytes + ASKEW)
            self._held.enter_context(pinned(self._client, whole))
            self.memory = whole[ASKEW:]

    def free(self) -> None:
        """Free the memory; nothing may be reading it."""
        self.memory = self.memory[:0]
        self._held.close()


@contextlib.contextmanager
def pinned(client: Any, memory: np.ndarray[Any, Any]) -> Iterator[bool]:
    """Have JAX's client pin memory for a while; yields whether it could."""
    try:
        client.dma_map(memory.ctypes.data, memory.nbytes)
    except (AttributeError, RuntimeError):  # An older jaxlib, or a platform that has no need.
        yield False
        return
    try:
        yield True
    finally:
        client.dma_unmap(memory.ctypes.data)


def fresh_memory(nbytes: int) -> np.ndarray[Any, Any]:
    """Bytes, aligned for JAX, on huge pages where they fill these; freed with the last view.

    The system's own allocator would use pages of 4 KiB, each of which costs a fault.
    """
    if nbytes < HUGE_PAGE:
        flat = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -flat.ctypes.data % ALIGNMENT
        return flat[start : start + nbytes]
    pages = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = np.frombuffer(pages, np.uint8)
    start = -flat.ctypes.data % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # The rest would take a whole huge page, most of it unused.
        pages.madvise(mmap.MADV_HUGEPAGE, start, nbytes - nbytes % HUGE_PAGE)
    return flat[start : start + nbytes]
