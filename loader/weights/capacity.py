"""Whether a model fits devices: what each must hold, and the smallest change that helps. Pure.

Weights and cache are exact. Work is an estimate from the largest arrays of one step; it excludes
compiled code and what the runtime itself keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from loader.weights.limits import LONGEST_STEP, QUERY_BLOCK, cache_bytes_per_token, cache_length
from loader.weights.partition import (
    Block,
    MeshShape,
    Position,
    arrangements,
    scale_block,
    scale_shape,
    weight_block,
)
from loader.weights.schema import GrokConfig, ParamSpec, parameters

__all__ = ["Memory", "Need", "Reads", "Shortage", "Use", "left", "need", "reads", "shortage"]

STREAMS = 6
"""About how many arrays of the residual stream's size a layer holds at a time."""

MOST_DEVICES = 256
"""Numbers of devices to try for a model that is too large."""

ITEM_SIZES = {"int8": 1, "float32": 4}
SCALE_SIZE = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one device must hold; all devices of a mesh hold the same amount.

    weights: its blocks, with their scales. cache: keys and values of its heads. work: activations
    and converted weights of one step.
    """

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.work


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """How a model will be used.

    config: the model. shape: the mesh, which must have passed `check_mesh`. tokens: the longest
    length of the batch's one row. itemsize: bytes of an element of the operands, and of the cache
    if `cache_itemsize` is None. mapped: whether the weights stay in their files, and are not
    converted.
    """

    config: GrokConfig
    shape: MeshShape
    tokens: int
    itemsize: int = 2
    mapped: bool = False
    cache_itemsize: int | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of one row, on all devices together."""
        itemsize = self.cache_itemsize or self.itemsize
        places = cache_length(self.config, self.tokens)
        return places * cache_bytes_per_token(self.config, itemsize)


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Free bytes: of each device, or of all `sharers` together, the CPU devices of one host."""

    free: int
    sharers: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Shortage:
    """Bytes needed when fewer are free, by a device or by all that share the memory.

    tokens: the longest context that would fit, None if not even the shortest does. mesh: one that
    would fit, with the current number of devices or the fewest more, None if none does. mapped:
    whether leaving the weights in their files would be enough.
    """

    needed: int
    tokens: int | None
    mesh: MeshShape | None
    mapped: bool


def need(use: Use) -> Need:
    """What one device holds."""
    config, ways = use.config, use.shape.model
    places = cache_length(config, use.tokens)
    cache = use.cache_bytes // ways
    stream = STREAMS * min(places, LONGEST_STEP) * config.emb_size * 4
    scores = 2 * min(places, QUERY_BLOCK) * places * (config.num_q_heads // ways) * 4
    if use.mapped:
        return Need(0, cache, stream + scores)
    # A matrix of one expert, copied out of its stack and converted.
    matrix = config.emb_size * (config.ff_size // ways) * (1 + use.itemsize)
    return Need(_bytes_each(config, use.shape), cache, stream + max(scores, matrix))


@dataclasses.dataclass(frozen=True, slots=True)
class Reads:
    """Bytes that a device must read for one token of each row: of one layer, and of the table."""

    layer: int
    logits: int

    def total(self, layers: int) -> int:
        """Of a model of so many layers."""
        return layers * self.layer + self.logits


def reads(use: Use, rows: int = 1) -> Reads:
    """The least that decoding reads: each needed weight once, and the whole cache.

    Among a device's experts, as many count as the tokens of all rows may choose: the device with
    the most work determines how long a step takes.
    """
    config, shape = use.config, use.shape
    experts_held = config.num_experts // shape.expert
    chosen = min(experts_held, rows * config.num_selected_experts)
    layer = table = 0
    for spec in parameters(config):
        size = _stored(spec, shape)
        if spec.layer == 0:
            layer += size * chosen // experts_held if spec.axes[0] == "expert" else size
        elif spec.axes[0] == "vocab":
            table = size
    cache = rows * use.cache_bytes // (config.num_layers * shape.model)
    return Reads(layer + cache, table)


def shortage(use: Use, memory: Memory) -> Shortage | None:
    """What is short, and what would help; None if the model fits."""
    if _fits(use, memory):
        return None
    powers = range(cache_length(use.config, use.tokens).bit_length() - 1, 7, -1)
    fewer = (2**power for power in powers if 2**power < use.tokens)
    in_files = dataclasses.replace(use, mapped=True)
    return Shortage(
        _needed(use, memory),
        next((n for n in fewer if _fits(dataclasses.replace(use, tokens=n), memory)), None),
        None if memory.sharers else _roomier(use, memory),
        bool(memory.sharers) and use.shape.only_model and _fits(in_files, memory),
    )


def left(use: Use, memory: Memory) -> int:
    """Bytes that a model that fits leaves free on all devices together."""
    return (memory.free - _needed(use, memory)) * (1 if memory.sharers else use.shape.devices)


def _fits(use: Use, memory: Memory) -> bool:
    return _needed(use, memory) <= memory.free


def _needed(use: Use, memory: Memory) -> int:
    needed = need(use)
    if not memory.sharers:
        return needed.total
    # What several CPU devices hold in common is in memory once.
    weights = min(memory.sharers * needed.weights, _bytes_once(use.config, use.shape))
    return weights + memory.sharers * (needed.cache + needed.work)


def _roomier(use: Use, memory: Memory) -> MeshShape | None:
    """The first mesh that fits: without copies of the weights, then of more devices."""
    for count in range(use.shape.devices, MOST_DEVICES + 1):
        more = next(arrangements(use.config, count), None)
        if more is not None and _fits(dataclasses.replace(use, shape=more), memory):
            return more
    return None


@functools.cache
def _bytes_each(config: GrokConfig, shape: MeshShape) -> int:
    """Bytes of one device's block of every tensor, its scales included."""
    return sum(_stored(spec, shape) for spec in parameters(config))


def _stored(spec: ParamSpec, shape: MeshShape) -> int:
    """Bytes of one device's block of a tensor, its scales included."""
    first = Position(0, 0)
    size = _volume(weight_block(spec, shape, first)) * ITEM_SIZES[spec.dtype]
    if spec.scale_groups is not None:
        size += _volume(scale_block(spec, shape, first)) * SCALE_SIZE
    return size


@functools.cache
def _bytes_once(config: GrokConfig, shape: MeshShape) -> int:
    """Bytes of all blocks of a mesh, each counted once however many devices hold it."""
    total = 0
    for spec in parameters(config):
        total += math.prod(spec.shape) * ITEM_SIZES[spec.dtype]
        if spec.scale_groups is not None:
            total += math.prod(scale_shape(spec, shape)) * SCALE_SIZE
    return total


def _volume(block: Block) -> int:
    return math.prod(part.stop - part.start for part in block)
