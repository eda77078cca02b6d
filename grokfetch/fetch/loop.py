"""Pieces to the disk, each read back and hashed, until all that is asked for is proven."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import PurePosixPath

from grokfetch.errors import Contradiction, Stalled, StorageFailed
from grokfetch.events import (
    Arrived,
    FetchEvent,
    Finding,
    Notice,
    Origin,
    Outcome,
    Phase,
    PiecesProven,
    Status,
    Traffic,
)
from grokfetch.fetch import preflight
from grokfetch.fetch.demand import Demand
from grokfetch.fetch.prepare import Asked, Prepared, prepare
from grokfetch.fetch.silence import Silence, other_ways
from grokfetch.fetch.source import Order, PieceSource
from grokfetch.folder.history import recorded
from grokfetch.folder.journal import checked
from grokfetch.folder.ledger import Proofs, Saver
from grokfetch.folder.payload import own
from grokfetch.folder.repair import read_again
from grokfetch.folder.store import Store
from grokfetch.folder.verify import corrupt, hash_files
from grokfetch.manifest.schema import Manifest, ManifestFile
from grokfetch.torrent.layout import Layout, LayoutFile
from grokfetch.torrent.read_back import (
    Hashers,
    PieceResult,
    check_pieces,
    in_batches,
    may_be_on_disk,
)
from grokfetch.units import count_text

__all__ = ["Limits", "fetch"]


MOST_DEMANDED = 100
"""Demanded pieces that are told at most."""

NOTICES = 3
"""Notices of the source, the last ones, that the error at the end repeats."""


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
    demand: Demand | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[FetchEvent, None, None]:
    """Bring a checkpoint to the disk and prove every byte of it.

    How it goes, and what it finds, is recorded in the folder for `status` and `report` on the way.
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
        demand: pieces that others wait for, before all the others.
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
        patience = limits or Limits()

        def events() -> Generator[FetchEvent, None, None]:
            for step in prepare(
                store,
                source,
                manifest=manifest,
                request=request,
                metadata_s=patience.metadata_s,
                clock=clock,
            ):
                if isinstance(step, Prepared):
                    bringing = _Bringing(step, source, patience, clock, demand or Demand())
                    yield from bringing.run(repair=repair)
                else:
                    yield step

        yield from checked(store, "fetch", recorded(store, events(), clock))


