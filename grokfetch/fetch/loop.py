"""Pieces to the disk, each read back and hashed, until all that is asked for is proven."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import PurePosixPath

from grokfetch.errors import Contradiction, Stalled, StorageFailed
from grokfetch.events import (
    Arrived,
    FetchEvent,
    Finding,
    Metadata,
    Notice,
    Origin,
    Outcome,
    Phase,
    PiecesProven,
    Status,
    Traffic,
)
from grokfetch.fetch import preflight
from grokfetch.fetch.prepare import Asked, metadata, settle
from grokfetch.fetch.source import Order, PieceSource
from grokfetch.folder.ledger import Proofs
from grokfetch.folder.payload import cut_long_files, make_empty_files, own
from grokfetch.folder.repair import read_again
from grokfetch.folder.saving import Saver
from grokfetch.folder.store import Store
from grokfetch.folder.verify import TensorIndex, corrupt, hash_files
from grokfetch.manifest.schema import Manifest, ManifestFile
from grokfetch.manifest.selection import pieces_of, urgency
from grokfetch.torrent.layout import Layout, LayoutFile
from grokfetch.torrent.read_back import (
    Hashers,
    PieceResult,
    check_pieces,
    in_batches,
    may_be_on_disk,
)

__all__ = ["Limits", "fetch"]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How long, in seconds, to wait for what; how often a piece is asked for in vain.

    `metadata_s` without metadata and `stall_s` without a byte end the fetch. `save_s` passes
    between two writings of the record. `attempts` rounds without one new piece end the fetch too.
    """

    metadata_s: float = 300.0
    stall_s: float = 600.0
    save_s: float = 3.0
    attempts: int = 3


