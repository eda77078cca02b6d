"""What the values in a shard's pickle mean: spans of arrays, and nothing else.

The reader (`loader.weights.shard_reader`) puts these on its stack in place of the objects that an
unpickler would make; each takes its state only if NumPy could have written it. The tables of
globals and dtypes are closed, and the writer (`loader.weights.shard_writer`) spells dtypes by the
same table.

Source of the format: NumPy `array_reduce` and `arraydescr_reduce`, xai-org/grok-1 `model.py` for
QuantizedWeight8bit.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Final, Literal

__all__ = [
    "DTYPES",
    "GLOBALS",
    "ArraySpan",
    "Flag",
    "Global",
    "Payload",
    "PendingArray",
    "PendingDtype",
    "PendingWeight",
    "Refusal",
    "Shard",
]

_MAX_RANK: Final = 64
_MAX_BYTES: Final = 2**63 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySpan:
    """Where an array is in a file and how to read it; little-endian, unaligned.

    `dtype` is a NumPy name (float32, int8, ...) or bfloat16, `offset` and `nbytes` are in bytes,
    and `order` says which index runs fastest in the file: C the last, F the first.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    order: Literal["C", "F"]


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """The content of one file: a plain array, or int8 weights `[..., K, N]` with their scales.

    `scales` is bfloat16 `[..., G, N]`, G a divisor of K; None for a plain array.
    """

    array: ArraySpan
    scales: ArraySpan | None = None


class Refusal(Exception):
    """What is wrong with the opcode at hand; `read_slices` adds where."""


class Flag(enum.Enum):
    """True and False, apart from 1 and 0, to which Python's are equal."""

    TRUE = enum.auto()
    FALSE = enum.auto()


class Global(enum.Enum):
    """Stands for a global; the global itself is never looked up."""

    RECONSTRUCT = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    BFLOAT16 = enum.auto()
    QUANTIZED = enum.auto()


GLOBALS: Final = {
    ("numpy.core.multiarray", "_reconstruct"): Global.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): Global.RECONSTRUCT,
    ("numpy", "ndarray"): Global.NDARRAY,
    ("numpy", "dtype"): Global.DTYPE,
    ("ml_dtypes", "bfloat16"): Global.BFLOAT16,
    ("__main__", "QuantizedWeight8bit"): Global.QUANTIZED,
}

DTYPES: Final[dict[object, tuple[str, int]]] = {
    "f2": ("float16", 2),
    "f4": ("float32", 4),
    "f8": ("float64", 8),
    "i1": ("int8", 1),
    "i2": ("int16", 2),
    "i4": ("int32", 4),
    "i8": ("int64", 8),
    "u1": ("uint8", 1),
    "u2": ("uint16", 2),
    "u4": ("uint32", 4),
    "u8": ("uint64", 8),
    Global.BFLOAT16: ("bfloat16", 2),
}
"""The first argument of `numpy.dtype`, and the name and item size in bytes that it means."""


@dataclasses.dataclass(frozen=True, slots=True)
class Payload:
    """A bytes object, left in the file."""

    offset: int
    nbytes: int


@dataclasses.dataclass(slots=True, eq=False)
class PendingDtype:
    """A dtype; usable once its state has said that it is little-endian."""

    name: str
    item_bytes: int
    complete: bool = False

    def take(self, state: object) -> None:
        """Accept version 3, byte order, no structure, item size, alignment and flags.

        Raises:
            Refusal: NumPy would not have written it, or it is big-endian.
        """
        match state:
            case (3, ("<" | "|") as order, None, None, None, int() as size, int(), int()):
                # -1 stands for the type's own size; bfloat16 writes its size.
                if size in (-1, self.item_bytes) and (order == "|") == (self.item_bytes == 1):
                    self.complete = True
                    return
            case (3, ">", *_):
                raise Refusal("the array is big-endian")
        raise Refusal(f"the state of dtype {self.name} is not one that NumPy writes")


@dataclasses.dataclass(slots=True, eq=False)
class PendingArray:
    """An array; `span` is None until its state is there."""

    span: ArraySpan | None = None

    def take(self, state: object) -> None:
        """Accept version 1, shape, dtype, whether in Fortran order, and payload.

        Raises:
            Refusal: NumPy would not have written it, or the payload does not fit the shape.
        """
        match state:
            case (
                1,
                tuple() as shape,
                PendingDtype(complete=True) as dtype,
                Flag() as fortran,
                Payload() as payload,
            ):
                dimensions = _dimensions(shape, dtype, payload)
            case _:
                raise Refusal("the state of the array is not one that NumPy writes")
        order: Literal["C", "F"] = "F" if fortran is Flag.TRUE else "C"
        self.span = ArraySpan(dtype.name, dimensions, payload.offset, payload.nbytes, order)


def _dimensions(
    shape: tuple[object, ...], dtype: PendingDtype, payload: Payload
) -> tuple[int, ...]:
    dimensions = tuple(size for size in shape if isinstance(size, int) and size >= 0)
    if len(dimensions) != len(shape) or len(shape) > _MAX_RANK:
        raise Refusal(f"the shape is not made of at most {_MAX_RANK} sizes")
    # Zeros count as ones: NumPy also limits the other dimensions of an empty array.
    if math.prod(max(size, 1) for size in dimensions) * dtype.item_bytes > _MAX_BYTES:
        raise Refusal("the shape is larger than any memory")
    needed = math.prod(dimensions) * dtype.item_bytes
    if needed != payload.nbytes:
        raise Refusal(
            f"shape {dimensions} of {dtype.name} takes {needed} bytes, "
            f"the payload has {payload.nbytes}"
        )
    return dimensions


@dataclasses.dataclass(slots=True, eq=False)
class PendingWeight:
    """A QuantizedWeight8bit; `shard` is None until its state is there."""

    shard: Shard | None = None

    def take(self, state: object) -> None:
        """Accept a dictionary of two complete arrays, weight and scales.

        Raises:
            Refusal: they are not int8 `[..., K, N]` and bfloat16 `[..., G, N]`, G a divisor of K,
                or they overlap in the file.
        """
        match state:
            case {
                "weight": PendingArray(span=ArraySpan() as weight),
                "scales": PendingArray(span=ArraySpan() as scales),
                **others,
            } if not others:
                _check_quantized(weight, scales)
            case _:
                raise Refusal("a quantised weight has two fields, the arrays weight and scales")
        self.shard = Shard(weight, scales)


def _check_quantized(weight: ArraySpan, scales: ArraySpan) -> None:
    if (weight.dtype, scales.dtype) != ("int8", "bfloat16"):
        raise Refusal(f"int8 weights and bfloat16 scales, not {weight.dtype} and {scales.dtype}")
    if min(len(weight.shape), len(scales.shape)) < 2:
        raise Refusal("weights and scales have two dimensions or more")
    *batch, rows, columns = weight.shape
    *scale_batch, groups, scale_columns = scales.shape
    if (batch, columns) != (scale_batch, scale_columns) or not groups or rows % groups:
        raise Refusal(f"scales of shape {scales.shape} do not fit weights of {weight.shape}")
    first, second = sorted((weight, scales), key=lambda span: span.offset)
    if first.offset + first.nbytes > second.offset:
        raise Refusal("weights and scales overlap")
