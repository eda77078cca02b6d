"""Grok-1's forward pass and KV cache: pure functions from arrays to arrays.

Every function runs on each device of a mesh with the axes `data`, `expert` and `model` (under
`jax.shard_map`) and sees that device's blocks: some of the rows of the batch, some of the heads,
its slice of each of its experts, its part of the vocabulary. The residual stream of its rows is
the same on every device along `expert` and `model`; their partial results are summed over them.
One device is a mesh of size one.

Activations are float32 between the products. `dtype` is the type of the products' operands, that of
the cache if None; in bfloat16 the reference also rounds activations, and then near ties in its
router fall the other way.

Letters in shapes: B rows, T tokens of this step, S places in the cache, D width, Q query heads, K
key/value heads, d head size, E experts, V vocabulary; of B, Q, K, E and V it is this device's
share.

Source of the formulas, including everything unusual: xai-org/grok-1 `model.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from loader.devices import native
from loader.devices.placement import Layer
from loader.devices.platforms import by_platform, on_cpus, on_tpus
from loader.devices.products import (
    Table,
    dots,
    each_product,
    lookup,
    product,
    table_rows,
)
from loader.inference import heads
from loader.inference.experts import Routed, experts, route, sum_over
from loader.weights.limits import QUERY_BLOCK
from loader.weights.partition import RULES
from loader.weights.schema import GrokConfig

__all__ = [
    "KeyValues",
    "Window",
    "attend",
    "attention",
    "close",
    "embed",
    "group_queries",
    "layer",
    "logits",
    "norm",
    "rotate",
    "soft_cap",
]

NORM_EPSILON = 1e-5
ROPE_BASE = 10_000.0
SCORE_CAP = 30.0
MASKED_SCORE = -1e30

SCORES = 2 << 20
"""Bytes of scores that a TPU computes at once if each row has one token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class KeyValues:
    """One layer's cache: keys (already rotated) and values, each `[B, S, K, d]`."""

    keys: Array
    values: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """The positions of this step's tokens; rows may have different lengths.

    positions: int32 `[B, T]`, each token's place in its row and in the cache.
    real: bool `[B, T]`, False for padding tokens.
    visible: bool `[B, S]`, the places of the cache that may be attended to, this step's included.
    fresh: the cache held nothing before, so every row starts at position 0.
    """

    positions: Array
    real: Array
    visible: Array
    fresh: bool = dataclasses.field(metadata={"static": True})


def embed(table: Table, tokens: Array, config: GrokConfig, dtype: jnp.dtype) -> Array:
    """Token ids `[B, T]` to the residual stream, float32 `[B, T, D]`; table float32 `[V, D]`."""
    rows = table_rows(table)
    local = tokens - lax.axis_index(RULES["vocab"]) * rows
    mine = (local >= 0) & (local < rows)
    rows_here = jnp.where(mine[..., None], lookup(table, jnp.where(mine, local, 0)), 0.0)
    return sum_over(rows_here, RULES["vocab"]) * _rounded(config.embedding_multiplier_scale, dtype)


def _rounded(multiplier: float, dtype: jnp.dtype) -> Array:
    """A multiplier as in the model's training: rounded to bfloat16, 78.38 is 78.5."""
    return jnp.asarray(multiplier, dtype).astype(jnp.float32)


def layer(  # noqa: PLR0913 - a step is all of these
    weights: Layer,
    cache: KeyValues,
    x: Array,
    window: Window,
    config: GrokConfig,
    *,
    dtype: jnp.dtype | None = None,
) -> tuple[Array, KeyValues, Array]:
    """One decoder layer over the residual stream, float32 `[B, T, D]`.

    Each half is normalised twice, before and after, so the second norm's scale sets the size of
    what is added to the stream.

    Returns:
        The stream, the cache, and the experts that each token chose, int32 `[B * T, chosen]`.
    """
    x, cache, routed = attend(weights, cache, x, window, config, dtype=dtype)
    mixed = experts(weights, routed, window.real, config, dtype or cache.keys.dtype)
    return close(weights, x, mixed), cache, routed.choices


