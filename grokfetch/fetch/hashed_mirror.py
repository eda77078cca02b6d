"""Hash a checkpoint on a web server as it streams by, and keep the hashes.

An interrupted run keeps only whole files: the state of a sha256 in the middle of a file cannot be
saved, so the files under way are streamed again from the start. That costs as many files as there
are connections. Within a run, a broken connection costs nothing.
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

from grokfetch.errors import Damaged, storage_errors
from grokfetch.events import Notice
from grokfetch.fetch.mirror import Length, MirrorSettings, pass_by
from grokfetch.folder import advisory
from grokfetch.folder.payload import flush
from grokfetch.torrent.streamed import FileHasher, FileHashes

__all__ = ["Mirrored", "Spans", "hash_mirror"]

SCHEMA = 3
FILE = "hashed.json"
FRAMES = "frames"

Spans = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Mirrored:
    """What to hash, and where it comes from.

    Attributes:
        address: of the mirror, a template with `{path}`.
        piece_length: bytes.
        lengths: of the files, in bytes; their paths begin with the torrent's top folder, and are in
            the order of the torrent.
        expected: the sha256 that files must have, where it is known.
        frames: the bytes of files to keep, from each start up to each stop.
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
    """Hash all files, except those that an earlier call in the same folder has hashed.

    Args:
        mirrored: what to hash.
        folder: where the state is kept, locked; below it, in `frames`, sparse files with only the
            frames.
        settings: how to treat the mirror.
        progress: called with the bytes hashed, those of earlier calls first.
        say: called with what is being waited for.

    Raises:
        Contradiction: a file changed while it was read.
        Damaged: a file has the wrong sha256, or what was kept of one has changed.
        OutOfReach: the mirror does not have a file, or does not answer.
        Stalled: it has limited us for too long.
        StorageFailed: what is kept cannot be written.
    """
    done = _earlier(mirrored, folder)
    progress(sum(mirrored.lengths[path][0] for path in done))

    def end(path: PurePosixPath, found: FileHashes, frame: str) -> None:
        if mirrored.expected.get(path, found.sha256) != found.sha256:
            raise Damaged(
                f"its sha256 is {found.sha256}, published is {mirrored.expected[path]}",
                path=f"{path} on the mirror",
                hint="this mirror holds another file, or a damaged one: name another",
            )
        done[path] = _Done(found, frame)
        _save(mirrored, folder, done)

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
        if path not in done
    }
    pass_by(mirrored.address, receivers, settings, progress, say)
    for path, it in done.items():
        if not _frame_holds(mirrored, folder, path, it.frame):
            raise Damaged(
                "what was kept of this file cannot be read back as it came",
                path=folder / FRAMES / path,
                hint="run the same command again: it reads this file anew",
            )
    return {path: it.hashes for path, it in done.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class _Done:
    """The hashes of a hashed file, and the sha256 of its frame."""

    hashes: FileHashes
    frame: str


@dataclasses.dataclass(slots=True)
class _Hashing:
    """Hashes one file, and keeps its frame."""

    hasher: FileHasher
    folder: Path
    path: Path
    frame: Spans
    size: int
    ended: Callable[[FileHashes, str], None]
    kept: Any = dataclasses.field(default_factory=hashlib.sha256)

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
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.truncate(handle, self.size)
                for start, stop in parts:
                    part = data[start - first : stop - first]
                    self.kept.update(part)
                    while part:
                        written = os.pwrite(handle, part, start)
                        part, start = part[written:], start + written  # noqa: PLW2901
            finally:
                os.close(handle)

    def end(self) -> None:
        if self.frame:
            # The state is about to claim that it is there.
            flush([self.path], self.folder)
        self.ended(self.hasher.result(), self.kept.hexdigest())


def _earlier(mirrored: Mirrored, folder: Path) -> dict[PurePosixPath, _Done]:
    """The files that were hashed before and have not changed since."""

    def decode(fields: dict[str, Any]) -> dict[PurePosixPath, _Done]:
        origin, rows = fields["of"], fields["files"]
        if origin != _origin(mirrored) or fields["sha256"] != _sha256(origin, rows):
            return {}
        return {
            path: _Done(FileHashes(row[2], bytes.fromhex(row[3]), bytes.fromhex(row[4])), row[6])
            for name, row in rows.items()
            if mirrored.lengths.get(path := PurePosixPath(name)) == (row[0], row[1])
            and mirrored.expected.get(path, row[2]) == row[2]
            and row[5] == _frame(mirrored, path)
            and _frame_holds(mirrored, folder, path, row[6])
        }

    return advisory.read(folder / FILE, SCHEMA, decode) or {}


def _frame_holds(mirrored: Mirrored, folder: Path, path: PurePosixPath, sha256: str) -> bool:
    """Whether the frame of a file is still there unchanged."""
    spans = [it for it in mirrored.frames.get(path, ()) if it[0] < it[1]]
    found = hashlib.sha256()
    try:
        if spans:
            with (folder / FRAMES / path).open("rb") as file:
                for start, stop in spans:
                    file.seek(start)
                    found.update(file.read(stop - start))
    except OSError:
        return False
    return found.hexdigest() == sha256


def _save(mirrored: Mirrored, folder: Path, done: Mapping[PurePosixPath, _Done]) -> None:
    rows = {
        str(path): [
            *mirrored.lengths[path],
            it.hashes.sha256,
            it.hashes.v1.hex(),
            it.hashes.v2.hex(),
            _frame(mirrored, path),
            it.frame,
        ]
        for path, it in done.items()
    }
    origin = _origin(mirrored)
    state = {"of": origin, "files": rows, "sha256": _sha256(origin, rows)}
    advisory.write(folder / FILE, SCHEMA, state)


def _sha256(origin: Sequence[object], rows: Mapping[str, object]) -> str:
    """The sha256 of what is kept: a bit that flips on the disk would be published."""
    return hashlib.sha256(json.dumps([origin, rows]).encode()).hexdigest()


def _frame(mirrored: Mirrored, path: PurePosixPath) -> list[list[int]]:
    return [list(span) for span in mirrored.frames.get(path, ())]


def _origin(mirrored: Mirrored) -> Sequence[object]:
    """What the hashes depend on besides the files themselves."""
    return [mirrored.address, mirrored.piece_length, len(mirrored.lengths) > 1]
