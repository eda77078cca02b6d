"""A second forward pass like `loader/inference/model.py`, for gradients and with optional faults.

All experts are computed for every token, with gates of zero for those that are not chosen, while
the loader reads only the chosen ones. The weights are used as int8 will hold them; the gradient
passes straight through the rounding (Bengio et al. 2013).

Letters in shapes: B rows, T tokens, D width, L layers, E experts, F expert width, V vocabulary; K
and N rows and columns of a matrix, G its groups of rows that share scales; Q query heads of d
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from loader.weights.schema import GrokConfig, ParamSpec, parameters

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
    attn_output_multiplier=14 / math.sqrt(8),
    embedding_multiplier_scale=math.sqrt(64),
    output_multiplier_scale=0.5,
)

JITTER: Final = 0.1
"""Noise on the logarithm of the router's probabilities, so that no choice depends on rounding."""

SCORE_CAP: Final = 30.0
"""Attention scores lie between this and its negative. The multiplier above lets them reach it from
the start, so that the model comes to need it."""

FIRST_ADDED: Final = 0.3
GROWTH: Final = 1.3
"""What the halves of layer l add to the residual stream has the size `FIRST_ADDED * GROWTH**l`: it
matters beside what the layers before have left, so a layer in another's place disturbs all later
ones, and so does an embedding, of size 1, that was not multiplied."""

SPREAD: Final = 3.0
"""The scales of neighbouring columns and groups differ by up to this factor, both ways, so that
mixing them up shows."""

Weights = Mapping[str, Array]


class Wiring(NamedTuple):
    """How a model is assembled: correctly, or with one fault.

    order: int32 `[L]`, the layer that stands at each place. rolls: by tensor, how many places its
    scales are moved over groups and over columns. stride: positions a token is ahead of the last.
    lead: positions a query is ahead of its own key. pairs: int32 `[d]`, the dimension of a head
    that rotation takes for each. readers: int32 `[Q]`, the head of keys and values that each query
    head reads. gates: float32 `[3, 2]`, how much the output of the first, second and third expert
    counts: times its probability, and besides. cap: of attention scores. embedding: factor on the
    embedding multiplier.
    """

    order: Any
    rolls: dict[str, Any]
    stride: Any
    lead: Any
    pairs: Any
    readers: Any
    gates: Any
    cap: Any
    embedding: Any


class Parameters(NamedTuple):
    """What is trained: embedding `[V, D]`, final norm `[D]`, and by name each tensor of all layers.

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
        lead=np.float32(0),
        pairs=np.arange(CONFIG.key_size),
        readers=np.arange(CONFIG.num_q_heads) // (CONFIG.num_q_heads // CONFIG.num_kv_heads),
        gates=np.array([[1, 0], [1, 0], [0, 0]], np.float32),
        cap=np.float32(SCORE_CAP),
        embedding=np.float32(1),
    )


def faults() -> dict[str, list[Wiring]]:
    """Wirings, by kind, each with one of the faults that a loader can have."""
    plain, layers = right(), CONFIG.num_layers
    swapped = [np.arange(layers) for _ in range(layers - 1)]
    for first, order in enumerate(swapped):
        order[[first, first + 1]] = first + 1, first
    moved = {"columns": [0, 1], "groups": [1, 0]}
    rolled: dict[str, list[Wiring]] = {
        f"{name}'s scales moved over {axis}": [
            plain._replace(rolls=plain.rolls | {name: np.array(roll, np.int32)})
        ]
        for name in plain.rolls
        for axis, roll in moved.items()
        if axis == "columns" or grouped(name)
    }
    changes: dict[str, dict[str, Any]] = {
        "layers in the order of their files": {"order": np.array(sorted(range(layers), key=str))},
        "positions forgotten": {"stride": np.float32(0)},
        "queries one position ahead": {"lead": np.float32(1)},
        "neighbours paired for rotation": {"pairs": plain.pairs.reshape(-1, 2).T.reshape(-1)},
        "keys and values dealt to queries in turn": {
            "readers": np.arange(CONFIG.num_q_heads) % CONFIG.num_kv_heads
        },
        "second and third expert": {"gates": np.array([[0, 0], [1, 0], [1, 0]], np.float32)},
        "first expert alone": {"gates": np.array([[1, 0], [0, 0], [0, 0]], np.float32)},
        "equal gates": {"gates": np.array([[0, 0.5], [0, 0.5], [0, 0]], np.float32)},
        "scores without cap": {"cap": np.float32(1e6)},
        "embedding not multiplied": {
            "embedding": np.float32(1 / CONFIG.embedding_multiplier_scale)
        },
    }
    named = {name: [plain._replace(**change)] for name, change in changes.items()}
    return (
        {"neighbours swapped": [plain._replace(order=order) for order in swapped]} | named | rolled
    )


def stacked(wirings: Sequence[Wiring]) -> Wiring:
    """Wirings stacked into one, along a new first axis."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *wirings)


