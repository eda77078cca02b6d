"""Weights that stay in the mapped pages of their shard files; a device uses them without a copy.

JAX's CPU backend uses a buffer without a copy if its address is a multiple of 64, which a payload's
is not. So it gets the whole file, whose mapping begins on a page, as one flat array; the place of
the payload in it is static, and the compiled product reads rows from there. Several devices of one
machine share the buffer, each reading its part. Pages are read from the disk when a product first
touches them, and never count as our memory.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from loader.devices.kernels import Rows, Tuning, product, row_dots

__all__ = ["Mapped", "MappedTable", "MatrixPlace", "TablePlace"]

LONGEST = 2**31
"""Elements that JAX's 32-bit indices can tell apart."""


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixPlace:
    """Where an int8 matrix, or a stack of them, and its scales are in their file.

    offset, scales_offset: bytes from the start of the file. stack: matrices, 1 for a single one.
    rows, columns: of each matrix. groups: rows of bfloat16 scales of each, `[groups, columns]`.
    split: what the devices along the mesh axis `model` divide, into `ways` parts.
    """

    offset: int
    scales_offset: int
    stack: int
    rows: int
    columns: int
    groups: int
    split: Literal["rows", "columns"]
    ways: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Mapped:
    """An int8 matrix in its file, or a stack of them.

    file: int8 `[bytes of the file]`, the same buffer on every device. index: int32 scalar, which
    matrix of the stack; None for a stack as a whole and for a single matrix.
    """

    file: Array
    index: Array | None
    place: MatrixPlace = dataclasses.field(metadata={"static": True})
    tuning: Tuning = dataclasses.field(default=Tuning(), metadata={"static": True})

    def product(self, x: Array) -> Array:
        """`x @ dequantised(part)`, `part` being this device's rows or columns of the matrix.

        Products and sums are float32.

        Args:
            x: float32 `[..., K]`, K this device's rows.

        Returns:
            float32 `[..., N]`, N this device's columns.
        """
        place = self.place
        part = lax.axis_index("model") if place.ways > 1 else jnp.int32(0)
        height, width = place.rows, place.columns
        row = column = jnp.int32(0)
        if place.split == "rows":
            height //= place.ways
            row = part * height
        else:
            width //= place.ways
            column = part * width
        index = jnp.int32(0) if self.index is None else self.index
        start = place.offset + (index * place.rows + row) * place.columns
        rows = Rows(self.file, start, column, height, width, place.columns)
        # A device may hold part of a group, or several groups, complete or not.
        of_group = place.rows // place.groups
        run = math.gcd(height, of_group)

        def scale(number: Array) -> Array:
            group = index * place.groups + (row + number * run) // of_group
            return self._scales(group * place.columns + column, width)

        flat = product(x.reshape(-1, height), rows, height // run, scale, self.tuning)
        return flat.reshape(*x.shape[:-1], width)

    def _scales(self, first: Array, count: int) -> Array:
        at = self.place.scales_offset + 2 * first
        pairs = lax.dynamic_slice_in_dim(self.file, at, 2 * count).reshape(count, 2)
        return lax.bitcast_convert_type(pairs, jnp.bfloat16).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class TablePlace:
    """Where a float32 table `[rows, columns]` is in its file, `offset` bytes from the start.

    The devices along the mesh axis `model` divide its rows into `ways` parts.
    """

    offset: int
    rows: int
    columns: int
    ways: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class MappedTable:
    """A float32 table in its file, which need not be aligned to its elements.

    words: uint32 `[whole words of the file]`, the same buffer on every device. A float32 is
    assembled from the two words that it spans; there would be too many bytes to index.
    """

    words: Array
    place: TablePlace = dataclasses.field(metadata={"static": True})

    @property
    def rows(self) -> int:
        """Rows of this device's part."""
        return self.place.rows // self.place.ways

    def take(self, tokens: Array) -> Array:
        """Rows of this device's part by their numbers, int32 `[...]`: float32 `[..., columns]`."""
        first = self._first(tokens)[..., None]
        at = first + jnp.arange(self.place.columns)
        return self._joined(self.words[at], self.words[at + 1])

    def dots(self, x: Array) -> Array:
        """`x @ part.T`, float32 `[..., columns]` to float32 `[..., rows]`."""
        columns = self.place.columns

        def read(row: Array, count: int) -> Array:
            # Two slices: parts of one longer slice would be written out before they are joined.
            low, high = (
                lax.dynamic_slice_in_dim(self.words, self._first(row) + more, count * columns)
                for more in (0, 1)
            )
            return self._joined(low, high).reshape(count, columns)

        flat = row_dots(x.reshape(-1, columns), read, self.rows)
        return flat.reshape(*x.shape[:-1], self.rows)

    def _first(self, row: Array) -> Array:
        """The word in which a row of this device's part begins."""
        part = lax.axis_index("model") if self.place.ways > 1 else 0
        return self.place.offset // 4 + (part * self.rows + row) * self.place.columns

    def _joined(self, low: Array, high: Array) -> Array:
        """The float32 that begin in the words `low`, each followed by the word in `high`."""
        shift = self.place.offset % 4 * 8
        bits = low if shift == 0 else (low >> shift) | (high << (32 - shift))
        return lax.bitcast_convert_type(bits, jnp.float32)
