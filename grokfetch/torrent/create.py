"""Makes a torrent of a folder, hybrid or v1 only, and computes the sha256 of every file.

The same files under the same name with the same piece length always give the same info hash: only
names and bytes go into the info dictionary. Files are in the order of their raw names. In a hybrid
torrent each file starts a new piece, and for v1 pad files fill the last piece of each file, even of
the last one (BEP 52, BEP 47), as in libtorrent. A v1-only torrent has no pads: a piece may span
several files (BEP 3).
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from grokfetch.errors import StorageFailed, TorrentInvalid, storage_errors
from grokfetch.events import Hashed
from grokfetch.torrent import bencode
from grokfetch.torrent.bencode import Value
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import (
    BLOCK,
    HASH_SIZES,
    Layout,
    LayoutFile,
    PieceHasher,
    merkle_root,
    piece_hasher,
    power_of_two_above,
)
from grokfetch.torrent.metainfo import TorrentFile, torrent_file
from grokfetch.torrent.read_back import BATCH, FileResult, Hashers, chunks, opened, sha256_of

__all__ = ["Made", "MadeFile", "Pieces", "hybrid_info", "make", "suitable_piece_length"]

MOST_PIECES = 20_000
"""This many hashes make a torrent of about a megabyte."""
SMALLEST_CHOSEN = 64 * 1024
LARGEST_CHOSEN = 64 << 20
"""Bytes; the largest length that common clients accept."""


@dataclasses.dataclass(frozen=True, slots=True)
class MadeFile:
    """A file of the torrent: its path, which begins with the torrent's name, bytes, and sha256.

    `mtime_ns` is its modification time, the same before and after it was read.
    """

    path: PurePosixPath
    size: int
    sha256: str | None
    mtime_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """The torrent, and its files with their sha256; their paths begin with the torrent's name."""

    torrent: TorrentFile
    files: tuple[MadeFile, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Pieces:
    """Hashes of consecutive pieces of a file, starting with its piece number `first`.

    In a v1-only torrent pieces are numbered over all files, and `file` is 0.
    """

    file: int
    first: int
    v1: bytes
    v2: bytes
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of a file that are whole pieces, or the rest of the file.

    `width` is the number of leaves of a piece's v2 tree. `padded`: zeros follow in v1.
    """

    start: int
    stop: int
    piece_length: int
    width: int
    padded: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Whole:
    file: int
    result: FileResult


def suitable_piece_length(sizes: Sequence[int]) -> int:
    """The smallest piece length in bytes, a power of two, that makes at most `MOST_PIECES`."""
    length = SMALLEST_CHOSEN
    while length < LARGEST_CHOSEN and sum(-(-size // length) for size in sizes) > MOST_PIECES:
        length *= 2
    return length


def make(  # noqa: PLR0913  # the folder, and what a publisher may choose by name
    folder: Path,
    files: Sequence[tuple[PurePosixPath, int]],
    piece_length: int,
    *,
    trackers: Sequence[str] = (),
    web_seeds: Sequence[str] = (),
    v1_only: bool = False,
) -> Iterator[Hashed | Made]:
    """Hash a folder on all cores and make its torrent.

    Args:
        folder: becomes the torrent's top folder under its own name.
        files: of `list_files`.
        piece_length: bytes, a power of two from 16 KiB on.
        trackers: URLs of trackers.
        web_seeds: HTTP URLs under which the top folder is found (BEP 19).
        v1_only: make no hybrid torrent, for clients that cannot read one.

    Yields:
        Progress in bytes, then the torrent.

    Raises:
        StorageFailed: a file cannot be read, or changes while it is read.
        TorrentInvalid: the piece length is not valid, a name is too long, or it is too large.
    """
    if piece_length < BLOCK or piece_length & (piece_length - 1):
        raise TorrentInvalid(
            f"the piece length must be a power of two and at least {BLOCK:,}",
            hint="leave out --piece-length to have a suitable one chosen",
        )
    stamps = [_stamp(folder / path) for path, _ in files]
    whole: list[FileResult] = [FileResult(None)] * len(files)
    pieces: list[list[Pieces]] = [[] for _ in files]
    done = 0
    layers: dict[bytes, bytes] = {}
    jobs = (_v1_jobs if v1_only else _jobs)(folder, files, piece_length)
    with Hashers[Pieces | _Whole]() as hashers:
        for result in hashers.run(jobs):
            if isinstance(result, _Whole):
                whole[result.file] = result.result
                done += files[result.file][1]
            else:
                pieces[result.file].append(result)
                done += result.length
            yield Hashed(done)
    _check_unchanged(folder, files, stamps, whole)
    if v1_only:
        info = _v1_info(folder.name, files, piece_length, pieces[0])
    else:
        info, layers = hybrid_info(folder.name, files, piece_length, pieces)
    torrent = torrent_file(info, layers, trackers=trackers, web_seeds=web_seeds)
    parse_info(torrent.info, torrent.piece_layers)
    entries = (
        MadeFile(PurePosixPath(folder.name, path), size, digest.sha256, stamp[1])
        for (path, size), digest, stamp in zip(files, whole, stamps, strict=True)
    )
    yield Made(torrent, tuple(entries))


def _check_unchanged(
    folder: Path,
    files: Sequence[tuple[PurePosixPath, int]],
    stamps: Sequence[tuple[int, int]],
    whole: Sequence[FileResult],
) -> None:
    for (path, size), stamp, digest in zip(files, stamps, whole, strict=True):
        if digest.sha256 is None:
            raise StorageFailed(f"cannot be read: {digest.detail}", path=folder / path)
        if stamp[0] != size or _stamp(folder / path) != stamp:
            raise StorageFailed(
                "it changed while it was read",
                path=folder / path,
                hint="run the command again when no other program writes to this folder",
            )


def _stamp(path: Path) -> tuple[int, int]:
    with storage_errors(path, reading=True):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


def _jobs(
    folder: Path, files: Sequence[tuple[PurePosixPath, int]], piece_length: int
) -> Iterator[Callable[[memoryview], Pieces | _Whole]]:
    """A file's digest and its pieces are consecutive jobs, so the disk is read only once."""
    batch = max(piece_length, BATCH)
    for index, (path, size) in enumerate(files):
        yield partial(_hash_whole, folder / path, index)
        # The tree of a file that fits into one piece is only as wide as the file.
        width = power_of_two_above(-(-min(size, piece_length) // BLOCK))
        for start in range(0, size, batch):
            stop = min(start + batch, size)
            span = _Span(start, stop, piece_length, width, len(files) > 1)
            yield partial(_hash_pieces, folder / path, index, span)


def _hash_whole(path: Path, index: int, buffer: memoryview) -> _Whole:
    return _Whole(index, sha256_of(path, buffer))


def _hash_pieces(path: Path, index: int, span: _Span, buffer: memoryview) -> Pieces:
    v1, v2 = [], []
    with storage_errors(path, reading=True), opened(path) as handle:
        for start in range(span.start, span.stop, span.piece_length):
            stop = min(start + span.piece_length, span.stop)
            one, two = piece_hasher(1, 0), piece_hasher(2, span.width)
            _feed(handle, start, stop, (one, two), buffer)
            if span.padded:
                one.update(bytes(start + span.piece_length - stop))
            v1.append(one.digest())
            v2.append(two.digest())
    first = span.start // span.piece_length
    return Pieces(index, first, b"".join(v1), b"".join(v2), span.stop - span.start)


def _v1_jobs(
    folder: Path, files: Sequence[tuple[PurePosixPath, int]], piece_length: int
) -> Iterator[Callable[[memoryview], Pieces | _Whole]]:
    """A file's digest, then the pieces that end in it."""
    starts = itertools.accumulate((size for _, size in files), initial=0)
    placed = tuple(LayoutFile(path, size, next(starts)) for path, size in files)
    count = -(-placed[-1].end // piece_length)
    layout = Layout(folder.name, 1, piece_length, placed, bytes(HASH_SIZES[1] * count))
    batch = max(1, BATCH // piece_length)
    first = 0
    for index, file in enumerate(placed):
        yield partial(_hash_whole, folder / file.path, index)
        stop = count if file is placed[-1] else file.end // piece_length
        while first < stop:
            last = min(first + batch, stop)
            yield partial(_hash_v1, folder, layout, range(first, last))
            first = last


def _hash_v1(folder: Path, layout: Layout, pieces: range, buffer: memoryview) -> Pieces:
    hashes, length = [], 0
    for piece in pieces:
        hasher = piece_hasher(1, 0)
        for part in layout.segments(piece):
            path = folder / part.file.path
            with storage_errors(path, reading=True), opened(path) as handle:
                _feed(handle, part.offset, part.offset + part.length, (hasher,), buffer)
            length += part.length
        hashes.append(hasher.digest())
    return Pieces(0, pieces.start, b"".join(hashes), b"", length)


def _feed(
    handle: int, start: int, stop: int, hashers: Sequence[PieceHasher], buffer: memoryview
) -> None:
    for data in chunks(handle, start, stop, buffer):
        for hasher in hashers:
            hasher.update(data)
        start += len(data)
    if start < stop:
        raise OSError(errno.EIO, "it changed while it was read")


def hybrid_info(
    name: str,
    files: Sequence[tuple[PurePosixPath, int]],
    piece_length: int,
    pieces: Sequence[list[Pieces]],
) -> tuple[bytes, dict[bytes, bytes]]:
    """The info dictionary and the piece layers."""
    tree: dict[bytes, Value] = {}
    listed: list[Value] = []
    hashes: list[bytes] = []
    layers: dict[bytes, bytes] = {}
    for (path, size), batches in zip(files, pieces, strict=True):
        batches.sort(key=lambda batch: batch.first)
        parts = [part.encode() for part in path.parts]
        leaf: dict[bytes, Value] = {b"length": size}
        if size:
            layer = b"".join(batch.v2 for batch in batches)
            leaf[b"pieces root"] = root = _root(layer, piece_length)
            if size > piece_length:
                layers[root] = layer
        _plant(tree, parts, leaf)
        listed.append({b"length": size, b"path": [*parts]})
        gap = -size % piece_length
        if gap and len(files) > 1:
            listed.append({b"attr": b"p", b"length": gap, b"path": [b".pad", str(gap).encode()]})
        hashes.extend(batch.v1 for batch in batches)
    info: dict[bytes, Value] = {
        b"file tree": tree,
        b"files": listed,
        b"meta version": 2,
        b"name": name.encode(),
        b"piece length": piece_length,
        b"pieces": b"".join(hashes),
    }
    return bencode.encode(info), layers


def _v1_info(
    name: str,
    files: Sequence[tuple[PurePosixPath, int]],
    piece_length: int,
    pieces: Sequence[Pieces],
) -> bytes:
    ordered = sorted(pieces, key=lambda batch: batch.first)
    return bencode.encode(
        {
            b"files": [
                {b"length": size, b"path": [part.encode() for part in path.parts]}
                for path, size in files
            ],
            b"name": name.encode(),
            b"piece length": piece_length,
            b"pieces": b"".join(batch.v1 for batch in ordered),
        }
    )


def _root(layer: bytes, piece_length: int) -> bytes:
    nodes = [layer[start : start + 32] for start in range(0, len(layer), 32)]
    padding = merkle_root((), piece_length // BLOCK)
    return merkle_root(nodes, power_of_two_above(len(nodes)), padding)


def _plant(tree: dict[bytes, Value], parts: Sequence[bytes], leaf: dict[bytes, Value]) -> None:
    for part in parts:
        node = tree.setdefault(part, {})
        assert isinstance(node, dict)
        tree = node
    tree[b""] = leaf
