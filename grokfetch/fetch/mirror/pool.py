"""Connections to mirrors: pieces over HTTP, hashed as they come and written where they belong.

One thread runs an event loop with several connections to each mirror, so that it ends within
milliseconds however silent a server is, and nothing is written afterwards. A mirror whose bytes
have a wrong hash is dropped; it is certain which mirror sent a piece, because no piece comes from
two. The fetch reads everything back and trusts none of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from grokfetch.events import Arrived, Notice
from grokfetch.fetch.demand import Demand
from grokfetch.fetch.mirror.answers import Failed, Faulty, Limited, Short
from grokfetch.fetch.mirror.http import Http
from grokfetch.fetch.mirror.jobs import Begun, Job, Jobs
from grokfetch.fetch.mirror.state import LONG_REST_S, Mirror, MirrorSettings, Pace
from grokfetch.fetch.mirror.transfer import Lacking, Reader, Writer
from grokfetch.torrent.layout import Layout, Segment

__all__ = ["Pool"]

LEAST_RATE = 16 << 10
"""Bytes a second on one connection below which a mirror counts as silent."""

MOST_REFUSALS = 8
"""Files that a mirror may lack before it has delivered anything."""

ZEROS = bytes(1 << 20)


class Pool:
    """Brings pieces from mirrors while its block runs; nothing is written afterwards.

    Args:
        mirrors: where pieces come from; what is learned about the mirrors is kept in them.
        layout: the torrent's.
        root: the checkpoint folder.
        pieces: what to bring, in order.
        settings: how to treat mirrors.
        demand: which pieces come before the others; while it stays, so do the connections.
        have: pieces that are there.

    Attributes:
        received: payload bytes so far.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what, from whom, to where and how
        self,
        mirrors: Iterable[Mirror],
        layout: Layout,
        root: Path,
        pieces: list[int],
        settings: MirrorSettings,
        demand: Demand | None = None,
        have: frozenset[int] = frozenset(),
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
        self._pace = Pace(settings.down)
        self._demand = demand or Demand()
        self._jobs = Jobs(layout, pieces, workers, self._demand, have)
        self._running = 0
        self._retired = False
        self._begun = threading.Event()

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "mirrors")
        self._future = self._thread.submit(lambda: asyncio.run(self._main()))
        # Whoever waits for an event must learn of the end.
        self._future.add_done_callback(lambda _: self._events.put(Arrived(())))
        self._begun.wait()
        self._heeding = contextlib.ExitStack()
        self._heeding.enter_context(self._demand.bell(lambda: self._tell(self._wake)))
        return self

    def __exit__(self, *_: object) -> None:
        self._heeding.close()
        self._tell(self._task.cancel)
        self._thread.shutdown()

    @property
    def busy(self) -> bool:
        """Whether more may come."""
        return not self._future.done()

    def retire(self) -> None:
        """Start no more pieces; those that were started are still brought."""
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
        """What has happened; waits at most `timeout_s` for something to happen.

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
            Http(
                connections * len(self._mirrors),
                settings.patience_s,
                settings.proxy,
                settings.environment,
            ) as http,
            asyncio.TaskGroup() as group,
        ):
            for mirror in self._mirrors:
                mirror.active = 0
                for _ in range(connections):
                    group.create_task(self._work(mirror, http))
                # The others may be in the middle of long pieces.
                group.create_task(self._work(mirror, http, urgent=True))

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _work(self, mirror: Mirror, http: Http, *, urgent: bool = False) -> None:
        while (job := await self._next(mirror, urgent=urgent)) is not None:
            began, count = time.monotonic(), len(job.left)
            lacking = None
            try:
                await self._bring(mirror, http, job)
                mirror.grow(self._settings.connections)
            except Lacking as error:
                self._note_lack(mirror, error)
                lacking = error.path
            except Faulty as error:
                self._drop(mirror, str(error))
            except Failed as error:
                useful = len(job.left) < count or (job.begun is not None and job.begun.useful)
                if not (isinstance(error, Short) and useful):
                    self._note_failure(mirror, error, began)
            finally:
                self._running -= 1
                mirror.active -= 1
                if not self._retired:
                    self._jobs.put_back(job, lacking)
                self._wake()

    async def _next(self, mirror: Mirror, *, urgent: bool) -> Job | None:
        """A job for this mirror; None if nothing is left for it.

        Args:
            mirror: which one.
            urgent: only what a reader waits for, on one connection more than usual.
        """
        while not mirror.dropped:
            rest_s = mirror.rests_until - time.monotonic()
            job = self._jobs.first(mirror.serves)
            if job is None and not self._running and not self._demand.stays:
                return None
            most = int(mirror.allowed) + urgent
            waits = job is None or mirror.active >= most or (urgent and not job.urgent)
            if job is not None and not waits and rest_s <= 0:
                self._jobs.take(job)
                self._running += 1
                mirror.active += 1
                return job
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`, which may swallow a cancellation in Python 3.11.
                async with asyncio.timeout(None if waits else max(rest_s, 0)):
                    await self._changed.wait()
        return None

    def _note_lack(self, mirror: Mirror, lack: Lacking) -> None:
        if lack.path in mirror.lacks:
            return
        mirror.lacks.add(lack.path)
        mirror.note(f"it is not asked for {lack.path} any more: {lack.why}")
        self._say(f"{mirror.name} is not asked for {lack.path} any more: {lack.why}")
        if not mirror.delivered and len(mirror.lacks) >= MOST_REFUSALS:
            self._drop(mirror, f"it lacks all of the first {MOST_REFUSALS} files asked for")

    def _note_failure(self, mirror: Mirror, error: Failed, began: float) -> None:
        """After a failed request: wait, ask less, or drop the mirror."""
        text = str(error)
        if isinstance(error, Limited) and error.rest_s is not None:
            mirror.limit(began, error.rest_s, self._settings)
            news = mirror.note(text)
            if news and error.rest_s >= LONG_REST_S:
                self._say(f"{mirror.name}: {text} and asks us to wait {error.rest_s:.0f} s")
            return
        if mirror.strike(began, self._settings, fewer=isinstance(error, Limited)):
            self._drop(mirror, text)
        elif mirror.note(text):
            self._say(f"{mirror.name} is asked again later: {text}")

    def _drop(self, mirror: Mirror, why: str) -> None:
        # Several requests may learn of it at the same time.
        if not mirror.dropped:
            mirror.dropped = True
            mirror.note(why)
            self._say(f"{mirror.name} is dropped: {why}")

    def _say(self, text: str) -> None:
        self._events.put(Notice(f"mirror {text}"))

    async def _bring(self, mirror: Mirror, http: Http, job: Job) -> None:
        """Bring consecutive pieces; each that arrives is removed from `job.left`."""
        size = len(job.left) * self._layout.piece_length
        longest_s = self._settings.patience_s + size / self._least_rate
        stop = (job.left[-1] + 1) * self._layout.piece_length
        begun = job.begun
        if begun is None or begun.mirror is not mirror or begun.piece != job.left[0]:
            begun = job.begun = self._begin(job.left[0], mirror)
        try:
            async with (
                asyncio.timeout(longest_s),
                contextlib.aclosing(Reader(mirror, http, stop)) as reader,
            ):
                with Writer(self._root) as writer:
                    while True:
                        await self._bring_piece(begun, reader, writer)
                        mirror.deliver()
                        self._events.put(Arrived((job.left.popleft(),)))
                        if not job.left or (not job.urgent and self._others_wait(mirror)):
                            return
                        begun = job.begun = self._begin(job.left[0], mirror)
        except TimeoutError:
            raise Failed(f"it sent less than {size:,} bytes in {longest_s:.0f} s") from None

    def _others_wait(self, mirror: Mirror) -> bool:
        """Whether a reader waits for other pieces that this mirror may have."""
        first = self._jobs.first(mirror.serves) if self._demand.waited else None
        return first is not None and first.urgent

    def _begin(self, piece: int, mirror: Mirror) -> Begun:
        return Begun(piece, mirror, self._layout.hasher(piece))

    async def _bring_piece(self, begun: Begun, reader: Reader, writer: Writer) -> None:
        begun.answers += 1
        begun.brought = False
        for part in _rest(self._layout.segments(begun.piece), begun.done):
            if part.file.pad:
                for start in range(0, part.length, len(ZEROS)):
                    begun.hasher.update(ZEROS[: part.length - start])
                begun.done += part.length
                continue
            offset = part.offset
            async for chunk in reader.read(part):
                begun.hasher.update(chunk)
                writer.write(part.file, offset, chunk)
                offset += len(chunk)
                begun.done += len(chunk)
                begun.brought = True
                self.received += len(chunk)
                begun.mirror.received += len(chunk)
                await self._pace.wait(len(chunk))
        if begun.hasher.digest() != self._layout.expected(begun.piece):
            files = [it.file.path for it in self._layout.segments(begun.piece) if not it.file.pad]
            raise Faulty(f"it sent wrong bytes for piece {begun.piece} ({files[-1]})")


def _rest(parts: Iterable[Segment], done: int) -> Iterator[Segment]:
    """The parts of a piece without its first `done` bytes."""
    for part in parts:
        skipped = min(done, part.length)
        done -= skipped
        if skipped < part.length:
            yield dataclasses.replace(
                part, offset=part.offset + skipped, length=part.length - skipped
            )
