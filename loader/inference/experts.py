"""Routing and experts: few tokens read each expert once, many are sorted into blocks.

Like `loader.inference.model`, all of this runs on each device of a mesh, over its own experts and
its slice of each. Letters in shapes: N tokens of a step, D width, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from loader.devices.placement import Layer
from loader.devices.platforms import by_platform
from loader.devices.products import (
    Quantized,
    Weights,
    in_parts,
    product,
    reads_decide,
    select,
    stack_product,
)
from loader.inference.pieces import Matrices, by_pieces, each_group, pieces
from loader.weights.schema import GrokConfig

__all__ = [
    "Plan",
    "Routed",
    "block_size",
    "expert",
    "experts",
    "feed_forward",
    "plan",
    "route",
    "sum_over",
]

LARGEST_BLOCK = 128
"""The most tokens in one pass over an expert's weights; limits the padding of small groups."""

FEW_HELD = 2
"""At most so many experts of a device are multiplied at once instead of one after another."""

MANY_GROUPS = 4
"""From so many groups of a down projection on, a copied expert is too large for a GPU."""

TOGETHER = 3 << 20
"""From so many bytes of hidden layers and outputs on, a GPU computes fewer experts at once."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Routed:
    """The work of a layer's experts for the N = B * T tokens of a step.

    x: float32 `[N, D]`. choices: int32 `[N, chosen]`, most probable first. gates: float32
    `[N, chosen]`, the weight of each chosen expert's output.
    """

    x: Array
    choices: Array
    gates: Array


def sum_over(partial: Array, axes: str | tuple[str, ...]) -> Array:
    """The sum, on every device, of the devices' partial results along some axes of the mesh."""
    total: Array = lax.psum(partial, axes)  # type: ignore[no-untyped-call]
    return total


def route(x: Array, router: Array, chosen: int) -> tuple[Array, Array]:
    """The experts of each token and the weight of their outputs.

    The weights are the probabilities of a softmax over all experts; they are not normalised to sum
    to one over the chosen experts.

    Args:
        x: float32 `[N, D]`.
        router: float32 `[D, E]`, of all experts.
        chosen: experts a token.

    Returns:
        int32 `[N, chosen]` and float32 `[N, chosen]`, most probable first.
    """

    def divided(x: Array, router: Array) -> Array:
        parts = in_parts(*router.shape)
        grouped = x.reshape(x.shape[0], parts, -1), router.reshape(parts, -1, router.shape[1])
        sums = jnp.einsum("npd,pde->pne", *grouped, precision=lax.Precision.HIGHEST)
        return jnp.sum(sums, axis=0)

    def at_once(x: Array, router: Array) -> Array:
        return jnp.einsum("nd,de->ne", x, router, precision=lax.Precision.HIGHEST)

    scores = by_platform(divided, at_once, x, router)
    weights, choices = lax.top_k(jax.nn.softmax(scores, axis=-1), chosen)
    return choices, weights


def feed_forward(x: Array, matrices: Matrices, dtype: jnp.dtype, *, halves: bool = True) -> Array:
    """One expert over float32 `[N, D]`: the same shape, still to be summed over `model`."""
    gate, up, down = matrices

    def times(x: Array, weights: Weights) -> Array:
        return product(x, weights, dtype, halves=halves)

    # The reference's GELU is the tanh approximation.
    hidden = jax.nn.gelu(times(x, gate), approximate=True) * times(x, up)
    return times(hidden, down)


def expert(weights: Layer, number: Array, routed: Routed, pairs: Array, dtype: jnp.dtype) -> Array:
    """The weighted output of one expert for the tokens that chose it.

    Args:
        weights: the layer, with all experts on every device and part of each.
        number: int32 scalar, the expert.
        routed: all tokens of the step.
        pairs: int32 `[n]`, indices into the flattened `routed.choices`; those beyond its end are
            ignored.
        dtype: of the products.

    Returns:
        float32 `[N, D]`, the same on all devices of these rows; zero for all other tokens.
    """
    rows = pairs // routed.choices.shape[1]
    output = feed_forward(
        # Zeros beyond the pairs' end: the C program skips tokens of zeros.
        routed.x.at[rows].get(mode="fill", fill_value=0),
        _selected(weights, number),
        dtype,
    )
    gates = routed.gates.reshape(-1).at[pairs].get(mode="clip")
    weighted = gates[:, None] * sum_over(output, "model")
    return jnp.zeros(routed.x.shape, jnp.float32).at[rows].add(weighted, mode="drop")


