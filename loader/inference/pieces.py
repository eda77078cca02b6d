"""Experts of a GPU piece by piece, so that less is copied or in memory at once.

Letters in shapes as in `loader.inference.experts`: N tokens of a step, D width, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from loader.devices.placement import Layer
from loader.devices.products import Quantized, Weights, cut

__all__ = ["Matrices", "by_pieces", "each_group", "pieces"]

Matrices: TypeAlias = tuple[Weights, Weights, Weights]
"""Gate, up and down of one expert."""


def pieces(weights: Layer, parts: int) -> Iterator[tuple[slice, Matrices]]:
    """A GPU's experts in pieces that are read in place, and which experts each belongs to.

    The experts are divided into `parts`; a piece is, for the experts of one part, the rows of the
    down projection that share a scale, with the columns that feed them.
    """
    down = weights.down
    assert isinstance(down, Quantized)
    held, groups = down.scales.shape[:2]
    rows, width = down.weight.shape[1] // groups, slice(None)
    for part, group in itertools.product(range(parts), range(groups)):
        some = slice(part * held // parts, (part + 1) * held // parts)
        inner = slice(group * rows, (group + 1) * rows)
        yield (
            some,
            (
                cut(weights.gate, (some, width, inner)),
                cut(weights.up, (some, width, inner)),
                cut(down, (some, inner, width)),
            ),
        )


def by_pieces(
    x: Array,
    gates: Array,
    those: Iterable[tuple[slice, Matrices]],
    forward: Callable[[Array, Matrices], Array],
) -> Array:
    """All tokens through all experts of a GPU, one piece's hidden layer in memory at a time.

    Args:
        x: `[N, D]`, of a type that `forward` takes.
        gates: float32 `[N, E]`.
        those: as from `pieces`.
        forward: computes a piece, with stacks of e matrices: float32 `[e, N, D]`.

    Returns:
        float32 `[N, D]`.
    """
    total = jnp.zeros(x.shape, jnp.float32)
    for some, matrices in those:
        total = total + jnp.sum(gates.T[some, :, None] * forward(x, matrices), axis=0)
        x, total = lax.optimization_barrier((x, total))  # type: ignore[no-untyped-call]
    return total


def each_group(
    x: Array, weights: Layer, number: Array, forward: Callable[[Array, Matrices], Array]
) -> Array:
    """One expert over `[N, D]`, with the rows of its down projection that share a scale at a time.

    If an index is known only at run time, a GPU copies that operand out of the stack; this way the
    copy has only one group's rows, and the columns that feed them. number: int32 scalar, the
    expert.
    """
    down = weights.down
    assert isinstance(down, Quantized)
    groups, width = down.scales.shape[1], down.weight.shape[2]
    rows = down.weight.shape[1] // groups
    total = jnp.zeros(x.shape, jnp.float32)
    for group in range(groups):
        gate, up = (
            Quantized(
                _at(it.weight, number, (0, group * rows), (it.weight.shape[1], rows)),
                _at(it.scales, number, (0, group * rows), (it.scales.shape[1], rows)),
            )
            for it in (weights.gate, weights.up)
            if isinstance(it, Quantized)
        )
        fed = Quantized(
            _at(down.weight, number, (group * rows, 0), (rows, width)),
            _at(down.scales, number, (group, 0), (1, width)),
        )
        total = total + forward(x, (gate, up, fed))
        # The number too: otherwise all groups are copied before the first is multiplied.
        x, total, number = lax.optimization_barrier(  # type: ignore[no-untyped-call]
            (x, total, number)
        )
    return total


def _at(array: Array, number: Array, start: tuple[int, int], size: tuple[int, int]) -> Array:
    box: Array = lax.dynamic_slice(array, (number, *start), (1, *size))
    return box[0]
