"""Products of queries with keys, and of the resulting weights with values.

Letters in shapes: B rows, t tokens, S places in the cache, K key/value heads, g queries of a head,
d head size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from loader.devices.products import in_parts

__all__ = ["in_blocks", "mixed", "one_token", "scores", "shares", "within"]

BLOCK = 64
"""Places whose keys and values a CPU converts and multiplies at once; they fit its caches."""

AT_ONCE, SHORTEST = 3600 << 10, 1024
"""Bytes of a block on a GPU, all rows and queries: weights before and after the mask, and sums; and
the fewest places to be had for that."""

LARGEST_HALF = 65_504.0

SMALLEST = 1e-30
"""Less than any sum of weights with one unmasked; avoids a division by zero."""


def scores(queries: Array, keys: Array) -> Array:
    """Products of `[B, t, K, g, d]` and `[B, S, K, d]`: float32 `[B, K, g, t, S]`."""
    return _product("btkgd,bskd->bkgts", queries, keys)


def shares(scores: Array, allowed: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The numerators of a softmax over places, and the sums that divide them.

    Scores are bounded, so the largest one need not be found first: each is used where it is made,
    and written only as a weight of the cache's width. The sums are those of the rounded weights,
    which costs less precision than rounding the quotients.

    Args:
        scores: float32 `[..., S]`, from -30 to 30.
        allowed: bool, broadcast to the scores; the weights of all others are zero.
        dtype: of the weights.

    Returns:
        Weights `[..., S]`, and float32 sums `[...]`, above zero even where nothing is allowed.
    """
    if dtype == jnp.float16:
        # Float16 ends at e^11.
        most = jnp.max(jnp.where(allowed, scores, -jnp.inf), axis=-1, keepdims=True)
        scores = scores - most
    weights = jnp.where(allowed, jnp.exp(scores), 0.0)
    if dtype != jnp.float32:
        # The compiler may drop a conversion there and back, but not this.
        kind = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
        weights = lax.reduce_precision(weights, kind.nexp, kind.nmant)
    sums = jnp.maximum(jnp.sum(weights, axis=-1), SMALLEST)
    return weights.astype(dtype), sums


def mixed(weights: Array, values: Array) -> Array:
    """Products of `[B, K, g, t, S]` and `[B, S, K, d]`: float32 `[B, t, K, g, d]`."""
    return _product("bkgts,bskd->btkgd", weights, values)


def one_token(
    queries: Array,
    held: tuple[Array, Array],
    step: tuple[Array, Array],
    allowed: tuple[Array, Array],
    weight: Callable[[Array], Array],
) -> Array:
    """One token a row over the cache and over itself, for GPUs: float32 `[B, 1, K, g, d]`.

    Scores are bounded, so the largest one need not be found before the weights: only weights are
    written, one block of places after another, and the sums are divided at the end. A product reads
    a block in place only if the cache is an unchanged argument of the program, so the token is
    written into it afterwards, and has a term of its own.

    Args:
        queries: float32 `[B, 1, K, g, d]`.
        held: keys and values of earlier tokens, `[B, S, K, d]`, as the program was given them.
        step: keys and values of this token, float32 `[B, 1, K, d]`.
        allowed: bool `[B, 1, S]`, earlier places that are attended to; `[B, 1]`, whether this token
            is.
        weight: the softmax numerators of float32 scores: at most 1, and above 1e-28.
    """
    batch, _, heads, group, size = queries.shape
    places, itemsize = held[0].shape[1], held[0].dtype.itemsize
    every = batch * heads * group
    # Queries and sums are as wide as all heads, see `_some_places`.
    most = (AT_ONCE - every * heads * size * (itemsize + 4)) // (every * 2 * itemsize)
    most, blocks = max(SHORTEST, most), 1
    while places // blocks > most and places % (2 * blocks) == 0:
        blocks *= 2
    parts = in_parts(places, batch * heads * size) if blocks == 1 else 1

    own = jnp.sum(queries[:, 0] * step[0][:, 0, :, None], axis=-1, keepdims=True)
    total = jnp.where(allowed[1][..., None, None], weight(own), 0)
    sums = total * step[1][:, 0, :, None]
    rounded = within(queries, held[0].dtype)
    for number in range(blocks):
        start, stop = number * places // blocks, (number + 1) * places // blocks
        keys, values = (lax.slice_in_dim(array, start, stop, axis=1) for array in held)
        mask = lax.slice_in_dim(allowed[0], start, stop, axis=2)
        more, weights = _some_places(rounded, (keys, values), mask, weight, parts)
        sums, total = sums + more, total + weights
        # One block after another, so that their weights are not in memory together.
        rounded, sums, total = lax.optimization_barrier(  # type: ignore[no-untyped-call]
            (rounded, sums, total)
        )
    return (sums / jnp.maximum(total, SMALLEST))[:, None]


