"""What decoding continues from, and how a step changes it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from loader.devices.semantics import as_written
from loader.inference.model import KeyValues, Window
from loader.weights.schema import GrokConfig

__all__ = ["Part", "State", "empty", "grown", "last_of", "window_after"]


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What decoding continues from, for B rows.

    The first rows belong to the prompts. If rows are split over copies of the weights, there may be
    more rows without a token, so that their number divides evenly.

    cache: one entry per layer. visible: bool `[B, S]`, the places with a token that may be attended
    to. lengths: int32 `[B]`, tokens of each row so far. longest: the largest length, known to the
    host.
    """

    cache: tuple[KeyValues, ...]
    visible: Array
    lengths: Array
    longest: int


class Part(NamedTuple):
    """A chunk that was read: its residual stream `[B, T, D]`, where each row ends, and the state.

    ends: int32 `[B]`, negative or beyond the chunk if the row ends before or after it.
    """

    x: Array
    ends: np.ndarray[Any, Any]
    state: State


@as_written
def empty(
    config: GrokConfig, layers: int, shape: tuple[int, int], dtype: jnp.dtype, heads: NamedSharding
) -> State:
    """A state without a token: rows and places by `shape`, a cache of so many layers on `heads`."""

    def zeros() -> Array:
        return jnp.zeros((*shape, config.num_kv_heads, config.key_size), dtype, device=heads)

    return State(
        cache=tuple(KeyValues(zeros(), zeros()) for _ in range(layers)),
        # NumPy's: for them nothing is compiled.
        visible=jax.device_put(np.zeros(shape, bool)),
        lengths=jax.device_put(np.zeros(shape[0], np.int32)),
        longest=0,
    )


def grown(state: State, places: int, heads: NamedSharding) -> State:
    """The state with so many places, zeros in the new ones."""
    more = places - state.visible.shape[1]

    def pad(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, more), (0, 0), (0, 0)))
        longer: Array = jax.device_put(padded, heads)
        return longer

    return dataclasses.replace(
        state,
        cache=jax.tree.map(pad, state.cache),
        visible=jnp.pad(state.visible, ((0, 0), (0, more))),
    )


def window_after(
    visible: Array, lengths: Array, counts: Array, shown: Array, *, fresh: bool
) -> tuple[Window, Array]:
    """The positions of a step's tokens after rows of `lengths`, and the lengths after it."""
    batch, width = shown.shape
    steps = jnp.arange(width)
    real = steps < counts[:, None]
    positions = lengths[:, None] + steps
    places = jnp.where(real, positions, visible.shape[1])
    visible = visible.at[jnp.arange(batch)[:, None], places].set(shown, mode="drop")
    return Window(positions, real, visible, fresh), lengths + counts


def last_of(x: Array, ends: Array, before: Array) -> Array:
    """Each row's last token `[B, 1, D]`: of `[B, T, D]`, or of the first token before."""
    last = x[jnp.arange(x.shape[0]), jnp.maximum(ends, 0)][:, None]
    return jnp.where(ends[:, None, None] < 0, before[:, :1], last)
