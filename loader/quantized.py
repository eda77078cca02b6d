"""int8 weights with scales: how they are held on a device, and the one product over them.

The model multiplies through `product` and picks experts through `select`, and knows no more about a
weight than that; another way of holding weights needs only these two.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["Quantized", "product", "select"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """An int8 matrix, or a stack of them, with a scale for each column of each group of rows.

    weight: int8 `[..., K, N]`. scales: bfloat16 `[..., G, N]`, G divides K; scale row g applies to
    the contiguous weight rows `g * K / G` to `(g + 1) * K / G`.
    """

    weight: Array
    scales: Array


def select(weights: Quantized, index: Array) -> Quantized:
    """One matrix of a stack, at an index known only at run time.

    Args:
        weights: weight `[E, K, N]`, scales `[E, G, N]`.
        index: int32 scalar.

    Returns:
        weight `[K, N]`, scales `[G, N]`; inside a compiled product neither is copied whole.
    """
    return Quantized(
        lax.dynamic_index_in_dim(weights.weight, index, keepdims=False),
        lax.dynamic_index_in_dim(weights.scales, index, keepdims=False),
    )


def product(x: Array, weights: Quantized) -> Array:
    """`x @ dequantised(weights)`, without a dequantised matrix in memory.

    Every int8 value is exact in bfloat16, so the weights take the dtype of `x`; products are
    summed in float32 and each group's sum is scaled once, which is also more accurate than scaling
    the weights first as the reference does.

    Args:
        x: `[..., K]`, float32 or bfloat16.
        weights: weight `[K, N]`, scales `[G, N]`.

    Returns:
        float32 `[..., N]`.
    """
    groups = weights.scales.shape[0]
    rows, columns = weights.weight.shape
    sums = jnp.einsum(
        "...gk,gkn->...gn",
        x.reshape(*x.shape[:-1], groups, rows // groups),
        weights.weight.reshape(groups, rows // groups, columns).astype(x.dtype),
        # Accelerators would otherwise multiply float32 in fewer bits than asked for.
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(sums * weights.scales.astype(jnp.float32), axis=-2)
