"""What is proven and missing in a folder now, in total and by piece, file and layer.

It follows from the record. Files are statted, so one that has changed counts as not proven; nothing
is read or hashed, and no lock is taken.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Literal

from grokfetch.folder.documents import part_name
from grokfetch.folder.proven import Proven
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import ManifestFile, ManifestTensor
from grokfetch.manifest.selection import Spans, pieces_of

__all__ = ["FileState", "Group", "Survey", "piece_map", "survey"]

OUTER = "embedding and final norm"
FileState = Literal["proven", "begun", "absent", "changed", "not asked for"]


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for: in words, its bytes, and how many of them are proven."""

    what: str
    total: int
    proven: int


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one layer, or those outside layers: how many bytes are proven, of how many."""

    name: str
    proven: int
    total: int


@dataclasses.dataclass(frozen=True, slots=True)
class Survey:
    """How much of a checkpoint is proven.

    Args:
        name: of the checkpoint.
        total: bytes in the manifest's files.
        by_pieces: how many of them the torrent's piece hashes have proven.
        by_sha256: how many of them the manifest's sha256 have proven.
        info_hash: the torrent's, None without one.
        measured: the date when the manifest's digests were taken from somebody's disk, None if
            they were published.
        pieces: for each piece of the torrent, whether it is proven.
        files: the state of each file in the manifest. A "changed" one was verified, but its size or
            time has changed since.
        groups: completion by layer, in numeric order, then outside the layers.
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
        """Proven bytes, in either way."""
        return self.by_pieces + self.by_sha256


def survey(store: Store) -> Survey:
    """Survey a folder: its manifest, its record, and the sizes and times of its files.

    Raises:
        StateMissing: there is no manifest.
    """
    manifest, layout, proven = store.manifest(), store.layout(), store.proven()
    asked = store.asked()
    counts = [proven.count(file, 0, file.size) for file in manifest.files]
    pieces = range(0 if layout is None else layout.piece_count)
    return Survey(
        manifest.name,
        manifest.size,
        sum(by_pieces for by_pieces, _ in counts),
        sum(by_sha256 for _, by_sha256 in counts),
        store.record().info_hash,
        manifest.measured,
        tuple(piece in proven.pieces for piece in pieces),
        {file.path: _state(store, file, proven, asked) for file in manifest.files},
        _groups(manifest.tensors, {file.path: file for file in manifest.files}, proven),
        _asked(store, proven),
    )


def _asked(store: Store, proven: Proven) -> Asked | None:
    selection, asked, layout = store.selection(), store.asked(), store.layout()
    if selection is None or asked is None:
        return None
    total = done = 0
    by_pieces = set()
    if layout is not None:
        named = {file.path for file in store.manifest().files}
        for piece in pieces_of(layout, asked):
            size = sum(part.length for part in layout.segments(piece) if part.file.path in named)
            total += size
            done += size if piece in proven.pieces else 0
        by_pieces = {path for path in asked if store.pieces_speak_for(path)}
    for file in store.manifest().files:
        if file.path in asked and file.path not in by_pieces:
            total += file.size
            done += sum(proven.count(file, 0, file.size))
    return Asked(str(selection), total, done)


def _state(store: Store, file: ManifestFile, proven: Proven, asked: Spans | None) -> FileState:
    if store.stamp(file.path) is None:
        if store.layout() is None and store.stamp(part_name(file.path)) is not None:
            return "begun"
        return "absent" if asked is None or file.path in asked else "not asked for"
    if file.path in store.record().files and not proven.unchanged(file.path):
        return "changed"
    return "proven" if proven.whole(file) else "begun"


def _groups(
    tensors: Sequence[ManifestTensor], files: dict[PurePosixPath, ManifestFile], proven: Proven
) -> tuple[Group, ...]:
    sums: defaultdict[tuple[int, int, str], list[int]] = defaultdict(lambda: [0, 0])
    for tensor in tensors:
        both = sums[_group(tensor.name)]
        for start, length in tensor.spans():
            both[0] += sum(proven.count(files[tensor.file], start, start + length))
            both[1] += length
    return tuple(Group(key[2], *both) for key, both in sorted(sums.items()))


def _group(name: str) -> tuple[int, int, str]:
    """The group of a tensor: two keys for the order of the groups, and its name."""
    layer = re.search(r"decoder_layer_(\d+)/", name)
    if layer is not None:
        return 0, int(layer[1]), f"layer {int(layer[1])}"
    return (1, 0, OUTER) if name.startswith("language_model/") else (2, 0, "other tensors")


def piece_map(pieces: Sequence[bool], cells: int) -> list[float]:
    """The proven share of each of at most `cells` runs of pieces, in order."""
    count = min(cells, len(pieces))
    bounds = [len(pieces) * cell // count for cell in range(count)] + [len(pieces)]
    return [sum(pieces[a:b]) / (b - a) for a, b in pairwise(bounds)]
