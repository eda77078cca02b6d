"""Bring pieces to the disk, and read back and hash each, until all that is asked for is proven."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import chain

from grokfetch.errors import SourceInvalid, Stalled, StorageFailed
from grokfetch.events import Arrived, FetchEvent, Finding, Notice, PiecesProven, Traffic
from grokfetch.fetch import preflight
from grokfetch.fetch.demand import Demand
from grokfetch.fetch.mirror import Mirrors
from grokfetch.fetch.on_disk import check_digests, doubt_all, find_pieces
from grokfetch.fetch.prepare import Asked, Prepared, prepare
from grokfetch.fetch.silence import Silence, other_ways
from grokfetch.fetch.source import Order, PieceSource
from grokfetch.fetch.standing import Standing
from grokfetch.fetch.whole_files import bring_whole
from grokfetch.folder.history import recorded
from grokfetch.folder.journal import checked
from grokfetch.folder.ledger import Saver
from grokfetch.folder.payload import own
from grokfetch.folder.store import Store
from grokfetch.folder.verify import corrupt
from grokfetch.manifest.schema import Manifest
from grokfetch.torrent.layout import LayoutFile
from grokfetch.torrent.read_back import Hashers, PieceResult, check_pieces, in_batches
from grokfetch.units import count_text

__all__ = ["Limits", "fetch"]

NOTICES = 3
"""How many of the source's last notices the error at the end repeats."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait, in seconds, and how often to ask for a piece in vain.

    The fetch ends after `metadata_s` without metadata, after `stall_s` without a byte, and after
    `attempts` rounds without a new piece. The record is written every `save_s`.
    """

    metadata_s: float = 300.0
    stall_s: float = 600.0
    save_s: float = 3.0
    attempts: int = 3


def fetch(  # noqa: PLR0913  # store and source, and what a caller may choose by name
    store: Store,
    source: PieceSource | Mirrors,
    *,
    manifest: Manifest | None = None,
    limits: Limits | None = None,
    repair: bool = False,
    request: Asked | None = None,
    demand: Demand | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[FetchEvent, None, None]:
    """Bring a checkpoint to the disk and prove every byte of it.

    Progress and findings are recorded in the folder for `status` and `report` along the way. Close
    the generator (`contextlib.closing`) to end early; what is proven is recorded first.

    Args:
        store: where to.
        source: where from; without a torrent mirrors bring whole files.
        manifest: what it must be; by default the manifest in force, or else whatever the torrent
            holds.
        limits: patience.
        repair: trust nothing that was proven before: read everything back first.
        request: which part of the checkpoint is wanted, in addition to what earlier fetches into
            this folder asked for; an empty one means all of it. By default only what they asked
            for, or all of it if there was none.
        demand: pieces that readers wait for; they come before all others.
        clock: monotonic seconds.

    Yields:
        Metadata, Status, proven pieces, findings and notices, then one Outcome.

    Raises:
        TorrentInvalid: the metadata is not the one asked for, or unsafe.
        SelectionInvalid: the request names what the checkpoint does not have.
        Contradiction: the torrent is not what the manifest says, or not the one begun here.
        Stalled: no metadata, or no byte, for too long.
        StateLocked: another process uses the folder.
        StorageFailed: the disk is full, read-only, gone or failing.
    """
    with store.lock():
        patience = limits or Limits()

        def events() -> Generator[FetchEvent, None, None]:
            if isinstance(source, Mirrors):
                if demand is not None:
                    raise SourceInvalid(
                        "without a torrent no part of a file can be proven, so that nothing can be "
                        "read while it is fetched",
                        path=store.root,
                        hint="fetch it first: grokfetch fetch MANIFEST --to DIR",
                    )
                yield from bring_whole(
                    store,
                    source,
                    manifest=manifest,
                    request=request,
                    repair=repair,
                    stall_s=patience.stall_s,
                    clock=clock,
                )
                return
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
    """A prepared fetch under way, and the source that brings its pieces."""

    def __init__(
        self,
        prepared: Prepared,
        source: PieceSource,
        limits: Limits,
        clock: Callable[[], float],
        demand: Demand,
    ) -> None:
        self._standing = Standing(prepared, demand)
        self._store = prepared.store
        self._layout = prepared.layout
        self._source = source
        self._limits = limits
        self._clock = clock
        self._demand = demand
        self._proofs = self._standing.proofs
        self._saver = Saver(self._proofs, limits.save_s, clock)
        self._notices: deque[str] = deque(maxlen=NOTICES)

    def run(self, *, repair: bool) -> Iterator[FetchEvent]:
        with self._saver:
            if repair:
                yield from doubt_all(self._standing)
            yield from self._bring_all()
        yield from check_digests(self._standing)
        if not self._proofs.settled:
            self._proofs.end_writing()
        yield self._standing.status("done")
        yield self._standing.outcome()

    def _bring_all(self) -> Iterator[FetchEvent]:
        in_vain = 0
        while True:
            for path in self._proofs.look_again():
                yield Finding("unproven", path, detail="others changed or removed it meanwhile")
            self._standing.recount()
            yield from find_pieces(self._standing, self._saver)
            missing = self._standing.missing
            if not missing and not self._demand.stays:
                return
            if in_vain == self._limits.attempts:
                raise StorageFailed(
                    f"piece {missing[0]} did not read back right after {in_vain} attempts "
                    f"({len(missing)} such pieces): the disk, or memory, is failing",
                    path=self._store.root,
                    hint="test both, or choose a folder on another disk: --to DIR",
                )
            files = self._layout.files_over(missing)
            preflight.check(self._store.root, self._standing.plan.room(files))
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

    def _download(self, missing: list[int], files: list[LayoutFile]) -> Iterator[FetchEvent]:
        self._saver.settle()
        self._proofs.mark_writing(file.path for file in files)
        order = Order(
            self._standing.plan.torrent,
            self._layout,
            self._store.root,
            frozenset(self._proofs.pieces),
            frozenset(missing),
            self._standing.plan.urgency,
            self._demand,
        )
        stream = self._source.download(order)
        with Hashers[list[PieceResult]]() as hashers:
            try:
                yield from self._follow(stream, hashers)
            finally:
                # The proofs may be tied to the files' size and time only when nobody writes any
                # more; if closing fails, the marks stay, and the next fetch trusts what was saved.
                stream.close()
                while hashers.busy:
                    for result in chain.from_iterable(hashers.take(None)):
                        self._standing.count(result)
                self._saver.settle()
                self._proofs.end_writing()

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
            self._standing.admit(self._saver)
            idle = self._standing.done >= self._standing.total
            if idle:
                # Nothing is missing, so nothing can stall.
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
                self._standing.sent = event.sent
                if not idle:
                    yield from silence.after(event)
            yield from self._collect(hashers, traffic, wait=False)
            self._check_alive(alive, traffic)
        while hashers.busy:
            yield from self._collect(hashers, traffic, wait=True)

    def _read_back(
        self, event: Arrived, hashers: Hashers[list[PieceResult]], traffic: Traffic
    ) -> Generator[FetchEvent, None, bool]:
        """Have pieces read back; return whether an awaited one was wrong and is needed again."""
        self._standing.fetched += len(event.pieces)
        for batch in in_batches(self._layout, event.pieces):
            hashers.submit(partial(check_pieces, self._store.root, self._layout, batch))
        waited = set(self._demand.waited).intersection(event.pieces)
        # The stream may have nothing more to say for a while.
        while waited and hashers.busy:
            yield from self._collect(hashers, traffic, wait=True)
        return not self._proofs.pieces.issuperset(waited)

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
            self._standing.count(result)
            if result.verdict == "good":
                yield PiecesProven((result.piece,))
            else:
                yield from corrupt(self._layout, result, self._standing.plan.tensors)
        self._saver.turn()
        yield dataclasses.replace(
            self._standing.status("downloading"),
            rate=traffic.rate,
            peers=traffic.peers,
            mirrors=traffic.mirrors,
        )