class _Bringing:
    """A prepared fetch under way: what is proven, and what the source has brought so far."""

    def __init__(
        self,
        prepared: Prepared,
        source: PieceSource,
        limits: Limits,
        clock: Callable[[], float],
        demand: Demand,
    ) -> None:
        self._plan = prepared
        self._store = prepared.store
        self._layout = prepared.layout
        self._source = source
        self._limits = limits
        self._clock = clock
        self._demand = demand
        self._proofs = Proofs(prepared.store, prepared.layout, prepared.torrent.info_hash)
        self._saver = Saver(self._proofs, limits.save_s, clock)
        self._total = prepared.weight(prepared.asked)
        self._done = prepared.weight(self._proofs.pieces & prepared.asked)
        self._fetched = 0
        self._rehashed = 0
        self._sent: Mapping[Origin, int] = {}
        self._notices: deque[str] = deque(maxlen=NOTICES)
        self._heeded = self._admitted_at = -1
        self._demanded: tuple[int, ...] = ()
        self._waiting: tuple[str, ...] = ()
        demand.follow(lambda piece: piece in self._proofs.pieces)

    def run(self, *, repair: bool) -> Iterator[FetchEvent]:
        with self._saver:
            if repair:
                yield from self._read_again()
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
            self._done = self._plan.weight(self._proofs.pieces & self._plan.asked)
            yield from self._check_disk()
            missing = self._missing
            if not missing and not self._demand.stays:
                return
            if in_vain == self._limits.attempts:
                raise StorageFailed(
                    f"piece {missing[0]} did not read back right after {in_vain} attempts "
                    f"({len(missing)} such pieces): the disk, or memory, is failing",
                    path=self._store.root,
                    hint="test both, or choose a folder on another disk: --to DIR",
                )
            files = _files_of(self._layout, missing)
            preflight.check(self._store.root, self._room(files))
            copied = []
            for file in own(self._store, files):
                copied.append(file)
                text = f"{file.path} was a link, and is a copy now, for bytes of it are missing"
                yield Notice(text)
            self._proofs.renew(copied)
            if not copied:
                before = len(self._proofs.pieces)
                yield from self._download(missing, files)
                in_vain = in_vain + 1 if len(self._proofs.pieces) <= before else 0

    @property
    def _missing(self) -> list[int]:
        return [piece for piece in self._proofs.missing if piece in self._plan.asked]

    def _check_disk(self) -> Iterator[FetchEvent]:
        """Read back what is not proven and may be on the disk already."""
        root, layout = self._store.root, self._layout
        pieces = list(may_be_on_disk(root, layout, self._missing))
        total = self._plan.weight(pieces)
        read = 0
        with Hashers[list[PieceResult]]() as hashers:
            batches = in_batches(layout, self._urgent_first(pieces))
            for results in hashers.run(partial(check_pieces, root, layout, b) for b in batches):
                for result in results:
                    self._rehashed += 1
                    read += self._plan.weights[result.piece]
                    self._count(result)
                yield PiecesProven(tuple(r.piece for r in results if r.verdict == "good"))
                self._saver.turn()
                yield dataclasses.replace(self._status("checking"), done=read, total=total)

    def _urgent_first(self, pieces: list[int]) -> Iterator[int]:
        """The pieces in order, but whatever is waited for by then comes next."""
        left = dict.fromkeys(pieces)
        version = -1
        while left:
            if self._demand.version != version:
                version = self._demand.version
                urgent = [piece for piece in self._demand.waited if piece in left]
                order = iter((*urgent, *left))
            piece = next(order)
            if piece in left:
                del left[piece]
                yield piece

    def _download(self, missing: list[int], files: list[LayoutFile]) -> Iterator[FetchEvent]:
        self._saver.settle()
        self._proofs.mark_writing(file.path for file in files)
        order = Order(
            self._plan.torrent,
            self._layout,
            self._store.root,
            frozenset(self._proofs.pieces),
            frozenset(missing),
            self._plan.urgency,
            self._demand,
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
        for piece in self._plan.asked:
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
        root, manifest = self._store.root, self._store.manifest()
        silence = Silence(other_ways(root, manifest, metadata=True), self._clock)
        for event in stream:
            self._admit()
            idle = self._done >= self._total
            if idle:
                # Nothing is missing, so that nothing can stall.
                alive = self._clock()
            if isinstance(event, Notice):
                self._notices.append(event.text)
                yield event
            elif isinstance(event, Arrived):
                alive = self._clock()
                if (yield from self._read_back(event, hashers, traffic)):
                    return
            else:
                alive = self._clock() if event.received > traffic.received else alive
                traffic = event
                self._sent = event.sent
                if not idle:
                    yield from silence.after(event)
            yield from self._collect(hashers, traffic, wait=False)
            self._check_alive(alive, traffic)
        while hashers.busy:
            yield from self._collect(hashers, traffic, wait=True)

    def _read_back(
        self, event: Arrived, hashers: Hashers[list[PieceResult]], traffic: Traffic
    ) -> Generator[FetchEvent, None, bool]:
        """Have pieces read back; whether one that is waited for was wrong, and is needed anew."""
        self._fetched += len(event.pieces)
        for batch in in_batches(self._layout, event.pieces):
            hashers.submit(partial(check_pieces, self._store.root, self._layout, batch))
        waited = set(self._demand.waited).intersection(event.pieces)
        # The stream may have nothing more to say for a while.
        while waited and hashers.busy:
            yield from self._collect(hashers, traffic, wait=True)
        return not self._proofs.pieces.issuperset(waited)

    def _admit(self) -> None:
        """Take in what somebody asks for beyond what was asked for, and remember it."""
        if not self._demand.stays or self._demand.version == self._admitted_at:
            return
        self._admitted_at = self._demand.version
        wanted = {*self._demand.waited, *self._demand.ahead}
        new = sorted(wanted - self._plan.asked - self._proofs.pieces)
        if not new:
            return
        spans: dict[PurePosixPath, list[tuple[int, int]]] = {}
        for piece in new:
            for part in self._layout.segments(piece):
                if not part.file.pad:
                    stop = part.offset + part.length
                    spans.setdefault(part.file.path, []).append((part.offset, stop))
        self._plan = dataclasses.replace(self._plan, asked=self._plan.asked.union(new))
        self._total = self._plan.weight(self._plan.asked)
        files = _files_of(self._layout, new)
        preflight.check(self._store.root, self._room(files))
        self._store.extend_selection({path: tuple(parts) for path, parts in spans.items()})
        self._saver.settle()
        self._proofs.renew(list(own(self._store, files)))
        self._proofs.mark_more(file.path for file in files)
        self._demand.admit(new)

    def _check_alive(self, alive: float, traffic: Traffic) -> None:
        if self._clock() - alive > self._limits.stall_s:
            silence = (
                f"no data for {self._limits.stall_s:.0f} s from {count_text(traffic.peers, 'peer')}"
            )
            raise Stalled(
                "; ".join((silence, *self._notices)),
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
                yield from corrupt(self._layout, result, self._plan.tensors)
        self._saver.turn()
        yield dataclasses.replace(
            self._status("downloading"),
            rate=traffic.rate,
            peers=traffic.peers,
            mirrors=traffic.mirrors,
        )

    def _count(self, result: PieceResult) -> None:
        if result.verdict == "good":
            self._done += self._plan.weight({result.piece} & self._plan.asked)
            self._proofs.add(result.piece)
            self._demand.answer((result.piece,))

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
        if self._demand.version != self._heeded:
            self._heeded = self._demand.version
            self._demanded = self._demand.waited[:MOST_DEMANDED]
            self._waiting = self._plan.names(self._demanded)
        return Status(
            phase,
            self._done,
            self._total,
            pieces_done=len(self._proofs.pieces & self._plan.asked),
            pieces_total=len(self._plan.asked),
            proven=self._done,
            sent=self._sent,
            demanded=self._demanded,
            waiting=self._waiting,
        )


def _files_of(layout: Layout, pieces: list[int]) -> list[LayoutFile]:
    """The files on disk in which these pieces lie."""
    return list(
        dict.fromkeys(
            part.file for piece in pieces for part in layout.segments(piece) if not part.file.pad
        )
    )
