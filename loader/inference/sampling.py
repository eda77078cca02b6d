"""How the next token is chosen from logits, each row with its own settings and random numbers.

A row's token depends only on its logits, its seed and its step, never on the other rows: the same
seed gives the same text alone and in a batch.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = ["MOST_RANKED", "Choice", "Ranked", "Sampling", "draw", "rank"]

COLDEST = 1e-30
"""The lowest temperature that float32 can still safely divide by."""

MOST_RANKED = 20
"""How many of the most probable tokens can be returned with the chosen one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most probable token; higher is more random. top_k: only the k most
    probable tokens count, None for all. top_p: of those, the most probable ones that together
    reach this share. seed: the same seed gives the same tokens; its low 32 bits count. min_p: only
    tokens with at least this share of the most probable token's probability count.

    Raises:
        ValueError: a value is out of bounds; the message names it.
        TypeError: a value is not a number, or not an integer where one is needed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, Real, 0.0, sys.float_info.max)
        _check("top_p", self.top_p, Real, 0.0, 1.0)
        _check("min_p", self.min_p, Real, 0.0, 1.0)
        _check("seed", self.seed, Integral)
        if self.top_k is not None:
            _check("top_k", self.top_k, Integral, 1)


def _check(
    name: str, value: Any, kind: type, least: float = -math.inf, most: float = math.inf
) -> None:
    if not issubclass(type(value), kind):
        kind_text = "an integer" if kind is Integral else "a number"
        raise TypeError(f"{name} must be {kind_text}, not {value!r:.40}")
    # Python's own number: NumPy would round the bounds to the value's precision.
    if not least <= (int(value) if kind is Integral else float(value)) <= most:
        bounds = "between 0 and 1" if most == 1 else f"{least:g} or more, and finite"
        raise ValueError(f"{name} must be {bounds}, not {value}")


class Choice(NamedTuple):
    """`Sampling` of B rows as arrays `[B]`, so that one compiled function serves all its values.

    step: how many tokens the row chose before; this and the seed determine the random numbers.
    top_k: the vocabulary's size or more means all tokens.
    """

    seed: Any
    step: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any

    @classmethod
    def of(cls, samplings: Sequence[Sampling], steps: Sequence[int]) -> Choice:
        """The choice of rows with these settings after `steps` tokens each."""
        everything = np.iinfo(np.int32).max
        ks = [everything if row.top_k is None else min(row.top_k, everything) for row in samplings]
        return cls(
            np.array([row.seed & 0xFFFFFFFF for row in samplings], np.uint32),
            np.array(steps, np.int32),
            np.array([row.temperature for row in samplings], np.float32),
            np.array(ks, np.int32),
            np.array([row.top_p for row in samplings], np.float32),
            np.array([row.min_p for row in samplings], np.float32),
        )


def draw(logits: Array, choice: Choice) -> Array:
    """The next token of each row: the best, or sampled by temperature, min p, top k, nucleus.

    The most probable token is always among the candidates. Nucleus sampling: Holtzman et al. 2020.
    If no row samples, nothing is drawn; if no row restricts its candidates, nothing is sorted.

    Args:
        logits: float32 `[B, V]`.
        choice: of each row.

    Returns:
        int32 `[B]`.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    warm = choice.temperature > 0
    # Relative to the best, and never divided by zero: a tiny temperature must not give a NaN.
    spread = jnp.maximum(choice.temperature, COLDEST)[:, None]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / spread
    scaled = jnp.where(scaled >= jnp.log(choice.min_p)[:, None], scaled, -jnp.inf)

    def sample() -> Array:
        restricted = warm & ((choice.top_k < logits.shape[-1]) | (choice.top_p < 1))
        kept = lax.cond(jnp.any(restricted), _candidates, lambda scaled, _: scaled, scaled, choice)
        return jax.vmap(_pick)(choice.seed, choice.step, kept)

    drawn = lax.cond(jnp.any(warm), sample, lambda: best)
    return jnp.where(warm, drawn, best)


def _candidates(scaled: Array, choice: Choice) -> Array:
    """Logits `[B, V]` with all but each row's candidates at minus infinity."""
    order = jnp.argsort(scaled, axis=-1, descending=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    ranks = jnp.arange(scaled.shape[-1])
    ranked = jnp.where(ranks < jnp.maximum(choice.top_k, 1)[:, None], ranked, -jnp.inf)
    shares = jax.nn.softmax(ranked, axis=-1)
    better = jnp.cumsum(shares, axis=-1) - shares
    # The sum of all shares may round to less than one.
    inside = (better < choice.top_p[:, None]) | (choice.top_p >= 1)[:, None] | (ranks == 0)
    ranked = jnp.where(inside, ranked, -jnp.inf)
    rows = jnp.arange(scaled.shape[0])[:, None]
    return jnp.zeros_like(scaled).at[rows, order].set(ranked)


def _pick(seed: Array, step: Array, scaled: Array) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.categorical(key, scaled).astype(jnp.int32)


class Ranked(NamedTuple):
    """Log-probabilities of N tokens, float32.

    chosen: `[N]`, of one given token each. best: `[N, MOST_RANKED]`, the most probable ones, and
    tokens: their ids, int32; fewer where the vocabulary is smaller.
    """

    chosen: Array
    best: Array
    tokens: Array


def rank(logits: Array, tokens: Array) -> Ranked:
    """The model's log-probabilities: the log-softmax of float32 `[N, V]` at int32 `[N]`."""
    scores = jax.nn.log_softmax(logits, axis=-1)
    best, ids = lax.top_k(scores, min(MOST_RANKED, scores.shape[-1]))
    return Ranked(jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0], best, ids)
