"""Arithmetic between pieces and files over a torrent's layout. Pure: no I/O here.

A torrent is a stream of bytes divided into pieces of equal length. In BitTorrent v1 the files
follow each other without gaps, a piece may span several of them, and its hash is the SHA-1 of its
bytes. In v2 every file starts a new piece, the last piece of a file ends with the file, and a
piece's hash is the root of a SHA-256 tree over blocks of 16 KiB (BEP 52). A hybrid torrent has both
hashes over one stream, in which pad files align the others; its v1 hashes are the ones used here,
and its pads are zeros that never exist on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Literal, Protocol

__all__ = [
    "BLOCK",
    "HASH_SIZES",
    "Layout",
    "LayoutFile",
    "PieceHasher",
    "Segment",
    "merkle_root",
    "piece_hasher",
    "power_of_two_above",
]

BLOCK = 16 * 1024
"""Bytes of a leaf of the v2 hash tree, and of the smallest piece."""

HASH_SIZES = {1: 20, 2: 32}
"""Bytes of a piece's hash, by version."""

Data = bytes | bytearray | memoryview


@dataclasses.dataclass(frozen=True, slots=True)
class LayoutFile:
    """A file in the stream: path relative to the checkpoint folder, size and start in bytes.

    The path includes the torrent's top folder. A pad is zeros and never exists on disk. `known_as`
    is the torrent's path if the file has another path on disk.
    """

    path: PurePosixPath
    size: int
    start: int
    pad: bool = False
    known_as: PurePosixPath | None = None

    @property
    def name(self) -> PurePosixPath:
        """The torrent's path."""
        return self.known_as or self.path

    @property
    def end(self) -> int:
        """The byte of the stream after the last one of this file."""
        return self.start + self.size


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """The part of a piece in one file: offset in the file, and length, in bytes."""

    file: LayoutFile
    offset: int
    length: int


