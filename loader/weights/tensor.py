"""One parameter in its file: lazy, read-only, mapped, at any offset.

Methods that a slice of `safetensors.safe_open` has too are called as there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import operator
from collections.abc import Iterator
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeGuard

import ml_dtypes
import numpy as np
import numpy.typing as npt

from grokfetch.errors import TOO_MANY_OPEN, CheckpointInvalid, StorageFailed, storage_failed
from grokfetch.open_files import map_file
from loader.weights.host_share import runs
from loader.weights.pages import CANNOT_MAP, Door, Pages
from loader.weights.schema import ParamSpec
from loader.weights.shard_values import ArraySpan

if TYPE_CHECKING:
    from loader.devices.transfer import OnDevices, Target

__all__ = ["Index", "Tensor", "index_spans"]

Index = Any
"""Whatever NumPy indexes with: integers, slices, `...`, new axes, integer arrays, masks."""

_Basic = SupportsIndex | slice | EllipsisType | tuple[SupportsIndex | slice | EllipsisType, ...]
"""What NumPy calls basic indexing, without new axes."""

_SHORT_FLOATS = frozenset(
    np.dtype(kind) for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
)
"""Floating-point dtypes that NumPy does not recognise as such."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter in its file; nothing is mapped before `weight` or `scales` is read.

    Both arrays are views into one read-only mapping, at offsets that need not be aligned. The
    mapping lives as long as the tensor or any view. A file that shrinks meanwhile kills the process
    (SIGBUS), so writers hold the folder's lock.

    If the file system cannot map files, an array is read into memory each time it is asked for, and
    lives as long as the caller keeps it.

    If the file is still being fetched, there is a `door`: reads of the weight wait there, and
    nothing else does.
    """

    spec: ParamSpec
    path: Path
    array: ArraySpan
    scale_span: ArraySpan | None = None
    door: Door | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.array.nbytes + (0 if self.scale_span is None else self.scale_span.nbytes)

    @property
    def weight(self) -> npt.NDArray[np.generic]:
        """float32 of `spec.shape`, or int8 if the tensor is quantised.

        Raises:
            StorageFailed: the file cannot be read.
            CheckpointInvalid: the file is shorter than when the checkpoint was opened.
        """
        if self.door is not None:
            self.door.require(self.array.offset, self.array.nbytes)
        return self._view(self.array)

    @property
    def scales(self) -> npt.NDArray[np.generic] | None:
        """bfloat16 of `spec.scale_shape`, None if the tensor is not quantised.

        Raises:
            StorageFailed: the file cannot be read.
            CheckpointInvalid: the file is shorter than when the checkpoint was opened.
        """
        return None if self.scale_span is None else self._view(self.scale_span)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the weight as stored: int8 if the tensor is quantised, else float32."""
        return np.dtype(self.spec.dtype)

    def get_shape(self) -> list[int]:
        """The shape, as a slice of `safetensors` gives it."""
        return list(self.spec.shape)

    def get_dtype(self) -> str:
        """The dtype, as a slice of `safetensors` names it: I8 or F32."""
        return {"int8": "I8", "float32": "F32"}[self.spec.dtype]

    def __getitem__(self, index: Index) -> npt.NDArray[np.generic]:
        """A part of the weight as stored, by whatever NumPy indexes with.

        For integers, slices and `...` it is a read-only view: only the pages that are used are
        read.
        """
        return self._awaited(index)[index]

    def _awaited(self, index: Index) -> npt.NDArray[np.generic]:
        """The weight, once the part that an index selects is there."""
        if self.door is None or not _is_basic(index):
            return self.weight
        spans = list(index_spans(self.array, index, self.door.gap))
        for start, length in spans:
            self.door.expect(start, length, at_once=True)
        for start, length in spans:
            self.door.require(start, length)
        return self._view(self.array)

    def __array__(
        self, dtype: npt.DTypeLike | None = None, *, copy: bool | None = None
    ) -> npt.NDArray[np.generic]:
        """The weight as stored, without scales, for `numpy.asarray` and the like."""
        return np.array(self.weight, dtype, copy=copy)

    def __len__(self) -> int:
        """Of the first dimension."""
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Tensor {self.spec.name}: {self.spec.dtype} {list(self.shape)}>"

    def dequantize(
        self, index: Index = ..., dtype: npt.DTypeLike = np.float32
    ) -> npt.NDArray[np.generic]:
        """The values that the weight stands for, or a part of them.

        An int8 times its bfloat16 scale is exact in float32, and rounded only to another `dtype`.

        Args:
            index: as for the tensor itself, like `numpy.s_[3, :, :128]`.
            dtype: of the result; floating-point.

        Returns:
            A new array, of the shape that the index gives.

        Raises:
            IndexError: the index does not fit the shape.
            TypeError: the dtype is not floating-point.
        """
        kind = np.dtype(dtype)
        if not (np.issubdtype(kind, np.floating) or kind in _SHORT_FLOATS):
            raise TypeError(f"dequantized values are floating-point, not {kind}")
        weight, scales = self._awaited(index), self.scales
        if scales is None:
            return np.array(weight[index], kind)
        if not _is_basic(index):
            return self._gathered(index, kind)
        cuts, result_shape = _cuts(weight.shape, index)
        *outer, rows, columns = cuts
        sizes = zip(cuts, self.shape, strict=True)
        values = np.empty([len(range(*cut.indices(size))) for cut, size in sizes], kind)
        for group, part, into in _groups(rows, self.shape[-2], scales.shape[-2]):
            np.multiply(
                weight[(*outer, part, columns)],
                scales[(*outer, slice(group, group + 1), columns)].astype(np.float32),
                out=values[(..., into, slice(None))],
                casting="unsafe",
                dtype=np.float32,
            )
        return values.reshape(result_shape)

    def _gathered(self, index: Any, dtype: np.dtype[Any]) -> npt.NDArray[np.generic]:
        """The values at integer arrays, masks or new axes: each element with its own scale."""
        assert self.scales is not None
        rows, groups = self.shape[-2], self.scales.shape[-2]
        scale_row = (np.arange(rows) * groups // rows)[:, None]
        places = np.ogrid[tuple(slice(size) for size in self.shape)]
        full = [np.broadcast_to(place, self.shape)[index] for place in places]
        full[-2] = np.broadcast_to(scale_row, self.shape)[index]
        values = self.weight[index].astype(np.float32) * self.scales[tuple(full)].astype(np.float32)
        return np.asarray(values, dtype)

    def to_jax(self, target: Target | None = None) -> OnDevices:
        """The tensor on devices; a thin call of `loader.devices.transfer.to_devices`.

        Args:
            target: a device, or a sharding that says where each part goes; None for all of it on
                jax's first device. Each of several processes reads what its own devices hold.

        Returns:
            float32, or int8 with its scales as `loader.devices.products.Quantized`. Scale rows are
            repeated if a device would hold part of one.
        """
        from loader.devices.transfer import to_devices

        return to_devices(self, target)

    @property
    def mappable(self) -> bool:
        """Whether the file system can map the file.

        Raises:
            StorageFailed: the file cannot be read.
        """
        return self._mapped is not None

    @property
    def file(self) -> npt.NDArray[np.uint8]:
        """The whole file in the mapping that `weight` and `scales` are views of; page aligned.

        Raises:
            StorageFailed: the file cannot be mapped.
        """
        return np.frombuffer(self._mapping(), np.uint8)

    def pages(self, start: int, nbytes: int) -> Pages:
        """The pages of bytes of the file, `start` counted from the file's first.

        Raises:
            StorageFailed: the file cannot be mapped.
        """
        return Pages(self.path, self._mapping(), start, nbytes, self.door)

    def read_into(self, start: int, target: npt.NDArray[np.generic]) -> None:
        """Read bytes of the weight, `start` counted from its first, into a contiguous array.

        Raises:
            StorageFailed: the file cannot be read.
            CheckpointInvalid: it is shorter than when the checkpoint was opened.
        """
        if self.door is not None:
            self.door.require(self.array.offset + start, target.nbytes)
        self._read(self.array.offset + start, target)

    def _read(self, at: int, target: npt.NDArray[np.generic]) -> None:
        left = target.reshape(-1).view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(at)
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise CheckpointInvalid(
                            f"{self.spec.name} has shrunk on disk", path=self.path
                        )
                    left = left[count:]
        except OSError as error:
            raise StorageFailed(f"cannot be read: {error.strerror}", path=self.path) from error

    def _view(self, span: ArraySpan) -> npt.NDArray[np.generic]:
        dtype = np.dtype(ml_dtypes.bfloat16 if span.dtype == "bfloat16" else span.dtype)
        mapped = self._mapped
        if mapped is None:
            data = np.empty(span.nbytes, np.uint8)
            self._read(span.offset, data)
            data.flags.writeable = False
            return np.ndarray(span.shape, dtype, data, order=span.order)
        if span.offset + span.nbytes > len(mapped):
            raise CheckpointInvalid(f"{self.spec.name} has shrunk on disk", path=self.path)
        return np.ndarray(span.shape, dtype, mapped, span.offset, order=span.order)

    def _mapping(self) -> mmap.mmap:
        if self._mapped is None:
            raise StorageFailed(
                "this file system cannot map files",
                path=self.path,
                hint="read the weights into memory: --placement sharded",
            )
        return self._mapped

    @functools.cached_property
    def _mapped(self) -> mmap.mmap | None:
        """The whole file in memory, None where the file system cannot map files."""
        try:
            with self.path.open("rb") as file:
                return map_file(file)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in CANNOT_MAP:
                return None
            if isinstance(error, OSError) and error.errno in TOO_MANY_OPEN:
                raise storage_failed(error, self.path) from error
            raise StorageFailed(f"cannot be mapped: {error}", path=self.path) from error


def _is_basic(index: Index) -> TypeGuard[_Basic]:
    """Whether an index consists only of integers, slices and `...`."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is ... or isinstance(part, slice | int | np.integer) for part in parts) and (
        not any(isinstance(part, bool) for part in parts)
    )


def _cuts(shape: tuple[int, ...], index: _Basic) -> tuple[list[slice], tuple[int, ...]]:
    """A slice for every axis, and the shape that the index gives.

    Raises:
        IndexError: the index does not fit the shape.
    """
    # A broadcast scalar has the shape but no memory, so NumPy itself tells what an index gives.
    result = np.broadcast_to(np.int8(0), shape)[index].shape
    given = index if isinstance(index, tuple) else (index,)
    at = next((place for place, part in enumerate(given) if part is ...), len(given))
    missing = len(shape) - sum(part is not ... for part in given)
    full = [*given[:at], *[slice(None)] * missing, *given[at + 1 :]]
    cuts = []
    for part, size in zip(full, shape, strict=True):
        if isinstance(part, slice):
            cuts.append(part)
        else:
            assert not isinstance(part, EllipsisType)
            place = operator.index(part) % size
            cuts.append(slice(place, place + 1))
    return cuts, result


def index_spans(array: ArraySpan, index: Index, gap: int) -> Iterator[tuple[int, int]]:
    """Start and length, in bytes of the file, of what an index selects of an array.

    Args:
        array: where it is.
        index: whatever NumPy indexes with; anything but integers, slices and `...` selects
            everything.
        gap: bytes; spans closer than this are joined.

    Raises:
        IndexError: the index does not fit the shape.
    """
    if not _is_basic(index):
        yield array.offset, array.nbytes
        return
    taken = [
        range(*cut.indices(size))
        for cut, size in zip(_cuts(array.shape, index)[0], array.shape, strict=True)
    ]
    if not all(taken):
        return
    hulls = [[(min(places[0], places[-1]), max(places[0], places[-1]) + 1)] for places in taken]
    item = array.nbytes // math.prod(array.shape)
    for start, stop in runs(array.shape, hulls, item, gap):
        yield array.offset + start, stop - start


def _groups(rows: slice, size: int, groups: int) -> Iterator[tuple[int, slice, slice]]:
    """The rows of each scale group that a slice of all `size` rows selects.

    Yields:
        The group, its rows as a slice of all, and the same rows as a slice of those taken.
    """
    taken = range(*rows.indices(size))
    place = 0
    while place < len(taken):
        group = taken[place] * groups // size
        inside = range(group * size // groups, (group + 1) * size // groups)
        edge = inside[-1] if taken.step > 0 else inside[0]
        count = (edge - taken[place]) // taken.step + 1
        stop = min(place + count, len(taken))
        last = taken[stop - 1] + taken.step
        yield group, slice(taken[place], None if last < 0 else last, taken.step), slice(place, stop)
        place = stop
