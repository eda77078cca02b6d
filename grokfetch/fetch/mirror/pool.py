"""Connections to mirrors: pieces over HTTP, hashed as they come and written where they belong.

One thread runs an event loop with several connections to each mirror, so that ending it is a matter
of milliseconds however silent a server is, and afterwards nothing is written any more. A mirror
whose bytes have a wrong hash is dropped; who sent a piece is certain, because no piece comes from
two. The fetch reads everything back and believes none of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Self

from grokfetch.events import Arrived, Notice
from grokfetch.fetch.mirror.addresses import label
from grokfetch.fetch.mirror.http import Failed, Faulty, Http
from grokfetch.fetch.mirror.state import Mirror, MirrorSettings
from grokfetch.fetch.mirror.transfer import Lacking, Reader, Writer
from grokfetch.torrent.layout import Layout

__all__ = ["Pool"]

SPAN = 16 << 20
"""Bytes of pieces that follow each other and are asked for by one request."""

LEAST_RATE = 16 << 10
"""Bytes a second on one connection below which a mirror counts as silent."""

MOST_REFUSALS = 8
"""Files that a mirror may lack before it has delivered anything."""

ZEROS = bytes(1 << 20)


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """Pieces that follow each other, and the files they lie in."""

    pieces: tuple[int, ...]
    files: frozenset[PurePosixPath]


class Pool:
    """Brings pieces from mirrors while its block runs; afterwards nothing is written any more.

    Args:
        mirrors: where from; what is learned about them is kept there.
        layout: the torrent's.
        root: the checkpoint folder.
        pieces: what to bring, in order.
        settings: how to treat mirrors.

    Attributes:
        received: payload bytes so far.
    """

    def __init__(
        self,
        mirrors: Iterable[Mirror],
        layout: Layout,
        root: Path,
        pieces: list[int],
        settings: MirrorSettings,
    ) -> None:
        self._mirrors = [mirror for mirror in mirrors if not mirror.dropped]
        self._layout = layout
        self._root = root
        self._settings = settings
        self.received = 0
        self._events: queue.SimpleQueue[Arrived | Notice] = queue.SimpleQueue()
        workers = settings.connections * max(1, len(self._mirrors))
        self._least_rate: float = LEAST_RATE
        if settings.down is not None:
            self._least_rate = min(LEAST_RATE, settings.down / (4 * workers))
        self._free_at = 0.0
        self._jobs = deque(_jobs(layout, pieces, workers))
        self._running = 0
        self._retired = False
        self._begun = threading.Event()

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "mirrors")
        self._future = self._thread.submit(lambda: asyncio.run(self._main()))
        # Whoever waits for something to happen is to learn of the end.
        self._future.add_done_callback(lambda _: self._events.put(Arrived(())))
        self._begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(self._task.cancel)
        self._thread.shutdown()

    @property
    def busy(self) -> bool:
        """Whether more may come."""
        return not self._future.done()

    def retire(self) -> None:
        """Begin no more pieces; what has been begun is still brought."""
        self._tell(self._retire)

    def _retire(self) -> None:
        self._retired = True
        self._jobs.clear()
        self._wake()

    def _tell(self, what: Callable[[], object]) -> None:
        # The loop is closed when all is done.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what)

    def take(self, timeout_s: float) -> Iterator[Arrived | Notice]:
        """What has happened; waits so long for something to happen.

        Raises:
            StorageFailed: the disk does not take the pieces.
        """
        ended = not self.busy
        wait_s = 0.0 if ended else timeout_s
        pieces: list[int] = []
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get(timeout=wait_s) if wait_s else self._events.get_nowait()
                wait_s = 0.0
                if isinstance(event, Arrived):
                    pieces += event.pieces
                else:
                    yield event
        if pieces:
            yield Arrived(tuple(pieces))
        if ended:
            self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        error = self._future.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if error is not None:
            raise error

    # --- inside the event loop ------------------------------------------------------------------

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._changed = asyncio.Event()
        self._begun.set()
        settings = self._settings
        connections = settings.connections
        async with (
            Http(connections * len(self._mirrors), settings.patience_s, settings.proxy) as http,
            asyncio.TaskGroup() as group,
        ):
            for mirror in self._mirrors:
                for _ in range(connections):
                    group.create_task(self._work(mirror, http))

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _work(self, mirror: Mirror, http: Http) -> None:
        while (job := await self._next(mirror)) is not None:
            left = deque(job.pieces)
            began = time.monotonic()
            try:
                await self._bring(mirror, http, left)
            except Lacking as error:
                self._note_lack(mirror, error)
            except Faulty as error:
                self._drop(mirror, str(error))
            except Failed as error:
                if mirror.strike(began, error.rest_s, self._settings):
                    self._drop(mirror, str(error))
            finally:
                self._running -= 1
                # One at a time: a file that is lacking shall not hold the others back.
                if not self._retired:
                    self._jobs.extendleft(_job(self._layout, (it,)) for it in reversed(left))
                self._wake()

    async def _next(self, mirror: Mirror) -> _Job | None:
        """Something that this mirror may have; None if nothing is left for it."""
        while not mirror.dropped:
            rest_s = mirror.rests_until - time.monotonic()
            found = next((job for job in self._jobs if mirror.serves(job.files)), None)
            if found is None and not self._running:
                return None
            if found is not None and rest_s <= 0:
                self._jobs.remove(found)
                self._running += 1
                return found
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait(), None if found is None else max(rest_s, 0)
                )
        return None

    def _note_lack(self, mirror: Mirror, lack: Lacking) -> None:
        if lack.path in mirror.lacks:
            return
        mirror.lacks.add(lack.path)
        self._say(f"{label(mirror.address)} is not asked for {lack.path} any more: {lack.why}")
        if not mirror.delivered and len(mirror.lacks) >= MOST_REFUSALS:
            self._drop(mirror, f"it lacks all of the first {MOST_REFUSALS} files asked for")

    def _drop(self, mirror: Mirror, why: str) -> None:
        # Several requests may learn of it at the same time.
        if not mirror.dropped:
            mirror.dropped = True
            self._say(f"{label(mirror.address)} is dropped: {why}")

    def _say(self, text: str) -> None:
        self._events.put(Notice(f"mirror {text}"))

    async def _bring(self, mirror: Mirror, http: Http, left: deque[int]) -> None:
        """Bring pieces that follow each other; `left` loses each that has arrived."""
        last = left[-1]
        size = len(left) * self._layout.piece_length
        longest_s = self._settings.patience_s + size / self._least_rate
        stop = (last + 1) * self._layout.piece_length
        try:
            async with (
                asyncio.timeout(longest_s),
                contextlib.aclosing(Reader(mirror, http, stop)) as reader,
            ):
                with Writer(self._root) as writer:
                    while left:
                        await self._bring_piece(mirror, left[0], reader, writer)
                        mirror.delivered, mirror.strikes = True, 0
                        self._events.put(Arrived((left.popleft(),)))
        except TimeoutError:
            raise Failed(f"it sent less than {size:,} bytes in {longest_s:.0f} s") from None

    async def _bring_piece(
        self, mirror: Mirror, piece: int, reader: Reader, writer: Writer
    ) -> None:
        hasher = self._layout.hasher(piece)
        path = None
        for part in self._layout.segments(piece):
            if part.file.pad:
                for start in range(0, part.length, len(ZEROS)):
                    hasher.update(ZEROS[: part.length - start])
                continue
            path = part.file.path
            offset = part.offset
            async for chunk in reader.read(part):
                hasher.update(chunk)
                writer.write(part.file, offset, chunk)
                offset += len(chunk)
                self.received += len(chunk)
                mirror.received += len(chunk)
                await self._pace(len(chunk))
        if hasher.digest() != self._layout.expected(piece):
            raise Faulty(f"it sent wrong bytes for piece {piece} ({path})")

    async def _pace(self, count: int) -> None:
        """Wait until so many bytes more are allowed."""
        if self._settings.down is not None:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + count / self._settings.down
            await asyncio.sleep(self._free_at - now)


def _jobs(layout: Layout, pieces: list[int], workers: int) -> Iterator[_Job]:
    """Pieces in runs, short enough that every connection gets some."""
    longest = max(1, min(SPAN // layout.piece_length, len(pieces) // (2 * workers)))
    run: list[int] = []
    for piece in pieces:
        if run and (piece != run[-1] + 1 or len(run) == longest):
            yield _job(layout, tuple(run))
            run = []
        run.append(piece)
    if run:
        yield _job(layout, tuple(run))


def _job(layout: Layout, pieces: tuple[int, ...]) -> _Job:
    parts = (part for piece in pieces for part in layout.segments(piece))
    return _Job(pieces, frozenset(part.file.path for part in parts if not part.file.pad))