def _some_places(
    queries: Array,
    held: tuple[Array, Array],
    allowed: Array,
    weight: Callable[[Array], Array],
    parts: int,
) -> tuple[Array, Array]:
    """Some places: sums of weighted values, `[B, K, g, d]`, and of weights, `[B, K, g, 1]`.

    All heads of a row are one product: for products of single heads a GPU's compiler copies the
    cache to another order and back. As one matrix per row it is read in place; products of
    different heads are zero, or dropped. parts: the number of parts into which the sum over places
    is divided.
    """
    batch, _, heads, group, size = queries.shape
    # Each part is a row: with an axis for parts, some compilers write out the scores.
    keys, values = (array.reshape(batch * parts, -1, heads * size) for array in held)
    own = jnp.eye(heads, dtype=queries.dtype)[:, None, :, None]
    spread = (queries[:, 0, :, :, None] * own).reshape(batch, 1, heads * group, heads * size)
    every = jnp.broadcast_to(spread, (batch, parts, *spread.shape[2:]))
    weights = weight(_product("bqc,bsc->bqs", every.reshape(-1, *spread.shape[2:]), keys))
    # Float16 cannot hold such small numbers.
    kept = weights.astype(jnp.float32 if values.dtype == jnp.float16 else values.dtype)
    # Masked only here: with the mask above, the compiler would write out the scores before it.
    kept = lax.optimization_barrier(kept)  # type: ignore[no-untyped-call]
    kept = jnp.where(allowed.reshape(batch * parts, 1, -1), kept, 0)
    total = jnp.sum(kept.astype(jnp.float32).reshape(batch, parts, heads * group, -1), axis=(1, 3))
    sums = _product("bqs,bsc->bqc", kept, values).reshape(batch, parts, heads, group, heads, size)
    mixed = jnp.einsum("bkgkd->bkgd", jnp.sum(sums, axis=1))
    return mixed, total.reshape(batch, heads, group, 1)


def within(array: Array, dtype: jnp.dtype) -> Array:
    """Float32 numbers in another dtype; those too large for float16 become its largest number."""
    if dtype == jnp.float16:
        array = jnp.clip(array, -LARGEST_HALF, LARGEST_HALF)
    return array.astype(dtype)


def in_blocks(
    queries: Array, keys: Array, values: Array, last: Array, weigh: Callable[[Array, Array], Array]
) -> Array:
    """Sums of the values of all places up to `last`, over the sums of their weights.

    Args:
        queries: float32 `[B, t, K, g, d]`.
        keys: `[B, S, K, d]`; BLOCK divides S.
        values: likewise.
        last: int32 `[]`; places after its block are not read.
        weigh: turns float32 scores `[B, K, g, t, BLOCK]` of the places from an int32 `[]` on into
            weights whose sums do not overflow.

    Returns:
        float32 `[B, t, K, g, d]`, zeros where all weights are.
    """
    batch, steps, heads, group, size = queries.shape
    flat = jnp.moveaxis(queries, 1, 3).reshape(batch, heads, group * steps, size)

    def add(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        # Without this tie, loop-invariant arrays would be converted as a whole before the first
        # round.
        tied = lax.optimization_barrier(((keys, values), number))  # type: ignore[no-untyped-call]
        held, number = tied
        start = number * BLOCK
        of_keys, of_values = (_block(array, start) for array in held)
        scores = _product("bkqd,bksd->bkqs", flat, of_keys)
        shape = batch, heads, group, steps, BLOCK
        weights = weigh(scores.reshape(shape), start).reshape(scores.shape)
        mixed = _product("bkqs,bksd->bkqd", weights, of_values)
        return sums[0] + mixed, sums[1] + jnp.sum(weights, axis=-1, keepdims=True)

    nothing = jnp.zeros_like(flat), jnp.zeros_like(flat[..., :1])
    count = jnp.clip(last // BLOCK + 1, 0, keys.shape[1] // BLOCK)
    total, weight = lax.fori_loop(0, count, add, nothing)
    whole = (total / jnp.where(weight == 0, 1, weight)).reshape(batch, heads, group, steps, size)
    return jnp.moveaxis(whole, 3, 1)


def _block(array: Array, start: Array) -> Array:
    """BLOCK places of `[B, S, K, d]` as float32 `[B, K, BLOCK, d]`."""
    block = lax.dynamic_slice_in_dim(array, start, BLOCK, axis=1)
    return jnp.swapaxes(block.astype(jnp.float32), 1, 2)


def _product(formula: str, given: Array, held: Array) -> Array:
    return jnp.einsum(
        formula,
        given,
        held,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
