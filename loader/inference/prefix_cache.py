"""The beginnings of earlier prompts, kept for prompts that begin in the same way.

A prompt is read in chunks. The results of a whole chunk, its keys and values and its residual
stream, depend on its tokens, on those before it and on the program that read it, and are kept under
a hash of these. A later prompt gets them instead of reading the chunk: bit for bit what reading it
gives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from loader.inference.model import KeyValues

__all__ = ["PrefixCache", "keys"]

Read = Callable[[], tuple[Array, tuple[KeyValues, ...]]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """A chunk: `[B, T, K, d]` of each layer's cache, float32 `[B, T, D]`, and the bytes of both."""

    cache: tuple[KeyValues, ...]
    x: Array
    nbytes: int


class PrefixCache:
    """The most recently used chunks of prompts, in bounded memory.

    Args:
        most: bytes that they may take on all devices together; 0 keeps nothing.
        heads: how the devices share a cache `[B, S, K, d]`.
        rows: how they share an array `[B, ...]` of a step.

    Attributes:
        most: as given.
        nbytes: what they take now.
        hits: prompts whose beginning was known.
        tokens: tokens that were not read because they were known.
    """

    def __init__(self, most: int, heads: NamedSharding, rows: NamedSharding) -> None:
        self.most = most
        self.nbytes = self.hits = self.tokens = 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        # All devices need the whole stream, but need not keep all of it.
        batch = heads.spec[0]
        spread = NamedSharding(heads.mesh, PartitionSpec(batch, ("expert", "model")))  # type: ignore[no-untyped-call]
        self._cut = jax.jit(_cut, static_argnames="size", out_shardings=(heads, spread))
        self._paste = jax.jit(_paste, donate_argnums=0, out_shardings=(heads, rows))

    def chunk(
        self, path: Sequence[bytes], cache: tuple[KeyValues, ...], start: int, read: Read
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """The result of reading a chunk of a prompt; it is read only if that is not known.

        Args:
            path: the keys of the chunks up to this one, empty to keep nothing.
            cache: of the prompt; used up.
            start: tokens of the prompt before the chunk.
            read: reads it.

        Returns:
            The residual stream at its tokens, and the cache with them.
        """
        known = self._kept.get(path[-1]) if path else None
        if known is not None:
            self._touch(path)
            self.hits += len(path) == 1
            self.tokens += known.x.shape[1]
            filled, x = self._paste(cache, (known.cache, known.x), np.int32(start))
            # As in `steps`: CPU devices may wait for one another only within one program at a time.
            return jax.block_until_ready((x, filled))  # type: ignore[no-any-return, no-untyped-call]
        x, filled = read()
        if path:
            self._keep(path, filled, x, start)
        return x, filled

    def _keep(
        self, path: Sequence[bytes], cache: tuple[KeyValues, ...], x: Array, start: int
    ) -> None:
        """Keep a chunk that has just been read, and drop others if there is no room."""
        blocks, stream = self._cut(cache, x, np.int32(start), size=x.shape[1])
        nbytes = sum(map(_nbytes, jax.tree.leaves((blocks, stream))))
        self._kept[path[-1]] = _Kept(blocks, stream, nbytes)
        self.nbytes += nbytes
        self._touch(path)
        while self.nbytes > self.most:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= dropped.nbytes

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self.nbytes = 0

    def _touch(self, path: Sequence[bytes]) -> None:
        """Mark a chunk as just used, and those before it as used even later: it needs them."""
        for key in reversed(path):
            if key in self._kept:
                self._kept.move_to_end(key)


def keys(prompt: Sequence[int], chunk: int, places: int) -> list[bytes]:
    """The key of each whole chunk of a prompt.

    Args:
        prompt: token ids.
        chunk: tokens of a chunk.
        places: of the cache into which it is read, if another size means another program whose sums
            may be rounded differently; 0 if it makes no difference.
    """
    tokens, chain = np.array(prompt, np.int32), [b"%d" % places]
    for start in range(0, len(tokens) // chunk * chunk, chunk):
        chain.append(hashlib.sha256(chain[-1] + tokens[start : start + chunk].tobytes()).digest())
    return chain[1:]


def _cut(cache: Any, x: Array, start: Array, *, size: int) -> tuple[Any, Array]:
    """So many places of arrays `[B, S, ...]` from `start` on, and the stream at them."""
    return jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, start, size, 1), cache), x


def _paste(cache: Any, kept: tuple[Any, Array], start: Array) -> tuple[Any, Array]:
    """Arrays `[B, S, ...]` with those of a chunk at `start`, and the stream at them."""
    chunk, x = kept

    def one(array: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(array, new, start, 1)

    return jax.tree.map(one, cache, chunk), x


def _nbytes(array: Array) -> int:
    """Bytes of an array on all devices, copies included."""
    each = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return each * len(array.sharding.device_set)
