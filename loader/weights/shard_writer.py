"""Writes a shard file, byte for byte as the official ones were written.

That is `pickle.dump(tensor, file, protocol=4)` by CPython's C pickler with NumPy 1.x. The bytes
around the payloads follow from dtypes and shapes alone, so `frame_layout` gives the size of a file
and the place of every array in it before there is any data.

Source of the format: CPython `Modules/_pickle.c`, PEP 3154 (framing), NumPy `array_reduce`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from loader.weights.shard_values import DTYPES, ArraySpan, Global, Shard

__all__ = ["FrameLayout", "frame_layout", "write_blocks", "write_shard"]

# A frame is closed before the next object once it holds 64 KiB; payloads of that size go outside
# frames; a frame of fewer than 4 bytes gets no header.
_FRAME_TARGET: Final = 64 * 1024
_FRAME_MIN: Final = 4
_FRAME_HEADER: Final = 9

_PROTOCOL: Final = b"\x80\x04"
_BLOCK_BYTES: Final = 16 * 1024 * 1024

_CODES: Final = {name: (code, size) for code, (name, size) in DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class FrameLayout:
    """A shard file without its payloads: where they go, and the bytes around them.

    `around` holds one more piece than there are payloads: before, between and after them.
    """

    shard: Shard
    around: tuple[bytes, ...]

    @property
    def spans(self) -> tuple[ArraySpan, ...]:
        """The payloads in file order: the array, then the scales if there are any."""
        shard = self.shard
        return (shard.array,) if shard.scales is None else (shard.array, shard.scales)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return sum(map(len, self.around)) + sum(span.nbytes for span in self.spans)


def frame_layout(
    dtype: str, shape: tuple[int, ...], scale_shape: tuple[int, ...] | None = None
) -> FrameLayout:
    """The layout of a plain array or, with a `scale_shape`, of a QuantizedWeight8bit.

    Args:
        dtype: of the array; int8 if there are scales, which are bfloat16.
        shape: of the array, `[..., K, N]`.
        scale_shape: `[..., G, N]`, None for a plain array.

    Raises:
        ValueError: the dtype is not a plain number, or an array has fewer than two bytes. (CPython
            keeps one object for each such bytes value, so its pickle would depend on the data.)
    """
    pickler = _Pickler()
    if scale_shape is None:
        pickler.array(dtype, shape)
    else:
        pickler.quantized(dtype, shape, scale_shape)
    around = pickler.finish()
    position = 0
    spans = []
    for piece, (name, dimensions, nbytes) in zip(around, pickler.payloads, strict=False):
        position += len(piece)
        spans.append(ArraySpan(name, dimensions, position, nbytes, "C"))
        position += nbytes
    return FrameLayout(Shard(*spans), around)


def write_shard(
    path: str | os.PathLike[str],
    array: npt.NDArray[np.generic],
    scales: npt.NDArray[np.generic] | None = None,
) -> FrameLayout:
    """Write an array, or int8 weights `[..., K, N]` with bfloat16 scales `[..., G, N]`, to a file.

    Arrays are written in C order whatever their own. Returns the layout of the file.

    Raises:
        ValueError: an array has fewer than two bytes, or a dtype that a shard does not hold.
        OSError: as writing a file does.
    """
    layout = frame_layout(
        array.dtype.name, array.shape, None if scales is None else tuple(scales.shape)
    )
    blocks = [_blocks(array)] if scales is None else [_blocks(array), _blocks(scales)]
    with Path(path).open("wb") as file:
        write_blocks(file, layout, *blocks)
    return layout


def write_blocks(
    file: BinaryIO, layout: FrameLayout, *payloads: Iterable[npt.NDArray[np.generic]]
) -> None:
    """Write a shard whose arrays come in blocks, so that no whole array has to be in memory.

    Args:
        file: where to write, at its current position.
        layout: of the shard.
        payloads: for each array of the layout, its elements in C order, divided anywhere.

    Raises:
        ValueError: a block has the wrong dtype, or the blocks of an array are too few or too many.
        OSError: as writing a file does.
    """
    for before, span, blocks in zip(layout.around, layout.spans, payloads, strict=False):
        file.write(before)
        written = 0
        for block in blocks:
            if block.dtype.name != span.dtype or not block.dtype.isnative:
                raise ValueError(f"a block is {block.dtype}, not {span.dtype}")
            written += file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        if written != span.nbytes:
            raise ValueError(f"the array has {span.nbytes} bytes, its blocks {written}")
    file.write(layout.around[-1])


def _blocks(array: npt.NDArray[np.generic]) -> Iterator[npt.NDArray[np.generic]]:
    """The elements in C order, in blocks that limit the copy of an array in another order."""
    if array.ndim == 0 or array.flags.c_contiguous or array.nbytes <= _BLOCK_BYTES:
        yield array
    else:
        for part in array:
            yield from _blocks(part)


@dataclasses.dataclass(slots=True)
class _Frame:
    """A frame being written: where its header will be, and its bytes so far."""

    piece: bytearray
    start: int
    nbytes: int = 0


class _Pickler:
    """Emits opcodes as CPython's C pickler does, with payloads left out.

    `_save` is called where CPython saves an object: only there may it end a frame that is long
    enough; `_append` adds opcodes to the current object.
    """

    def __init__(self) -> None:
        self.payloads: list[tuple[str, tuple[int, ...], int]] = []
        self._pieces = [bytearray(_PROTOCOL)]
        self._frame: _Frame | None = None
        self._memo: dict[str, int] = {}
        self._memoized = 0

    def quantized(self, dtype: str, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> None:
        self._global("__main__", "QuantizedWeight8bit")
        self._save(b")")  # EMPTY_TUPLE
        self._append(b"\x81")  # NEWOBJ
        self._memoize()
        self._save(b"}")  # EMPTY_DICT
        self._memoize()
        self._append(b"(")  # MARK
        self._text("weight")
        self.array(dtype, shape)
        self._text("scales")
        self.array("bfloat16", scale_shape)
        self._append(b"ub")  # SETITEMS, BUILD

    def array(self, dtype: str, shape: tuple[int, ...]) -> None:
        if dtype not in _CODES:
            raise ValueError(f"a shard holds no {dtype}")
        code, item_bytes = _CODES[dtype]
        nbytes = math.prod(shape) * item_bytes
        if nbytes < 2:
            raise ValueError(f"{dtype} {shape} has fewer than two bytes")
        self._global("numpy.core.multiarray", "_reconstruct")
        self._global("numpy", "ndarray")
        self._integer(0)
        self._append(b"\x85")  # TUPLE1
        self._memoize()
        self._shared("b'b'", b"C\x01b")  # SHORT_BINBYTES
        self._call(b"\x87")  # TUPLE3
        self._save(b"(")  # MARK
        self._integer(1)
        self._shape(shape)
        self._dtype(code, item_bytes)
        self._save(b"\x89")  # NEWFALSE: not in Fortran order
        self.payloads.append((dtype, shape, nbytes))
        self._payload(nbytes)
        self._build()

    def finish(self) -> tuple[bytes, ...]:
        """End the pickle and return the bytes before, between and after the payloads."""
        self._append(b".")  # STOP
        self._close_frame()
        return tuple(map(bytes, self._pieces))

    def _dtype(self, code: object, item_bytes: int) -> None:
        self._global("numpy", "dtype")
        if code is Global.BFLOAT16:
            self._global("ml_dtypes", "bfloat16")
        else:
            self._text(str(code))
        self._save(b"\x89")  # NEWFALSE
        self._save(b"\x88")  # NEWTRUE
        self._call(b"\x87")  # TUPLE3
        self._save(b"(")  # MARK
        self._integer(3)
        self._text("|" if item_bytes == 1 else "<")
        for _ in range(3):
            self._save(b"N")  # NONE
        # Item size, alignment and flags; a built-in type leaves the first two to itself.
        for number in (2, 2, 64) if code is Global.BFLOAT16 else (-1, -1, 0):
            self._integer(number)
        self._build()

    def _shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) > 3:
            self._save(b"(")  # MARK
        for size in shape:
            self._integer(size)
        if shape:
            # TUPLE1, TUPLE2, TUPLE3, TUPLE
            self._append((b"\x85", b"\x86", b"\x87", b"t")[min(len(shape), 4) - 1])
            self._memoize()
        else:
            self._save(b")")  # EMPTY_TUPLE

    def _call(self, close_arguments: bytes) -> None:
        self._append(close_arguments)
        self._memoize()
        self._append(b"R")  # REDUCE
        self._memoize()

    def _build(self) -> None:
        self._append(b"t")  # TUPLE
        self._memoize()
        self._append(b"b")  # BUILD

    def _global(self, module: str, name: str) -> None:
        key = f"{module}.{name}"
        if key in self._memo:
            self._recall(key)
            return
        self._text(module)
        self._text(name)
        self._append(b"\x93")  # STACK_GLOBAL
        self._memoize(key)

    def _text(self, value: str) -> None:
        self._shared(repr(value), b"\x8c" + bytes([len(value)]) + value.encode())

    def _shared(self, key: str, opcodes: bytes) -> None:
        """Save an object that exists once in memory: by reference at its second occurrence."""
        if key in self._memo:
            self._recall(key)
        else:
            self._save(opcodes)
            self._memoize(key)

    def _recall(self, key: str) -> None:
        self._save(b"h" + bytes([self._memo[key]]))  # BINGET

    def _memoize(self, key: str | None = None) -> None:
        self._append(b"\x94")  # MEMOIZE
        if key is not None:
            self._memo[key] = self._memoized
        self._memoized += 1

    def _integer(self, value: int) -> None:
        if 0 <= value < 2**8:
            opcodes = b"K" + value.to_bytes(1)
        elif 0 <= value < 2**16:
            opcodes = b"M" + value.to_bytes(2, "little")
        elif -(2**31) <= value < 2**31:
            opcodes = b"J" + value.to_bytes(4, "little", signed=True)
        else:
            length = value.bit_length() // 8 + 1
            opcodes = b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)
        self._save(opcodes)

    def _payload(self, nbytes: int) -> None:
        self._save(b"")
        if nbytes < 2**8:
            header = b"C" + nbytes.to_bytes(1)
        elif nbytes < 2**32:
            header = b"B" + nbytes.to_bytes(4, "little")
        else:
            header = b"\x8e" + nbytes.to_bytes(8, "little")
        if nbytes >= _FRAME_TARGET:
            self._close_frame()
            self._pieces[-1] += header
        else:
            self._append(header)
            self._open_frame().nbytes += nbytes
        self._pieces.append(bytearray())
        self._memoize()

    def _save(self, opcodes: bytes) -> None:
        if self._frame is not None and self._frame.nbytes >= _FRAME_TARGET:
            self._close_frame()
        self._append(opcodes)

    def _append(self, opcodes: bytes) -> None:
        if opcodes:
            self._open_frame().nbytes += len(opcodes)
            self._pieces[-1] += opcodes

    def _open_frame(self) -> _Frame:
        if self._frame is None:
            piece = self._pieces[-1]
            self._frame = _Frame(piece, len(piece))
            piece += bytes(_FRAME_HEADER)
        return self._frame

    def _close_frame(self) -> None:
        frame, self._frame = self._frame, None
        if frame is None:
            return
        header = b""
        if frame.nbytes >= _FRAME_MIN:
            header = b"\x95" + frame.nbytes.to_bytes(8, "little")
        frame.piece[frame.start : frame.start + _FRAME_HEADER] = header