def attend(  # noqa: PLR0913 - a step is all of these
    weights: Layer,
    cache: KeyValues,
    x: Array,
    window: Window,
    config: GrokConfig,
    *,
    dtype: jnp.dtype | None = None,
) -> tuple[Array, KeyValues, Routed]:
    """The first half of a layer, and what its router asks of the second."""
    before = norm(x, weights.before_attention)
    attended, cache = attention(weights, cache, before, window, config, dtype=dtype)
    x = x + norm(attended, weights.after_attention)
    flat = norm(x, weights.before_experts).reshape(-1, x.shape[-1])
    return x, cache, Routed(flat, *route(flat, weights.router, config.num_selected_experts))


def close(weights: Layer, x: Array, mixed: Array) -> Array:
    """The end of a layer: the residual stream `[B, T, D]` with its experts' sum `[N, D]`."""
    return x + norm(mixed.reshape(x.shape), weights.after_experts)


def logits(table: Table, scale: Array, x: Array, config: GrokConfig, dtype: jnp.dtype) -> Array:
    """The residual stream `[..., D]` to float32 scores `[..., V]` over this device's vocabulary."""
    return dots(norm(x, scale), table) * _rounded(config.output_multiplier_scale, dtype)


def norm(x: Array, scale: Array) -> Array:
    """RMS norm over the last axis, float32."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(mean_square + NORM_EPSILON) * scale


def rotate(x: Array, positions: Array) -> Array:
    """Rotary embedding of float32 `[B, T, heads, d]` at int32 positions `[B, T]`.

    Dimension i is paired with i + d/2 (split halves, not neighbours). Phases are float32: bf16
    cannot tell neighbouring positions apart beyond 256.
    """
    half = x.shape[-1] // 2
    frequencies = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    phases = positions.astype(jnp.float32)[..., None, None] * frequencies
    cosine, sine = jnp.cos(phases), jnp.sin(phases)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        (first * cosine - second * sine, second * cosine + first * sine), axis=-1
    )


def group_queries(queries: Array, kv_heads: int) -> Array:
    """`[B, T, Q, d]` to `[B, T, K, Q / K, d]`: query head h reads key/value head h // (Q / K)."""
    batch, steps, heads, size = queries.shape
    return queries.reshape(batch, steps, kv_heads, heads // kv_heads, size)


def soft_cap(scores: Array) -> Array:
    """Attention scores squeezed smoothly into -30 to 30, as in the model's training."""
    return SCORE_CAP * jnp.tanh(scores / SCORE_CAP)


def attention(  # noqa: PLR0913 - a step is all of these
    weights: Layer,
    cache: KeyValues,
    x: Array,
    window: Window,
    config: GrokConfig,
    *,
    dtype: jnp.dtype | None = None,
) -> tuple[Array, KeyValues]:
    """Causal attention over the cache for this device's heads, summed over all devices.

    Returns:
        float32 `[B, T, D]` and the cache with this step's keys and values in their places.
    """
    dtype = dtype or cache.keys.dtype

    queries, keys, values = (
        projected.reshape(*x.shape[:2], -1, config.key_size)
        for projected in each_product(x, (weights.query, weights.key, weights.value), dtype)
    )
    queries = rotate(queries, window.positions)
    step = KeyValues(rotate(keys, window.positions), values)
    tuning = weights.query.tuning
    if tuning is not None and tuning.native:
        mixed, cache = _by_native(queries, cache, step, window, config)
        partial = product(mixed.reshape(*x.shape[:2], -1), weights.output, dtype)
        return sum_over(partial, "model"), cache

    def written_first(
        queries: Array, cache: KeyValues, step: KeyValues, window: Window
    ) -> tuple[Array, KeyValues]:
        cache = _store(cache, step, window)
        # A first step needs no cache: its own keys are the only ones, and are not rounded yet.
        return _attend(queries, step if window.fresh else cache, window, config), cache

    def read_first(
        queries: Array, cache: KeyValues, step: KeyValues, window: Window
    ) -> tuple[Array, KeyValues]:
        return _attend_once(queries, cache, step, window, config)

    on_gpus = read_first if x.shape[1] == 1 and not window.fresh else written_first
    mixed, cache = by_platform(on_gpus, written_first, queries, cache, step, window)
    partial = product(mixed.reshape(*x.shape[:2], -1), weights.output, dtype)
    return sum_over(partial, "model"), cache


def _by_native(
    queries: Array, cache: KeyValues, step: KeyValues, window: Window, config: GrokConfig
) -> tuple[Array, KeyValues]:
    """The same by the C program, which writes the step into the cache in place."""
    asked = native.Step(
        queries,
        step.keys,
        step.values,
        jnp.where(window.real, window.positions, -1),
        window.visible,
        window.fresh,
    )
    scale = config.attn_output_multiplier
    mixed, keys, values = native.attention(asked, cache.keys, cache.values, scale, SCORE_CAP)
    return mixed, KeyValues(keys, values)


def _attend_once(
    queries: Array, cache: KeyValues, step: KeyValues, window: Window, config: GrokConfig
) -> tuple[Array, KeyValues]:
    """One token a row, written into the cache after the cache has been read; for GPUs."""
    # The token's key and value are computed here: otherwise their inputs are kept.
    step = lax.optimization_barrier(step)  # type: ignore[no-untyped-call]
    visible = window.visible[:, : cache.keys.shape[1]]
    earlier = visible[:, None] & (jnp.arange(visible.shape[1]) < window.positions[:, :, None])
    here = jnp.take_along_axis(visible, window.positions, axis=1, mode="fill", fill_value=False)

    def weight(scores: Array) -> Array:
        return jnp.exp(soft_cap(scores * config.attn_output_multiplier) - SCORE_CAP)

    mixed = heads.one_token(
        group_queries(queries, cache.keys.shape[2]),
        (cache.keys, cache.values),
        (step.keys, step.values),
        # As in `_allowed`, a token that may attend to nothing attends to itself.
        (earlier, here | ~jnp.any(earlier, axis=-1)),
        weight,
    )
    cache, mixed = lax.optimization_barrier((cache, mixed))  # type: ignore[no-untyped-call]
    return mixed, _store(cache, step, window)


def _attend(queries: Array, held: KeyValues, window: Window, config: GrokConfig) -> Array:
    """Queries `[B, T, Q, d]` over keys and values `[B, S, K, d]`: float32 `[B, T, K, Q / K, d]`."""
    grouped = group_queries(queries, held.keys.shape[2])
    batch, steps = grouped.shape[:2]
    each = queries.shape[2] * held.keys.shape[1] * 4
    if steps == 1 < batch and batch * each > SCORES:
        return _attend_by_rows(grouped, held, window, config, max(1, SCORES // each))
    size = next(n for n in range(min(steps, QUERY_BLOCK), 0, -1) if steps % n == 0)
    if size == steps:
        return _attend_block(grouped, window.positions, held, window, config)

    def block(part: tuple[Array, Array]) -> Array:
        return _attend_block(*part, held, window, config)

    def cut(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(batch, steps // size, size, *array.shape[2:]), 1, 0)

    mixed = lax.map(block, (cut(grouped), cut(window.positions)))
    return jnp.moveaxis(mixed, 0, 1).reshape(grouped.shape)


def _attend_by_rows(
    queries: Array, held: KeyValues, window: Window, config: GrokConfig, most: int
) -> Array:
    """One token a row, a few rows at a time: their scores stay in a TPU's fast memory."""
    batch = queries.shape[0]
    size = next(n for n in range(min(batch, most), 0, -1) if batch % n == 0)

    def at_once(queries: Array, held: KeyValues, window: Window) -> Array:
        return _attend_block(queries, window.positions, held, window, config)

    def some(queries: Array, held: KeyValues, window: Window) -> Array:
        def rows(start: Array) -> Array:
            def cut(array: Array) -> Array:
                return lax.dynamic_slice_in_dim(array, start, size)

            return at_once(*jax.tree.map(cut, (queries, held, window)))

        mixed: Array = lax.map(rows, jnp.arange(0, batch, size))
        return mixed.reshape(queries.shape)

    return on_tpus(some, at_once, queries, held, window)


def _attend_block(
    queries: Array, positions: Array, held: KeyValues, window: Window, config: GrokConfig
) -> Array:
    """Some tokens' queries, `[B, t, K, Q / K, d]` at `[B, t]`, over everything that is held."""
    allowed = _allowed(positions, window, held.keys.shape[1])

    def capped(scores: Array) -> Array:
        return soft_cap(scores * config.attn_output_multiplier)

    def elsewhere(queries: Array, held: KeyValues, allowed: Array) -> Array:
        scores = capped(heads.scores(queries, held.keys))
        weights, sums = heads.shares(scores, allowed[:, None, None], held.values.dtype)
        return heads.mixed(weights, held.values) / jnp.moveaxis(sums, -1, 1)[..., None]

    def by_softmax(queries: Array, held: KeyValues, allowed: Array) -> Array:
        # The cap comes before the mask: after it, a masked score would be no lower than -30.
        scores = capped(heads.scores(queries, held.keys))
        scores = jnp.where(allowed[:, None, None], scores, MASKED_SCORE)
        weights = jax.nn.softmax(scores, axis=-1).astype(held.values.dtype)
        return heads.mixed(weights, held.values)

    def at_once(queries: Array, held: KeyValues, allowed: Array) -> Array:
        # For several tokens a GPU's compiler also writes the weights in float32.
        queries = heads.within(queries, held.keys.dtype)
        return by_platform(by_softmax, elsewhere, queries, held, allowed)

    def in_blocks(queries: Array, held: KeyValues, allowed: Array) -> Array:
        def weigh(scores: Array, start: Array) -> Array:
            seen = lax.dynamic_slice_in_dim(allowed, start, heads.BLOCK, axis=2)
            return jnp.where(seen[:, None, None], jnp.exp(capped(scores)), 0.0)

        return heads.in_blocks(queries, held.keys, held.values, jnp.max(positions), weigh)

    if held.keys.shape[1] % heads.BLOCK:
        return at_once(queries, held, allowed)
    return on_cpus(in_blocks, at_once, queries, held, allowed)


def _allowed(positions: Array, window: Window, places: int) -> Array:
    """Which places tokens at positions `[B, t]` attend to: bool `[B, t, places]`."""
    causal = jnp.arange(places) <= positions[:, :, None]
    visible = window.visible[:, None, :places]
    # A query that may attend to nothing, as in a prompt of pad ids, attends to itself.
    first = jnp.min(jnp.where(visible, jnp.arange(places), places), axis=-1)
    alone = (first > positions)[:, :, None] & (jnp.arange(places) == positions[:, :, None])
    return (visible & causal) | alone


def _store(cache: KeyValues, step: KeyValues, window: Window) -> KeyValues:
    # Writes to a place outside the cache are dropped, so padding tokens leave no trace in it.
    places = jnp.where(window.real, window.positions, cache.keys.shape[1])
    rows = jnp.arange(places.shape[0])[:, None]

    def write(into: Array, new: Array) -> Array:
        return into.at[rows, places].set(heads.within(new, into.dtype), mode="drop")

    return KeyValues(write(cache.keys, step.keys), write(cache.values, step.values))
