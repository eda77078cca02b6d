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

from loader.devices import kernels
from loader.devices.kernels import Rows, Tuning
from loader.devices.mapped import LONGEST, Mapped, MappedTable

__all__ = ["Quantized", "Table", "Weights", "dots", "lookup", "product", "select", "table_rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """An int8 matrix, or a stack of them, with a scale for each column of each group of rows.

    weight: int8 `[..., K, N]`. scales: bfloat16 `[..., G, N]`, G divides K; scale row g applies to
    the contiguous weight rows `g * K / G` to `(g + 1) * K / G`. index: int32 scalar, which matrix
    of the stack; None for a stack as a whole and for a single matrix. tuning: what suits the
    processor, where that is a CPU; None for accelerators.
    """

    weight: Array
    scales: Array
    index: Array | None = None
    tuning: Tuning | None = dataclasses.field(default=None, metadata={"static": True})


Weights = Quantized | Mapped
Table = Array | MappedTable
"""A float32 table `[rows, columns]`, of which this device has its part of the rows."""


def select(weights: Weights, index: Array) -> Weights:
    """One matrix of a stack, at an index known only at run time.

    Args:
        weights: weight `[E, K, N]`, scales `[E, G, N]`.
        index: int32 scalar.

    Returns:
        What `product` takes; inside a compiled product it is not copied whole, and of mapped
        weights no page of another matrix is touched.
    """
    if isinstance(weights, Mapped):
        return dataclasses.replace(weights, index=index)
    if weights.tuning is not None and weights.weight.size < LONGEST:
        return dataclasses.replace(weights, index=index)
    return dataclasses.replace(
        weights,
        weight=lax.dynamic_index_in_dim(weights.weight, index, keepdims=False),
        scales=lax.dynamic_index_in_dim(weights.scales, index, keepdims=False),
    )


def product(x: Array, weights: Weights, dtype: jnp.dtype) -> Array:
    """`x @ dequantised(weights)`, without a dequantised matrix in memory.

    Every int8 value is exact in bfloat16. Products are summed in float32 and each group's sum is
    scaled once; the reference scales the weights first, and rounds them. In bfloat16, `x` is split
    into its rounded value and the rest, and both are multiplied at once: twice the rows over the
    same weights, which decoding does not notice, and no rounding of `x` to speak of.

    Args:
        x: float32 `[..., K]`.
        weights: weight `[K, N]`, scales `[G, N]`, or from `select`.
        dtype: float32 or bfloat16, what accelerators multiply; CPUs multiply in float32 either
            way, which is the faster there.

    Returns:
        float32 `[..., N]`.
    """
    if isinstance(weights, Mapped):
        return weights.product(x)
    if weights.tuning is not None:
        return _in_place(x, weights, weights.tuning)
    if dtype == jnp.float32:
        return _grouped(x, weights)
    # A conversion to bfloat16 and back may be dropped by the compiler; this may not.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.sum(_grouped(jnp.stack((high, x - high)).astype(dtype), weights), axis=0)


def _in_place(x: Array, weights: Quantized, tuning: Tuning) -> Array:
    """The product on a CPU: rows are read where they lie in the stack."""
    groups, (height, width) = weights.scales.shape[-2], weights.weight.shape[-2:]
    index = jnp.int32(0) if weights.index is None else weights.index
    start, column = index * height * width, jnp.int32(0)
    rows = Rows(weights.weight.reshape(-1), start, column, height, width, stride=width)
    scales = weights.scales.reshape(-1, width)

    def scale(number: Array) -> Array:
        row: Array = lax.dynamic_index_in_dim(scales, index * groups + number, keepdims=False)
        return row.astype(jnp.float32)

    found = kernels.product(x.reshape(-1, height), rows, groups, scale, tuning)
    return found.reshape(*x.shape[:-1], width)


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


def dots(x: Array, table: Table) -> Array:
    """`x @ table.T` over this device's part, in float32: to convert the table is to write it anew.

    Args:
        x: float32 `[..., columns]`.
        table: resident or mapped.

    Returns:
        float32 `[..., rows]`.
    """
    if isinstance(table, MappedTable):
        return table.dots(x)
    return jnp.einsum(
        "...d,vd->...v",
        x,
        table,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