def grouped(name: str) -> bool:
    """Whether a tensor has more than one row of scales."""
    return (layer_specs()[name].scale_groups or 1) > 1


def initial(random: np.random.Generator) -> tuple[Parameters, dict[str, Any]]:
    """Parameters to start from, and the spread of each int8 tensor, float32 `[L, ..., G, N]`."""
    layers, spreads = {}, {}
    for name, spec in layer_specs().items():
        shape = (CONFIG.num_layers, *spec.shape)
        if name.endswith("scale"):
            after = name.startswith(("rms_norm_1", "rms_norm_3"))
            added = FIRST_ADDED * GROWTH ** np.arange(CONFIG.num_layers)[:, None]
            layers[name] = np.broadcast_to(added if after else 1.0, shape)
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
    """The weights of all layers that the parameters represent, before rounding."""
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


def picked(x: Array, numbers: Array) -> Array:
    """`x[..., numbers]` as a product, whose gradient is faster on a CPU."""
    return x @ jax.nn.one_hot(numbers, x.shape[-1], axis=0)


def rotate(x: Array, wiring: Wiring, lead: Array) -> Array:
    """Rotary embedding of `[B, T, heads, d]` from position `lead` on: i is paired with i + d/2."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    positions = jnp.arange(x.shape[1]) * wiring.stride + lead
    phases = positions[:, None, None] * frequencies
    cosine, sine = jnp.cos(phases), jnp.sin(phases)
    first, second = jnp.split(picked(x, wiring.pairs), 2, axis=-1)
    return jnp.concatenate(
        (first * cosine - second * sine, second * cosine + first * sine), axis=-1
    )


def attention(weights: Weights, x: Array, real: Array, wiring: Wiring) -> Array:
    """Causal attention over `[B, T, D]`; `real`, bool `[B, T]`, is False for the pad id."""

    def heads(name: str, *shape: int) -> Array:
        product = x @ weights[f"multi_head_attention/{name}/w"]
        return product.reshape(*x.shape[:2], *shape, CONFIG.key_size)

    queries = rotate(heads("query", CONFIG.num_q_heads), wiring, wiring.lead)
    keys = rotate(heads("key", CONFIG.num_kv_heads), wiring, jnp.zeros(()))
    values = heads("value", CONFIG.num_kv_heads)
    keys, values = (
        picked(each.swapaxes(-1, -2), wiring.readers).swapaxes(-1, -2) for each in (keys, values)
    )
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys) * CONFIG.attn_output_multiplier
    scores = wiring.cap * jnp.tanh(scores / wiring.cap)
    allowed = jnp.tri(x.shape[1], dtype=bool) & real[:, None]
    shares = jax.nn.softmax(jnp.where(allowed[:, None], scores, -1e30), axis=-1)
    mixed = jnp.einsum("bhts,bshd->bthd", shares, values)
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

    x = learnt.embedding[tokens] * CONFIG.embedding_multiplier_scale * wiring.embedding
    x, balance = lax.scan(
        jax.checkpoint(layer), x, (weights, jax.random.split(key, CONFIG.num_layers))
    )
    logits = norm(x, learnt.norm) @ learnt.embedding.T * CONFIG.output_multiplier_scale
    return logits, balance.mean()
