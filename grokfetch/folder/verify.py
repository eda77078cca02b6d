"""Reads everything back and reports what is proven, what is wrong and what is unknown.

Findings are values: the scan continues after each one, and the caller decides what they mean. Each
byte is read once, and checked by the hash that can prove it: the torrent's piece hashes, or the
manifest's sha256 if the manifest does not name that torrent. `Proven` decides what is proven.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from grokfetch.errors import StateLocked, StorageFailed
from grokfetch.events import Finding, Kind, PiecesProven, Progress, Summary, VerifyEvent
from grokfetch.folder.documents import part_name
from grokfetch.folder.payload import flush
from grokfetch.folder.proven import Proven
from grokfetch.folder.record import FileProof, Record, Stamp
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, ManifestFile, ManifestTensor
from grokfetch.manifest.selection import pieces_of
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.names import STATE_FOLDER
from grokfetch.torrent.read_back import (
    FileResult,
    Hashers,
    PieceResult,
    check_pieces,
    in_batches,
    sha256_of,
)

__all__ = ["TensorIndex", "corrupt", "hash_files", "verify"]


def verify(store: Store) -> Generator[VerifyEvent, None, None]:
    """Read the whole checkpoint back and record what is proven.

    Args:
        store: the checkpoint folder, with a manifest in force.

    Yields:
        Progress, proven pieces and findings as they come, then one Summary.

    Raises:
        StateMissing: there is no manifest.
        StateLocked: another process uses the folder.
    """
    if not store.state.is_dir():
        # Raises if there is no manifest; the lock would create a state folder that is not wanted.
        store.manifest()
    with contextlib.ExitStack() as stack:
        recording = True
        try:
            stack.enter_context(store.lock())
        except (StateLocked, StorageFailed):
            # Other readers keep writers out, but need not keep out a reader.
            stack.enter_context(store.lock(exclusive=False))
            recording = False
        yield from _Verification(store, recording=recording).run()


class TensorIndex:
    """Finds the tensors in a span of a manifest's files."""

    def __init__(self, manifest: Manifest) -> None:
        self._of: defaultdict[PurePosixPath, list[ManifestTensor]] = defaultdict(list)
        for tensor in manifest.tensors:
            self._of[tensor.file].append(tensor)

    def names(self, path: PurePosixPath, start: int, length: int) -> str | None:
        """The tensors with a byte in a span of a file, separated by ", "; None if there is none."""
        names = [
            tensor.name
            for tensor in self._of.get(path, ())
            if any(
                begin < start + length and start < begin + size for begin, size in tensor.spans()
            )
        ]
        return ", ".join(names) or None


def corrupt(layout: Layout, result: PieceResult, tensors: TensorIndex) -> Iterator[Finding]:
    """The findings about a piece that was read wrong, or not at all: one for each of its files."""
    kind: Kind = "unreadable" if result.verdict == "unreadable" else "corrupt"
    algorithm = "SHA-1" if layout.version == 1 else "SHA-256"
    for part in layout.segments(result.piece):
        if not part.file.pad:
            yield Finding(
                kind,
                part.file.path,
                result.piece,
                tensors.names(part.file.path, part.offset, part.length),
                result.detail
                or f"{algorithm} of piece {result.piece} is not the torrent's; it holds bytes "
                f"{part.offset:,} to {part.offset + part.length:,}",
            )


def hash_files(
    store: Store,
    files: Iterable[ManifestFile],
    *,
    keep: bool = True,
    beside: Mapping[PurePosixPath, Callable[[memoryview], object]] | None = None,
) -> Iterator[tuple[ManifestFile, Stamp | None, FileResult]]:
    """Hash whole files: each with how it looked before it was read, and the result.

    Args:
        store: their folder.
        files: which.
        keep: whether what is read may stay in the page cache.
        beside: by file, what else is given its bytes, as of `sha256_of`.
    """

    def job(
        file: ManifestFile, buffer: memoryview
    ) -> tuple[ManifestFile, Stamp | None, FileResult]:
        path, other = store.payload(file.path), (beside or {}).get(file.path)
        return file, store.stamp(file.path), sha256_of(path, buffer, keep=keep, beside=other)

    with Hashers[tuple[ManifestFile, Stamp | None, FileResult]]() as hashers:
        yield from hashers.run(partial(job, file) for file in files)


