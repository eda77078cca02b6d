"""The rows of a decoding step as slots, which texts enter and leave between steps.

On each copy of the weights the number of slots is a power of two, so that few steps are compiled. A
free slot uses no expert.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from loader.inference.engine import Engine
from loader.inference.state import State

__all__ = ["Slots", "doubled"]

SPARE = 4
"""Slots, or places, are given up when a fourth would be enough: each change copies the cache."""


class Slots:
    """A decoding state whose rows come and go.

    Args:
        engine: the model.
        most: the most slots; from `doubled`.

    Attributes:
        lengths: of each slot, how many tokens its cache holds; 0 for a free one.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine = engine
        self._most = most
        self._state: State | None = None
        self.lengths: list[int] = []
        self._take = {
            sharding: jax.jit(_taken, static_argnames="places", out_shardings=sharding)
            for sharding in (engine.heads, engine.by_rows)
        }
        self._put = {
            sharding: jax.jit(_put, donate_argnums=0, out_shardings=sharding)
            for sharding in (engine.heads, engine.by_rows)
        }

    @property
    def live(self) -> int:
        """How many slots are taken."""
        return sum(length > 0 for length in self.lengths)

    def join(self, state: State) -> int:
        """Put a text that has been read into a free slot.

        Args:
            state: of one text; used up.

        Returns:
            The slot. Other texts stay in theirs.
        """
        length = state.longest
        if self._state is None:
            self._state, self.lengths = state, [length] + [0] * (state.visible.shape[0] - 1)
            return 0
        slot = self.lengths.index(0) if 0 in self.lengths else len(self.lengths)
        count = len(self.lengths) * (2 if slot == len(self.lengths) else 1)
        assert count <= self._most
        places = max(self._state.visible.shape[1], state.visible.shape[1])
        self._arrange([*range(len(self.lengths)), *[-1] * (count - len(self.lengths))], places)
        self._write(slot, state)
        self.lengths[slot] = length
        self._state = dataclasses.replace(self._state, longest=max(self.lengths))
        return slot

    def leave(self, slot: int) -> None:
        """Free a slot; freeing the last one releases the memory."""
        self.lengths[slot] = 0
        if not any(self.lengths):
            self.reset()
        elif self._state is not None:
            self._state = dataclasses.replace(self._state, longest=max(self.lengths))

    def reset(self) -> None:
        """Free all slots."""
        self._state, self.lengths = None, []

    def shrink(self) -> dict[int, int]:
        """Give up slots and places if far fewer are needed.

        Returns:
            Where each taken slot is now.
        """
        taken = [slot for slot, length in enumerate(self.lengths) if length]
        if self._state is None:
            return {}
        count, places = len(self.lengths), self._state.visible.shape[1]
        fewer = doubled(len(taken), self._engine.rows(1))
        shorter = self._engine.places(max(self.lengths) + 1)
        if fewer * SPARE > count and shorter * SPARE > places:
            return {slot: slot for slot in taken}
        self._arrange([*taken, *[-1] * (fewer - len(taken))], shorter)
        return {slot: index for index, slot in enumerate(taken)}

    def step(self, tokens: Any) -> Array:
        """Append a token to each taken slot.

        Args:
            tokens: int32 `[slots]`; those of free slots mean nothing.

        Returns:
            float32 logits `[slots, V]`.
        """
        assert self._state is not None
        state, self._state = self._state, None
        live = np.array(self.lengths) > 0
        logits, self._state = self._engine.decode(state, tokens, live)
        self.lengths = [length + 1 if length else 0 for length in self.lengths]
        return logits

    def _arrange(self, rows: list[int], places: int) -> None:
        """Give slot i the contents of slot `rows[i]`, or nothing if that is -1."""
        assert self._state is not None
        if len(rows) == len(self.lengths) and places == self._state.visible.shape[1]:
            return
        # An index beyond the end is filled with zeros; -1 would be the last row.
        index = np.array([row if row >= 0 else len(self.lengths) for row in rows], np.int32)
        layers, visible = list(self._state.cache), self._state.visible
        longest, self._state = self._state.longest, None
        take, small = self._take[self._engine.heads], self._take[self._engine.by_rows]
        # One layer at a time, freed before the next: never two whole caches at once.
        cache = [take(layers.pop(0), index, places=places) for _ in range(len(layers))]
        self.lengths = [self.lengths[row] if row >= 0 else 0 for row in rows]
        visible = small(visible, index, places=places)
        lengths = jax.device_put(np.array(self.lengths, np.int32), self._engine.by_rows)
        self._state = State(tuple(cache), visible, lengths, longest)

    def _write(self, slot: int, state: State) -> None:
        """Write the one text of a state over a slot."""
        assert self._state is not None
        put, small = self._put[self._engine.heads], self._put[self._engine.by_rows]
        at = np.int32(slot)
        batch_state, self._state = self._state, None
        self._state = dataclasses.replace(
            batch_state,
            cache=tuple(
                put(*pair, at) for pair in zip(batch_state.cache, state.cache, strict=True)
            ),
            visible=small(batch_state.visible, state.visible, at),
            lengths=small(batch_state.lengths, state.lengths, at),
        )


def doubled(count: int, smallest: int) -> int:
    """`smallest` doubled until it is at least `count`."""
    return smallest << (-(-count // smallest) - 1).bit_length()


def _taken(arrays: Any, rows: Array, *, places: int) -> Any:
    """Rows of arrays `[B, S, ...]`, truncated or zero-padded to `[len(rows), places, ...]`."""

    def one(array: Array) -> Array:
        taken = array[:, :places].at[rows].get(mode="fill", fill_value=0)
        more = places - taken.shape[1]
        return jnp.pad(taken, ((0, 0), (0, more), *[(0, 0)] * (array.ndim - 2)))

    return jax.tree.map(one, arrays)


def _put(arrays: Any, row: Any, slot: Array) -> Any:
    """Arrays `[B, S, ...]` with the first row of others at the start of a slot, then zeros."""

    def one(array: Array, new: Array) -> Array:
        filled = jnp.zeros_like(array[:1])
        filled = jax.lax.dynamic_update_slice(filled, new[:1], (0,) * array.ndim)
        return jax.lax.dynamic_update_slice(array, filled, (slot, *[0] * (array.ndim - 1)))

    return jax.tree.map(one, arrays, row)
