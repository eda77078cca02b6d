"""What a connection to a mirror brings next: runs of pieces, demanded ones first. Pure: no I/O."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import PurePosixPath

from grokfetch.fetch.demand import Demand
from grokfetch.fetch.mirror.state import Mirror
from grokfetch.torrent.layout import Layout, PieceHasher

__all__ = ["Begun", "Job", "Jobs"]

SPAN = 16 << 20
"""Bytes of consecutive pieces that one request asks for."""

MOST_ANSWERS = 40
"""How many truncated answers may make up one piece before that counts against the mirror: enough if
every answer ends half-way."""


@dataclasses.dataclass(slots=True)
class Begun:
    """A piece whose first `done` bytes came from one mirror, in so many answers.

    `brought` is whether the latest of them has brought anything.
    """

    piece: int
    mirror: Mirror
    hasher: PieceHasher
    done: int = 0
    answers: int = 0
    brought: bool = False

    @property
    def useful(self) -> bool:
        """Whether the latest answer brought something, and there were not too many answers."""
        return self.brought and self.answers < MOST_ANSWERS


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """Consecutive pieces that are still to come, and the files that hold them.

    `urgent` is whether a reader waits for them.
    """

    left: deque[int]
    files: frozenset[PurePosixPath]
    urgent: bool = False
    begun: Begun | None = None


class Jobs:
    """The jobs not yet started, in the order in which they should be done.

    Args:
        layout: the torrent's.
        pieces: the pieces to bring, in order.
        workers: the number of connections that share the jobs.
        demand: which pieces come before the others, and which to bring in addition.
        have: pieces that are there, though the demand may have admitted them before.
    """

    def __init__(
        self,
        layout: Layout,
        pieces: list[int],
        workers: int,
        demand: Demand,
        have: frozenset[int] = frozenset(),
    ) -> None:
        self._known = have.union(pieces)
        self._layout = layout
        self._workers = workers
        self._demand = demand
        self._heeded = -1
        self._places: dict[int, int] = {}
        self._jobs = deque(self._runs(pieces))

    def first(self, serves: Callable[[frozenset[PurePosixPath]], bool]) -> Job | None:
        """The first job whose files `serves` accepts, None without one."""
        self._heed()
        behind = len(self._places)
        return min(
            (job for job in self._jobs if serves(job.files)),
            key=lambda job: self._places.get(job.left[0], behind),
            default=None,
        )

    def take(self, job: Job) -> None:
        """Take a job off the list."""
        self._jobs.remove(job)

    def put_back(self, job: Job, lacking: PurePosixPath | None = None) -> None:
        """Put the rest of a job first.

        Args:
            job: what could not be done.
            lacking: a file that must not hold the others back; its pieces become separate jobs.
        """
        parts = [job]
        if lacking is not None:
            parts = self._split(job, lambda piece: lacking in self._files(piece))
        self._jobs.extendleft(part for part in reversed(parts) if part.left)
        self._heeded = -1

    def clear(self) -> None:
        """Forget all of them."""
        self._jobs.clear()

    def _heed(self) -> None:
        """Make separate jobs of demanded pieces, as many as there are connections."""
        if self._heeded == self._demand.version:
            return
        self._heeded = self._demand.version
        new = self._demand.admitted - self._known
        self._known |= new
        self._jobs.extend(self._runs(sorted(new)))
        waited = dict.fromkeys(self._demand.waited)
        self._places = {piece: place for place, piece in enumerate((*waited, *self._demand.ahead))}
        if not self._places:
            return
        parted: list[Job] = []
        for job in self._jobs:
            if job.urgent or self._places.keys().isdisjoint(job.left):
                parted.append(job)
                continue
            for part in self._split(job, self._places.__contains__):
                if part.left[0] in waited and part.begun is None:
                    for run in self._runs(list(part.left)):
                        run.urgent = True
                        parted.append(run)
                else:
                    part.urgent = part.left[0] in waited
                    parted.append(part)
        self._jobs = deque(parted)

    def _split(self, job: Job, inside: Callable[[int], bool]) -> list[Job]:
        """The rest of a job in runs of pieces that are all inside, or all outside."""
        parts = [self._job(run) for _, run in groupby(job.left, inside)]
        for part in parts:
            part.urgent = job.urgent
        if parts:
            parts[0].begun = job.begun
        return parts

    def _runs(self, pieces: list[int]) -> Iterator[Job]:
        """Pieces in runs, short enough that every connection gets some."""
        most = len(pieces) // (2 * self._workers)
        longest = max(1, min(SPAN // self._layout.piece_length, most))
        run: list[int] = []
        for piece in pieces:
            if run and (piece != run[-1] + 1 or len(run) == longest):
                yield self._job(run)
                run = []
            run.append(piece)
        if run:
            yield self._job(run)

    def _job(self, pieces: Iterable[int]) -> Job:
        left = deque(pieces)
        return Job(left, frozenset(path for piece in left for path in self._files(piece)))

    def _files(self, piece: int) -> Iterator[PurePosixPath]:
        return (part.file.path for part in self._layout.segments(piece) if not part.file.pad)
