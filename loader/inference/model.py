"""Grok-1's forward pass and KV cache: pure functions from arrays to arrays.

Every function runs on each device of a mesh with the axes `data`, `expert` and `model` (under
`jax.shard_map`) and sees that device's blocks: some of the rows of the batch, some of the heads,
its slice of each of its experts, its part of the vocabulary. The residual stream of its rows is
the same on every device along `expert` and `model`; what those compute in part is summed over them.
One device is a mesh of size one.

Activations are float32 between the products. `dtype` is that of the cache and of what the products
multiply; in bfloat16 the reference rounds activations too, and then near ties of its router fall
the other way.

Letters in shapes: B rows, T tokens of this step, S places in the cache, D width, Q query heads, K
key/value heads, d head size, E experts, V vocabulary; of B, Q, K, E and V it is this device's
share.

Source of the formulas and of everything unusual: xai-org/grok-1 `model.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from loader.devices.placement import Layer
from loader.devices.products import Table, Weights, dots, lookup, product, select, table_rows
from loader.weights.limits import QUERY_BLOCK
from loader.weights.schema import GrokConfig

__all__ = [
    "KeyValues",
    "Routed",
    "Window",
    "attend",
    "attention",
    "close",
    "embed",
    "expert",
    "experts",
    "feed_forward",
    "group_queries",
    "layer",
    "logits",
    "norm",
    "rotate",
    "route",
    "soft_cap",
]

NORM_EPSILON = 1e-5
ROPE_BASE = 10_000.0
SCORE_CAP = 30.0
MASKED_SCORE = -1e30

LARGEST_BLOCK = 128
"""Most tokens that one pass over an expert's weights serves; bounds the padding of small groups."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class KeyValues:
    """One layer's cache: keys (already rotated) and values, each `[B, S, K, d]`."""

    keys: Array
    values: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """Where this step's tokens stand; rows may have different lengths.

    positions: int32 `[B, T]`, each token's place in its row and in the cache.
    real: bool `[B, T]`, False for the tokens that only fill up the step.
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
    local = tokens - lax.axis_index("model") * rows
    mine = (local >= 0) & (local < rows)
    found = jnp.where(mine[..., None], lookup(table, jnp.where(mine, local, 0)), 0.0)
    return _sum_over(found, "model") * _rounded(config.embedding_multiplier_scale, dtype)


def _rounded(multiplier: float, dtype: jnp.dtype) -> Array:
    """A multiplier as the model was trained with it: rounded to bf16, 78.38 is 78.5."""
    return jnp.asarray(multiplier, dtype).astype(jnp.float32)


def layer(
    weights: Layer, cache: KeyValues, x: Array, window: Window, config: GrokConfig
) -> tuple[Array, KeyValues, Array]:
    """One decoder layer over the residual stream, float32 `[B, T, D]`.

    Each half is normed twice, before it and after it, so what is added to the stream has the size
    that the second norm's scale gives it.

    Returns:
        The stream, the cache, and the experts that each token chose, int32 `[B * T, chosen]`.
    """
    x, cache, routed = attend(weights, cache, x, window, config)
    mixed = experts(weights, routed, window.real, config, cache.keys.dtype)
    return close(weights, x, mixed), cache, routed.choices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Routed:
    """What the experts of a layer are to do, for the N = B * T tokens of a step.

    x: float32 `[N, D]`. choices: int32 `[N, chosen]`, most probable first. gates: float32
    `[N, chosen]`, what each chosen expert's output is weighted with.
    """

    x: Array
    choices: Array
    gates: Array


def attend(
    weights: Layer, cache: KeyValues, x: Array, window: Window, config: GrokConfig
) -> tuple[Array, KeyValues, Routed]:
    """The first half of a layer, and what its router wants of the second."""
    attended, cache = attention(weights, cache, norm(x, weights.before_attention), window, config)
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
    """Attention scores squeezed smoothly into -30 to 30, as the model was trained."""
    return SCORE_CAP * jnp.tanh(scores / SCORE_CAP)


def attention(
    weights: Layer, cache: KeyValues, x: Array, window: Window, config: GrokConfig
) -> tuple[Array, KeyValues]:
    """Causal attention over the cache for this device's heads, summed over all devices.

    Returns:
        float32 `[B, T, D]` and the cache with this step's keys and values in their places.
    """
    dtype = cache.keys.dtype

    def heads(matrix: Weights) -> Array:
        return product(x, matrix, dtype).reshape(*x.shape[:2], -1, config.key_size)

    queries = rotate(heads(weights.query), window.positions)
    step = KeyValues(rotate(heads(weights.key), window.positions), heads(weights.value))
    cache = _store(cache, step, window)
    # A first step needs no cache: its own keys are all there are, and are not rounded yet.
    mixed = _attend(queries, step if window.fresh else cache, window, config)
    partial = product(mixed.reshape(*x.shape[:2], -1), weights.output, dtype)
    return _sum_over(partial, "model"), cache


def _attend(queries: Array, held: KeyValues, window: Window, config: GrokConfig) -> Array:
    """Queries `[B, T, Q, d]` over keys and values `[B, S, K, d]`: float32 `[B, T, K, Q / K, d]`."""
    grouped = group_queries(queries, held.keys.shape[2])
    batch, steps = grouped.shape[:2]
    size = next(n for n in range(min(steps, QUERY_BLOCK), 0, -1) if steps % n == 0)
    if size == steps:
        return _attend_block(grouped, window.positions, held, window, config)

    def block(part: tuple[Array, Array]) -> Array:
        return _attend_block(*part, held, window, config)

    def cut(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(batch, steps // size, size, *array.shape[2:]), 1, 0)

    mixed = lax.map(block, (cut(grouped), cut(window.positions)))
    return jnp.moveaxis(mixed, 0, 1).reshape(grouped.shape)


def _attend_block(
    queries: Array, positions: Array, held: KeyValues, window: Window, config: GrokConfig
) -> Array:
    """Some tokens' queries, `[B, t, K, Q / K, d]` at `[B, t]`, over everything that is held."""
    scores = jnp.einsum(
        "btkgd,bskd->bkgts",
        queries.astype(held.keys.dtype),
        held.keys,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    scores = soft_cap(scores * config.attn_output_multiplier)
    # The cap comes before the mask: after it, a masked score would be no lower than -30.
    places = held.keys.shape[1]
    causal = jnp.arange(places) <= positions[:, :, None]
    allowed = window.visible[:, None, :places] & causal
    scores = jnp.where(allowed[:, None, None], scores, MASKED_SCORE)
    return jnp.einsum(
        "bkgts,bskd->btkgd",
        jax.nn.softmax(scores, axis=-1).astype(held.values.dtype),
        held.values,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _sum_over(partial: Array, axes: str | tuple[str, ...]) -> Array:
    total: Array = lax.psum(partial, axes)  # type: ignore[no-untyped-call]
    return total


def _store(cache: KeyValues, step: KeyValues, window: Window) -> KeyValues:
    # A place outside the cache is dropped, so that padding tokens leave no trace in it.
    places = jnp.where(window.real, window.positions, cache.keys.shape[1])
    rows = jnp.arange(places.shape[0])[:, None]

    def write(into: Array, new: Array) -> Array:
        return into.at[rows, places].set(new.astype(into.dtype), mode="drop")

    return KeyValues(write(cache.keys, step.keys), write(cache.values, step.values))


def route(x: Array, router: Array, chosen: int) -> tuple[Array, Array]:
    """The experts of each token and the weight of their outputs.

    The weights are the probabilities of a softmax over all experts, used as they are: they are not
    made to sum to one over the chosen experts.

    Args:
        x: float32 `[N, D]`.
        router: float32 `[D, E]`, of all experts.
        chosen: experts a token.

    Returns:
        int32 `[N, chosen]` and float32 `[N, chosen]`, most probable first.
    """
    scores = jnp.einsum("nd,de->ne", x, router, precision=lax.Precision.HIGHEST)
    weights, choices = lax.top_k(jax.nn.softmax(scores, axis=-1), chosen)
    return choices, weights


def feed_forward(x: Array, gate: Weights, up: Weights, down: Weights, dtype: jnp.dtype) -> Array:
    """One expert over float32 `[N, D]`: the same shape, still to be summed over `model`."""
    # The reference's GELU is the tanh approximation.
    hidden = jax.nn.gelu(product(x, gate, dtype), approximate=True) * product(x, up, dtype)
    return product(hidden, down, dtype)


def expert(weights: Layer, number: Array, routed: Routed, pairs: Array, dtype: jnp.dtype) -> Array:
    """What one expert gives the tokens that chose it, weighted.

    Args:
        weights: the layer, with all experts on every device and part of each.
        number: int32 scalar, the expert.
        routed: all tokens of the step.
        pairs: int32 `[n]`, indices of `routed.choices` taken flat; those beyond its end count for
            nothing.
        dtype: of the products.

    Returns:
        float32 `[N, D]`, the same on all devices of these rows; zero for all other tokens.
    """
    rows = pairs // routed.choices.shape[1]
    output = feed_forward(
        routed.x.at[rows].get(mode="clip"),
        select(weights.gate, number),
        select(weights.up, number),
        select(weights.down, number),
        dtype,
    )
    gates = routed.gates.reshape(-1).at[pairs].get(mode="clip")
    given = gates[:, None] * _sum_over(output, "model")
    return jnp.zeros(routed.x.shape, jnp.float32).at[rows].add(given, mode="drop")


def experts(
    weights: Layer, routed: Routed, real: Array, config: GrokConfig, dtype: jnp.dtype
) -> Array:
    """Each token's chosen experts, weighted and summed; no other expert's weights are read.

    Pairs of token and choice are sorted by expert and cut into blocks of one expert each. A loop
    runs over the blocks that there are, and reads the weights of its block's expert; how many
    there are, and whose, is known only at run time.

    Args:
        weights: the layer; this device holds some of the experts, and part of each.
        routed: the tokens and their choices.
        real: bool `[B, T]`; padding tokens get no expert.
        config: the hyperparameters.
        dtype: of the products.

    Returns:
        float32 `[N, D]`, the same on all devices of these rows.
    """
    flat = routed.x
    held = config.num_experts // lax.axis_size("expert")
    local = routed.choices - lax.axis_index("expert") * held
    nobody = (local < 0) | (local >= held) | ~real.reshape(-1, 1)
    size = _block_size(routed.choices.size, config.num_experts)
    plan = _plan(jnp.where(nobody, held, local).reshape(-1), held, size)

    def block(index: Array, total: Array) -> Array:
        expert, pairs, live = _block(plan, index, size)
        # Places beyond the group's end point outside: they read some row and add to none.
        rows = jnp.where(live, pairs // config.num_selected_experts, flat.shape[0])
        output = feed_forward(
            flat.at[rows].get(mode="clip"),
            select(weights.gate, expert),
            select(weights.up, expert),
            select(weights.down, expert),
            dtype,
        )
        gates = routed.gates.reshape(-1)[pairs]
        return total.at[rows].add(gates[:, None] * output, mode="drop")

    total = lax.fori_loop(0, plan.ends[-1], block, jnp.zeros(flat.shape, jnp.float32))
    return _sum_over(total, ("expert", "model"))


def _block_size(pairs: int, num_experts: int) -> int:
    """Tokens in a block: about what an expert gets on average, one for a single token."""
    average = max(1, pairs // num_experts)
    return min(LARGEST_BLOCK, 1 << (average.bit_length() - 1))


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """Pairs sorted by expert, and where each expert's pairs start, how many, and its last block."""

    order: Array
    starts: Array
    counts: Array
    blocks: Array
    ends: Array


def _plan(choices: Array, held: int, size: int) -> _Plan:
    counts = jnp.sum(choices[:, None] == jnp.arange(held), axis=0)
    blocks = -(-counts // size)
    return _Plan(
        order=jnp.argsort(choices, stable=True),
        starts=jnp.cumsum(counts) - counts,
        counts=counts,
        blocks=blocks,
        ends=jnp.cumsum(blocks),
    )


def _block(plan: _Plan, index: Array, size: int) -> tuple[Array, Array, Array]:
    """A block's expert (scalar), its pairs `[size]`, and which of those are the expert's at all."""
    expert = jnp.searchsorted(plan.ends, index, side="right")
    first = index - (plan.ends - plan.blocks)[expert]
    ranks = first * size + jnp.arange(size)
    live = ranks < plan.counts[expert]
    return expert, plan.order[jnp.where(live, plan.starts[expert] + ranks, 0)], live