class PieceHasher(Protocol):
    """Hashes one piece, whose bytes are passed in order."""

    def update(self, data: Data, /) -> None:
        """Hash the next bytes."""

    def digest(self) -> bytes:
        """The piece's hash, 20 bytes for v1 and 32 for v2."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """A torrent's files in stream order and the hashes of its pieces.

    `hashes` has the hashes of all pieces one after another, zeros for those not known yet.
    `version` says how they are computed; a hybrid torrent has version 1 here.
    """

    name: str
    version: Literal[1, 2]
    piece_length: int
    files: tuple[LayoutFile, ...]
    hashes: bytes = dataclasses.field(repr=False)
    _starts: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)
    _by_path: dict[PurePosixPath, LayoutFile] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", tuple(file.start for file in self.files))
        object.__setattr__(
            self, "_by_path", {file.path: file for file in self.files if not file.pad}
        )

    @property
    def piece_count(self) -> int:
        """How many pieces there are."""
        return len(self.hashes) // HASH_SIZES[self.version]

    @property
    def payload(self) -> tuple[LayoutFile, ...]:
        """The files that exist on disk: all except the pads."""
        return tuple(self._by_path.values())

    def file(self, path: PurePosixPath) -> LayoutFile | None:
        """The file with that path, None if the torrent has none."""
        return self._by_path.get(path)

    def moved(self, places: Mapping[PurePosixPath, PurePosixPath]) -> Layout:
        """The same with other paths for some files: `places` maps the torrent's path to ours."""
        return dataclasses.replace(
            self,
            files=tuple(
                dataclasses.replace(file, path=places[file.name], known_as=file.name)
                if not file.pad and file.name in places
                else file
                for file in self.files
            ),
        )

    def expected(self, piece: int) -> bytes:
        """The hash that the torrent gives for a piece."""
        width = HASH_SIZES[self.version]
        return self.hashes[piece * width : (piece + 1) * width]

    def provable(self, piece: int) -> bool:
        """Whether the hash of a piece is known; for a v2 file it may still be missing."""
        return self.version == 1 or any(self.expected(piece))

    @property
    def unprovable(self) -> tuple[LayoutFile, ...]:
        """The files whose hashes are not known yet."""
        if self.version == 1:
            return ()
        pieces = ((file, self.pieces_over(file)) for file in self.payload)
        return tuple(file for file, its in pieces if its and not self.provable(its[0]))

    def segments(self, piece: int) -> Iterator[Segment]:
        """The parts of a piece in stream order, pads included."""
        start = piece * self.piece_length
        stop = start + self.piece_length
        for index in range(bisect_right(self._starts, start) - 1, len(self.files)):
            file = self.files[index]
            if file.start >= stop:
                return
            first, last = max(start, file.start), min(stop, file.end)
            if first < last:
                yield Segment(file, first - file.start, last - first)

    def piece_size(self, piece: int) -> int:
        """Bytes of a piece, pads included."""
        return sum(segment.length for segment in self.segments(piece))

    def pieces_over(self, file: LayoutFile, offset: int = 0, length: int | None = None) -> range:
        """The pieces that overlap a span of a file, by default all of the file."""
        size = file.size - offset if length is None else length
        if size <= 0:
            return range(0)
        first = file.start + offset
        return range(first // self.piece_length, (first + size - 1) // self.piece_length + 1)

    def files_over(self, pieces: Iterable[int]) -> list[LayoutFile]:
        """The files on disk that these pieces overlap."""
        parts = (part for piece in pieces for part in self.segments(piece))
        return list(dict.fromkeys(part.file for part in parts if not part.file.pad))

    def hasher(self, piece: int) -> PieceHasher:
        """A new hasher for a piece."""
        if self.version == 1:
            return piece_hasher(1, 0)
        segment = next(self.segments(piece))
        blocks = self.piece_length // BLOCK
        if segment.file.size <= self.piece_length:
            # The tree of a file that fits into one piece is only as wide as the file.
            blocks = power_of_two_above(-(-segment.file.size // BLOCK))
        return piece_hasher(2, blocks)


# --- hashing ---------------------------------------------------------------------------------


def piece_hasher(version: Literal[1, 2], blocks: int) -> PieceHasher:
    """A hasher for one piece.

    Args:
        version: of the piece hashes.
        blocks: for v2, the leaves of the piece's tree, a power of two.
    """
    return hashlib.sha1(usedforsecurity=False) if version == 1 else _MerkleHasher(blocks)


class _MerkleHasher:
    """Hashes blocks of 16 KiB into leaves and the leaves into the root."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._leaves: list[bytes] = []
        self._open = hashlib.sha256()
        self._filled = 0

    def update(self, data: Data, /) -> None:
        from grokfetch.torrent.lanes import lanes

        view = memoryview(data)
        # The C program takes no memory that is read-only.
        program = None if view.readonly else lanes(view.nbytes)
        while view.nbytes:
            if not self._filled and view.nbytes >= BLOCK:
                if program and program.blocks and view.nbytes >= program.count * BLOCK:
                    together = view[: program.count * BLOCK]
                    self._leaves += program.sha256(together)
                    view = view[together.nbytes :]
                    continue
                self._leaves.append(hashlib.sha256(view[:BLOCK]).digest())
                view = view[BLOCK:]
                continue
            taken = view[: BLOCK - self._filled]
            self._open.update(taken)
            self._filled += taken.nbytes
            view = view[taken.nbytes :]
            if self._filled == BLOCK:
                self._close()

    def _close(self) -> None:
        self._leaves.append(self._open.digest())
        self._open = hashlib.sha256()
        self._filled = 0

    def digest(self) -> bytes:
        if self._filled:
            self._close()
        return merkle_root(self._leaves, self._blocks)


def merkle_root(leaves: Iterable[bytes], width: int, padding: bytes = bytes(32)) -> bytes:
    """The root of a SHA-256 tree.

    Args:
        leaves: hashes of 32 bytes.
        width: the number of leaves of the full tree, a power of two; missing ones are `padding`.
        padding: the hash of a missing leaf.
    """
    layer = list(leaves)
    while width > 1:
        if len(layer) % 2:
            layer.append(padding)
        layer = [
            hashlib.sha256(layer[index] + layer[index + 1]).digest()
            for index in range(0, len(layer), 2)
        ]
        padding = hashlib.sha256(padding + padding).digest()
        width //= 2
    return layer[0] if layer else padding


def power_of_two_above(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()