def experts(
    weights: Layer, routed: Routed, real: Array, config: GrokConfig, dtype: jnp.dtype
) -> Array:
    """Each token's chosen experts, weighted and summed.

    For a few tokens an accelerator spends more time reading experts than multiplying: each is read
    once, in a loop whose length is known at compile time. Otherwise pairs of token and choice are
    sorted by expert and cut into blocks, and the weights of experts that no token chose are not
    read.

    Args:
        weights: the layer; this device holds some of the experts, and a slice of each.
        routed: the tokens and their choices.
        real: bool `[B, T]`; padding tokens get no expert.
        config: the hyperparameters.
        dtype: of the products.

    Returns:
        float32 `[N, D]`, the same on all devices of these rows.
    """
    held = config.num_experts // lax.axis_size("expert")
    local = routed.choices - lax.axis_index("expert") * held
    nobody = (local < 0) | (local >= held) | ~real.reshape(-1, 1)
    mine = dataclasses.replace(
        routed,
        choices=jnp.where(nobody, held, local),
        gates=jnp.where(nobody, 0.0, routed.gates),
    )
    if not reads_decide(weights.gate, routed.x.shape[0]):
        total = _by_blocks(weights, mine, held, config, dtype)
    elif routed.choices.size < held:
        total = _by_pairs(weights, mine, dtype)
    else:
        total = _by_experts(weights, mine, held, dtype)
    return sum_over(total, ("expert", "model"))


def _selected(weights: Layer, number: Array) -> Matrices:
    """Gate, up and down of one of this device's experts."""
    gate, up, down = (select(it, number) for it in (weights.gate, weights.up, weights.down))
    return gate, up, down


def _by_pairs(weights: Layer, routed: Routed, dtype: jnp.dtype) -> Array:
    """One trip for each pair of token and choice; those of other devices are ignored."""
    numbers, gates = routed.choices.reshape(-1), routed.gates.reshape(-1)
    chosen = routed.choices.shape[1]

    def pair(index: Array, total: Array) -> Array:
        row = index // chosen
        x = lax.dynamic_slice_in_dim(routed.x, row, 1)
        output = feed_forward(x, _selected(weights, numbers[index]), dtype)
        return total.at[row].add(gates[index] * output[0])

    total: Array = lax.fori_loop(0, numbers.size, pair, jnp.zeros_like(routed.x))
    return total


def _gates(routed: Routed, held: int) -> Array:
    """The weight of each expert of this device for each token, `[N, held]`: zero if not chosen."""
    taken = routed.choices[..., None] == jnp.arange(held)
    return jnp.sum(jnp.where(taken, routed.gates[..., None], 0.0), axis=1)


def _one_by_one(x: Array, weights: Layer, gates: Array, dtype: jnp.dtype) -> Array:
    """Every expert that this device holds over all tokens, one after another.

    One group of scales after another: otherwise a TPU's compiler would hold the hidden layer and
    the products of all groups in memory together.
    """
    down = weights.down
    assert isinstance(down, Quantized)
    in_groups = x.shape[0] > 1 and down.scales.shape[1] > 1

    def piece(x: Array, matrices: Matrices) -> Array:
        return feed_forward(x, matrices, dtype)

    def add(number: Array, total: Array) -> Array:
        if in_groups:
            output = each_group(x, weights, number, piece)
        else:
            output = piece(x, _selected(weights, number))
        return total + gates[:, number, None] * output

    total: Array = lax.fori_loop(0, gates.shape[1], add, jnp.zeros_like(x))
    return total


