"""What is proven and by which hash, and the stamp of each file at that time. Pure: no I/O here.

A proof is only valid with a stamp, the (size, mtime_ns) of its file at that time. What a record
proves about the files as they are now is decided only in `proven`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

__all__ = ["SCHEMA", "FileProof", "Record", "RecordDamaged", "Stamp", "decode", "encode"]

SCHEMA = 1


class RecordDamaged(ValueError):
    """Some bytes are not a record that this version of grokfetch wrote."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stamp:
    """A file's size in bytes and the time of its last change in nanoseconds."""

    size: int
    mtime_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class FileProof:
    """What a file's proofs rest on.

    `sha256` is the digest of the whole file if it was computed. `writing` says that we have the
    file open for writing, or had it when we were killed.
    """

    stamp: Stamp
    sha256: str | None = None
    writing: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """Which pieces of the torrent `info_hash` and which whole files are proven."""

    info_hash: str | None = None
    pieces: frozenset[int] = frozenset()
    files: Mapping[PurePosixPath, FileProof] = dataclasses.field(default_factory=dict)


def encode(record: Record) -> bytes:
    """The record as JSON: its schema, a digest of the rest, and the rest."""
    body = {
        "info_hash": record.info_hash,
        "pieces": _bits(record.pieces),
        "files": {
            text: [
                proof.stamp.size,
                proof.stamp.mtime_ns,
                proof.sha256,
                "writing" if proof.writing else "",
            ]
            for text, proof in sorted((str(path), proof) for path, proof in record.files.items())
        },
    }
    text = json.dumps(body, separators=(",", ":"))
    top = json.dumps({"schema": SCHEMA, "digest": _sha256(text)}, separators=(",", ":"))
    return f"{top[:-1]},{text[1:]}\n".encode()


def decode(text: bytes) -> Record:
    """The record that `text` encodes.

    Raises:
        RecordDamaged: it is truncated or altered, or has another schema or format.
    """
    try:
        top = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordDamaged(f"is not valid JSON: {error}") from None
    if not isinstance(top, dict) or "schema" not in top:
        raise RecordDamaged("not a record")
    if top.pop("schema") != SCHEMA:
        raise RecordDamaged("written by another version of grokfetch")
    if top.pop("digest", None) != _digest(top):
        raise RecordDamaged("its digest is wrong")
    return Record(
        top["info_hash"],
        _numbers(top["pieces"]),
        {PurePosixPath(path): _proof(fields) for path, fields in top["files"].items()},
    )


def _proof(fields: list[Any]) -> FileProof:
    size, mtime_ns, sha256, mark = fields
    return FileProof(Stamp(size, mtime_ns), sha256, writing=mark == "writing")


def _digest(body: Mapping[str, object]) -> str:
    return _sha256(json.dumps(body, separators=(",", ":")))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _bits(numbers: Iterable[int]) -> str:
    field = bytearray()
    top = max(numbers, default=-1)
    field.extend(bytes(top // 8 + 1))
    for number in numbers:
        field[number // 8] |= 128 >> number % 8
    return field.hex()


def _numbers(text: str) -> frozenset[int]:
    bits = bin(int("1" + text, 16))[3:]
    return frozenset(match.start() for match in re.finditer("1", bits))
