"""Products of float32 activations with int8 matrices in memory, at the speed of that memory.

For the CPU, in plain JAX. XLA's CPU backend would write a converted matrix out as float32 before it
multiplies, which is 25 times slower than the memory allows; here a few rows at a time are converted
where they are used. Only `_sums` decides which formulation serves how many tokens, by a `Tuning`
that `loader.devices.tuning` measures; on a machine with a compiler, `loader.devices.native` serves
all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jax import Array, lax

from loader.devices import native

__all__ = ["Rows", "Tuning", "product", "row_dots"]

SERIAL = 10_000
"""Values in a step of a loop beyond which XLA splits the step over the cores, which costs some
microseconds: measured, and what its cost model says of a converted product."""

SPLIT = 100_000
"""Values in a step that are worth that: between the two, a step of fewer rows is faster."""

WIDE = 16_384
"""From so many columns on, a few rows fill a step."""

SMALL = 1 << 16
"""Values of a group of rows that stay in a cache; none of Grok-1's are so few."""

FEW_ROWS = 8
"""Rows of such a group in a step for one token: more only take longer to compile."""

COLUMNS = 1024
"""Columns whose sums for a few tokens stay in the first-level cache while rows are added."""

TABLE_ROWS = 256
"""Rows of a float32 table that are read before they are multiplied."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tuning:
    """Which formulations suit a processor. The defaults are those of one with AVX-512.

    vector_width: bits that the compiler should prefer; its default, 256, is limited by conversions.
    wide_rows, narrow_rows: rows per step for one token, over a matrix of at least `WIDE` columns or
    of fewer: fewer rows leave loads waiting, more spill registers. few_tokens: up to so many tokens
    rows are accumulated; above, blocks are converted and multiplied as matrices. block_rows,
    block_columns: of such a block. halves: multiply blocks in bfloat16, and activations as the sum
    of two bfloat16 numbers, which pays where the processor has matrix instructions for them.
    native: leave all products to `loader.devices.native`, which must have been built. integers:
    compute those of many tokens in 16-bit integers, unless float32 is asked for.
    """

    vector_width: int = 512
    wide_rows: int = 16
    narrow_rows: int = 32
    few_tokens: int = 8
    block_rows: int = 2048
    block_columns: int = 512
    halves: bool = False
    native: bool = False
    integers: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """A matrix of int8 in a flat buffer, or some columns of it.

    flat: int8 `[bytes]`, less than 2**31. start: int32 scalar, where the first row begins; may be
    known only at run time, like `column`, the first column. count, width: our rows and columns.
    stride: columns of the whole matrix.
    """

    flat: Array
    start: Array
    column: Array
    count: int
    width: int
    stride: int

    def rows(self, first: Array, count: int) -> Iterator[Array]:
        """Some rows from one of ours on, each float32 `[width]`."""
        at = self.start + first * self.stride + self.column
        for number in range(count):
            yield _cut(self.flat, at + number * self.stride, self.width).astype(jnp.float32)

    def block(self, row: Array, rows: int, column: Array, columns: int) -> Array:
        """A block that begins at one of our rows and columns, int8 `[rows, columns]`."""
        at = self.start + row * self.stride
        whole = _cut(self.flat, at, rows * self.stride)
        return _cut(whole.reshape(rows, self.stride), self.column + column, columns, axis=1)


def _cut(array: Array, start: Array, size: int, axis: int = 0) -> Array:
    """A slice from an index that is never negative: looking for that takes longer to compile."""
    cut: Array = lax.dynamic_slice_in_dim(array, start, size, axis, allow_negative_indices=False)
    return cut


def product(
    x: Array, rows: Rows, groups: int, scale: Callable[[Array], Array], tuning: Tuning
) -> Array:
    """`x @ matrix`, with each group of rows scaled by columns after its products are summed.

    Args:
        x: float32 `[T, rows.count]`.
        rows: the int8 matrix.
        groups: how many equal runs of rows have their own scale; divides `rows.count`.
        scale: from the int32 number of a group to its scales, float32 `[rows.width]`.
        tuning: what suits this processor.

    Returns:
        float32 `[T, rows.width]`.
    """
    if tuning.native:
        place = jnp.stack((rows.start, rows.column, jnp.int32(rows.stride)))
        scales = jnp.stack([scale(jnp.int32(number)) for number in range(groups)])
        return native.product(x, rows.flat, place, scales, integers=tuning.integers)
    height = rows.count // groups

    def group(number: Array, total: Array) -> Array:
        first = number * height
        part = dataclasses.replace(rows, start=rows.start + first * rows.stride, count=height)
        factors = _cut(x, first, height, axis=1)
        return total + _sums(factors, part, tuning) * scale(number)

    zero = jnp.zeros((x.shape[0], rows.width), jnp.float32)
    if groups == 1:
        return group(jnp.int32(0), zero)
    total: Array = lax.fori_loop(0, groups, group, zero)
    return total


def _sums(x: Array, rows: Rows, tuning: Tuning) -> Array:
    """`x @ matrix`, float32 `[T, rows.count]` to `[T, rows.width]`."""
    tokens = x.shape[0]
    most = FEW_ROWS if rows.count * rows.width <= SMALL else rows.count
    if tokens == 1:
        at_once = min(most, _rows_of_one(rows.width, tuning))
        return _accumulated(x, rows, rows.width, at_once)
    if tokens <= tuning.few_tokens:
        at_once = min(most, tuning.wide_rows if tokens == 2 else tuning.wide_rows // 2)
        return _accumulated(x, rows, math.gcd(rows.width, COLUMNS), at_once)
    return _converted(x, rows, tuning)


def _rows_of_one(width: int, tuning: Tuning) -> int:
    """Rows in a step for one token."""
    rows = tuning.wide_rows if width >= WIDE else tuning.narrow_rows
    return rows if rows * width >= SPLIT else max(1, min(rows, SERIAL // width))


def _accumulated(x: Array, rows: Rows, columns: int, at_once: int) -> Array:
    """The same, row after row added to sums stored in runs of `columns` for all tokens."""
    tokens, runs = x.shape[0], rows.width // columns
    step = _divisor(rows.count, at_once)

    def add(index: Array, total: Array) -> Array:
        at = index * step
        factors = _cut(x, at, step, axis=1)
        for number, values in enumerate(rows.rows(at, step)):
            factor = lax.slice_in_dim(factors, number, number + 1, axis=1)
            total = total + factor[None] * values.reshape(runs, 1, columns)
        return total

    zero = jnp.zeros((runs, tokens, columns), jnp.float32)
    total: Array = lax.fori_loop(0, rows.count // step, add, zero)
    return total.transpose(1, 0, 2).reshape(tokens, rows.width)


def _converted(x: Array, rows: Rows, tuning: Tuning) -> Array:
    """The same, block after block converted and multiplied as a matrix."""
    tokens = x.shape[0]
    height = _divisor(rows.count, tuning.block_rows)
    width = _divisor(rows.width, tuning.block_columns)
    if tuning.halves:
        # The compiler may drop a conversion to bfloat16 and back, but not this.
        high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        x = jnp.concatenate((high, x - high)).astype(jnp.bfloat16)

    def columns(index: Array, sums: Array) -> Array:
        def multiply(number: Array, total: Array) -> Array:
            block = rows.block(number * height, height, index * width, width).astype(x.dtype)
            part = _cut(x, number * height, height, axis=1)
            return total + jnp.dot(
                part,
                block,
                precision=lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )

        zero = jnp.zeros((x.shape[0], width), jnp.float32)
        total = lax.fori_loop(0, rows.count // height, multiply, zero)
        if tuning.halves:
            total = total[:tokens] + total[tokens:]
        return lax.dynamic_update_slice_in_dim(sums, total, index * width, axis=1)

    zero = jnp.zeros((tokens, rows.width), jnp.float32)
    sums: Array = lax.fori_loop(0, rows.width // width, columns, zero)
    return sums


def _divisor(count: int, most: int) -> int:
    """The largest divisor of `count` that is not above `most`."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


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
