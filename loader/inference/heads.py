"""Queries with the keys of their heads, and what follows from it with the values.

Letters in shapes: B rows, t tokens, S places in the cache, K key/value heads, g queries of a head,
d head size.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from loader.devices.products import by_platform

__all__ = ["mixed", "scores"]


def scores(queries: Array, keys: Array) -> Array:
    """Products of `[B, t, K, g, d]` and `[B, S, K, d]`: float32 `[B, K, g, t, S]`."""

    def apart(queries: Array, keys: Array) -> Array:
        return _product("btkgd,bskd->bkgts", queries, keys)

    def at_once(queries: Array, keys: Array) -> Array:
        batch, _, heads, group, _ = queries.shape
        own = jnp.eye(heads, dtype=queries.dtype)[:, None, :, None]
        spread = queries[:, 0, :, :, None] * own
        flat = spread.reshape(batch, heads * group, -1), keys.reshape(*keys.shape[:2], -1)
        return _product("bqc,bsc->bqs", *flat).reshape(batch, heads, group, 1, -1)

    if _wants_one_matrix(queries.shape[1], keys):
        return by_platform(at_once, apart, queries, keys)
    return apart(queries, keys)


def mixed(weights: Array, values: Array) -> Array:
    """Products of `[B, K, g, t, S]` and `[B, S, K, d]`: float32 `[B, t, K, g, d]`."""

    def apart(weights: Array, values: Array) -> Array:
        return _product("bkgts,bskd->btkgd", weights, values)

    def at_once(weights: Array, values: Array) -> Array:
        batch, heads, group, _, places = weights.shape
        flat = weights.reshape(batch, heads * group, places), values.reshape(batch, places, -1)
        every = _product("bqs,bsc->bqc", *flat).reshape(batch, heads, group, heads, -1)
        return jnp.einsum("bkgkd->bkgd", every)[:, None]

    if _wants_one_matrix(weights.shape[3], values):
        return by_platform(at_once, apart, weights, values)
    return apart(weights, values)


def _wants_one_matrix(tokens: int, held: Array) -> bool:
    """Whether a GPU is to multiply all heads of a row at once: one token, and several heads.

    For products of single heads its compiler copies the cache to another order, and back. As one
    matrix a row it is read where it lies; products with the heads of others are zero, or dropped.
    """
    return tokens == 1 and held.shape[2] > 1


def _product(formula: str, given: Array, held: Array) -> Array:
    return jnp.einsum(
        formula,
        given,
        held,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
