"""The state of a fetch: what is asked for, how much of it is proven, and the status shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePosixPath

from grokfetch.events import Origin, Outcome, Phase, Status
from grokfetch.fetch import preflight
from grokfetch.fetch.demand import Demand
from grokfetch.fetch.prepare import Prepared
from grokfetch.folder.ledger import Proofs, Saver
from grokfetch.folder.payload import own
from grokfetch.torrent.read_back import PieceResult

__all__ = ["Standing"]

MOST_DEMANDED = 100
"""How many demanded pieces a status lists at most."""


class Standing:
    """How far a prepared fetch has come; grows with every proof, and with what readers demand.

    Args:
        prepared: the fetch.
        demand: what readers wait for.

    Attributes:
        plan: the fetch, with all that is asked for so far.
        demand: what readers wait for.
        proofs: what is proven.
        total: payload bytes of the pieces that are asked for.
        done: those of them that are proven.
        fetched: pieces that a source has brought.
        rehashed: pieces that were read back because they might have been there.
        sent: who has sent how many bytes.
    """

    def __init__(self, prepared: Prepared, demand: Demand) -> None:
        self.plan = prepared
        self.demand = demand
        self.proofs = Proofs(prepared.store, prepared.layout, prepared.torrent.info_hash)
        self.total = prepared.weight(prepared.asked)
        self.done = 0
        self.recount()
        self.fetched = self.rehashed = 0
        self.sent: Mapping[Origin, int] = {}
        self._told = self._admitted = -1
        self._demanded: tuple[int, ...] = ()
        self._waiting: tuple[str, ...] = ()
        demand.follow(lambda piece: piece in self.proofs.pieces)

    @property
    def missing(self) -> list[int]:
        """The pieces that are asked for and not proven, in order."""
        return [piece for piece in self.proofs.missing if piece in self.plan.asked]

    def recount(self) -> None:
        """Count again what is proven; some of it may be in doubt now."""
        self.done = self.plan.weight(self.proofs.pieces & self.plan.asked)

    def count(self, result: PieceResult) -> None:
        """Count a piece that was read back."""
        if result.verdict == "good":
            self.done += self.plan.weight({result.piece} & self.plan.asked)
            self.proofs.add(result.piece)
            self.demand.answer((result.piece,))

    def admit(self, saver: Saver) -> None:
        """Add the pieces that readers demand beyond what was asked for, and remember them.

        Args:
            saver: what saves the proofs.

        Raises:
            StorageFailed: there is no room for it, or the state folder cannot be written.
        """
        if not self.demand.stays or self.demand.version == self._admitted:
            return
        self._admitted = self.demand.version
        wanted = {*self.demand.waited, *self.demand.ahead}
        new = sorted(wanted - self.plan.asked - self.proofs.pieces)
        if not new:
            return
        store, layout = self.plan.store, self.plan.layout
        spans: dict[PurePosixPath, list[tuple[int, int]]] = {}
        for piece in new:
            for part in layout.segments(piece):
                if not part.file.pad:
                    stop = part.offset + part.length
                    spans.setdefault(part.file.path, []).append((part.offset, stop))
        self.plan = dataclasses.replace(self.plan, asked=self.plan.asked.union(new))
        self.total = self.plan.weight(self.plan.asked)
        files = layout.files_over(new)
        preflight.check(store.root, self.plan.room(files))
        store.extend_selection({path: tuple(parts) for path, parts in spans.items()})
        saver.settle()
        self.proofs.renew(list(own(store, files)))
        self.proofs.mark_more(file.path for file in files)
        self.demand.admit(new)

    def status(self, phase: Phase) -> Status:
        """The status now."""
        if self.demand.version != self._told:
            self._told = self.demand.version
            self._demanded = self.demand.waited[:MOST_DEMANDED]
            self._waiting = self.plan.names(self._demanded)
        return Status(
            phase,
            self.done,
            self.total,
            pieces_done=len(self.proofs.pieces & self.plan.asked),
            pieces_total=len(self.plan.asked),
            proven=self.done,
            sent=self.sent,
            demanded=self._demanded,
            waiting=self._waiting,
        )

    def outcome(self) -> Outcome:
        """The result."""
        return Outcome(self.total, self.fetched, self.rehashed)
