"""Which pieces readers wait for: readers name them, the fetch and its sources heed them.

The threads of readers, of the fetch and of its sources share this value. It knows only the numbers
of pieces, and decides only their order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

__all__ = ["Demand"]


class Demand:
    """The urgent pieces of a fetch, in the order in which they were asked for.

    There are two kinds: pieces that a reader waits for now and, after all of these, pieces that a
    reader will need next. A piece is removed only when it is proven, even if its reader has stopped
    waiting.

    Args:
        answered: called when pieces that a reader waits for are proven; None if there are no
            readers.
        stays: whether more may be asked for until the fetch is ended: then the fetch and its
            sources keep running when everything is there.

    Attributes:
        stays: as it was given.
        readers: whether readers may ask for pieces while the fetch runs.
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
        """A number that differs after every change."""
        return self._version

    @property
    def waited(self) -> tuple[int, ...]:
        """The pieces that readers wait for, in the order in which they were asked for."""
        with self._lock:
            return tuple(self._waited)

    @property
    def ahead(self) -> tuple[int, ...]:
        """The pieces that will be needed next, in the order in which they were asked for."""
        with self._lock:
            return tuple(self._ahead)

    @property
    def admitted(self) -> frozenset[int]:
        """The pieces that sources should bring in addition to their order."""
        return self._admitted

    def admit(self, pieces: Iterable[int]) -> None:
        """Have sources bring pieces in addition to their order; the folder is ready for them."""
        with self._lock:
            self._admitted = self._admitted.union(pieces)
            self._version += 1
            bells = list(self._bells)
        for ring in bells:
            ring()

    def ask(self, pieces: Iterable[int], *, ahead: bool = False) -> None:
        """Ask for unproven pieces, after all that were asked for before.

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
        """Learn from a fetch which pieces are proven, whether or not the record has them yet."""
        self._holds = holds

    def proven(self, pieces: Iterable[int]) -> frozenset[int]:
        """The pieces among these that the fetch has proven so far."""
        return frozenset(filter(self._holds, pieces))

    def answer(self, pieces: Iterable[int]) -> None:
        """Remove proven pieces."""
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
        """Have `ring` called, in the asking thread, when more is asked for."""
        with self._lock:
            self._bells.append(ring)
        try:
            yield
        finally:
            with self._lock:
                self._bells.remove(ring)
