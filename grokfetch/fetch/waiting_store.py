"""A checkpoint that is read while it is fetched: readers wait here for the swarm.

The fetch runs in a thread of its own and holds the folder's lock; readers in the same process read
under that lock, through `Store.require`. Here it waits until the record says that the bytes are
proven, and meanwhile has them brought before all others. Nothing else about a reader changes.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import FrameType

from grokfetch.errors import NotProven
from grokfetch.events import FetchEvent, Metadata, Outcome
from grokfetch.fetch.demand import Demand
from grokfetch.folder.record import Record
from grokfetch.folder.store import Store

__all__ = ["Arriving"]


WATCH_S = 1.0


class Arriving(Store):
    """A checkpoint directory that a fetch of this process fills, see `filled`.

    Args:
        root: the checkpoint folder; need not exist yet.
        state: where our own files are; `root/.grokfetch` by default.
        watch: called every second while somebody waits; an exception from it ends the wait.
        on_demand: whether to ask for what is required even if no request has; the fetch then keeps
            running until the block of `filled` ends.

    Attributes:
        demand: what readers wait for; the fetch heeds it.
    """

    def __init__(
        self,
        root: Path,
        state: Path | None = None,
        watch: Callable[[], None] = lambda: None,
        *,
        on_demand: bool = False,
    ) -> None:
        super().__init__(root, state)
        self._watch = watch
        self.demand = Demand(self._tell, stays=on_demand)
        self._changed = threading.Condition()
        self._told = 0
        self._over = False
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def filled(self, events: Generator[FetchEvent, None, None]) -> Iterator[None]:
        """Follow a fetch into this folder in a thread, and hold its lock, while the block runs.

        Until it is known what the folder will hold, the fetch runs in the caller's thread: what is
        asked for may depend on devices, which only the main thread sets up. A block that ends
        normally waits for the end of the fetch. An exception in the block ends the fetch; what is
        proven is recorded first.

        Args:
            events: of `fetch`, for this store.

        Raises:
            GrokfetchError: the fetch has failed, and with what.
        """
        with contextlib.closing(events):
            self._follow_to_metadata(events)
            with self._followed(events):
                yield

    def _follow_to_metadata(self, events: Iterator[FetchEvent]) -> None:
        due = time.monotonic() + WATCH_S
        for event in events:
            if isinstance(event, Metadata):
                return
            if time.monotonic() >= due:
                self._watch()
                due = time.monotonic() + WATCH_S

    @contextlib.contextmanager
    def _followed(self, events: Iterator[FetchEvent]) -> Iterator[None]:
        left, early = threading.Event(), threading.Event()

        def follow() -> None:
            for event in events:
                if isinstance(event, Outcome):
                    self._tell(over=True)
                    # The lock is released with the last event.
                    left.wait()
                if early.is_set():
                    return

        with ThreadPoolExecutor(1, "fetch") as pool:
            running = pool.submit(follow)
            running.add_done_callback(self._end)
            try:
                with _before_interrupt(lambda: self._tell(over=True)):
                    yield
            except BaseException:
                early.set()
                raise
            finally:
                if self.demand.stays:
                    early.set()
                left.set()
        running.result()

    def _end(self, running: Future[None]) -> None:
        self._error = running.exception()
        self._tell(over=True)

    def require(self, path: PurePosixPath, start: int = 0, length: int | None = None) -> None:
        """Return once a span of a payload file, all of it by default, is proven.

        Raises:
            NotProven: the fetch has ended without it.
            GrokfetchError: the fetch has failed, and with what.
            StateMissing: there is no manifest.
        """
        asked = False
        while True:
            seen = self.news
            if self._arrived(path, start, length):
                return
            if asked:
                self.await_news(seen)
            else:
                # A piece proven before it was asked for wakes nobody: look once more.
                self.demand.ask(self._pieces(path, start, length))
                asked = True

    def arrived(self, path: PurePosixPath) -> bool:
        """Whether a payload file is proven, without waiting for it; False where it may yet come.

        Raises:
            NotProven: the fetch has ended without it.
            GrokfetchError: the fetch has failed, and with what.
            StateMissing: there is no manifest.
        """
        return self._arrived(path, 0, None)

    def _arrived(self, path: PurePosixPath, start: int, length: int | None) -> bool:
        over = self.over
        fresh = self.demand.proven(self._pieces(path, start, length))
        try:
            self._refuse(self.proven(fresh), path, start, length)
        except NotProven:
            if over and self._error is not None:
                raise self._error from None
            if over:
                raise
            return False
        return True

    def expect(
        self, path: PurePosixPath, start: int, length: int, *, at_once: bool = False
    ) -> None:
        """Have a span of a payload file brought before anything that no reader has asked for.

        Args:
            path: as in the manifest.
            start: the first byte.
            length: how many bytes.
            at_once: whether it should also come before what will be needed later.
        """
        pieces = self._pieces(path, start, length)
        there = self.record().pieces
        self.demand.ask((piece for piece in pieces if piece not in there), ahead=not at_once)

    def _pieces(self, path: PurePosixPath, start: int, length: int | None) -> range:
        """The pieces that hold a span of a payload file; none if the torrent lacks the file."""
        layout = self.layout()
        file = None if layout is None else layout.file(path)
        if layout is None or file is None:
            return range(0)
        return layout.pieces_over(file, start, length)

    @property
    def over(self) -> bool:
        """Whether the fetch has ended, successfully or not."""
        with self._changed:
            return self._over

    @property
    def news(self) -> int:
        """A number that rises when more may be proven."""
        with self._changed:
            return self._told

    def await_news(self, seen: int) -> None:
        """Return when `news` is greater than `seen`, or the fetch has ended."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._told > seen or self._over, WATCH_S):
                self._watch()

    def save_record(self, record: Record) -> None:
        """Keep what is proven, and wake the readers that wait for it.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        super().save_record(record)
        self._tell()

    def _tell(self, *, over: bool = False) -> None:
        with self._changed:
            self._told += 1
            self._over |= over
            self._changed.notify_all()


@contextlib.contextmanager
def _before_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Have `act` called at Ctrl-C or SIGTERM, which otherwise only the main thread would notice."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        act()
        before = usual[signal.Signals(number)]
        assert callable(before)
        before(number, frame)

    handled = [number for number, before in usual.items() if callable(before)]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, usual[number])