def fetch(  # noqa: PLR0913  # store and source, and what a caller may choose by name
    store: Store,
    source: PieceSource,
    *,
    manifest: Manifest | None = None,
    limits: Limits | None = None,
    repair: bool = False,
    request: Asked | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[FetchEvent, None, None]:
    """Bring a checkpoint to the disk and prove every byte of it.

    Close the generator (`contextlib.closing`) to end early; what is proven is recorded first.

    Args:
        store: where to.
        source: where from.
        manifest: what it must be; by default the manifest in force, or else whatever the torrent
            holds.
        limits: patience.
        repair: trust nothing that was proven before: read everything back first.
        request: what of the checkpoint is wanted, beside what earlier fetches into this folder
            asked for; an empty one is all of it. By default just what they asked for, or all of it
            if there was none.
        clock: monotonic seconds.

    Yields:
        Metadata, Status, proven pieces, findings and notices, then one Outcome.

    Raises:
        TorrentInvalid: the metadata is not the one asked for, or unsafe.
        SelectionInvalid: the request names what the checkpoint does not have.
        Contradiction: the torrent is not what the manifest says, or not the one begun here.
        Stalled: no metadata, or not a byte, for too long.
        StateLocked: another process uses the folder.
        StorageFailed: the disk is full, read-only, gone or failing.
    """
    with store.lock():
        fetch = _Fetch(store, source, manifest, limits or Limits(), clock)
        yield from fetch.run(request, repair=repair)


class _Fetch:
    """One fetch, with the lock held."""

    def __init__(
        self,
        store: Store,
        source: PieceSource,
        manifest: Manifest | None,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._source = source
        self._wanted = manifest
        self._limits = limits
        self._clock = clock
        self._fetched = 0
        self._rehashed = 0
        self._sent: Mapping[Origin, int] = {}

    def run(self, request: Asked | None, *, repair: bool) -> Iterator[FetchEvent]:
        store, source = self._store, self._source
        self._torrent = yield from metadata(store, source, self._limits.metadata_s, self._clock)
        self._layout = yield from settle(store, self._torrent, source.magnet, self._wanted, request)
        self._tensors = TensorIndex(self._store.manifest())
        self._weights = [_payload_size(self._layout, p) for p in range(self._layout.piece_count)]
        asked = self._store.asked()
        every = range(self._layout.piece_count)
        self._asked = frozenset(every) if asked is None else pieces_of(self._layout, asked)
        self._total = sum(self._weights[piece] for piece in self._asked)
        self._urgency = urgency(self._store.manifest(), self._layout, self._asked)
        counts = (len(self._layout.payload), sum(self._weights), self._layout.piece_count)
        yield Metadata(self._layout.name, self._torrent.info_hash, *counts)
        for file in cut_long_files(self._store, self._layout):
            yield Finding("long", file.path, detail=f"cut to the {file.size:,} bytes it must have")
        make_empty_files(self._store, self._layout)
        self._proofs = Proofs(self._store, self._layout, self._torrent.info_hash)
        if repair:
            yield from self._read_again()
        with Saver(self._proofs, self._limits.save_s, self._clock) as self._saver:
            yield from self._bring_all()
        yield from self._check_digests()
        if not self._proofs.settled:
            self._proofs.end_writing()
        yield self._status("done")
        yield Outcome(self._total, self._fetched, self._rehashed)

    # --- pieces -------------------------------------------------------------------------------

    def _read_again(self) -> Iterator[FetchEvent]:
        for event in read_again(self._store, self._layout, self._proofs):
            if isinstance(event, Finding | PiecesProven):
                yield event
            else:
                yield Status("checking", event.done, event.total)

    def _bring_all(self) -> Iterator[FetchEvent]:
        in_vain = 0
        while True:
            for path in self._proofs.look_again():
                yield Finding("unproven", path, detail="others changed or removed it meanwhile")
            self._done = sum(self._weights[piece] for piece in self._proofs.pieces & self._asked)
            yield from self._check_disk()
            missing = self._missing
            if not missing:
                return
            if in_vain == self._limits.attempts:
                raise StorageFailed(
                    f"piece {missing[0]} did not read back right after {in_vain} attempts "
                    f"({len(missing)} such pieces): the disk, or memory, is failing",
                    path=self._store.root,
                )
            if (yield from self._make_room(missing)):
                continue
            before = len(self._proofs.pieces)
            yield from self._download(missing)
            in_vain = in_vain + 1 if len(self._proofs.pieces) <= before else 0

    @property
    def _missing(self) -> list[int]:
        return [piece for piece in self._proofs.missing if piece in self._asked]

    def _check_disk(self) -> Iterator[FetchEvent]:
        """Read back what is not proven and may be on the disk already."""
        root, layout = self._store.root, self._layout
        pieces = list(may_be_on_disk(root, layout, self._missing))
        total = sum(self._weights[piece] for piece in pieces)
        read = 0
        with Hashers[list[PieceResult]]() as hashers:
            batches = in_batches(layout, pieces)
            for results in hashers.run(partial(check_pieces, root, layout, b) for b in batches):
                for result in results:
                    self._rehashed += 1
                    read += self._weights[result.piece]
                    self._count(result)
                yield PiecesProven(tuple(r.piece for r in results if r.verdict == "good"))
                self._saver.turn()
                yield dataclasses.replace(self._status("checking"), done=read, total=total)

    def _make_room(self, missing: list[int]) -> Generator[FetchEvent, None, bool]:
        """Make sure that these pieces can be written; whether files had to be copied for that."""
        files = _files_of(self._layout, missing)
        preflight.check(self._store.root, self._room(files))
        copied = []
        for file in own(self._store, files):
            copied.append(file)
            yield Notice(f"{file.path} was a link, and is a copy now, for bytes of it are missing")
        self._proofs.renew(copied)
        return bool(copied)

    def _download(self, missing: list[int]) -> Iterator[FetchEvent]:
        self._saver.settle()
        self._proofs.mark_writing(file.path for file in _files_of(self._layout, missing))
        order = Order(
            self._torrent,
            self._layout,
            self._store.root,
            frozenset(self._proofs.pieces),
            frozenset(missing),
            self._urgency,
        )
        stream = self._source.download(order)
        with Hashers[list[PieceResult]]() as hashers:
            try:
                yield from self._follow(stream, hashers)
            finally:
                # Only when nobody writes any more may the proofs be tied to the files as they look;
                # if closing fails, the marks stay, and the next fetch trusts what was saved.
                stream.close()
                while hashers.busy:
                    for result in chain.from_iterable(hashers.take(None)):
                        self._count(result)
                self._saver.settle()
                self._proofs.end_writing()

    def _room(self, files: list[LayoutFile]) -> list[tuple[PurePosixPath, int]]:
        """The files with the bytes that are asked for of each."""
        room = dict.fromkeys((file.path for file in files), 0)
        for piece in self._asked:
            for part in self._layout.segments(piece):
                if part.file.path in room and not part.file.pad:
                    room[part.file.path] += part.length
        return list(room.items())

    def _follow(
        self,
        stream: Iterator[Arrived | Traffic | Notice],
        hashers: Hashers[list[PieceResult]],
    ) -> Iterator[FetchEvent]:
        traffic = Traffic(0, 0.0, 0)
        alive = self._clock()
        for event in stream:
            if isinstance(event, Notice):
                yield event
            elif isinstance(event, Arrived):
                alive = self._clock()
                self._fetched += len(event.pieces)
                for batch in in_batches(self._layout, event.pieces):
                    hashers.submit(partial(check_pieces, self._store.root, self._layout, batch))
            else:
                alive = self._clock() if event.received > traffic.received else alive
                traffic = event
                self._sent = event.sent
            yield from self._collect(hashers, traffic, wait=False)
            self._check_alive(alive, traffic)
        while hashers.busy:
            yield from self._collect(hashers, traffic, wait=True)

    def _check_alive(self, alive: float, traffic: Traffic) -> None:
        if self._clock() - alive > self._limits.stall_s:
            raise Stalled(
                f"no data for {self._limits.stall_s:.0f} s from {traffic.peers} peers",
                path=self._store.root,
                hint=f"what has arrived is kept; go on with: grokfetch fetch {self._store.root}",
            )

    def _collect(
        self, hashers: Hashers[list[PieceResult]], traffic: Traffic, *, wait: bool
    ) -> Iterator[FetchEvent]:
        for result in chain.from_iterable(hashers.take(None if wait else 0)):
            self._count(result)
            if result.verdict == "good":
                yield PiecesProven((result.piece,))
            else:
                yield from corrupt(self._layout, result, self._tensors)
        self._saver.turn()
        yield dataclasses.replace(
            self._status("downloading"), rate=traffic.rate, peers=traffic.peers
        )

    def _count(self, result: PieceResult) -> None:
        if result.verdict == "good":
            self._done += self._weights[result.piece] if result.piece in self._asked else 0
            self._proofs.add(result.piece)

    # --- digests ------------------------------------------------------------------------------

    def _check_digests(self) -> Iterator[FetchEvent]:
        """Hash whole files where the manifest's sha256 decides and not the torrent."""
        asked = self._store.asked()
        files = [
            file
            for file in self._store.manifest().files
            if not self._store.pieces_speak_for(file.path)
            and (asked is None or file.path in asked)
            and self._proofs.sha256(file.path) != file.sha256
        ]
        total = sum(file.size for file in files)
        read = 0
        wrong: list[ManifestFile] = []
        for file, stamp, result in hash_files(self._store, files):
            read += file.size
            if stamp and result.sha256 and result.sha256 == file.sha256:
                self._proofs.add_file(file.path, stamp, result.sha256)
            else:
                wrong.append(file)
            yield dataclasses.replace(self._status("hashing"), done=read, total=total)
        if wrong:
            self._proofs.end_writing()
            raise Contradiction(
                f"{wrong[0].path} is as the torrent has it, but not the file whose sha256 the "
                f"manifest gives ({len(wrong)} such files)",
                path=self._store.root,
            )

    def _status(self, phase: Phase) -> Status:
        return Status(
            phase,
            self._done,
            self._total,
            pieces_done=len(self._proofs.pieces & self._asked),
            pieces_total=len(self._asked),
            proven=self._done,
            sent=self._sent,
        )


def _payload_size(layout: Layout, piece: int) -> int:
    return sum(part.length for part in layout.segments(piece) if not part.file.pad)


def _files_of(layout: Layout, pieces: list[int]) -> list[LayoutFile]:
    """The files on disk in which these pieces lie."""
    return list(
        dict.fromkeys(
            part.file for piece in pieces for part in layout.segments(piece) if not part.file.pad
        )
    )
