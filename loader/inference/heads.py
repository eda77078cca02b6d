"""Queries with the keys of their heads, and what follows from it with the values.

Letters in shapes: B rows, t tokens, S places in the cache, K key/value heads, g queries of a head,
d head size.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from loader.devices.products import by_platform, in_parts

__all__ = ["mixed", "scores"]


def scores(queries: Array, keys: Array) -> Array:
    """Products of `[B, t, K, g, d]` and `[B, S, K, d]`: float32 `[B, K, g, t, S]`.

    A GPU multiplies all heads of a row at once, if it has one token and several heads: for products
    of single heads its compiler copies the cache to another order, and back. As one matrix a row it
    is read where it lies; products with the heads of others are zero, or dropped.
    """

    def apart(queries: Array, keys: Array) -> Array:
        return _product("btkgd,bskd->bkgts", queries, keys)

    def at_once(queries: Array, keys: Array) -> Array:
        batch, _, heads, group, _ = queries.shape
        own = jnp.eye(heads, dtype=queries.dtype)[:, None, :, None]
        spread = queries[:, 0, :, :, None] * own
        flat = spread.reshape(batch, heads * group, -1), keys.reshape(*keys.shape[:2], -1)
        return _product("bqc,bsc->bqs", *flat).reshape(batch, heads, group, 1, -1)

    if queries.shape[1] == 1 and keys.shape[2] > 1:
        return by_platform(at_once, apart, queries, keys)
    return apart(queries, keys)


def mixed(weights: Array, values: Array) -> Array:
    """Products of `[B, K, g, t, S]` and `[B, S, K, d]`: float32 `[B, t, K, g, d]`; see `scores`."""

    def apart(weights: Array, values: Array) -> Array:
        return _product("bkgts,bskd->btkgd", weights, values)

    def at_once(weights: Array, values: Array) -> Array:
        batch, heads, group, _, places = weights.shape
        parts = in_parts(places, batch * heads * values.shape[-1])
        flat = (
            weights.reshape(batch, heads * group, parts, -1),
            values.reshape(batch, parts, places // parts, -1),
        )
        sums = jnp.sum(_product("bqps,bpsc->bpqc", *flat), axis=1)
        every = sums.reshape(batch, heads, group, heads, -1)
        return jnp.einsum("bkgkd->bkgd", every)[:, None]

    # Of one head, too: the division of its sum over places is ours.
    if weights.shape[3] == 1:
        return by_platform(at_once, apart, weights, values)
    return apart(weights, values)


def _product(formula: str, given: Array, held: Array) -> Array:
    return jnp.einsum(
        formula,
        given,
        held,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
