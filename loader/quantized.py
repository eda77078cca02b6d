"""How weights are held on a device, resident or mapped, and the products over them.

The model multiplies through `product` and `dots`, picks experts through `select` and embeds
through `lookup`, and knows no more about a weight than that; another way of holding weights needs
only these.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from loader.mapped import Mapped, MappedTable

__all__ = ["Quantized", "Table", "Weights", "dots", "lookup", "product", "select", "table_rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """An int8 matrix, or a stack of them, with a scale for each column of each group of rows.

    weight: int8 `[..., K, N]`. scales: bfloat16 `[..., G, N]`, G divides K; scale row g applies to
    the contiguous weight rows `g * K / G` to `(g + 1) * K / G`.
    """

    weight: Array
    scales: Array


Weights = Quantized | Mapped
Table = Array | MappedTable
"""A float32 table `[rows, columns]`, of which this device has its part of the rows."""


def select(weights: Weights, index: Array) -> Weights:
    """One matrix of a stack, at an index known only at run time.

    Args:
        weights: weight `[E, K, N]`, scales `[E, G, N]`.
        index: int32 scalar.

    Returns:
        weight `[K, N]`, scales `[G, N]`; inside a compiled product neither is copied whole, and of
        mapped weights no page of another matrix is touched.
    """
    if isinstance(weights, Mapped):
        return dataclasses.replace(weights, index=index)
    return Quantized(
        lax.dynamic_index_in_dim(weights.weight, index, keepdims=False),
        lax.dynamic_index_in_dim(weights.scales, index, keepdims=False),
    )


def product(x: Array, weights: Weights, dtype: jnp.dtype) -> Array:
    """`x @ dequantised(weights)`, without a dequantised matrix in memory.

    Every int8 value is exact in bfloat16. Products are summed in float32 and each group's sum is
    scaled once; the reference scales the weights first, and rounds them. In bfloat16, `x` is split
    into its rounded value and the rest, and both are multiplied at once: twice the rows over the
    same weights, which decoding does not notice, and no rounding of `x` to speak of.

    Args:
        x: float32 `[..., K]`.
        weights: weight `[K, N]`, scales `[G, N]`.
        dtype: float32 or bfloat16, what is multiplied; mapped weights are multiplied in float32
            either way, which is the faster on a CPU.

    Returns:
        float32 `[..., N]`.
    """
    if isinstance(weights, Mapped):
        return weights.product(x)
    if dtype == jnp.float32:
        return _grouped(x, weights)
    # A conversion to bfloat16 and back may be dropped by the compiler; this may not.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.sum(_grouped(jnp.stack((high, x - high)).astype(dtype), weights), axis=0)


def _grouped(x: Array, weights: Quantized) -> Array:
    groups, rows = weights.scales.shape[0], weights.weight.shape[0]
    total = jnp.zeros((), jnp.float32)
    # One product a group, not one batched over groups: XLA's CPU backend has no batched product of
    # bfloat16 with a float32 result.
    for group in range(groups):
        part = slice(group * rows // groups, (group + 1) * rows // groups)
        sums = jnp.einsum(
            "...k,kn->...n",
            x[..., part],
            weights.weight[part].astype(x.dtype),
            # Accelerators would otherwise multiply float32 in fewer bits than asked for.
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        total = total + sums * weights.scales[group].astype(jnp.float32)
    return total


def table_rows(table: Table) -> int:
    """Rows of this device's part of a table."""
    return table.rows if isinstance(table, MappedTable) else table.shape[0]


def lookup(table: Table, numbers: Array) -> Array:
    """Rows of this device's part by their numbers, int32 `[...]`: float32 `[..., columns]`."""
    return table.take(numbers) if isinstance(table, MappedTable) else table[numbers]


def dots(x: Array, table: Table, dtype: jnp.dtype) -> Array:
    """`x @ table.T` over this device's part.

    Args:
        x: float32 `[..., columns]`.
        table: resident or mapped.
        dtype: what is multiplied; a mapped table is multiplied in float32 either way.

    Returns:
        float32 `[..., rows]`.
    """
    if isinstance(table, MappedTable):
        return table.dots(x)
    return jnp.einsum(
        "...d,vd->...v",
        x.astype(dtype),
        table.astype(dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
