"""Reads a shard file without unpickling it.

A shard is what `pickle.dump(tensor, file, protocol=4)` of CPython wrote: a few hundred bytes of
pickle opcodes around one or two payloads of up to gigabytes. `read_shard` walks those opcodes with
a closed list of opcodes and a closed list of globals. The values on its stack are plain private
ones; no global is imported, nothing is called, no payload is read. What comes out are spans: which
bytes of the file are which array.

The same frame is written by `loader.weights.shard_writer`.

Source of the format: CPython `Lib/pickletools.py` and `Modules/_pickle.c`, NumPy
`array_reduce` and `arraydescr_reduce`, and the published sizes of the official files.
"""

from __future__ import annotations

import os
import pickletools
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, Protocol

from grokfetch.errors import ShardInvalid, StorageFailed
from loader.weights.shard_values import (
    DTYPES,
    GLOBALS,
    ArraySpan,
    Flag,
    Global,
    Payload,
    PendingArray,
    PendingDtype,
    PendingWeight,
    Refusal,
    Shard,
)

__all__ = ["ArraySpan", "Shard", "Slices", "read_shard", "read_slices"]

# An official shard has at most 140 opcodes, an array of 64 dimensions some 200. As each opcode adds
# at most one value, this bounds the stack, the memo and all nesting as well as the work.
_MAX_OPCODES: Final = 1024
_NAMES: Final = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


def read_shard(path: str | os.PathLike[str]) -> Shard:
    """The spans of the array in the file, checked to lie inside it, complete and disjoint.

    Raises:
        ShardInvalid: it is not a pickled array of the official form; nothing of it was executed.
        StorageFailed: it cannot be opened or read, or is not a regular file.
    """
    path = Path(path)
    try:
        # Asked before opening, because opening a named pipe waits for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise StorageFailed("not a regular file", path=path)
        with path.open("rb") as file:
            # Not mapped: a mapped page that is gone ends the process without a message.
            return read_slices(_File(file), path)
    except OSError as error:
        raise StorageFailed(f"cannot be read: {error.strerror or error}", path=path) from error


def read_slices(view: Slices, path: str | os.PathLike[str]) -> Shard:
    """The same for the content of a file, of which only slices are read.

    Args:
        view: the content.
        path: of the file, for the error message.

    Raises:
        ShardInvalid: it is not a pickled array of the official form; nothing of it was executed.
    """
    walk = _Walk(view)
    while walk.shard is None:
        start = walk.position
        try:
            walk.step()
        except Refusal as refusal:
            name = _opcode_name(view, start)
            raise ShardInvalid(str(refusal), path=path, offset=start, opcode=name) from None
    return walk.shard


def _opcode_name(view: Slices, position: int) -> str:
    if position >= len(view):
        return "none"
    [code] = bytes(view[position : position + 1])
    return _NAMES.get(code, f"0x{code:02x}")


class Slices(Protocol):
    """The source of a shard's bytes; only slices of at most 255 bytes are asked for."""

    def __len__(self) -> int:
        """Bytes in all."""

    def __getitem__(self, part: slice, /) -> bytes | memoryview:
        """Some of them."""


