"""Queries with the keys of their heads, and what follows from it with the values.

Letters in shapes: B rows, t tokens, S places in the cache, K key/value heads, g queries of a head,
d head size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from loader.devices.products import in_parts

__all__ = ["mixed", "one_token", "scores", "shares"]

SMALLEST = 1e-30
"""Less than any sum of weights of which one is not masked, and no zero to divide by."""


def scores(queries: Array, keys: Array) -> Array:
    """Products of `[B, t, K, g, d]` and `[B, S, K, d]`: float32 `[B, K, g, t, S]`."""
    return _product("btkgd,bskd->bkgts", queries, keys)


def shares(scores: Array, allowed: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """What a softmax over places divides by its sums, and these sums.

    Scores are bounded, so that no largest one has to be found first: each is used where it is made,
    and what is written of it is as wide as the cache. The sums are those of the rounded weights,
    which costs less precision than to round the quotients.

    Args:
        scores: float32 `[..., S]`, from -30 to 30.
        allowed: bool, broadcast to them; the weights of all others are zero.
        dtype: of the weights.

    Returns:
        Weights `[..., S]`, and float32 sums `[...]`, above zero even where nothing is allowed.
    """
    if dtype == jnp.float16:
        # Its numbers end at e^11.
        most = jnp.max(jnp.where(allowed, scores, -jnp.inf), axis=-1, keepdims=True)
        scores = scores - most
    weights = jnp.where(allowed, jnp.exp(scores), 0.0)
    if dtype != jnp.float32:
        # A conversion and back may be dropped by the compiler; this may not.
        kind = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
        weights = lax.reduce_precision(weights, kind.nexp, kind.nmant)
    sums = jnp.maximum(jnp.sum(weights, axis=-1), SMALLEST)
    return weights.astype(dtype), sums


def mixed(weights: Array, values: Array) -> Array:
    """Products of `[B, K, g, t, S]` and `[B, S, K, d]`: float32 `[B, t, K, g, d]`."""
    return _product("bkgts,bskd->btkgd", weights, values)


def one_token(
    queries: Array, keys: Array, values: Array, allowed: Array, weight: Callable[[Array], Array]
) -> Array:
    """One token a row over the cache, for GPUs: float32 `[B, 1, K, g, d]`.

    Scores are bounded, so that no largest one has to be found before the weights: these are all
    that is written of the scores, and the sums are divided at the end. All heads of a row are one
    product: for products of single heads a GPU's compiler copies the cache to another order, and
    back. As one matrix a row it is read where it lies; products with the heads of others are zero,
    or dropped. The division of the sum over places is ours.

    Args:
        queries: `[B, 1, K, g, d]`, of the cache's dtype.
        keys: `[B, S, K, d]`.
        values: `[B, S, K, d]`.
        allowed: bool `[B, 1, S]`, the places that are attended to.
        weight: what softmax divides by its sum, of float32 scores: at most 1, and above 1e-28.
    """
    batch, _, heads, group, size = queries.shape
    places = keys.shape[1]
    parts = in_parts(places, batch * heads * size)

    def divided(array: Array) -> Array:
        return array.reshape(batch, parts, places // parts, heads * size)

    own = jnp.eye(heads, dtype=queries.dtype)[:, None, :, None]
    spread = (queries[:, 0, :, :, None] * own).reshape(batch, 1, heads * group, heads * size)
    every = jnp.broadcast_to(spread, (batch, parts, *spread.shape[2:]))
    weights = weight(_product("bpqc,bpsc->bpqs", every, divided(keys)))
    # Float16 has no numbers so small.
    kept = weights.astype(jnp.float32 if values.dtype == jnp.float16 else values.dtype)
    # Masked only here: with the mask the compiler would write the scores before it.
    kept = lax.optimization_barrier(kept)  # type: ignore[no-untyped-call]
    kept = jnp.where(allowed.reshape(batch, parts, 1, -1), kept, 0)
    total = jnp.sum(kept.astype(jnp.float32), axis=(1, 3)).reshape(batch, heads, group, 1)
    sums = jnp.sum(_product("bpqs,bpsc->bpqc", kept, divided(values)), axis=1)
    own_sums = jnp.einsum("bkgkd->bkgd", sums.reshape(batch, heads, group, heads, size))
    return (own_sums / jnp.maximum(total, SMALLEST))[:, None]


def _product(formula: str, given: Array, held: Array) -> Array:
    return jnp.einsum(
        formula,
        given,
        held,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
