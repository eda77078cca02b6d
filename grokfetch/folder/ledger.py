"""The record in memory: what a fetch or a verification has proven so far, and saving it.

Proofs come only from reading back. Data is flushed to the disk before the record claims it, so that
after a power cut the record claims no bytes that are lost.

Flushing a second's worth of a fast download takes most of a second. A thread of its own keeps the
disk busy from the first bytes on, and only the record waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Self

from grokfetch.errors import StorageFailed, gone
from grokfetch.folder.payload import flush
from grokfetch.folder.proven import Proven
from grokfetch.folder.record import FileProof, Record, Stamp
from grokfetch.folder.store import Store
from grokfetch.torrent.layout import Layout, LayoutFile

__all__ = ["Proofs", "Saver"]

FLUSH_BYTES = 256 << 20
"""After this many proven bytes, data is flushed."""

AFTER_FILE_S = 0.5
"""Least seconds since the last record before one is written because a file is complete."""

REST = 10
"""Pause before such a record, in multiples of the time that the last one took to write: the time
grows with the number of files."""


class Proofs:
    """What is proven of a torrent's payload, with the store's exclusive lock held.

    Args:
        store: the checkpoint folder.
        layout: the torrent's.
        info_hash: the torrent's.

    Attributes:
        pieces: the proven ones, including those not yet saved.
        unflushed_bytes: of pieces proven since the last flush began.
        whole_file: whether a file has become whole since the record was written.
    """

    def __init__(self, store: Store, layout: Layout, info_hash: str) -> None:
        self._store = store
        self._layout = layout
        self._info_hash = info_hash
        record = store.record()
        self._files = dict(record.files)
        self.pieces = set(record.pieces)
        self._unflushed: set[int] = set()
        self._flushing: set[int] = set()
        self.unflushed_bytes = 0
        self.whole_file = False
        self._left: dict[PurePosixPath, int] = {}
        self._inodes: dict[PurePosixPath, tuple[int, int] | None] = {}
        self._spoilt: list[PurePosixPath] = []
        self._doubt_changed()

    def _doubt_changed(self) -> list[PurePosixPath]:
        """Drop the proofs of files that have changed; returns the paths of those that had any."""
        now = {file.path: self._store.stamp(file.path) for file in self._layout.payload}
        record = Record(self._info_hash, frozenset(self.pieces), self._files)
        proven = Proven(record, now, self._layout)
        doubtful = record.pieces - proven.pieces
        spoilt = []
        for file in self._layout.payload:
            if not proven.unchanged(file.path):
                if not doubtful.isdisjoint(self._layout.pieces_over(file)):
                    spoilt.append(file.path)
                self._look(file.path, now[file.path])
        self.remove(doubtful)
        return spoilt

    def _look(self, path: PurePosixPath, now: Stamp | None) -> None:
        """Tie the proofs of a file to its current stamp, without a sha256."""
        self._files.pop(path, None)
        if now is not None:
            self._files[path] = FileProof(now)

    @property
    def missing(self) -> list[int]:
        """The pieces that are not proven, in order."""
        return [piece for piece in range(self._layout.piece_count) if piece not in self.pieces]

    def add(self, piece: int) -> None:
        """Count a piece whose read-back was right."""
        if piece in self.pieces:
            return
        self.pieces.add(piece)
        self._unflushed.add(piece)
        for part in self._layout.segments(piece):
            if not part.file.pad:
                self.unflushed_bytes += part.length
                self._count_down(part.file)

    def _count_down(self, file: LayoutFile) -> None:
        """One piece less is missing of a file."""
        left = self._left.get(file.path)
        if left is None:
            left = sum(piece not in self.pieces for piece in self._layout.pieces_over(file))
        else:
            left -= 1
        self._left[file.path] = left
        self.whole_file |= not left

    def remove(self, pieces: Iterable[int]) -> None:
        """Drop the proofs of pieces that no longer read correctly."""
        doubtful = set(pieces)
        self.pieces -= doubtful
        self._unflushed -= doubtful
        self._flushing -= doubtful
        self._left.clear()

    def forget_digests(self) -> None:
        """Drop the digests of whole files."""
        for path, proof in self._files.items():
            self._files[path] = dataclasses.replace(proof, sha256=None)

    def mark_writing(self, paths: Iterable[PurePosixPath]) -> None:
        """Record on disk, before it happens, that we will write these files.

        Raises:
            StorageFailed: the record cannot be written.
        """
        for path in paths:
            now = self._store.stamp(path) or Stamp(0, 0)
            self._files[path] = FileProof(now, writing=True)
        self.save()

    def _mark(self, paths: Iterable[PurePosixPath]) -> None:
        """Mark those of the files that are not marked yet."""
        for path in paths:
            if path not in self._files or not self._files[path].writing:
                now = self._store.stamp(path) or Stamp(0, 0)
                self._files[path] = FileProof(now, writing=True)

    def mark_more(self, paths: Iterable[PurePosixPath]) -> None:
        """The same of files beside those being written; what was proven may be flushed later.

        Raises:
            StorageFailed: the record cannot be written.
        """
        self._mark(paths)
        self.write()

    def save(self) -> None:
        """Flush the data of newly proven pieces, then write the record.

        Raises:
            StorageFailed: either failed.
        """
        try:
            flush(self.begin_flush(), self._store.root)
        except StorageFailed:
            self.end_flush(well=False)
            raise
        self.end_flush(well=True)
        self.write()

    @property
    def root(self) -> Path:
        """The checkpoint folder."""
        return self._store.root

    def begin_flush(self) -> list[Path]:
        """The files to be flushed, before the record can claim what has been proven by now."""
        self._flushing |= self._unflushed
        self._unflushed.clear()
        self.unflushed_bytes = 0
        paths = {
            segment.file.path
            for piece in self._flushing
            for segment in self._layout.segments(piece)
            if not segment.file.pad
        }
        return [self._store.payload(path) for path in paths]

    def end_flush(self, *, well: bool) -> None:
        """Count the pieces as flushed for which `begin_flush` named the files.

        If that failed, their proofs are dropped: the system reports lost data only once.
        """
        if not well:
            self.remove(self._flushing)
        self._flushing.clear()

    def write(self) -> None:
        """Write the record of what is proven and flushed.

        Raises:
            StorageFailed: it cannot be written.
        """
        self._look_at_targets()
        self._store.save_record(self.record())
        self.whole_file = False

    def _look_at_targets(self) -> None:
        """Note how the files that we write look now, and doubt those that others have spoilt.

        Raises:
            StorageFailed: the whole folder has gone; what the record says of it stays.
        """
        if self.pieces and not self._store.root.is_dir():
            raise gone(self._store.root)
        for path, proof in list(self._files.items()):
            file = self._layout.file(path) if proof.writing else None
            # Without a proof, the stamp of a file does not matter.
            if file is not None and (end := self._proven_end(file)):
                now, inode = self._store.stamp_and_inode(path)
                stamp = now or Stamp(0, 0)
                if end > stamp.size or self._inodes.setdefault(path, inode) != inode:
                    self._doubt(file)
                    self._inodes.pop(path, None)
                if stamp != proof.stamp:
                    self._files[path] = FileProof(stamp, writing=True)

    def _proven_end(self, file: LayoutFile) -> int:
        """The byte of a file after its last proven one: no honest file is shorter."""
        for piece in reversed(self._layout.pieces_over(file)):
            if piece in self.pieces:
                return min(file.end, (piece + 1) * self._layout.piece_length) - file.start
        return 0

    def _doubt(self, file: LayoutFile) -> None:
        self.remove(self._layout.pieces_over(file))
        self._spoilt.append(file.path)

    def _doubt_holes(self) -> None:
        """Doubt pieces over holes: a file was truncated by others, and made long again by us.

        Where a file system makes holes of written zeros, their pieces are read once more.
        """
        for path, proof in self._files.items():
            file = self._layout.file(path)
            if proof.writing and file is not None:
                for start, length in _holes(self._store.payload(path), self._proven_end(file)):
                    doubtful = self.pieces.intersection(
                        self._layout.pieces_over(file, start, length)
                    )
                    if doubtful:
                        self.remove(doubtful)
                        self._spoilt.append(path)

    def look_again(self) -> list[PurePosixPath]:
        """Doubt the files that others have changed since; the paths of those, each only once."""
        changed = dict.fromkeys((*self._spoilt, *self._doubt_changed()))
        self._spoilt = []
        return list(changed)

    def renew(self, files: Iterable[LayoutFile]) -> None:
        """Doubt files that we have replaced ourselves; nothing is reported.

        What we are writing stays marked, though it may not be there yet.
        """
        ours = {file.path for file in files}
        writing = [path for path, proof in self._files.items() if proof.writing]
        self._spoilt += [path for path in self._doubt_changed() if path not in ours]
        self._mark(writing)

    def end_writing(self) -> None:
        """Save, and tie the proofs to the files as they look now that nobody writes them.

        Raises:
            StorageFailed: it cannot be written.
        """
        self._doubt_holes()
        self.save()
        for path, proof in list(self._files.items()):
            if proof.writing:
                self._look(path, self._store.stamp(path))
        self._inodes.clear()
        self.write()

    @property
    def settled(self) -> bool:
        """Whether the record on the disk says all of this, and of no file that it is written."""
        record = Record(self._info_hash, frozenset(self.pieces), self._files)
        writing = any(proof.writing for proof in self._files.values())
        return not writing and record == self._store.record()

    def sha256(self, path: PurePosixPath) -> str | None:
        """The digest of a file computed earlier, None if there is none or the file was written."""
        proof = self._files.get(path)
        return None if proof is None else proof.sha256

    def add_file(self, path: PurePosixPath, stamp: Stamp, sha256: str) -> None:
        """Count a whole file whose sha256 was computed while it looked like `stamp`."""
        self._files[path] = FileProof(stamp, sha256)

    def record(self) -> Record:
        """The record of all this, but for what is not flushed."""
        pieces = self.pieces - self._unflushed - self._flushing
        return Record(self._info_hash, frozenset(pieces), self._files.copy())


class Saver:
    """Saves proofs while more come.

    The record is at most `save_s` behind what is proven, or as far as the disk is slow. A record
    that is twice as old as it should be is waited for.

    Args:
        proofs: what to save.
        save_s: seconds between two writings of the record.
        clock: monotonic seconds.
        pool: where files are flushed, shut down at the end; by default a thread of its own.
    """

    def __init__(
        self,
        proofs: Proofs,
        save_s: float,
        clock: Callable[[], float],
        pool: Executor | None = None,
    ) -> None:
        self._proofs = proofs
        self._save_s = save_s
        self._clock = clock
        self._written_at = clock()
        self._after_file_s = AFTER_FILE_S
        self._pool = pool or ThreadPoolExecutor(1, "flush")
        self._flush: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def turn(self) -> None:
        """Do what is due; called after every event.

        Raises:
            StorageFailed: data cannot be flushed, or the record not be written.
        """
        age = self._clock() - self._written_at
        due = age >= self._save_s or (self._proofs.whole_file and age >= self._after_file_s)
        if self._flush is None and (due or self._proofs.unflushed_bytes >= FLUSH_BYTES):
            self._flush = self._pool.submit(flush, self._proofs.begin_flush(), self._proofs.root)
        if self._flush is not None and (self._flush.done() or age >= 2 * self._save_s):
            self.settle()
            if due:
                began = self._clock()
                self._proofs.write()
                self._written_at = self._clock()
                self._after_file_s = max(AFTER_FILE_S, REST * (self._written_at - began))

    def settle(self) -> None:
        """Wait for the flush under way.

        Raises:
            StorageFailed: the disk refuses; what it was about is doubted.
        """
        if self._flush is None:
            return
        running, self._flush = self._flush, None
        try:
            running.result()
        except StorageFailed:
            self._proofs.end_flush(well=False)
            raise
        self._proofs.end_flush(well=True)


def _holes(path: Path, stop: int) -> Iterator[tuple[int, int]]:
    """Start and length of each hole in the first `stop` bytes; none where that cannot be known."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        at = 0
        while at < stop:
            start = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            if start >= stop:
                return
            try:
                at = os.lseek(file.fileno(), start, os.SEEK_DATA)
            except OSError:
                # Nothing but hole follows.
                at = stop
            yield start, min(at, stop) - start
