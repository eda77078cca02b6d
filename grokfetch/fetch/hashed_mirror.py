"""A checkpoint on a web server is hashed as it streams by, and what is hashed is kept.

What is kept of an interrupted run is whole files: the state of a sha256 in the middle of a file
cannot be written down, so that the files that were under way are streamed again from their
beginning. That costs as many files as there are connections. Within a run, a connection that
breaks costs nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from grokfetch.errors import Damaged, storage_failed
from grokfetch.events import Notice
from grokfetch.fetch.mirror import Length, MirrorSettings, pass_by
from grokfetch.folder import advisory
from grokfetch.folder.payload import flush
from grokfetch.torrent.streamed import FileHasher, FileHashes

__all__ = ["Mirrored", "Spans", "hash_mirror"]

SCHEMA = 2
FILE = "hashed.json"
FRAMES = "frames"

Spans = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Mirrored:
    """What is to be hashed, and where from.

    Attributes:
        address: of the mirror, a template with `{path}`.
        piece_length: bytes.
        lengths: of the files; their paths begin with the torrent's top folder, and stand in the
            order of the torrent.
        expected: the sha256 that files must have, as far as it is known.
        frames: bytes that are kept of files, from each start up to each stop.
    """

    address: str
    piece_length: int
    lengths: Mapping[PurePosixPath, Length]
    expected: Mapping[PurePosixPath, str]
    frames: Mapping[PurePosixPath, Spans]


def hash_mirror(
    mirrored: Mirrored,
    folder: Path,
    settings: MirrorSettings,
    progress: Callable[[int], None],
    say: Callable[[Notice], None],
) -> dict[PurePosixPath, FileHashes]:
    """Hash all files; what an earlier call in the same folder has hashed is not read again.

    Args:
        mirrored: what.
        folder: where the state is kept, locked; below it, in `frames`, sparse files with the
            frames alone.
        settings: how to treat the mirror.
        progress: is told of bytes that are hashed, those of earlier calls first.
        say: is told what is waited for.

    Raises:
        Contradiction: a file has changed in the middle.
        Damaged: a file has not the sha256 that it must have.
        OutOfReach: the mirror does not have a file, or does not answer.
        Stalled: it has limited us for too long.
        StorageFailed: what is kept cannot be written.
    """
    hashes = _earlier(mirrored, folder)
    progress(sum(mirrored.lengths[path][0] for path in hashes))

    def end(path: PurePosixPath, found: FileHashes) -> None:
        if mirrored.expected.get(path, found.sha256) != found.sha256:
            raise Damaged(
                f"its sha256 is {found.sha256}, published is {mirrored.expected[path]}",
                path=f"{path} on the mirror",
                hint="this mirror holds another file, or a damaged one: name another",
            )
        hashes[path] = found
        _save(mirrored, folder, hashes)

    padded = len(mirrored.lengths) > 1
    receivers = {
        path: (
            length,
            _Hashing(
                FileHasher(length[0], mirrored.piece_length, padded=padded),
                folder,
                folder / FRAMES / path,
                mirrored.frames.get(path, ()),
                length[0],
                partial(end, path),
            ),
        )
        for path, length in mirrored.lengths.items()
        if path not in hashes
    }
    pass_by(mirrored.address, receivers, settings, progress, say)
    return hashes


@dataclasses.dataclass(slots=True)
class _Hashing:
    """Hashes one file, and keeps its frame."""

    hasher: FileHasher
    folder: Path
    path: Path
    frame: Spans
    size: int
    ended: Callable[[FileHashes], None]

    @property
    def done(self) -> int:
        return self.hasher.done

    def take(self, data: memoryview) -> None:
        self._keep(data)
        self.hasher.update(data)

    def _keep(self, data: memoryview) -> None:
        first = self.done
        parts = [
            (max(start, first), min(stop, first + len(data)))
            for start, stop in self.frame
            if start < first + len(data) and first < stop
        ]
        if not parts:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.truncate(handle, self.size)
                for start, stop in parts:
                    os.pwrite(handle, data[start - first : stop - first], start)
            finally:
                os.close(handle)
        except OSError as error:
            raise storage_failed(error, self.path) from error

    def end(self) -> None:
        if self.frame:
            # The state is about to say that it is there.
            flush([self.path], self.folder)
        self.ended(self.hasher.result())


def _earlier(mirrored: Mirrored, folder: Path) -> dict[PurePosixPath, FileHashes]:
    """What was hashed of the files as they are now."""

    def decode(fields: dict[str, Any]) -> dict[PurePosixPath, FileHashes]:
        origin, rows = fields["of"], fields["files"]
        if origin != _origin(mirrored) or fields["sha256"] != _sha256(origin, rows):
            return {}
        return {
            path: FileHashes(row[2], bytes.fromhex(row[3]), bytes.fromhex(row[4]))
            for name, row in rows.items()
            if mirrored.lengths.get(path := PurePosixPath(name)) == (row[0], row[1])
            and mirrored.expected.get(path, row[2]) == row[2]
            and row[5] == _frame(mirrored, path)
            and (not row[5] or (folder / FRAMES / path).is_file())
        }

    return advisory.read(folder / FILE, SCHEMA, decode) or {}


def _save(mirrored: Mirrored, folder: Path, hashes: Mapping[PurePosixPath, FileHashes]) -> None:
    rows = {
        str(path): [
            *mirrored.lengths[path],
            it.sha256,
            it.v1.hex(),
            it.v2.hex(),
            _frame(mirrored, path),
        ]
        for path, it in hashes.items()
    }
    origin = _origin(mirrored)
    state = {"of": origin, "files": rows, "sha256": _sha256(origin, rows)}
    advisory.write(folder / FILE, SCHEMA, state)


def _sha256(origin: Sequence[object], rows: Mapping[str, object]) -> str:
    """Of what is kept: a bit that changes on the disk would be published."""
    return hashlib.sha256(json.dumps([origin, rows]).encode()).hexdigest()


def _frame(mirrored: Mirrored, path: PurePosixPath) -> list[list[int]]:
    return [list(span) for span in mirrored.frames.get(path, ())]


def _origin(mirrored: Mirrored) -> Sequence[object]:
    """What hashes depend on beside the files themselves."""
    return [mirrored.address, mirrored.piece_length, len(mirrored.lengths) > 1]