class _Verification:
    """One pass over a checkpoint."""

    def __init__(self, store: Store, *, recording: bool) -> None:
        self._store = store
        self._recording = recording
        self._manifest = store.manifest()
        self._torrent = store.torrent()
        self._layout = store.layout()
        self._tensors = TensorIndex(self._manifest)
        self._asked = asked = store.asked()
        self._files = [f for f in self._manifest.files if asked is None or f.path in asked]
        # A piece may be shared with a file that is not asked for, or that the manifest omits.
        shared = () if self._layout is None else self._layout.payload
        paths = [file.path for file in self._files] + [file.path for file in shared]
        self._before = {path: store.stamp(path) for path in paths}
        self._by_pieces = [file for file in self._files if self._is_by_pieces(file)]
        self._by_sha256 = self._files_by_sha256()
        self._pieces = self._pieces_to_check()
        self._good: set[int] = set()
        self._digests: dict[PurePosixPath, str] = {}
        self._findings: list[Finding] = []
        self._done = 0
        self._total = sum(file.size for file in self._by_sha256)
        if self._layout is not None:
            self._total += sum(map(self._layout.piece_size, self._pieces))

    def _is_by_pieces(self, file: ManifestFile) -> bool:
        laid_out = None if self._layout is None else self._layout.file(file.path)
        if laid_out is None or laid_out.size != file.size:
            return False
        return self._store.pieces_speak_for(file.path)

    def _files_by_sha256(self) -> list[ManifestFile]:
        by_pieces = {file.path for file in self._by_pieces}
        return [
            file
            for file in self._files
            if file.sha256 is not None
            and file.path not in by_pieces
            and self._before[file.path] is not None
        ]

    def _asked_pieces(self, files: Iterable[ManifestFile]) -> frozenset[int]:
        """The pieces that are asked for of some files."""
        if self._layout is None:
            return frozenset()
        asked = self._asked
        spans = {
            file.path: ((0, file.size),) if asked is None else asked[file.path] for file in files
        }
        return pieces_of(self._layout, spans)

    def _pieces_to_check(self) -> list[int]:
        present = (file for file in self._by_pieces if self._before[file.path] is not None)
        return sorted(self._asked_pieces(present))

    def run(self) -> Iterator[VerifyEvent]:
        yield from self._note(self._at_first_sight())
        yield from self._check_pieces()
        yield from self._check_files()
        yield from self._note(self._changed_meanwhile())
        if self._recording:
            self._save()
        yield from self._note(self._extras())
        yield self._summary()

    def _note(self, findings: Iterable[Finding]) -> Iterator[Finding]:
        for finding in findings:
            self._findings.append(finding)
            yield finding

    def _at_first_sight(self) -> Iterator[Finding]:
        hashed = {file.path for file in (*self._by_pieces, *self._by_sha256)}
        for file in self._files:
            now = self._before[file.path]
            names = self._tensors.names(file.path, 0, file.size)
            if now is None:
                yield Finding("missing", file.path, None, names)
            elif now.size != file.size:
                yield Finding(
                    "short" if now.size < file.size else "long",
                    file.path,
                    None,
                    self._tensors.names(file.path, now.size, file.size - now.size),
                    f"it has {now.size:,} bytes instead of {file.size:,}",
                )
            elif file.path not in hashed:
                yield Finding("unproven", file.path, None, names, "no hash of it is known")

    # --- by pieces --------------------------------------------------------------------------

    def _check_pieces(self) -> Iterator[VerifyEvent]:
        layout = self._layout
        if layout is None:
            return
        root = self._store.root
        jobs: Iterable[Callable[[memoryview], list[PieceResult]]] = (
            partial(check_pieces, root, layout, batch) for batch in in_batches(layout, self._pieces)
        )
        with Hashers[list[PieceResult]]() as hashers:
            for results in hashers.run(jobs):
                for result in results:
                    yield from self._note(self._judge(layout, result))
                    self._done += layout.piece_size(result.piece)
                yield PiecesProven(tuple(r.piece for r in results if r.verdict == "good"))
                yield Progress(self._done, self._total)

    def _judge(self, layout: Layout, result: PieceResult) -> Iterator[Finding]:
        if result.verdict == "good":
            self._good.add(result.piece)
        elif result.verdict != "absent":
            # What is absent has been reported with its file.
            yield from corrupt(layout, result, self._tensors)

    # --- by sha256 --------------------------------------------------------------------------

    def _check_files(self) -> Iterator[VerifyEvent]:
        for file, _, result in hash_files(self._store, self._by_sha256):
            yield from self._note(self._judge_file(file, result))
            self._done += file.size
            yield Progress(self._done, self._total)

    def _judge_file(self, file: ManifestFile, result: FileResult) -> Iterator[Finding]:
        names = self._tensors.names(file.path, 0, file.size)
        now = self._before[file.path]
        if result.sha256 is None:
            yield Finding("unreadable", file.path, None, names, result.detail)
        elif result.sha256 == file.sha256:
            self._digests[file.path] = result.sha256
        elif now is not None and now.size == file.size:
            yield Finding("corrupt", file.path, None, names, "its sha256 is not the manifest's")

    # --- the end ----------------------------------------------------------------------------

    def _changed_meanwhile(self) -> Iterator[Finding]:
        for path, before in self._before.items():
            if self._store.stamp(path) == before:
                continue
            self._digests.pop(path, None)
            self._before[path] = None
            yield Finding("unproven", path, None, None, "it changed while it was being read")

    def _save(self) -> None:
        paths = set(self._digests)
        if self._layout is not None:
            for piece in self._good:
                segments = self._layout.segments(piece)
                paths.update(part.file.path for part in segments if not part.file.pad)
        flush(map(self._store.payload, paths), self._store.root)
        self._store.save_record(self._record())

    def _record(self) -> Record:
        """What is proven by what was read, and by earlier proofs of what was not read now."""
        layout, before = self._layout, self._before
        info_hash = None if self._torrent is None else self._torrent.info_hash
        kept = Proven(self._store.record(), before, layout).pieces.difference(self._pieces)
        files = {
            path: FileProof(stamp, self._digests.get(path))
            for path, stamp in before.items()
            if stamp is not None
        }
        record = Record(info_hash, kept | self._good, files)
        return dataclasses.replace(record, pieces=Proven(record, before, layout).pieces)

    def _extras(self) -> Iterator[Finding]:
        named = {file.path for file in self._manifest.files}
        if self._layout is None:
            named.update(part_name(file.path) for file in self._manifest.files)
        else:
            named.update(file.path for file in self._layout.payload)
        if self._manifest.tokenizer is not None:
            named.add(self._manifest.tokenizer.path)
        ours = {self._store.root / STATE_FOLDER, self._store.state}
        for folder, names, files in os.walk(self._store.root):
            names.sort()
            names[:] = [name for name in names if Path(folder, name) not in ours]
            place = PurePosixPath(os.path.relpath(folder, self._store.root))
            for name in sorted(files):
                if place / name not in named and not re.fullmatch(r"\.[0-9a-f]+\.parts", name):
                    yield Finding("extra", place / name, detail="the manifest does not name it")

    def _summary(self) -> Summary:
        by_pieces = {file.path for file in self._by_pieces}
        others = sum(file.size for file in self._files if file.path not in by_pieces)
        return Summary(
            total=self._bytes_of(self._asked_pieces(self._by_pieces)) + others,
            by_pieces=self._bytes_of(self._good & self._record().pieces),
            by_sha256=sum(f.size for f in self._by_sha256 if f.path in self._digests),
            info_hash=None if self._torrent is None else self._torrent.info_hash,
            failures=sum(finding.kind != "extra" for finding in self._findings),
            recorded=self._recording,
            unreadable=sum(finding.kind == "unreadable" for finding in self._findings),
        )

    def _bytes_of(self, pieces: Iterable[int]) -> int:
        """Bytes of pieces in files that the torrent's hashes prove."""
        if self._layout is None:
            return 0
        names = {file.path for file in self._by_pieces}
        parts = (part for piece in pieces for part in self._layout.segments(piece))
        return sum(part.length for part in parts if part.file.path in names)
