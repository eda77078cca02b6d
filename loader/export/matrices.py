"""Matrices as other formats hold them: transposed, and in their element types. Pure: no I/O here.

Shapes: the official shards hold a matrix as `[K, N]`, with K the contracted axis; each of G groups
of K / G rows shares scales.

Source of Q8_0: llama.cpp, `block_q8_0` in ggml-common.h.
"""

from __future__ import annotations

from typing import Final, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from grokfetch.errors import Inexact

__all__ = [
    "BLOCK",
    "BLOCK_LENGTH",
    "Data",
    "ElementType",
    "bfloat16_scales",
    "bytes_of",
    "encode",
    "encode_quantized",
    "float16_scales",
    "row_bytes",
    "transposed",
    "transposed_back",
]

ElementType = Literal["F32", "F16", "BF16", "Q8_0"]
"""By their names in GGUF; safetensors has the same names for the first three."""

BLOCK_LENGTH: Final = 32
BLOCK: Final = np.dtype([("scale", "<f2"), ("values", "i1", BLOCK_LENGTH)])
"""Q8_0: 32 weights in a row and the scale that they share."""

FLOATS: Final[dict[str, np.dtype[np.generic]]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_STRIP: Final = 512
"""Rows transposed at once, few enough to stay in a core's cache."""

_UNIT: Final = 8
"""Neighbouring bytes that are moved together in the first step."""

_FLOAT_BLOCK: Final = 1 << 18
"""Most elements held as float32 at a time."""

Int8 = npt.NDArray[np.int8]
Float32 = npt.NDArray[np.float32]
Data = bytes | memoryview | npt.NDArray[np.generic]


def bytes_of(data: Data) -> memoryview:
    """The bytes themselves, or those of an array as a file holds them."""
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def row_bytes(kind: ElementType, length: int) -> int:
    """Bytes of a row of `length` elements; for Q8_0, a multiple of 32."""
    if kind == "Q8_0":
        return length // BLOCK_LENGTH * BLOCK.itemsize
    return length * FLOATS[kind].itemsize


def transposed(matrix: Int8) -> Int8:
    """The transpose `[N, K]` of `[K, N]` int8, C-contiguous."""
    rows, columns = matrix.shape
    result = np.empty((columns, rows), np.int8)
    _transpose(matrix, result[:, None])
    return result


def _transpose(matrix: Int8, into: Int8) -> None:
    """Write the transpose of `[K, N]` into `[N, K / B, B]`, with rows in blocks of B.

    Bytes are first moved eight at a time and then one by one within a core's cache. This is 20
    times as fast as copying the transpose, where each step goes to another page.
    """
    rows, columns = matrix.shape
    length = into.shape[-1]
    if columns % _UNIT:
        into[...] = matrix.T.reshape(into.shape)
        return
    by_eights = into.reshape(columns // _UNIT, _UNIT, -1, length)
    for start in range(0, rows, _STRIP):
        # It is copied because arrays in shards are not aligned.
        strip = np.ascontiguousarray(matrix[start : start + _STRIP])
        units = np.ascontiguousarray(strip.view(np.uint64).T).view(np.int8)
        within = min(length, len(strip))
        by_column = units.reshape(columns // _UNIT, -1, within, _UNIT).transpose(0, 3, 1, 2)
        block, offset = divmod(start, length)
        blocks = by_eights[:, :, block : block + by_column.shape[2]]
        blocks[..., offset : offset + within] = by_column


def encode(values: Float32, kind: ElementType) -> npt.NDArray[np.generic]:
    """float32 values in another floating-point type, rounded to nearest.

    Raises:
        Inexact: a finite value is beyond the range of float16.
    """
    with np.errstate(over="ignore"):
        result = values.astype(FLOATS[kind], copy=False)
    if kind == "F16" and not np.isfinite(result).all():
        raise Inexact(
            "a weight is beyond 65,504, the largest number of F16", hint="choose --type bf16 or f32"
        )
    return result


def encode_quantized(
    matrix: Int8, scales: npt.NDArray[np.generic], kind: ElementType
) -> npt.NDArray[np.generic]:
    """The weights that int8 values and their scales represent, transposed.

    Q8_0 and F32 are exact. For BF16 and F16 the product is rounded once; in BF16 these are the
    weights that the reference computes with.

    Args:
        matrix: `[K, N]`, as the shards hold it.
        scales: bfloat16 `[G, N]`.
        kind: type of the result.

    Returns:
        `[N, K / 32]` blocks for Q8_0, otherwise `[N, K]`.

    Raises:
        Inexact: a scale or a weight cannot be represented; the message says why.
    """
    length, count = matrix.shape
    groups = len(scales)
    if kind == "Q8_0":
        blocks = np.empty((count, length // BLOCK_LENGTH), BLOCK)
        _transpose(matrix, blocks["values"])
        each = length // BLOCK_LENGTH // groups
        blocks["scale"] = np.repeat(float16_scales(scales).T, each, axis=1)
        return blocks
    rows = transposed(matrix)
    result = np.empty((count, length), FLOATS[kind])
    factors = scales.astype(np.float32).T[:, :, None]
    step = max(1, _FLOAT_BLOCK // length)
    for start in range(0, count, step):
        part = slice(start, start + step)
        grouped = rows[part].reshape(-1, groups, length // groups)
        products = np.multiply(grouped, factors[part], dtype=np.float32)
        result[part] = encode(products.reshape(-1, length), kind)
    return result


def float16_scales(scales: npt.NDArray[np.generic]) -> npt.NDArray[np.float16]:
    """bfloat16 scales as float16, with the same shape and values.

    Raises:
        Inexact: float16 cannot represent one of them.
    """
    wanted = scales.astype(np.float32)
    with np.errstate(over="ignore"):
        result = wanted.astype(np.float16)
    wrong = ~np.isfinite(result) | (result.astype(np.float32) != wanted)
    if wrong.any():
        raise Inexact(
            f"its scale {wanted[wrong].flat[0]:.6g} cannot be represented in float16, "
            "in which Q8_0 keeps scales",
            hint="choose --type f32 or bf16",
        )
    return result


def transposed_back(blocks: npt.NDArray[np.void], rows: slice) -> Int8:
    """Rows of the int8 matrix `[K, N]` with the given Q8_0 blocks `[N, K / 32]`.

    Args:
        blocks: those of the whole matrix.
        rows: which of the K rows; both ends are multiples of 32.
    """
    part = blocks["values"][:, rows.start // BLOCK_LENGTH : rows.stop // BLOCK_LENGTH]
    return transposed(np.ascontiguousarray(part).reshape(len(blocks), -1))


def bfloat16_scales(blocks: npt.NDArray[np.void], groups: int) -> npt.NDArray[np.generic]:
    """The bfloat16 scales `[G, N]` of a matrix from its Q8_0 blocks `[N, K / 32]`.

    Raises:
        Inexact: blocks of a group have different scales, or bfloat16 cannot represent one. So they
            were not made from official shards.
    """
    by_group = blocks["scale"].reshape(len(blocks), groups, -1)
    first = by_group[:, :, :1]
    if (by_group.view(np.uint16) != first.view(np.uint16)).any():
        raise Inexact("blocks of one group of rows have different scales")
    wanted = first[:, :, 0].astype(np.float32)
    result = wanted.astype(ml_dtypes.bfloat16)
    if (result.astype(np.float32) != wanted).any():
        raise Inexact("a scale cannot be represented in bfloat16")
    return np.ascontiguousarray(result.T)
