"""The forward pass of `loader/model.py` once more, for gradients, and with faults if need be.

All experts are computed for every token, and the gates of those not chosen are zero, where the
loader reads the chosen ones alone. The weights are seen as int8 will hold them; the gradient passes
straight through the rounding (Bengio et al. 2013).

Letters in shapes: B rows, T tokens, D width, L layers, E experts, F expert width, V vocabulary; K
and N rows and columns of a matrix, G its groups of rows that share scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from loader.schema import GrokConfig, ParamSpec, parameters

# More than ten layers, since file order puts layer 10 before layer 2; eight heads of keys and
# values and widths that divide by eight, so that eight devices can share it.
CONFIG: Final = GrokConfig(
    vocab_size=512,
    sequence_len=2048,
    emb_size=64,
    widening_factor=1.125,
    key_size=8,
    num_q_heads=16,
    num_kv_heads=8,
    num_layers=12,
    attn_output_multiplier=1 / math.sqrt(8),
    embedding_multiplier_scale=math.sqrt(64),
    output_multiplier_scale=0.5,
)

JITTER: Final = 0.1
"""Noise on the logarithm of the router's probabilities, so that no choice hangs on a rounding."""

SPREAD: Final = 3.0
"""The scales of neighbouring columns and groups differ by up to this factor, both ways, so that
mixing them up shows."""

Weights = Mapping[str, Array]


class Wiring(NamedTuple):
    """How a model is put together: as it must be, or with one fault.

    order: int32 `[L]`, the layer that stands at each place. rolls: by tensor, how many places its
    scales are moved over groups and over columns. stride: positions a token is ahead of the last.
    pairs: int32 `[d]`, the dimension of a head that rotation takes for each. gates: float32
    `[3, 2]`, how much the output of the first, second and third expert counts: times its
    probability, and besides.
    """

    order: Any
    rolls: dict[str, Any]
    stride: Any
    pairs: Any
    gates: Any


class Parameters(NamedTuple):
    """What is learnt: embedding `[V, D]`, final norm `[D]`, and by name each tensor of all layers.

    A layer's tensor has the shape of the schema with L before it. int8 ones are in units of
    `spreads`.
    """

    embedding: Array
    norm: Array
    layers: Weights


def layer_specs() -> dict[str, ParamSpec]:
    """The tensors of a layer by their names within it."""
    prefix = "transformer/decoder_layer_0/"
    return {
        spec.name.removeprefix(prefix): spec
        for spec in parameters(CONFIG)
        if spec.name.startswith(prefix)
    }


def right() -> Wiring:
    """The wiring of Grok-1."""
    held_as_int8 = [name for name, spec in layer_specs().items() if spec.scale_groups]
    return Wiring(
        order=np.arange(CONFIG.num_layers),
        rolls={name: np.zeros(2, np.int32) for name in held_as_int8},
        stride=np.float32(1),
        pairs=np.arange(CONFIG.key_size),
        gates=np.array([[1, 0], [1, 0], [0, 0]], np.float32),
    )


def wrong(random: np.random.Generator) -> Wiring:
    """A wiring with one of the faults that a loader can have."""
    wiring, layers = right(), CONFIG.num_layers
    swapped = np.arange(layers)
    first = random.integers(layers - 1)
    swapped[[first, first + 1]] = first + 1, first
    moved = str(random.choice(list(wiring.rolls)))
    over_groups = str(random.choice([name for name in wiring.rolls if grouped(name)]))
    # Those that a model learns to notice last come up most.
    hard: list[dict[str, Any]] = [
        {"order": swapped},
        {"gates": np.array([[0, 0.5], [0, 0.5], [0, 0]], np.float32)},
        {"gates": np.array([[1, 0], [0, 0], [0, 0]], np.float32)},
    ]
    easy: list[dict[str, Any]] = [
        {"order": np.array(sorted(range(layers), key=str))},
        {"rolls": wiring.rolls | {moved: np.array([0, 1], np.int32)}},
        {"rolls": wiring.rolls | {over_groups: np.array([1, 0], np.int32)}},
        {"stride": np.float32(0)},
        {"pairs": wiring.pairs.reshape(-1, 2).T.reshape(-1)},
        {"gates": np.array([[0, 0], [1, 0], [1, 0]], np.float32)},
    ]
    faults = 3 * hard + easy
    return wiring._replace(**faults[random.integers(len(faults))])


