"""Which pieces somebody waits for: named by readers, heeded by the fetch and its sources.

A value that the threads of readers, of the fetch and of its sources share. It knows numbers of
pieces only, and decides nothing but their order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

__all__ = ["Demand"]


class Demand:
    """The urgent pieces of a fetch, those that were asked for first in front.

    Two kinds are told apart: pieces that somebody waits for now, and behind all of them pieces
    that somebody will need next. A piece leaves when it is proven, and only then: who has waited
    for it may have gone, and has wanted it all the same.

    Args:
        answered: called when pieces are proven that somebody waits for; None where nobody will.
        stays: whether more may be asked for as long as the fetch is not ended: then it and its
            sources stay when all is there.

    Attributes:
        stays: as it was given.
        readers: whether somebody may ask for pieces while the fetch runs.
    """

    def __init__(self, answered: Callable[[], None] | None = None, *, stays: bool = False) -> None:
        self.stays = stays
        self.readers = answered is not None
        self._answered = answered
        self._admitted: frozenset[int] = frozenset()
        self._holds: Callable[[int], bool] = lambda _piece: False
        self._lock = threading.Lock()
        self._waited: dict[int, None] = {}
        self._ahead: dict[int, None] = {}
        self._bells: list[Callable[[], None]] = []
        self._version = 0

    @property
    def version(self) -> int:
        """A number that another one takes the place of with every change."""
        return self._version

    @property
    def waited(self) -> tuple[int, ...]:
        """The pieces that somebody waits for, in the order in which they were asked for."""
        with self._lock:
            return tuple(self._waited)

    @property
    def ahead(self) -> tuple[int, ...]:
        """The pieces that will be needed next, in the order in which they were asked for."""
        with self._lock:
            return tuple(self._ahead)

    @property
    def admitted(self) -> frozenset[int]:
        """The pieces that sources are to bring beside those of their order."""
        return self._admitted

    def admit(self, pieces: Iterable[int]) -> None:
        """Have sources bring pieces beside those of their order; the folder is ready for them."""
        with self._lock:
            self._admitted = self._admitted.union(pieces)
            self._version += 1
            bells = list(self._bells)
        for ring in bells:
            ring()

    def ask(self, pieces: Iterable[int], *, ahead: bool = False) -> None:
        """Ask for pieces that are not proven, behind all that were asked for before.

        Args:
            pieces: what is needed, in this order.
            ahead: nobody waits for them yet.
        """
        with self._lock:
            new = [
                piece
                for piece in dict.fromkeys(pieces)
                if piece not in self._waited and not self._holds(piece)
            ]
            if ahead:
                new = [piece for piece in new if piece not in self._ahead]
                self._ahead.update(dict.fromkeys(new))
            else:
                self._waited.update(dict.fromkeys(new))
                for piece in new:
                    self._ahead.pop(piece, None)
            self._version += bool(new)
            bells = list(self._bells)
        if new:
            for ring in bells:
                ring()

    def follow(self, holds: Callable[[int], bool]) -> None:
        """Learn from a fetch which pieces are proven, written down in the record or not."""
        self._holds = holds

    def proven(self, pieces: Iterable[int]) -> frozenset[int]:
        """Those of some pieces that the fetch has proven by now."""
        return frozenset(filter(self._holds, pieces))

    def answer(self, pieces: Iterable[int]) -> None:
        """Take out pieces that are proven."""
        with self._lock:
            done = [piece for piece in pieces if piece in self._waited or piece in self._ahead]
            waited = [piece for piece in done if self._waited.pop(piece, 0) is None]
            for piece in done:
                self._ahead.pop(piece, None)
            self._version += bool(done)
        if waited and self._answered is not None:
            self._answered()

    @contextlib.contextmanager
    def bell(self, ring: Callable[[], None]) -> Iterator[None]:
        """Have `ring` called, in the thread of who asks, when more is asked for."""
        with self._lock:
            self._bells.append(ring)
        try:
            yield
        finally:
            with self._lock:
                self._bells.remove(ring)
