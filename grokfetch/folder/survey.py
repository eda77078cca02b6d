"""What the record says of a folder now: proven and missing, by what, by piece, file and layer.

Files are statted, so that one which has changed counts as not proven; nothing is read or hashed,
and no lock is taken.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Literal

from grokfetch.folder.record import Record, Stamp
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import ManifestFile, ManifestTensor
from grokfetch.manifest.selection import pieces_of
from grokfetch.torrent.layout import Layout, LayoutFile

__all__ = ["FileState", "Group", "Survey", "piece_map", "survey"]

OUTER = "embedding and final norm"
FileState = Literal["proven", "begun", "absent", "changed", "not asked for"]


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for in words, its bytes, and those of them that are proven."""

    what: str
    total: int
    proven: int


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one layer, or those outside the layers: proven bytes and all bytes."""

    name: str
    proven: int
    total: int


@dataclasses.dataclass(frozen=True, slots=True)
class Survey:
    """How far a checkpoint is.

    Args:
        name: of the checkpoint.
        total: bytes that the manifest names.
        by_pieces: those of them that the torrent's piece hashes have proven.
        by_sha256: those that the manifest's sha256 have.
        info_hash: the torrent's, None without one.
        measured: when the manifest's digests were taken from somebody's disk, None if published.
        pieces: for each piece of the torrent, whether it is proven.
        files: how each file of the manifest is. "changed" is one that was verified once and has
            another size or time since.
        groups: completion by layer, in numeric order, then what lies outside the layers.
        asked: what is asked for, None for everything; whole pieces count.
    """

    name: str
    total: int
    by_pieces: int
    by_sha256: int
    info_hash: str | None
    measured: str | None
    pieces: tuple[bool, ...]
    files: dict[PurePosixPath, FileState]
    groups: tuple[Group, ...]
    asked: Asked | None = None

    @property
    def proven(self) -> int:
        """Proven bytes, whichever way."""
        return self.by_pieces + self.by_sha256


def survey(store: Store) -> Survey:
    """Look at a folder: its manifest, its record, and how its files look.

    Raises:
        StateMissing: there is no manifest.
    """
    manifest, record, layout = store.manifest(), store.record(), store.layout()
    known = {file.path for file in manifest.files}
    others = () if layout is None else (file.path for file in layout.payload)
    stamps = {path: store.stamp(path) for path in known.union(others)}
    spans = _Spans(store, record, stamps, layout)
    proven = {file.path: spans.proven(file, 0, file.size) for file in manifest.files}
    ways = {file.path: spans.by_pieces(file) for file in manifest.files}
    return Survey(
        manifest.name,
        manifest.size,
        sum(proven[path] for path in known if ways[path]),
        sum(proven[path] for path in known if not ways[path]),
        record.info_hash,
        manifest.measured,
        spans.pieces,
        {file.path: _state(store, file, proven, stamps) for file in manifest.files},
        _groups(manifest.tensors, {file.path: file for file in manifest.files}, spans),
        _asked(store, spans),
    )


def _asked(store: Store, spans: _Spans) -> Asked | None:
    selection, asked, layout = store.selection(), store.asked(), store.layout()
    if selection is None or asked is None:
        return None
    total = proven = 0
    by_pieces = set()
    if layout is not None:
        named = {file.path for file in store.manifest().files}
        pieces = pieces_of(layout, asked)
        for piece in pieces:
            size = sum(part.length for part in layout.segments(piece) if part.file.path in named)
            total += size
            proven += size if spans.pieces[piece] else 0
        by_pieces = {path for path in asked if store.pieces_speak_for(path)}
    for file in store.manifest().files:
        if file.path in asked and file.path not in by_pieces:
            total += file.size
            proven += spans.proven(file, 0, file.size)
    return Asked(str(selection), total, proven)


class _Spans:
    """How many bytes of a span of a file are proven."""

    def __init__(
        self,
        store: Store,
        record: Record,
        stamps: dict[PurePosixPath, Stamp | None],
        layout: Layout | None,
    ) -> None:
        self._store = store
        self._record = record
        self._layout = layout
        self._held = {
            path
            for path, stamp in stamps.items()
            if path in record.files and record.files[path].holds(stamp)
        }
        self.pieces = () if layout is None else self._proven_pieces(layout)

    def _proven_pieces(self, layout: Layout) -> tuple[bool, ...]:
        """As the next fetch will see it: all pieces of a file that has changed are in doubt."""
        pieces = [piece in self._record.pieces for piece in range(layout.piece_count)]
        for file in layout.payload:
            if file.path not in self._held:
                for piece in layout.pieces_over(file):
                    pieces[piece] = False
        return tuple(pieces)

    def by_pieces(self, entry: ManifestFile) -> bool:
        return self._in_torrent(entry) is not None

    def _in_torrent(self, entry: ManifestFile) -> LayoutFile | None:
        file = None if self._layout is None else self._layout.file(entry.path)
        if file is None or not self._store.pieces_speak_for(entry.path):
            return None
        return file

    def proven(self, entry: ManifestFile, start: int, length: int) -> int:
        """Proven bytes of `length` bytes of a file from `start` on."""
        file, layout = self._in_torrent(entry), self._layout
        if file is None or layout is None:
            proof = self._record.files.get(entry.path)
            right = entry.sha256 is not None and proof is not None and proof.sha256 == entry.sha256
            whole = right and proof is not None and not proof.writing and entry.path in self._held
            return length if whole else 0
        first, stop = file.start + start, file.start + start + length
        width = layout.piece_length
        return sum(
            min(stop, (piece + 1) * width) - max(first, piece * width)
            for piece in layout.pieces_over(file, start, length)
            if self.pieces[piece]
        )


def _state(
    store: Store,
    file: ManifestFile,
    proven: dict[PurePosixPath, int],
    stamps: dict[PurePosixPath, Stamp | None],
) -> FileState:
    stamp, proof = stamps[file.path], store.record().files.get(file.path)
    asked = store.asked()
    if stamp is None:
        return "absent" if asked is None or file.path in asked else "not asked for"
    if proof is not None and not proof.holds(stamp):
        return "changed"
    return "proven" if proven[file.path] == file.size == stamp.size else "begun"


def _groups(
    tensors: Sequence[ManifestTensor], files: dict[PurePosixPath, ManifestFile], spans: _Spans
) -> tuple[Group, ...]:
    sums: defaultdict[tuple[int, int, str], list[int]] = defaultdict(lambda: [0, 0])
    for tensor in tensors:
        both = sums[_group(tensor.name)]
        for start, length in tensor.spans():
            both[0] += spans.proven(files[tensor.file], start, length)
            both[1] += length
    return tuple(Group(key[2], *both) for key, both in sorted(sums.items()))


def _group(name: str) -> tuple[int, int, str]:
    """What sorts the tensors into groups, and the groups in their order."""
    layer = re.search(r"decoder_layer_(\d+)/", name)
    if layer is not None:
        return 0, int(layer[1]), f"layer {int(layer[1])}"
    return (1, 0, OUTER) if name.startswith("language_model/") else (2, 0, "other tensors")


def piece_map(pieces: Sequence[bool], cells: int) -> list[float]:
    """The share of proven pieces in each of at most `cells` runs of pieces, in order."""
    count = min(cells, len(pieces))
    bounds = [len(pieces) * cell // count for cell in range(count)] + [len(pieces)]
    return [sum(pieces[a:b]) / (b - a) for a, b in pairwise(bounds)]