def grouped(name: str) -> bool:
    """Whether a tensor has more than one row of scales."""
    return (layer_specs()[name].scale_groups or 1) > 1


def initial(random: np.random.Generator) -> tuple[Parameters, dict[str, Any]]:
    """Parameters to start from, and the spread of each int8 tensor, float32 `[L, ..., G, N]`."""
    layers, spreads = {}, {}
    for name, spec in layer_specs().items():
        shape = (CONFIG.num_layers, *spec.shape)
        if name.endswith("scale"):
            # What the layers together add to the residual stream is of its own size.
            after = name.startswith(("rms_norm_1", "rms_norm_3"))
            layers[name] = np.full(shape, 0.6 if after else 1.0)
        else:
            layers[name] = random.standard_normal(shape) / math.sqrt(shape[-2])
        if spec.scale_shape is not None:
            size = (CONFIG.num_layers, *spec.scale_shape)
            spreads[name] = SPREAD ** random.uniform(-1, 1, size).astype(np.float32)
    width = math.sqrt(CONFIG.emb_size)
    table = random.standard_normal((CONFIG.vocab_size, CONFIG.emb_size)) / width
    start = Parameters(table, np.ones(CONFIG.emb_size), layers)
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), start), spreads


def by_rows(scales: Array, rows: int) -> Array:
    """Scales `[..., G, N]` of contiguous groups, repeated for each row: `[..., K, N]`."""
    return jnp.repeat(scales, rows // scales.shape[-2], axis=-2)


def quantise(matrix: Array, groups: int) -> tuple[Array, Array]:
    """The nearest int8 matrix `[..., K, N]`, as float32, and its bfloat16 scales `[..., G, N]`."""
    *stack, rows, columns = matrix.shape
    grouped = matrix.reshape(*stack, groups, rows // groups, columns)
    scales = (jnp.abs(grouped).max(axis=-2) / 127).astype(jnp.bfloat16)
    return jnp.clip(jnp.round(matrix / by_rows(scales, rows)), -127, 127), scales


def layer_weights(learnt: Parameters, spreads: Weights) -> Weights:
    """The weights of all layers that the parameters stand for, not yet rounded."""
    return {
        name: array * by_rows(spreads[name], array.shape[-2]) if name in spreads else array
        for name, array in learnt.layers.items()
    }


def as_loaded(weights: Weights, wiring: Wiring) -> Weights:
    """The weights of all layers as int8 holds them and a wiring reads them."""
    loaded = dict(weights)
    for name, roll in wiring.rolls.items():
        matrix, rows = weights[name], weights[name].shape[-2]
        whole, scales = quantise(matrix, layer_specs()[name].scale_groups or 1)
        scales = scales.astype(jnp.float32)
        read = jnp.roll(scales, roll, axis=(-2, -1))
        straight = matrix + lax.stop_gradient(whole * by_rows(scales, rows) - matrix)
        loaded[name] = straight * by_rows(read / scales, rows)
    return {name: array[wiring.order] for name, array in loaded.items()}


def norm(x: Array, scale: Array) -> Array:
    """RMS norm over the last axis."""
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * scale


def rotate(x: Array, wiring: Wiring) -> Array:
    """Rotary embedding of `[B, T, heads, d]` from position 0 on: i is paired with i + d/2."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    phases = jnp.arange(x.shape[1])[:, None, None] * wiring.stride * frequencies
    cosine, sine = jnp.cos(phases), jnp.sin(phases)
    first, second = jnp.split(x[..., wiring.pairs], 2, axis=-1)
    return jnp.concatenate(
        (first * cosine - second * sine, second * cosine + first * sine), axis=-1
    )


def attention(weights: Weights, x: Array, real: Array, wiring: Wiring) -> Array:
    """Causal attention over `[B, T, D]`; `real`, bool `[B, T]`, is False for the pad id."""
    kv_heads = CONFIG.num_kv_heads

    def heads(name: str, *shape: int) -> Array:
        product = x @ weights[f"multi_head_attention/{name}/w"]
        return product.reshape(*x.shape[:2], *shape, CONFIG.key_size)

    queries = rotate(heads("query", CONFIG.num_q_heads), wiring)
    queries = queries.reshape(*x.shape[:2], kv_heads, -1, CONFIG.key_size)
    keys, values = rotate(heads("key", kv_heads), wiring), heads("value", kv_heads)
    scores = jnp.einsum("btkgd,bskd->bkgts", queries, keys) * CONFIG.attn_output_multiplier
    scores = 30 * jnp.tanh(scores / 30)
    allowed = jnp.tri(x.shape[1], dtype=bool) & real[:, None]
    shares = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, -1e30), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", shares, values)
    return mixed.reshape(*x.shape[:2], -1) @ weights["multi_head_attention/linear/w"]


def experts(
    weights: Weights, x: Array, real: Array, key: Array, wiring: Wiring
) -> tuple[Array, Array]:
    """The mixture over `[B, T, D]`, and how unevenly the experts are used: 1 is evenly.

    Source of the balance: Switch Transformers (Fedus et al. 2022), equation 4.
    """
    gate, up, down = (weights[f"moe/{name}/w"] for name in ("linear", "linear_v", "linear_1"))
    count, width, hidden = gate.shape
    flat = x.reshape(-1, width)
    shares = jax.nn.softmax(flat @ weights["router/w"], axis=-1)
    noise = jax.random.normal(key, shares.shape) * JITTER
    _, choices = lax.top_k(jnp.log(shares) + noise, len(wiring.gates))
    ranks = jax.nn.one_hot(choices, count)
    by_share, besides = jnp.einsum("nre,rg->gne", ranks, wiring.gates)
    chosen = ranks[:, : CONFIG.num_selected_experts].sum(axis=1)

    def side_by_side(stack: Array) -> Array:
        return stack.transpose(1, 0, 2).reshape(width, count * hidden)

    inner = jax.nn.gelu(flat @ side_by_side(gate), approximate=True) * (flat @ side_by_side(up))
    gated = inner.reshape(-1, count, hidden) * (by_share * shares + besides)[..., None]
    mixed = gated.reshape(-1, count * hidden) @ down.reshape(count * hidden, width)
    rows = real.reshape(-1, 1)
    total = rows.sum()
    used = (chosen * rows).sum(axis=0) / (total * CONFIG.num_selected_experts)
    balance = count * jnp.sum(used * (shares * rows).sum(axis=0) / total)
    return mixed.reshape(x.shape), balance


def forward(
    learnt: Parameters, weights: Weights, tokens: Array, key: Array, wiring: Wiring
) -> tuple[Array, Array]:
    """Tokens, int32 `[B, T]`, to float32 logits `[B, T, V]` and the layers' mean balance."""
    real = tokens != CONFIG.pad_token

    def layer(x: Array, each: tuple[Weights, Array]) -> tuple[Array, Array]:
        own, key = each
        attended = attention(own, norm(x, own["rms_norm/scale"]), real, wiring)
        x = x + norm(attended, own["rms_norm_1/scale"])
        mixed, balance = experts(own, norm(x, own["rms_norm_2/scale"]), real, key, wiring)
        return x + norm(mixed, own["rms_norm_3/scale"]), balance

    x = learnt.embedding[tokens] * CONFIG.embedding_multiplier_scale
    x, balance = lax.scan(layer, x, (weights, jax.random.split(key, CONFIG.num_layers)))
    logits = norm(x, learnt.norm) @ learnt.embedding.T * CONFIG.output_multiplier_scale
    return logits, balance.mean()
