"""Whole files streamed from one web server, several at a time; no byte is written here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol

from grokfetch.errors import Contradiction, GrokfetchError, OutOfReach, Stalled
from grokfetch.events import Notice
from grokfetch.fetch.mirror.addresses import label, places
from grokfetch.fetch.mirror.answers import (
    IGNORES_RANGE,
    Changed,
    Failed,
    Faulty,
    Limited,
    Refused,
    Short,
    Span,
)
from grokfetch.fetch.mirror.state import LONG_REST_S, Mirror, MirrorSettings, Pace
from grokfetch.units import seconds_text

if TYPE_CHECKING:
    from grokfetch.fetch.mirror.http import Http

__all__ = [
    "Delivery",
    "Length",
    "Mirrors",
    "Receiver",
    "Told",
    "deliver",
    "lengths",
    "mirror_name",
    "pass_by",
]

BUFFER = 1 << 20
"""Bytes handed on together."""

Length = tuple[int, str | None]
"""The size in bytes of a file on the server, and its ETag."""

Told = int | Notice | GrokfetchError | None
"""The bytes of a file that have come, what is being waited for, or why the file does not come; None
if the file is complete."""

Work = Callable[["Http", Mirror, PurePosixPath], Awaitable[None]]

HINT = "what has been hashed is kept; run the same command again"


@dataclasses.dataclass(frozen=True, slots=True)
class Mirrors:
    """Mirrors that bring whole files, without a torrent."""

    addresses: tuple[str, ...]
    settings: MirrorSettings


def mirror_name(address: str) -> str:
    """The name of a mirror as shown to users."""
    return label(address)


class Receiver(Protocol):
    """Takes one file, in order; called in other threads, never twice at the same time."""

    @property
    def done(self) -> int:
        """Bytes taken so far."""

    def take(self, data: memoryview) -> None:
        """The next bytes."""

    def end(self) -> None:
        """The file is complete; called in the thread of `pass_by`."""


def lengths(
    address: str,
    paths: Iterable[PurePosixPath],
    settings: MirrorSettings,
    say: Callable[[Notice], None],
) -> dict[PurePosixPath, Length]:
    """The lengths of files on a server.

    Args:
        address: as of a mirror.
        paths: with the torrent's top folder.
        settings: how many connections, and how patient.
        say: is told what is waited for.

    Raises:
        OutOfReach: the server does not have one, or does not answer.
        Stalled: it has limited us for too long.
    """
    found: dict[PurePosixPath, Length] = {}

    async def look(http: Http, mirror: Mirror, path: PurePosixPath) -> None:
        found[path] = await _length(http, mirror, path)

    asyncio.run(_Server(address, settings, look, say).visit(paths))
    return found


def pass_by(
    address: str,
    files: Mapping[PurePosixPath, tuple[Length, Receiver]],
    settings: MirrorSettings,
    progress: Callable[[int], None],
    say: Callable[[Notice], None],
) -> None:
    """Stream files from beginning to end, each on one connection.

    A broken connection is made again, and the file continues where it stopped.

    Args:
        address: as of a mirror.
        files: path with the torrent's top folder, length from `lengths`, and receiver.
        settings: how many connections, and how patient.
        progress: called with the bytes that have come.
        say: is told what is waited for.

    Raises:
        Contradiction: a file now has another length or ETag there.
        OutOfReach: the server does not have one any more, or does not answer.
        Stalled: it has limited us for too long.
    """
    pace = Pace(settings.down)

    async def bring(http: Http, mirror: Mirror, path: PurePosixPath) -> None:
        length, receiver = files[path]
        await _Passage(http, mirror, path, length, progress, pace).to_the_end(receiver)
        receiver.end()

    asyncio.run(_Server(address, settings, bring, say).visit(files))


class Delivery(Protocol):
    """A file to be written from `done` on."""

    done: int

    @property
    def size(self) -> int:
        """The bytes that it must have."""

    def take(self, data: memoryview) -> None:
        """The next bytes; called in other threads, never twice at the same time."""

    def restart(self) -> None:
        """Start again: the server sends files only from their beginning."""


def deliver(
    work: Mapping[str, Mapping[PurePosixPath, Delivery]],
    settings: MirrorSettings,
    tell: Callable[[str, PurePosixPath, Told], None],
    ready: Callable[[Callable[[], None]], None],
) -> None:
    """Have several mirrors bring whole files at the same time, each from where it stopped.

    Args:
        work: for the address of each mirror, the files by path.
        settings: how to treat them.
        tell: called, in this thread, with the bytes that have come, None for a complete file, what
            a mirror does not bring, and what is being waited for.
        ready: called with a function that ends all this and may be called from another thread.
    """

    async def all_mirrors() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop() -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)

        ready(stop)
        pace = Pace(settings.down)
        try:
            async with asyncio.TaskGroup() as group:
                for address, files in work.items():
                    told = partial(tell, address)
                    group.create_task(_delivered(address, files, settings, told, pace))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(all_mirrors())


async def _delivered(
    address: str,
    files: Mapping[PurePosixPath, Delivery],
    settings: MirrorSettings,
    tell: Callable[[PurePosixPath, Told], None],
    pace: Pace,
) -> None:
    async def bring(http: Http, mirror: Mirror, path: PurePosixPath) -> None:
        file = files[path]
        length = await _length(http, mirror, path)
        if length[0] != file.size:
            raise Changed(f"it has {length[0]:,} bytes there, not {file.size:,}")
        passage = _Passage(http, mirror, path, length, partial(tell, path), pace)
        try:
            await passage.to_the_end(file)
        except Failed as error:
            if error.args != (IGNORES_RANGE,):
                raise
            file.restart()
            await passage.to_the_end(file)
        tell(path, None)

    say = partial(tell, next(iter(files)))
    await _Server(address, settings, bring, say, tell).visit(files)


class _Server:
    """Does something for each of several files, on several connections to one server."""

    def __init__(
        self,
        address: str,
        settings: MirrorSettings,
        work: Work,
        say: Callable[[Notice], None],
        failed: Callable[[PurePosixPath, GrokfetchError], None] | None = None,
    ) -> None:
        here = settings.environment.at_hub(address)
        self._mirror = Mirror(here, label(here), settings.connections)
        self._settings = settings
        self._work = work
        self._say = say
        self._failed = failed

    async def visit(self, paths: Iterable[PurePosixPath]) -> None:
        from grokfetch.fetch.mirror.http import Http

        settings = self._settings
        left = iter(list(paths))
        async with Http(
            settings.connections, settings.patience_s, settings.proxy, settings.environment
        ) as http:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(settings.connections):
                        group.create_task(self._serve(http, left))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def _serve(self, http: Http, left: Iterator[PurePosixPath]) -> None:
        for path in left:
            rest_s: float | None = 0.0
            try:
                while rest_s is not None:
                    await asyncio.sleep(rest_s)
                    rest_s = await self._attempt(http, path)
            except (Contradiction, OutOfReach, Stalled) as error:
                if self._failed is None:
                    raise
                self._failed(path, error)

    async def _attempt(self, http: Http, path: PurePosixPath) -> float | None:
        """How long to rest before the next attempt, None after a good one."""
        mirror = self._mirror
        if mirror.dropped:
            raise self._stalled(path)
        began = time.monotonic()
        try:
            await self._work(http, mirror, path)
        except Changed as error:
            raise Contradiction(
                f"{path} has changed: {error}", path=mirror.name, hint=HINT
            ) from None
        except (Refused, Faulty) as error:
            raise OutOfReach(f"{path}: {error}", path=mirror.name, hint=HINT) from None
        except Failed as error:
            if isinstance(error, Limited) and error.rest_s is not None:
                self._limit(began, error, error.rest_s)
                if mirror.dropped:
                    raise self._stalled(path) from None
            elif mirror.strike(began, self._settings, fewer=isinstance(error, Limited)):
                raise OutOfReach(f"{path}: {error}", path=mirror.name, hint=HINT) from None
            return max(0.0, mirror.rests_until - time.monotonic())
        mirror.deliver()
        return None

    def _limit(self, began: float, error: Limited, rest_s: float) -> None:
        """Wait as long as the server says, unless all waits together would be too long."""
        mirror = self._mirror
        news = mirror.note(str(error))
        mirror.dropped = mirror.limit(began, rest_s, self._settings) or mirror.dropped
        if news and rest_s >= LONG_REST_S and not mirror.dropped:
            self._say(Notice(f"mirror {mirror.name}: {error} and asks us to wait {rest_s:.0f} s"))

    def _stalled(self, path: PurePosixPath) -> Stalled:
        """The error for a file of a server that only limits us."""
        fault, patience = next(reversed(self._mirror.faults)), self._settings.limited_s
        return Stalled(
            f"{path}: {fault}, and has us wait for {seconds_text(patience)} or more",
            path=self._mirror.name,
            hint="what has been hashed is kept; run the same command again later, or name another"
            " mirror",
        )


async def _length(http: Http, mirror: Mirror, path: PurePosixPath) -> Length:
    """The length of a file, at the first of its addresses that has it."""
    candidates = places(mirror.address, path)
    for form in sorted(range(len(candidates)), key=lambda form: form != mirror.form):
        try:
            found = await http.length(candidates[form])
        except Refused as error:
            refused = error
        else:
            mirror.form = form
            return found
    raise refused


@dataclasses.dataclass(frozen=True, slots=True)
class _Passage:
    """A file on its way from a mirror: its address, its length, and who takes the bytes."""

    http: Http
    mirror: Mirror
    path: PurePosixPath
    length: Length
    progress: Callable[[int], None]
    pace: Pace

    async def to_the_end(self, receiver: Receiver | Delivery) -> None:
        """Hand on the rest of the file, over as many answers as that takes."""
        while receiver.done < self.length[0]:
            before = receiver.done
            try:
                await self._one_answer(receiver)
            except Short:
                if receiver.done == before:
                    raise

    async def _one_answer(self, receiver: Receiver | Delivery) -> None:
        size, etag = self.length
        candidates = places(self.mirror.address, self.path)
        url = candidates[min(self.mirror.form, len(candidates) - 1)]
        async with self.http.opened(url, Span(receiver.done, size, size, etag)) as chunks:
            held = bytearray()

            async def hand_on() -> None:
                with memoryview(held) as data:
                    await asyncio.to_thread(receiver.take, data)
                self.progress(len(held))
                held.clear()

            try:
                async for chunk in chunks:
                    held += chunk[: size - receiver.done - len(held)]
                    await self.pace.wait(len(chunk))
                    if len(held) >= BUFFER:
                        await hand_on()
                        self.mirror.deliver()
                    if receiver.done + len(held) >= size:
                        break
            finally:
                if held:
                    await hand_on()
        if receiver.done < size:
            raise Short("it sent fewer bytes than were asked for")
