"""Where the blocks of an array go: memory that CPU devices take over, or the devices' own.

On CPU devices a block is written where the array will be: into new memory on huge pages (page
faults, not copying, are the cost of loading) that JAX takes over without a copy. For other devices
it goes through buffers of `loader.devices.staging`, several of them in flight at a time.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Sharding

from loader.devices.chunks import Chunk, Part
from loader.devices.staging import ALIGNMENT, Staging, fresh_memory
from loader.weights.partition import Block

__all__ = ["Copy", "Landing", "corner", "landing", "on_host"]

Holder = tuple[Block, tuple[jax.Device, ...]]


def _holders(sharding: Sharding, shape: tuple[int, ...]) -> list[Holder]:
    """Every block that this process holds, and which of its devices hold it."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = (cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        holders.setdefault(tuple(bounds), []).append(device)
    return [
        (tuple(slice(*bounds) for bounds in block), tuple(devices))
        for block, devices in holders.items()
    ]


Copy = Callable[[Part, np.ndarray[Any, Any]], None]
"""Writes a part of the host's array into an array of its shape."""


class Landing(Protocol):
    """The blocks of one array that this process holds."""

    @property
    def blocks(self) -> Sequence[Block]:
        """Which they are."""

    def take(self, chunk: Chunk, copy: Copy) -> None:
        """Copy the parts of a chunk to their places; several threads may call this at a time."""

    def shards(self) -> list[Array]:
        """Every device's block, once all parts have been taken; they may still be in flight."""


def landing(
    sharding: Sharding,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    staging: Callable[[Any], Staging],
) -> Landing:
    """Where an array goes on the devices of this process.

    Args:
        sharding: of the array.
        shape: of the array.
        dtype: of the array.
        staging: makes the buffers for the client of devices with their own memory.
    """
    holders = _holders(sharding, shape)
    devices = [device for _, of_block in holders for device in of_block]
    if on_host(devices):
        return _Resident(holders, dtype)
    return _Staged(holders, dtype, staging(devices[0].client))


def on_host(devices: Sequence[jax.Device]) -> bool:
    """Whether the memory of devices is the host's."""
    return all(device.platform == "cpu" for device in devices)


class _Resident:
    """Memory that CPU devices take over; several that hold the same block share it.

    The arrays keep the memory alive. JAX never lets a computation reuse it when an array is
    donated: it copies memory that it does not own.
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
    """Blocks in the devices' own memory; the parts of a chunk are sent there as they come."""

    def __init__(self, holders: Sequence[Holder], dtype: np.dtype[Any], staging: Staging) -> None:
        self.blocks = [block for block, _ in holders]
        self._devices = [devices for _, devices in holders]
        self._dtype, self._staging = dtype, staging
        self._arrays: list[list[Array]] = [[] for _ in holders]
        self._lock = threading.Lock()

    def take(self, chunk: Chunk, copy: Copy) -> None:
        shapes = [part.shape for part in chunk.parts]
        with self._staging.buffer(_room(shapes, self._dtype)) as (memory, waiting):
            views = _views(shapes, self._dtype, lambda _: memory)
            for part, view in zip(chunk.parts, views, strict=True):
                copy(part, view)
                sent = [jax.device_put(view, device) for device in self._devices[part.block]]
                # Each part is written into the result of the one before.
                with self._lock:
                    waiting.extend(self._add(part, sent))

    def _add(self, part: Part, sent: list[Array]) -> list[Array]:
        """Write a part into its block; returns arrays that are ready once it is."""
        arrays, shape = self._arrays[part.block], _shape(self.blocks[part.block])
        if part.shape == shape:
            arrays[:] = sent
            return [corner(piece) for piece in sent]
        start = tuple(cut.start for cut in part.target)
        if arrays:
            both = [_write(array, piece, start) for array, piece in zip(arrays, sent, strict=True)]
        else:
            both = [_begin(piece, start, shape) for piece in sent]
        arrays[:] = [block for block, _ in both]
        return [element for _, element in both]

    def shards(self) -> list[Array]:
        return list(itertools.chain.from_iterable(self._arrays))


@jax.jit
def corner(piece: Array) -> Array:
    """One element, which is ready when the whole array is."""
    return piece[(slice(1),) * piece.ndim]


@functools.partial(jax.jit, static_argnums=2)
def _begin(piece: Array, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A block with its first part, and an element of the part."""
    return lax.dynamic_update_slice(jnp.zeros(shape, piece.dtype), piece, start), corner(piece)


@functools.partial(jax.jit, donate_argnums=0)
def _write(block: Array, piece: Array, start: tuple[int, ...]) -> tuple[Array, Array]:
    return lax.dynamic_update_slice(block, piece, start), corner(piece)


def _shape(block: Block) -> tuple[int, ...]:
    return tuple(cut.stop - cut.start for cut in block)


def _room(shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]) -> int:
    """Bytes of arrays of these shapes, one after another."""
    return sum(_sizes(shapes, dtype)[1])


def _sizes(shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]) -> tuple[list[int], list[int]]:
    """Bytes of each array, and from its beginning to that of the next."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    return sizes, [size + -size % ALIGNMENT for size in sizes]


def _views(
    shapes: Sequence[tuple[int, ...]],
    dtype: np.dtype[Any],
    memory: Callable[[int], np.ndarray[Any, Any]],
) -> list[np.ndarray[Any, Any]]:
    """Arrays of some shapes, one after another in one piece of memory, each aligned like it."""
    sizes, steps = _sizes(shapes, dtype)
    flat = memory(sum(steps))
    starts = itertools.accumulate(steps, initial=0)
    return [
        flat[start : start + size].view(dtype).reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]
