"""How weights are held on a device, resident or mapped, and the products over them.

The model multiplies through `product` and `dots`, picks experts through `select` and embeds through
`lookup`, and knows nothing else about a weight; another way of holding weights needs only these.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from loader.devices import kernels
from loader.devices.kernels import Rows, Tuning
from loader.devices.mapped import LONGEST, Mapped, MappedTable
from loader.devices.platforms import by_platform

__all__ = [
    "Quantized",
    "Table",
    "Weights",
    "cut",
    "dots",
    "each_product",
    "in_parts",
    "lookup",
    "product",
    "reads_decide",
    "select",
    "stack_product",
    "table_rows",
]

PART, PARTIAL_SUMS = 128, 196_608
"""When a GPU sums over the rows of a matrix: the fewest rows in a part, and about how many sums."""

FEW = 32
"""Tokens whose products take an accelerator no longer than reading the weights."""

FEW_GROUPS = 4
"""Groups of a matrix whose products of a few tokens a TPU may hold in memory together."""

LARGE = 8 << 20
"""From so many bytes of a product on, a GPU sums the groups of its matrix one after another."""

BUSY, SHORTEST = 6144, 256
"""Columns that keep a GPU busy with few tokens, and the fewest rows in a part of the sum."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """An int8 matrix, or a stack of them, with a scale for each column of each group of rows.

    weight: int8 `[..., K, N]`. scales: bfloat16 `[..., G, N]`, G divides K; scale row g applies to
    the contiguous weight rows `g * K / G` to `(g + 1) * K / G`. index: int32 scalar, which matrix
    of the stack; None for a stack as a whole and for a single matrix. tuning: what suits the
    processor, if that is a CPU; None for accelerators.
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
        What `product` takes; inside a compiled product it is not copied whole, and for mapped
        weights no page of another matrix is touched.
    """
    chosen = dataclasses.replace(weights, index=index)
    if isinstance(chosen, Mapped) or chosen.tuning is None or chosen.weight.size < LONGEST:
        return chosen
    return _matrix(chosen)


def _matrix(weights: Quantized) -> Quantized:
    """The chosen matrix of a stack as a single matrix."""
    if weights.index is None:
        return weights
    return Quantized(
        lax.dynamic_index_in_dim(weights.weight, weights.index, keepdims=False),
        lax.dynamic_index_in_dim(weights.scales, weights.index, keepdims=False),
        tuning=weights.tuning,
    )


def cut(weights: Weights, box: tuple[slice, slice, slice]) -> Quantized:
    """A part of a stack, known at compile time, that a GPU reads in place.

    Its compiler fuses such a slice into a product, unless something else needs its input; see
    `loader.devices.xla_setup.SLICES_APART`.

    Args:
        weights: weight `[E, K, N]`, scales `[E, G, N]`, resident.
        box: which matrices, rows (whole groups) and columns.

    Returns:
        weight int8 `[e, k, n]`, scales `[e, g, n]`.
    """
    assert isinstance(weights, Quantized)
    height = weights.weight.shape[1] // weights.scales.shape[1]
    matrices, rows, columns = box
    first, last, _ = rows.indices(weights.weight.shape[1])
    groups = slice(first // height, last // height)
    return Quantized(_box(weights.weight, *box), _box(weights.scales, matrices, groups, columns))


def _box(array: Array, *sides: slice) -> Array:
    """A slice for the compiler: indexing may become a gather."""
    bounds = [side.indices(size) for side, size in zip(sides, array.shape, strict=True)]
    return lax.slice(array, [start for start, _, _ in bounds], [stop for _, stop, _ in bounds])


def product(x: Array, weights: Weights, dtype: jnp.dtype, *, halves: bool = True) -> Array:
    """`x @ dequantised(weights)`, without a dequantised matrix in memory.

    Every int8 value is exact in bfloat16. Products are summed in float32 and each group's sum is
    scaled once; the reference scales the weights first, and rounds them. In bfloat16, `x` is split
    into its rounded value and the rest, and both are multiplied at once: twice the rows over the
    same weights, which costs decoding nothing, and rounds `x` hardly at all.

    Args:
        x: float32 `[..., K]`.
        weights: weight `[K, N]`, scales `[G, N]`, or from `select`.
        dtype: float32 or bfloat16, what accelerators multiply. CPUs multiply in float32 either way
            or, for bfloat16, in integers that are 2^7 times as fine, if that is faster.
        halves: whether `x` is split; otherwise it is rounded.

    Returns:
        float32 `[..., N]`.
    """
    return _product(x, weights, dtype, halves=halves)


def each_product(x: Array, several: Sequence[Weights], dtype: jnp.dtype) -> tuple[Array, ...]:
    """The `product` of the same `x` with each of several matrices.

    For a few tokens a GPU's compiler makes one kernel of them, which reads `x` once, as their sums
    are divided alike.
    """
    columns = sum(it.weight.shape[-1] for it in several if isinstance(it, Quantized))
    return tuple(_product(x, weights, dtype, columns=columns) for weights in several)


def _product(
    x: Array, weights: Weights, dtype: jnp.dtype, *, halves: bool = True, columns: int = 0
) -> Array:
    """The same; columns: of all matrices that are multiplied with this `x`, 0 for this one's."""
    if weights.tuning is not None and dtype == jnp.float32:
        tuning = dataclasses.replace(weights.tuning, integers=False)
        weights = dataclasses.replace(weights, tuning=tuning)
    if isinstance(weights, Mapped):
        return weights.product(x)
    if weights.tuning is not None:
        return _in_place(x, weights, weights.tuning)

    split = halves and dtype != jnp.float32
    multiplied = functools.partial(_grouped, dtype=dtype, split=split, in_turn=False)
    in_turn = functools.partial(_grouped, dtype=dtype, split=split, in_turn=True)

    if x.size == x.shape[-1]:
        return by_platform(_summed, multiplied, x, weights)
    if weights.index is None and reads_decide(weights, x.size // x.shape[-1]):

        def at_once(x: Array, weights: Quantized) -> Array:
            rows, one = x.reshape(-1, x.shape[-1]), jax.tree.map(lambda part: part[None], weights)
            return stack_product(rows, one, dtype, columns).reshape(*x.shape[:-1], -1)

        # For a matrix cut into groups, a GPU's compiler first writes all of it in another type, and
        # a TPU's holds the products of many groups in memory before it sums them.
        elsewhere = in_turn if weights.scales.shape[0] > FEW_GROUPS else multiplied
        return by_platform(at_once, elsewhere, x, weights)
    if 4 * x.size // x.shape[-1] * weights.weight.shape[-1] < LARGE:
        return multiplied(x, weights)
    # A GPU's compiler would hold the products of all groups in memory before it sums them.
    return by_platform(in_turn, multiplied, x, weights)


def reads_decide(weights: Weights, tokens: int) -> bool:
    """Whether a product of so many tokens takes as long as reading the weights."""
    return isinstance(weights, Quantized) and weights.tuning is None and tokens <= FEW


def _summed(x: Array, weights: Quantized) -> Array:
    """The product of one token as a sum over rows: int8 is read in place in the stack.

    A GPU's compiler makes one kernel of it, and also one of two such sums over the same `x`; for a
    matrix product in a library kernel it would copy the matrix. `x` is a vector, not a matrix of
    one row, and products are scaled within the sum: otherwise the stack is transposed first. Parts
    are summed first: if the compiler splits the sum itself, it may write out all addends, as for a
    B200, whose cache is large. The parts of large matrices are longer, so that there are few sums.
    """
    weights = _matrix(weights)
    groups, (rows, columns) = weights.scales.shape[0], weights.weight.shape
    size = math.gcd(rows // groups, max(PART, rows * columns // PARTIAL_SUMS))
    shape = (groups, rows // groups // size, size)
    matrix = weights.weight.reshape(*shape, columns).astype(jnp.float32)
    scaled = x.reshape(*shape, 1) * matrix * weights.scales[:, None, None].astype(jnp.float32)
    parts: Array = lax.optimization_barrier(jnp.sum(scaled, axis=2))  # type: ignore[no-untyped-call]
    return jnp.sum(parts, axis=(0, 1)).reshape(*x.shape[:-1], columns)


def stack_product(x: Array, weights: Weights, dtype: jnp.dtype, columns: int = 0) -> Array:
    """Each matrix of a stack with its own rows, as one product over the stack in place.

    Args:
        x: float32 `[E, T, K]`, or `[T, K]` if all have the same.
        weights: weight `[E, K, N]`, scales `[E, G, N]`, resident.
        dtype: as for `product`.
        columns: of all products of these rows together, if there are others.

    Returns:
        float32 `[E, T, N]`.
    """
    assert isinstance(weights, Quantized)

    def on_gpus(x: Array, weights: Quantized) -> Array:
        (stack, rows, width), groups = weights.weight.shape, weights.scales.shape[1]
        parts = in_parts(rows // groups, stack * groups * max(columns, width))
        # Split within the product: a GPU's compiler would write out the results of both halves.
        exact = dtype == jnp.float32
        precision = lax.Precision.HIGHEST if exact else lax.DotAlgorithmPreset.BF16_BF16_F32_X3
        return _stacked(x[..., None, :, :], weights, precision, parts)

    def elsewhere(x: Array, weights: Quantized) -> Array:
        halves = x[..., None, :, :] if dtype == jnp.float32 else jnp.moveaxis(_halves(x), 0, -3)
        return _stacked(halves, weights, lax.Precision.HIGHEST)

    return by_platform(on_gpus, elsewhere, x, weights)


def in_parts(length: int, columns: int) -> int:
    """How many parts to divide a sum into, so that a product of so many columns keeps a GPU busy.

    XLA's own division, which ignores the cost of writing and reading the sums of all parts, is
    turned off for few tokens: `loader.devices.xla_setup.sums_undivided`.
    """
    parts = 1
    while (
        parts * columns < BUSY and length % (2 * parts) == 0 and length // (2 * parts) >= SHORTEST
    ):
        parts *= 2
    return parts


def _stacked(
    x: Array,
    weights: Quantized,
    precision: lax.Precision | lax.DotAlgorithmPreset,
    parts: int = 1,
) -> Array:
    """Rows `[H, T, K]`, of a stack `[E, H, T, K]`, whose products are summed over H."""
    (halves, tokens, rows), (stack, groups) = x.shape[-3:], weights.scales.shape[:2]
    shape = (groups * parts, rows // groups // parts)
    grouped = x.reshape(*x.shape[:-3], halves * tokens, *shape)
    sums = jnp.einsum(
        "etgk,egkn->egtn",
        # Repeated last: a GPU's compiler then repeats within the product what was divided once.
        jnp.broadcast_to(grouped, (stack, *grouped.shape[-3:])),
        weights.weight.reshape(stack, *shape, -1).astype(x.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    each = sums.reshape(stack, groups, parts * halves, tokens, -1)
    return jnp.sum(each * weights.scales[:, :, None, None].astype(jnp.float32), axis=(1, 2))


def _halves(x: Array) -> Array:
    """float32 `[...]` as two of bfloat16, `[2, ...]`: its rounded value and the rest."""
    # The compiler may drop a conversion to bfloat16 and back, but not this.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.stack((high, x - high)).astype(jnp.bfloat16)


def _in_place(x: Array, weights: Quantized, tuning: Tuning) -> Array:
    """The product on a CPU: rows are read in place in the stack."""
    groups, (height, width) = weights.scales.shape[-2], weights.weight.shape[-2:]
    index = jnp.int32(0) if weights.index is None else weights.index
    start, column = index * height * width, jnp.int32(0)
    rows = Rows(weights.weight.reshape(-1), start, column, height, width, stride=width)
    scales = weights.scales.reshape(-1, width)

    def scale(number: Array) -> Array:
        row: Array = lax.dynamic_index_in_dim(scales, index * groups + number, keepdims=False)
        return row.astype(jnp.float32)

    flat = kernels.product(x.reshape(-1, height), rows, groups, scale, tuning)
    return flat.reshape(*x.shape[:-1], width)


def _grouped(
    x: Array, weights: Quantized, *, dtype: jnp.dtype, split: bool, in_turn: bool
) -> Array:
    """The product, group by group; `split`: of both halves of `x`.

    in_turn: one group after another, and the halves are summed at once, so that fewer sums are in
    memory together. The halves of a prompt are summed last on TPUs: summed at once, one v5p needs
    more memory.
    """
    x = _halves(x) if split else x.astype(dtype)
    groups, rows = weights.scales.shape[-2], weights.weight.shape[-2] // weights.scales.shape[-2]
    total = jnp.zeros((), jnp.float32)
    # One product a group, not one batched over groups: XLA's CPU backend has no batched product of
    # bfloat16 with a float32 result.
    for group in range(groups):
        if in_turn and group:
            x, total = lax.optimization_barrier((x, total))  # type: ignore[no-untyped-call]
        sums = jnp.einsum(
            "...k,kn->...n",
            x[..., group * rows : (group + 1) * rows],
            _rows(weights.weight, weights.index, group * rows, rows).astype(x.dtype),
            # Accelerators would otherwise multiply float32 in fewer bits than asked for.
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        scales = _rows(weights.scales, weights.index, group, 1)[0]
        summed = jnp.sum(sums, axis=0) if split and in_turn else sums
        total = total + summed * scales.astype(jnp.float32)
    return jnp.sum(total, axis=0) if split and not in_turn else total


def _rows(array: Array, index: Array | None, start: int, count: int) -> Array:
    """Some rows of a matrix, or of one of a stack.

    They are cut out of the stack in one step: otherwise, if several products use rows of a matrix,
    the matrix would be copied out first.
    """
    if index is None:
        return array[start : start + count]
    sliced: Array = lax.dynamic_slice(array, (index, start, 0), (1, count, array.shape[-1]))
    return sliced[0]


def table_rows(table: Table) -> int:
    """Rows of this device's part of a table."""
    return table.rows if isinstance(table, MappedTable) else table.shape[0]


def lookup(table: Table, numbers: Array) -> Array:
    """Rows of this device's part by their numbers, int32 `[...]`: float32 `[..., columns]`."""
    return table.take(numbers) if isinstance(table, MappedTable) else table[numbers]


def dots(x: Array, table: Table) -> Array:
    """`x @ table.T` over this device's part, in float32: a converted table would be written out.

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
