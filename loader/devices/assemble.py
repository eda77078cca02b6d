"""Where the blocks of an array come to lie: memory that CPU devices take over, or the devices' own.

On CPU devices a block is written where the array will lie: into fresh memory on huge pages (page
faults, not copying, are the cost of loading) that JAX takes over as it is. For other devices it
goes through a buffer of the thread's own, used again as soon as they have what is in it.
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Sharding

from loader.devices.chunks import Chunk, Part
from loader.weights.partition import Block

__all__ = ["Copy", "Landing", "fresh_memory", "landing"]

HUGE_PAGE = 2**21
ALIGNMENT = 64
"""Bytes; JAX takes over host memory that is aligned so."""

Holder = tuple[Block, tuple[jax.Device, ...]]


def _holders(sharding: Sharding, shape: tuple[int, ...]) -> list[Holder]:
    """Every block that this process holds, and its devices that hold it."""
    found: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = (cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        found.setdefault(tuple(bounds), []).append(device)
    return [
        (tuple(slice(*bounds) for bounds in block), tuple(devices))
        for block, devices in found.items()
    ]


Copy = Callable[[Part, np.ndarray[Any, Any]], None]
"""Writes a part of the host's array into an array of its shape."""


class Landing(Protocol):
    """The blocks of one array that this process holds."""

    @property
    def blocks(self) -> Sequence[Block]:
        """Which they are."""

    def take(self, chunk: Chunk, copy: Copy) -> None:
        """Have the parts of a chunk copied to where they go; several threads may at a time."""

    def shards(self) -> list[Array]:
        """Every device's block, once all parts are there."""


def landing(sharding: Sharding, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Landing:
    """Where an array is to lie on the devices of this process."""
    holders = _holders(sharding, shape)
    on_host = all(device.platform == "cpu" for _, devices in holders for device in devices)
    return _Resident(holders, dtype) if on_host else _Staged(holders, dtype)


class _Resident:
    """Memory that CPU devices take over; several that hold the same block share it.

    The arrays keep the memory alive. JAX never hands it to a computation that is given (donated) an
    array: what it does not own, it copies.
    """

    def __init__(self, holders: Sequence[Holder], dtype: np.dtype[Any]) -> None:
        self.blocks = [block for block, _ in holders]
        self._devices = [devices for _, devices in holders]
        self._views = _views([_shape(block) for block in self.blocks], dtype, fresh_memory)

    def take(self, chunk: Chunk, copy: Copy) -> None:
        for part in chunk.parts:
            copy(part, self._views[part.block][part.target])

    def shards(self) -> list[Array]:
        return [
            jax.device_put(view, device, may_alias=True)
            for view, devices in zip(self._views, self._devices, strict=True)
            for device in devices
        ]


class _Staged:
    """Blocks in the devices' own memory, to which the parts of a chunk are sent as they come."""

    _staging = threading.local()

    def __init__(self, holders: Sequence[Holder], dtype: np.dtype[Any]) -> None:
        self.blocks = [block for block, _ in holders]
        self._devices = [devices for _, devices in holders]
        self._dtype = dtype
        self._arrays: list[list[Array]] = [[] for _ in holders]
        self._lock = threading.Lock()

    def take(self, chunk: Chunk, copy: Copy) -> None:
        views = _views([part.shape for part in chunk.parts], self._dtype, self._buffer)
        pieces = []
        for part, view in zip(chunk.parts, views, strict=True):
            copy(part, view)
            pieces.append([jax.device_put(view, device) for device in self._devices[part.block]])
        with self._lock:
            for part, sent in zip(chunk.parts, pieces, strict=True):
                self._add(part, sent)
            # Only now may the buffer be written again, and nothing piles up on the devices.
            jax.block_until_ready((pieces, self._arrays))  # type: ignore[no-untyped-call]

    def _buffer(self, nbytes: int) -> np.ndarray[Any, Any]:
        """This thread's buffer. It is not aligned as JAX likes it, lest it be taken over."""
        held = getattr(self._staging, "buffer", None)
        if held is None or held.size < nbytes:
            held = self._staging.buffer = fresh_memory(nbytes + ALIGNMENT // 4)[ALIGNMENT // 4 :]
        return held

    def _add(self, part: Part, sent: list[Array]) -> None:
        arrays, shape = self._arrays[part.block], _shape(self.blocks[part.block])
        if part.shape == shape:
            arrays[:] = sent
            return
        start = tuple(cut.start for cut in part.target)
        if not arrays:
            arrays[:] = [_begin(piece, start, shape) for piece in sent]
            return
        arrays[:] = [_write(array, piece, start) for array, piece in zip(arrays, sent, strict=True)]

    def shards(self) -> list[Array]:
        return list(itertools.chain.from_iterable(self._arrays))


@functools.partial(jax.jit, static_argnums=2)
def _begin(piece: Array, start: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """A block of which one part is there."""
    return lax.dynamic_update_slice(jnp.zeros(shape, piece.dtype), piece, start)


@functools.partial(jax.jit, donate_argnums=0)
def _write(block: Array, piece: Array, start: tuple[int, ...]) -> Array:
    return lax.dynamic_update_slice(block, piece, start)


def _shape(block: Block) -> tuple[int, ...]:
    return tuple(cut.stop - cut.start for cut in block)


def _views(
    shapes: Sequence[tuple[int, ...]],
    dtype: np.dtype[Any],
    memory: Callable[[int], np.ndarray[Any, Any]],
) -> list[np.ndarray[Any, Any]]:
    """Arrays of some shapes, one after another in one piece of memory, each aligned like it."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    steps = [size + -size % ALIGNMENT for size in sizes]
    flat = memory(sum(steps))
    starts = itertools.accumulate(steps, initial=0)
    return [
        flat[start : start + size].view(dtype).reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]


def fresh_memory(nbytes: int) -> np.ndarray[Any, Any]:
    """Bytes, aligned for JAX and on huge pages as far as they fill them; freed with the last view.

    The system's own allocator would give pages of 4 KiB, each of which costs a fault.
    """
    if nbytes < HUGE_PAGE:
        flat = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -flat.ctypes.data % ALIGNMENT
        return flat[start : start + nbytes]
    pages = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = np.frombuffer(pages, np.uint8)
    start = -flat.ctypes.data % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # The rest would take a huge page for itself, most of it unused.
        pages.madvise(mmap.MADV_HUGEPAGE, start, nbytes - nbytes % HUGE_PAGE)
    return flat[start : start + nbytes]