def _by_experts(weights: Layer, routed: Routed, held: int, dtype: jnp.dtype) -> Array:
    """Every expert that this device holds over all tokens, weighted with zero if not chosen."""

    def one(x: Array, weights: Layer, gates: Array) -> Array:
        return _one_by_one(x, weights, gates, dtype)

    def all_outputs(x: Array, matrices: Matrices) -> Array:
        gate, up, down = matrices
        hidden = jax.nn.gelu(stack_product(x, gate, dtype), approximate=True)
        return stack_product(hidden * stack_product(x, up, dtype), down, dtype)

    def together(x: Array, weights: Layer, gates: Array) -> Array:
        output = all_outputs(x, (weights.gate, weights.up, weights.down))
        return jnp.sum(gates.T[..., None] * output, axis=0)

    def in_pieces(x: Array, weights: Layer, gates: Array) -> Array:
        down = weights.down
        assert isinstance(down, Quantized)
        groups = down.scales.shape[1]
        parts, each = 1, 4 * x.shape[0] * (down.weight.shape[1] // groups + x.shape[1])
        while held // parts * each > TOGETHER and held % (2 * parts) == 0:
            parts *= 2
        if parts * groups == 1:
            return together(x, weights, gates)
        return by_pieces(x, gates, pieces(weights, parts), all_outputs)

    # In a loop a TPU would fetch a whole stack of few experts again for each of them.
    elsewhere = together if held <= FEW_HELD else one
    on_gpus = one if routed.x.shape[0] == 1 else in_pieces
    return by_platform(on_gpus, elsewhere, routed.x, weights, _gates(routed, held))


def _alone(x: Array, matrices: Matrices, dtype: jnp.dtype) -> Array:
    """`feed_forward` of a piece of one expert, for a prompt on GPUs: `[1, N, D]`."""
    gate, up, down = jax.tree.map(lambda part: part[0], matrices)
    # With the same tokens a GPU would merge both products, and write out both matrices for that.
    again = lax.optimization_barrier(x)  # type: ignore[no-untyped-call]
    hidden = jax.nn.gelu(product(x, gate, dtype, halves=False), approximate=True)
    hidden = hidden * product(again, up, dtype, halves=False)
    return product(hidden, down, dtype, halves=False)[None]


def _by_blocks(
    weights: Layer, routed: Routed, held: int, config: GrokConfig, dtype: jnp.dtype
) -> Array:
    """Blocks of pairs, each for one expert; their number is known only at run time.

    A GPU's host would wait for every trip of a loop of unknown length, and each block copies its
    expert out of the stack. So on GPUs the blocks are larger, and the loop runs for the greatest
    possible number; if a device holds only some of the experts, that would be several times the
    number needed, so each of its experts takes all tokens instead.
    """
    size = block_size(routed.choices.size, config.num_experts)

    def whole(x: Array, weights: Layer, number: Array) -> Array:
        # This arithmetic takes most of a prompt's time: docs/explanation/precision.md.
        return feed_forward(x, _selected(weights, number), dtype, halves=False)

    def by_groups(x: Array, weights: Layer, number: Array) -> Array:
        def piece(x: Array, matrices: Matrices) -> Array:
            return feed_forward(x, matrices, dtype, halves=False)

        if isinstance(weights.down, Quantized) and weights.down.scales.shape[1] < MANY_GROUPS:
            return whole(x, weights, number)
        return each_group(x.astype(dtype), weights, number, piece)

    def all_blocks(
        forward: Callable[[Array, Layer, Array], Array],
        weights: Layer,
        routed: Routed,
        largest: tuple[int, int | None],
    ) -> Array:
        size, most = largest
        blocks = plan(routed.choices.reshape(-1), held, size)

        def block(index: Array, total: Array) -> Array:
            expert, pairs, live = _block(blocks, index, size)
            # Entries beyond the group's end point outside: they read some row and add to none.
            rows = jnp.where(live, pairs // routed.choices.shape[1], routed.x.shape[0])
            x = routed.x.at[rows].get(mode="fill", fill_value=0)
            output = forward(x, weights, expert)
            gates = routed.gates.reshape(-1)[pairs]
            return total.at[rows].add(gates[:, None] * output, mode="drop")

        trips = blocks.ends[-1] if most is None else most
        total: Array = lax.fori_loop(0, trips, block, jnp.zeros_like(routed.x))
        return total

    def on_gpus(weights: Layer, routed: Routed) -> Array:
        if held < config.num_experts:
            # Rounded once, not for each piece.
            x, gates = routed.x.astype(dtype), _gates(routed, held)
            forward = functools.partial(_alone, dtype=dtype)
            return by_pieces(x, gates, pieces(weights, held), forward)
        larger = 2 * size
        most = routed.choices.size // larger + held - 1
        return all_blocks(by_groups, weights, routed, (larger, most))

    def elsewhere(weights: Layer, routed: Routed) -> Array:
        return all_blocks(whole, weights, routed, (size, None))

    return by_platform(on_gpus, elsewhere, weights, routed)


def block_size(pairs: int, num_experts: int) -> int:
    """Tokens in a block: about what an expert gets on average, one for a single token."""
    average = max(1, pairs // num_experts)
    return min(LARGEST_BLOCK, 1 << (average.bit_length() - 1))


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Pairs sorted by expert; for each expert, where its pairs start, how many, its last block."""

    order: Array
    starts: Array
    counts: Array
    blocks: Array
    ends: Array


def plan(choices: Array, held: int, size: int) -> Plan:
    """Divide choices of `held` experts, int32 `[pairs]`, into blocks of at most `size` pairs.

    A choice of `held` or more belongs to no expert here.
    """
    counts = jnp.sum(choices[:, None] == jnp.arange(held), axis=0)
    blocks = -(-counts // size)
    return Plan(
        order=jnp.argsort(choices, stable=True),
        starts=jnp.cumsum(counts) - counts,
        counts=counts,
        blocks=blocks,
        ends=jnp.cumsum(blocks),
    )


def _block(plan: Plan, index: Array, size: int) -> tuple[Array, Array, Array]:
    """A block's expert (scalar), its pairs `[size]`, and which of those are really the expert's."""
    # Blocks beyond the last have no live pair.
    expert = jnp.minimum(jnp.sum(plan.ends <= index), plan.ends.size - 1)
    first = index - (plan.ends - plan.blocks)[expert]
    ranks = first * size + jnp.arange(size)
    live = ranks < plan.counts[expert]
    return expert, plan.order[jnp.where(live, plan.starts[expert] + ranks, 0)], live
