"""Tensors from their files to devices: every byte is read once, host memory in flight is limited.

A few threads read chunks in file order, several tensors at a time, and announce to the kernel what
will be read next. `loader.devices.assemble` decides where chunks go. Devices with their own memory
receive one chunk while others are read, and the next tensor starts before the last has arrived.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self, TypeAlias

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding, SingleDeviceSharding

from grokfetch.process_limits import cores
from loader.devices.assemble import landing
from loader.devices.chunks import Chunk, Part, chunks
from loader.devices.products import Quantized
from loader.devices.staging import Staging
from loader.weights.checkpoint import Tensor
from loader.weights.pages import Pages
from loader.weights.partition import expanded_rows
from loader.weights.schema import ParamSpec

__all__ = ["IN_FLIGHT", "OnDevices", "Stored", "Target", "division", "to_devices", "transfer"]

OnDevices: TypeAlias = Array | Quantized
"""A tensor on its devices: float32, or int8 with its scales."""

Target: TypeAlias = Sharding | jax.Device
"""Where a tensor goes: on one device, or divided as a sharding says."""

IN_FLIGHT = 2**29
"""Bytes of host memory in use at a time, beyond the arrays of CPU devices."""

CHUNK = 2**24
"""Bytes that a thread reads at a time; with far fewer, handing out the work dominates."""

AHEAD = 16
"""Chunks announced to the kernel before the first of them is settled."""


class Stored(Protocol):
    """One tensor on the host: `loader.weights.checkpoint.Tensor`, or anything shaped like it."""

    @property
    def spec(self) -> ParamSpec:
        """What the tensor is."""

    @property
    def weight(self) -> np.ndarray[Any, Any]:
        """float32 or int8, of `spec.shape`; may be a read-only map at any alignment."""

    @property
    def scales(self) -> np.ndarray[Any, Any] | None:
        """bfloat16 of `spec.scale_shape`, None if the tensor is not quantised."""


def transfer(
    tensors: Iterable[tuple[Stored, Sharding]],
    *,
    in_flight: int = IN_FLIGHT,
    on_bytes: Callable[[int], None] | None = None,
    drop: bool = False,
) -> Iterator[OnDevices]:
    """Tensors on their devices, in the given order; the last ones may still be in flight.

    When the iterator ends, all have arrived.

    Weights stay int8 and scales bfloat16. Each of several processes reads what its own devices
    hold. A block that several CPU devices hold is in memory once.

    Args:
        tensors: each with its target; the scales of a quantised one go to the same place, with rows
            repeated if a device would hold part of one.
        in_flight: bytes of host memory in use at a time, beyond the arrays of CPU devices.
        on_bytes: called with the bytes of the checkpoint as they are read.
        drop: whether the kernel drops the pages of a file once they are read.
    """
    size, workers = division(in_flight, cores())
    waiting: deque[tuple[_Leg, ...]] = deque()
    # The threads end first, then the buffers that they fill are closed.
    with contextlib.ExitStack() as buffers, _Reader(workers, on_bytes, drop=drop) as reader:

        @functools.cache
        def staging(client: Any) -> Staging:
            return buffers.enter_context(contextlib.closing(Staging(client, size, in_flight)))

        for tensor, sharding in tensors:
            waiting.append(_legs(tensor, _Route(sharding, size, staging)))
            for leg in waiting[-1]:
                reader.begin(leg)
            while waiting and all(leg.landed for leg in waiting[0]):
                yield _together(waiting.popleft())
        for legs in waiting:
            for leg in legs:
                reader.finish(leg)
            yield _together(legs)


def to_devices(tensor: Stored, target: Target | None = None) -> OnDevices:
    """One tensor on `target`, or on jax's first device; see `transfer`."""
    wanted = jax.devices()[0] if target is None else target
    sharding = wanted if isinstance(wanted, Sharding) else SingleDeviceSharding(wanted)
    return next(transfer([(tensor, sharding)]))


