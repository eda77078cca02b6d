"""Bencoding, BitTorrent's notation: a strict reader and a writer. Pure: no I/O here.

Integers must be canonical, keys must be byte strings that occur once, nothing may follow the value,
and nesting is bounded. Keys need not be sorted: other programs' torrents are read as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

from grokfetch.errors import TorrentInvalid

__all__ = ["Value", "decode", "encode", "expect", "members", "text"]

Value = int | bytes | list["Value"] | dict[bytes, "Value"]

T = TypeVar("T")

DEEPEST = 64
"""Nested lists and dictionaries; in a v2 torrent each folder of a path is one level."""

LARGEST_INPUT = 256 * 1024 * 1024
"""Bytes; ten times the metadata of the largest known torrents."""

_INTEGER = re.compile(rb"i(0|-?[1-9][0-9]{0,18})e")
_LENGTH = re.compile(rb"(0|[1-9][0-9]{0,9}):")


def decode(data: bytes) -> Value:
    """The value that `data` encodes.

    Raises:
        TorrentInvalid: the data is malformed; the message names the byte.
    """
    value, end = _value(data, 0, 0)
    if end != len(data):
        _refuse(end, "something follows the value")
    return value


def members(data: bytes) -> dict[bytes, tuple[Value, bytes]]:
    """The members of a dictionary by their keys: each value, and the bytes that encode it.

    Raises:
        TorrentInvalid: `data` is not a dictionary, or not bencoding.
    """
    if data[:1] != b"d":
        raise TorrentInvalid("is not a torrent: the data is not a bencoded dictionary")
    found, position = {}, 1
    for key, value, start, position in _members(data, 1, 0):
        found[key] = (value, data[start:position])
    if position + 1 != len(data):
        _refuse(position + 1, "something follows the value")
    return found


def encode(value: Value) -> bytes:
    """The canonical encoding, with sorted keys."""
    parts: list[bytes] = []
    _write(value, parts)
    return b"".join(parts)


def _write(value: Value, parts: list[bytes]) -> None:
    if isinstance(value, int):
        parts.append(b"i%de" % value)
    elif isinstance(value, bytes):
        parts += (b"%d:" % len(value), value)
    elif isinstance(value, list):
        parts.append(b"l")
        for item in value:
            _write(item, parts)
        parts.append(b"e")
    else:
        parts.append(b"d")
        for key in sorted(value):
            _write(key, parts)
            _write(value[key], parts)
        parts.append(b"e")


def _refuse(position: int, why: str) -> None:
    raise TorrentInvalid(f"not bencoding: {why} (byte {position:,})")


def _value(data: bytes, position: int, depth: int) -> tuple[Value, int]:
    if len(data) > LARGEST_INPUT:
        _refuse(LARGEST_INPUT, "it is too long")
    if depth > DEEPEST:
        _refuse(position, f"nested deeper than {DEEPEST}")
    mark = data[position : position + 1]
    if mark == b"i":
        return _integer(data, position)
    if mark == b"l":
        return _list(data, position, depth)
    if mark == b"d":
        members: dict[bytes, Value] = {}
        position += 1
        for key, value, _, end in _members(data, position, depth):
            members[key] = value
            position = end
        return members, position + 1
    return _string(data, position)


def _integer(data: bytes, position: int) -> tuple[int, int]:
    match = _INTEGER.match(data, position)
    if match is None:
        raise TorrentInvalid(f"not bencoding: a malformed integer (byte {position:,})")
    return int(match[1]), match.end()


def _string(data: bytes, position: int) -> tuple[bytes, int]:
    match = _LENGTH.match(data, position)
    if match is None:
        raise TorrentInvalid(f"not bencoding: no value begins here (byte {position:,})")
    end = match.end() + int(match[1])
    if end > len(data):
        _refuse(position, "a string reaches beyond the end")
    return data[match.end() : end], end


def _list(data: bytes, position: int, depth: int) -> tuple[list[Value], int]:
    items: list[Value] = []
    position += 1
    while data[position : position + 1] != b"e":
        item, position = _value(data, position, depth + 1)
        items.append(item)
    return items, position + 1


def _members(data: bytes, position: int, depth: int) -> Iterator[tuple[bytes, Value, int, int]]:
    """Key, value, start and end of each member of a dictionary, the first at `position`."""
    seen = set()
    while data[position : position + 1] != b"e":
        key, start = _string(data, position)
        if key in seen:
            _refuse(position, f"the key {key[:40]!r} appears twice")
        seen.add(key)
        value, end = _value(data, start, depth + 1)
        yield key, value, start, end
        position = end


def expect(value: Value | None, kind: type[T], name: str) -> T:
    """The value, which must be of type `kind`.

    Raises:
        TorrentInvalid: it is not, or is missing; the message says `name`.
    """
    if not isinstance(value, kind):
        raise TorrentInvalid(f"{name} is missing or malformed")
    return value


def text(value: Value | None, name: str) -> str:
    """The value, which must be a string.

    Raises:
        TorrentInvalid: it is not UTF-8, or is missing; the message says `name`.
    """
    try:
        return expect(value, bytes, name).decode()
    except UnicodeDecodeError:
        raise TorrentInvalid(f"{name} is not UTF-8: {value!r:.80}") from None
