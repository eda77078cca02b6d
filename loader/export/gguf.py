"""Writes and reads the container GGUF, version 3: fields and tensors by name.

Everything but `read` is pure.

A file is a header of fields and tensor entries, then the tensors, each at a multiple of 32 bytes.
Integers are little-endian; strings are UTF-8, preceded by their length. Dimensions are stored with
the fastest first; shapes here are NumPy's, with the fastest last.

Source: the GGUF specification in ggml, docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from grokfetch.errors import CheckpointInvalid, StorageFailed
from loader.export.matrices import BLOCK_LENGTH, ElementType, row_bytes

__all__ = ["ALIGNMENT", "Entry", "Field", "FieldType", "Gguf", "padded", "read", "written"]

ALIGNMENT: Final = 32
MAGIC: Final = b"GGUF"
VERSION: Final = 3
MOST: Final = 1 << 24
"""Most fields, tensors or elements of an array that a file may claim; a vocabulary has 2**17."""

FieldType = Literal["u16", "u32", "i32", "f32", "bool", "str", "u64"]
NUMBERS: Final[dict[FieldType, tuple[int, str]]] = {
    "u16": (2, "<H"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
}
STRING, ARRAY = 8, 9
TYPES: Final[dict[int, FieldType]] = {code: name for name, (code, _) in NUMBERS.items()} | {
    STRING: "str"
}
ELEMENT_CODES: Final[dict[ElementType, int]] = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30}
ELEMENT_TYPES: Final = {code: name for name, code in ELEMENT_CODES.items()}


class Field(NamedTuple):
    """A value and the type it is written as; a sequence is an array of that type."""

    kind: FieldType
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: its shape, fastest dimension last, and its offset in bytes among the tensors."""

    name: str
    shape: tuple[int, ...]
    kind: ElementType
    offset: int

    @property
    def nbytes(self) -> int:
        """Without padding."""
        return math.prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


@dataclasses.dataclass(frozen=True, slots=True)
class Gguf:
    """What a file holds; offsets of `tensors` count from the beginning of the file."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def padded(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return nbytes + -nbytes % ALIGNMENT


def written(fields: Mapping[str, Field], tensors: Sequence[Entry]) -> bytes:
    """Everything in a file before its first tensor, whose offset is 0."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(fields))]
    for key, field in fields.items():
        parts += [_string(key), *_typed(field)]
    for entry in tensors:
        dimensions = entry.shape[::-1]
        form = f"<I{len(dimensions)}QIQ"
        code = ELEMENT_CODES[entry.kind]
        parts += [
            _string(entry.name),
            struct.pack(form, len(dimensions), *dimensions, code, entry.offset),
        ]
    head = b"".join(parts)
    return head.ljust(padded(len(head)), b"\0")


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(field: Field) -> list[bytes]:
    code, _ = NUMBERS.get(field.kind, (STRING, ""))
    if not isinstance(field.value, Sequence) or isinstance(field.value, str):
        return [struct.pack("<I", code), _plain(field.kind, field.value)]
    head = struct.pack("<IIQ", ARRAY, code, len(field.value))
    return [head, *(_plain(field.kind, value) for value in field.value)]


def _plain(kind: FieldType, value: Any) -> bytes:
    return _string(value) if kind == "str" else struct.pack(NUMBERS[kind][1], value)


def read(path: Path) -> Gguf:
    """Fields and tensor entries of a file; no tensor is read.

    Raises:
        StorageFailed: it cannot be read.
        CheckpointInvalid: it is not a GGUF of version 3, is truncated, or has tensors of other
            types.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).file(path)
    except OSError as error:
        raise StorageFailed(f"cannot be read: {error.strerror}", path=path) from error
    except (ValueError, struct.error) as error:
        raise CheckpointInvalid(f"not a GGUF that can be read: {error}", path=path) from None


class _Reader:
    """Reads values one after another; ValueError says what is wrong."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def file(self, path: Path) -> Gguf:
        magic, version, tensors, fields = self._take("<4sIQQ")
        if magic != MAGIC or version != VERSION:
            raise ValueError(f"it does not begin as GGUF version {VERSION} does")
        values = {self._text(): self._value() for _ in range(_count(fields))}
        entries = [self._entry() for _ in range(_count(tensors))]
        if values.get("general.alignment", ALIGNMENT) != ALIGNMENT:
            raise ValueError("its alignment is not 32")
        start = padded(self._at)
        placed = [dataclasses.replace(it, offset=start + it.offset) for it in entries]
        for entry in placed:
            if entry.offset + entry.nbytes > len(self._data):
                raise ValueError(f"it ends within or before {entry.name}")
        return Gguf(path, values, {entry.name: entry for entry in placed})

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _text(self) -> str:
        (length,) = self._take("<Q")
        if length > len(self._data) - self._at:
            raise ValueError("a string reaches beyond its end")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self) -> Any:
        (code,) = self._take("<I")
        if code != ARRAY:
            return self._plain(code)
        code, count = self._take("<IQ")
        return [self._plain(code) for _ in range(_count(count))]

    def _plain(self, code: int) -> Any:
        if code not in TYPES:
            raise ValueError(f"a field has the unknown type {code}")
        kind = TYPES[code]
        return self._text() if kind == "str" else self._take(NUMBERS[kind][1])[0]

    def _entry(self) -> Entry:
        name = self._text()
        (rank,) = self._take("<I")
        if not 1 <= rank <= 4:
            raise ValueError(f"{name} has {rank} dimensions")
        *dimensions, code, offset = self._take(f"<{rank}QIQ")
        if code not in ELEMENT_TYPES:
            raise ValueError(f"{name} has the type {code}, which is not one of {ELEMENT_TYPES}")
        kind = ELEMENT_TYPES[code]
        if kind == "Q8_0" and dimensions[0] % BLOCK_LENGTH:
            raise ValueError(f"{name} has rows that are not made of blocks of {BLOCK_LENGTH}")
        return Entry(name, tuple(reversed(dimensions)), kind, offset)


def _count(number: int) -> int:
    if number > MOST:
        raise ValueError(f"it claims {number:,} fields, tensors or elements")
    return number