class _File:
    """A file whose slices are read on request."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice, /) -> bytes:
        self._file.seek(part.start)
        data = self._file.read(part.stop - part.start)
        if len(data) < part.stop - part.start:
            raise OSError(f"it has shrunk below {self._size} bytes while it was read")
        return data


_MARK: Final = object()


class _Walk:
    """A stack machine that understands only what a pickled array needs."""

    def __init__(self, view: Slices) -> None:
        self.view = view
        self.position = 0
        self.shard: Shard | None = None
        self._frame_end = 0
        self._steps = 0
        self._stack: list[object] = []
        self._memo: list[object] = []

    def step(self) -> None:
        """Take one opcode; sets `shard` when it was STOP."""
        start = self.position
        self._steps += 1
        if self._steps > _MAX_OPCODES:
            raise Refusal(f"more than {_MAX_OPCODES} opcodes")
        code = self._number(1)
        if (start == 0) != (code == 0x80):
            raise Refusal("a pickle starts, once, with its protocol")
        handler = _HANDLERS.get(code)
        if handler is None:
            raise Refusal("this opcode has no business in a pickled array")
        handler(self)
        if start < self._frame_end < self.position:
            raise Refusal("it runs over the end of its frame")

    def _skip(self, nbytes: int) -> int:
        """Skip bytes of the file and return where they start."""
        start = self.position
        if nbytes > len(self.view) - start:
            raise Refusal(f"it needs {nbytes} bytes where {len(self.view) - start} are left")
        self.position += nbytes
        return start

    def _number(self, nbytes: int, *, signed: bool = False) -> int:
        start = self._skip(nbytes)
        return int.from_bytes(self.view[start : self.position], "little", signed=signed)

    def _pop(self) -> object:
        if not self._stack or self._stack[-1] is _MARK:
            raise Refusal("it takes a value that is not on the stack")
        return self._stack.pop()

    def _pop_to_mark(self) -> tuple[object, ...]:
        values = []
        while self._stack and self._stack[-1] is not _MARK:
            values.append(self._stack.pop())
        if not self._stack:
            raise Refusal("there is no mark on the stack")
        self._stack.pop()
        return tuple(reversed(values))

    def protocol(self) -> None:
        if self._number(1) != 4:
            raise Refusal("only pickle protocol 4 is read")

    def frame(self) -> None:
        if self.position <= self._frame_end:
            raise Refusal("a frame begins inside another")
        nbytes = self._number(8)
        if nbytes > len(self.view) - self.position:
            raise Refusal(f"a frame of {nbytes} bytes ends outside the file")
        self._frame_end = self.position + nbytes

    def stop(self) -> None:
        if self.position != len(self.view):
            raise Refusal(f"{len(self.view) - self.position} bytes follow the end of the pickle")
        result = self._pop()
        if self._stack:
            raise Refusal("more than one value is left at the end")
        if isinstance(result, PendingArray) and result.span is not None:
            self.shard = Shard(result.span)
        elif isinstance(result, PendingWeight) and result.shard is not None:
            self.shard = result.shard
        else:
            raise Refusal("the pickled object is neither an array nor a quantised weight")

    def memoize(self) -> None:
        value = self._pop()
        self._stack.append(value)
        self._memo.append(value)

    def recall(self) -> None:
        index = self._number(1)
        if index >= len(self._memo):
            raise Refusal(f"nothing was memoised as {index}")
        self._stack.append(self._memo[index])

    def text(self) -> None:
        start = self._skip(self._number(1))
        try:
            self._stack.append(str(self.view[start : self.position], "utf-8"))
        except UnicodeDecodeError:
            raise Refusal("the string is not UTF-8") from None

    def payload(self, length_bytes: int) -> None:
        nbytes = self._number(length_bytes)
        self._stack.append(Payload(self._skip(nbytes), nbytes))

    def integer(self, nbytes: int, *, signed: bool) -> None:
        self._stack.append(self._number(nbytes, signed=signed))

    def long(self) -> None:
        self.integer(self._number(1), signed=True)

    def push(self, value: object) -> None:
        self._stack.append(value)

    def short_tuple(self, length: int) -> None:
        values = [self._pop() for _ in range(length)]
        self._stack.append(tuple(reversed(values)))

    def marked_tuple(self) -> None:
        self._stack.append(self._pop_to_mark())

    def set_items(self) -> None:
        items = self._pop_to_mark()
        target = self._pop()
        if not isinstance(target, dict) or target or len(items) % 2:
            raise Refusal("items are set on something that is not a fresh dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or key in target:
                raise Refusal("a key is not a string, or comes twice")
            target[key] = value
        self._stack.append(target)

    def find_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Refusal("a global's name is not a string")
        allowed = GLOBALS.get((module, name))
        if allowed is None:
            raise Refusal(f"the global {module!a:.80}.{name!a:.80} has no business here")
        self._stack.append(allowed)

    def new_object(self) -> None:
        match (args := self._pop(), self._pop()):
            case (tuple(), Global.QUANTIZED) if args == ():
                self._stack.append(PendingWeight())
            case _:
                raise Refusal("only an empty QuantizedWeight8bit can be made this way")

    def reduce(self) -> None:
        match (self._pop(), self._pop()):
            case ((Global.NDARRAY, (0,), Payload() as kind), Global.RECONSTRUCT):
                if bytes(self.view[kind.offset : kind.offset + min(kind.nbytes, 2)]) != b"b":
                    raise Refusal("the array to be filled is not of the kind b'b'")
                self._stack.append(PendingArray())
            case ((str() | Global.BFLOAT16 as code, Flag.FALSE, Flag.TRUE), Global.DTYPE):
                if code not in DTYPES:
                    raise Refusal("the dtype is not a plain number")
                self._stack.append(PendingDtype(*DTYPES[code]))
            case _:
                raise Refusal("it calls something else than NumPy does to rebuild an array")

    def build(self) -> None:
        state = self._pop()
        target = self._stack[-1] if self._stack else None
        match target:
            case PendingDtype(complete=False) | PendingArray(span=None) | PendingWeight(shard=None):
                target.take(state)
            case _:
                raise Refusal("it gives a state to something that takes none, or has one")


_HANDLERS: Final[dict[int, Callable[[_Walk], None]]] = {
    0x80: _Walk.protocol,  # PROTO
    0x95: _Walk.frame,  # FRAME
    0x2E: _Walk.stop,  # STOP
    0x94: _Walk.memoize,  # MEMOIZE
    0x68: _Walk.recall,  # BINGET
    0x8C: _Walk.text,  # SHORT_BINUNICODE
    0x43: lambda walk: walk.payload(1),  # SHORT_BINBYTES
    0x42: lambda walk: walk.payload(4),  # BINBYTES
    0x8E: lambda walk: walk.payload(8),  # BINBYTES8
    0x4B: lambda walk: walk.integer(1, signed=False),  # BININT1
    0x4D: lambda walk: walk.integer(2, signed=False),  # BININT2
    0x4A: lambda walk: walk.integer(4, signed=True),  # BININT
    0x8A: _Walk.long,  # LONG1
    0x4E: lambda walk: walk.push(None),  # NONE
    0x88: lambda walk: walk.push(Flag.TRUE),  # NEWTRUE
    0x89: lambda walk: walk.push(Flag.FALSE),  # NEWFALSE
    0x28: lambda walk: walk.push(_MARK),  # MARK
    0x7D: lambda walk: walk.push({}),  # EMPTY_DICT
    0x29: lambda walk: walk.push(()),  # EMPTY_TUPLE
    0x85: lambda walk: walk.short_tuple(1),  # TUPLE1
    0x86: lambda walk: walk.short_tuple(2),  # TUPLE2
    0x87: lambda walk: walk.short_tuple(3),  # TUPLE3
    0x74: _Walk.marked_tuple,  # TUPLE
    0x75: _Walk.set_items,  # SETITEMS
    0x93: _Walk.find_global,  # STACK_GLOBAL
    0x81: _Walk.new_object,  # NEWOBJ
    0x52: _Walk.reduce,  # REDUCE
    0x62: _Walk.build,  # BUILD
}
