"""Products of float32 activations with int8 matrices in memory, at the speed of that memory.

For the CPU, in plain JAX. XLA's CPU backend would write a converted matrix out as float32 before it
multiplies, which is 25 times slower than the memory allows; here a few rows at a time are converted
where they are used. Which formulation serves how many tokens is decided in `_sums` alone, from what
`benchmarks/kernels.py` measures. Products of bfloat16 are not among them: with activations in two
halves, as `quantized.product` needs them, they lost to float32 with and without AVX-512.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["Rows", "product", "row_dots"]

ROWS_OF_ONE_TOKEN = 8
"""Rows in one step over the matrix: fewer leave loads waiting, more spill registers."""

ROWS_OF_FEW_TOKENS = 4
COLUMNS = 1024
"""Columns whose sums for a few tokens stay in the first-level cache while rows pass."""

FEW_TOKENS = 64
"""Up to here rows are accumulated; above, blocks are converted and multiplied as matrices."""

ROWS_OF_MANY_TOKENS = 256

TABLE_ROWS = 256
"""Rows of a float32 table that are read before they are multiplied."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """A matrix of int8 in a flat buffer, or some columns of it.

    flat: int8 `[bytes]`, less than 2**31. start: int32 scalar, where the first row begins; may be
    known only at run time, like `column`, the first of the columns. count, width: rows, and columns
    of ours. stride: columns of the whole matrix.
    """

    flat: Array
    start: Array
    column: Array
    count: int
    width: int
    stride: int

    def row(self, index: Array) -> Array:
        """One row, float32 `[width]`."""
        at = self.start + index * self.stride + self.column
        return lax.dynamic_slice_in_dim(self.flat, at, self.width).astype(jnp.float32)

    def block(self, index: Array, rows: int) -> Array:
        """`rows` rows from `index` on, float32 `[rows, width]`."""
        at = self.start + index * self.stride
        whole = lax.dynamic_slice_in_dim(self.flat, at, rows * self.stride)
        part = lax.dynamic_slice_in_dim(
            whole.reshape(rows, self.stride), self.column, self.width, axis=1
        )
        return part.astype(jnp.float32)


def product(x: Array, rows: Rows, groups: int, scale: Callable[[Array], Array]) -> Array:
    """`x @ matrix`, with each group of rows scaled by columns after its products are summed.

    Args:
        x: float32 `[T, rows.count]`.
        rows: the int8 matrix.
        groups: runs of equally many rows with a scale of their own; divides `rows.count`.
        scale: from the int32 number of a group to its scales, float32 `[rows.width]`.

    Returns:
        float32 `[T, rows.width]`.
    """
    height = rows.count // groups

    def group(number: Array, total: Array) -> Array:
        first = number * height
        part = dataclasses.replace(rows, start=rows.start + first * rows.stride, count=height)
        factors = lax.dynamic_slice_in_dim(x, first, height, axis=1)
        return total + _sums(factors, part) * scale(number)

    zero = jnp.zeros((x.shape[0], rows.width), jnp.float32)
    total: Array = lax.fori_loop(0, groups, group, zero)
    return group(jnp.int32(0), zero) if groups == 1 else total


def _sums(x: Array, rows: Rows) -> Array:
    """`x @ matrix`, float32 `[T, rows.count]` to `[T, rows.width]`."""
    tokens = x.shape[0]
    if tokens <= 2:
        return _accumulated(x, rows, rows.width, ROWS_OF_ONE_TOKEN)
    if tokens <= FEW_TOKENS:
        return _accumulated(x, rows, math.gcd(rows.width, COLUMNS), ROWS_OF_FEW_TOKENS)
    step = math.gcd(rows.count, ROWS_OF_MANY_TOKENS)

    def multiply(index: Array, total: Array) -> Array:
        at = index * step
        part = lax.dynamic_slice_in_dim(x, at, step, axis=1)
        return total + jnp.dot(part, rows.block(at, step), precision=lax.Precision.HIGHEST)

    zero = jnp.zeros((tokens, rows.width), jnp.float32)
    total: Array = lax.fori_loop(0, rows.count // step, multiply, zero)
    return total


def _accumulated(x: Array, rows: Rows, columns: int, at_once: int) -> Array:
    """The same, row after row added to sums that lie in runs of `columns` for all tokens."""
    tokens, runs = x.shape[0], rows.width // columns
    step = math.gcd(rows.count, at_once)

    def add(index: Array, total: Array) -> Array:
        at = index * step
        factors = lax.dynamic_slice_in_dim(x, at, step, axis=1)
        for row in range(step):
            values = rows.row(at + row).reshape(runs, 1, columns)
            total = total + factors[None, :, row, None] * values
        return total

    zero = jnp.zeros((runs, tokens, columns), jnp.float32)
    total: Array = lax.fori_loop(0, rows.count // step, add, zero)
    return total.transpose(1, 0, 2).reshape(tokens, rows.width)


def row_dots(x: Array, read: Callable[[Array, int], Array], count: int) -> Array:
    """`x @ table.T` for a table read in blocks of rows.

    Args:
        x: float32 `[T, D]`.
        read: from the int32 number of a row and how many, to float32 `[rows, D]`.
        count: rows of the table.

    Returns:
        float32 `[T, count]`.
    """
    step = math.gcd(count, TABLE_ROWS)
    multiply = functools.partial(jnp.einsum, "td,rd->tr", precision=lax.Precision.HIGHEST)

    def block(index: Array, scores: Array) -> Array:
        part = multiply(x, read(index * step, step))
        return lax.dynamic_update_slice_in_dim(scores, part, index * step, axis=1)

    zero = jnp.zeros((x.shape[0], count), jnp.float32)
    scores: Array = lax.fori_loop(0, count // step, block, zero)
    return scores
