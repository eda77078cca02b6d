"""Proves a GGUF by the piece hashes of a torrent: its shards are rebuilt in memory and hashed.

Neighbouring pieces are hashed together, so that rows of a shard that several of them share are
rebuilt once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Final

from grokfetch.errors import Inexact
from grokfetch.torrent.layout import Layout, Segment
from grokfetch.torrent.read_back import Hashers, PieceResult
from loader.export.restoring import Exported
from loader.weights.schema import ParamSpec

__all__ = ["Shards", "check_pieces", "rebuildable"]

RUN: Final = 64 << 20
"""Bytes of neighbouring pieces that a thread hashes one after another."""

Shards = Mapping[PurePosixPath, ParamSpec]
"""The parameter in each file of the torrent that is a shard."""


def rebuildable(layout: Layout, shards: Shards) -> list[int]:
    """The pieces that hold bytes of shards and of nothing else."""
    files = [file for file in layout.payload if file.path in shards]
    pieces = sorted({piece for file in files for piece in layout.pieces_over(file)})
    return [
        piece
        for piece in pieces
        if all(part.file.pad or part.file.path in shards for part in layout.segments(piece))
    ]


def check_pieces(
    exported: Exported, layout: Layout, shards: Shards, pieces: Iterable[int]
) -> Iterator[PieceResult]:
    """Rebuild pieces on all cores and compare their hashes with the torrent's, in any order.

    Raises:
        StorageFailed: the GGUF cannot be read.
    """

    def job(run: list[int], _buffer: memoryview) -> list[PieceResult]:
        try:
            return list(_check(exported, layout, shards, run))
        except Inexact as error:
            if len(run) == 1:
                return [PieceResult(run[0], "bad", error.what)]
            # Only the pieces with this tensor are bad, so each is checked on its own.
            return [result for piece in run for result in job([piece], _buffer)]

    with Hashers[list[PieceResult]]() as hashers:
        for results in hashers.run(partial(job, run) for run in _runs(layout, pieces)):
            yield from results


def _runs(layout: Layout, pieces: Iterable[int]) -> Iterator[list[int]]:
    """Neighbouring pieces in runs of at most `RUN` bytes."""
    most = max(1, RUN // layout.piece_length)
    run: list[int] = []
    for piece in pieces:
        if run and (piece != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _check(
    exported: Exported, layout: Layout, shards: Shards, run: list[int]
) -> Iterator[PieceResult]:
    parts = (part for piece in run for part in layout.segments(piece))
    data = (chunk for part in _joined(parts) for chunk in _bytes_of(exported, shards, part))
    left = memoryview(b"")
    for piece in run:
        hasher, lacking = layout.hasher(piece), layout.piece_size(piece)
        while lacking:
            left = left or next(data, left)
            if not left:
                raise Inexact("a shard of this model is shorter than the torrent's")
            hasher.update(left[:lacking])
            lacking, left = lacking - len(left[:lacking]), left[lacking:]
        yield PieceResult(piece, "good" if hasher.digest() == layout.expected(piece) else "bad")


def _joined(parts: Iterable[Segment]) -> Iterator[Segment]:
    """The parts of files, with consecutive parts of one file joined."""
    last: Segment | None = None
    for part in parts:
        if last is not None and last.file == part.file:
            last = Segment(last.file, last.offset, last.length + part.length)
            continue
        if last is not None:
            yield last
        last = part
    if last is not None:
        yield last


def _bytes_of(exported: Exported, shards: Shards, part: Segment) -> Iterator[memoryview]:
    if part.file.pad:
        yield memoryview(bytes(part.length))
    else:
        spec = shards[part.file.path]
        yield from exported.shard(spec, part.offset, part.offset + part.length)