def division(in_flight: int, cores: int) -> tuple[int, int]:
    """Bytes that a thread reads at a time, and how many threads there are.

    What a thread has read may be in memory twice, in its own buffer and in the runtime's.
    """
    size = max(1, min(CHUNK, in_flight // 2))
    return size, max(1, min(cores, in_flight // (2 * size)))


def _together(legs: tuple[_Leg, ...]) -> OnDevices:
    weight, *scales = (leg.array() for leg in legs)
    return Quantized(weight, scales[0]) if scales else weight


@dataclasses.dataclass(frozen=True, slots=True)
class _Route:
    """Where arrays go, the size of a chunk in bytes, and what makes buffers for JAX's client."""

    sharding: Sharding
    size: int
    staging: Callable[[Any], Staging]


def _legs(tensor: Stored, route: _Route) -> tuple[_Leg, ...]:
    """The weight in transit, and the scales if it has any."""
    spec, scales = tensor.spec, tensor.scales
    file = tensor if isinstance(tensor, Tensor) else None
    weight = _Leg(tensor.weight, route, file=file)
    if scales is None:
        return (weight,)
    parts = spec.shape[-2] // route.sharding.shard_shape(spec.shape)[-2]
    groups = scales.shape[-2]
    times = expanded_rows(groups, parts) // groups
    repeated = scales if times == 1 else np.repeat(scales, times, axis=-2)
    return weight, _Leg(repeated, route, times=times)


class _Leg:
    """One array in transit from the host to the devices of this process.

    Args:
        source: the array on the host.
        route: where it goes.
        file: the tensor in whose file the array is, None for an array in memory.
        times: how often `source` repeats each byte of the checkpoint.
    """

    def __init__(
        self,
        source: np.ndarray[Any, Any],
        route: _Route,
        *,
        file: Tensor | None = None,
        times: int = 1,
    ) -> None:
        self.file = file
        self._source, self._sharding, self._times = source, route.sharding, times
        self._landing = landing(route.sharding, source.shape, source.dtype, route.staging)
        itemsize = source.dtype.itemsize
        self.chunks = tuple(chunks(source.shape, itemsize, self._landing.blocks, route.size))
        self._left, self._used = len(self.chunks), 0

    @property
    def landed(self) -> bool:
        """Whether every chunk is settled."""
        return self._left == 0

    def read(self, chunk: Chunk) -> None:
        """Copy the parts of a chunk to their places; runs in a thread."""
        self._landing.take(chunk, self._copy)

    def _copy(self, part: Part, target: np.ndarray[Any, Any]) -> None:
        # If bytes stay contiguous, the kernel copies them without mapping a page.
        if self.file is not None and part.solid and target.flags.c_contiguous:
            self.file.read_into(part.start, target)
        else:
            np.copyto(target, self._source[part.source])

    def pages(self, chunk: Chunk) -> Iterator[Pages]:
        """The pages of a chunk, if it is in a mapped file."""
        if self.file is not None and self.file.mappable:
            yield self.file.pages(self.file.array.offset + chunk.start, chunk.nbytes)

    def settle(self, chunk: Chunk) -> int:
        """Note that a chunk has been read; returns by how many bytes of the checkpoint."""
        before = self._used // self._times
        self._used += chunk.used
        self._left -= 1
        return self._used // self._times - before

    def array(self) -> Array:
        """The array, once it has landed."""
        shards = self._landing.shards()
        return jax.make_array_from_single_device_arrays(self._source.shape, self._sharding, shards)


class _Reader:
    """Threads that read chunks, some of them ahead of those being waited for."""

    def __init__(self, workers: int, on_bytes: Callable[[int], None] | None, *, drop: bool) -> None:
        self._threads = ThreadPoolExecutor(workers, "transfer")
        self._on_bytes, self._drop = on_bytes, drop
        self._reading: deque[tuple[Future[None], _Leg, Chunk]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def begin(self, leg: _Leg) -> None:
        """Have all chunks of an array read; returns when the last has been handed out."""
        for chunk in leg.chunks:
            while len(self._reading) == AHEAD or (self._reading and self._reading[0][0].done()):
                self._settle()
            for pages in leg.pages(chunk):
                pages.announce()
            self._reading.append((self._threads.submit(leg.read, chunk), leg, chunk))

    def finish(self, leg: _Leg) -> None:
        """Wait until an array has landed."""
        while not leg.landed:
            self._settle()

    def _settle(self) -> None:
        future, leg, chunk = self._reading.popleft()
        future.result()
        nbytes = leg.settle(chunk)
        if self._drop:
            for pages in leg.pages(chunk):
                pages.drop()
        if self._on_bytes is not None:
            self._on_bytes(nbytes)
