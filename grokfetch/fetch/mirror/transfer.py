"""A run of pieces in transit: read from a mirror, written into files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import Self

from grokfetch.errors import storage_errors
from grokfetch.fetch.mirror.addresses import places
from grokfetch.fetch.mirror.answers import Refused, Short, Span
from grokfetch.fetch.mirror.http import Http
from grokfetch.fetch.mirror.state import Mirror
from grokfetch.torrent.layout import LayoutFile, Segment

__all__ = ["Lacking", "Reader", "Writer"]


class Lacking(Exception):
    """A mirror does not have a file."""

    def __init__(self, path: PurePosixPath, why: str) -> None:
        super().__init__(why)
        self.path = path
        self.why = why


class Reader:
    """Reads parts of files from one mirror, with one request for consecutive parts.

    Args:
        mirror: the mirror.
        http: the client.
        stop: the byte of the torrent's stream up to which parts will be asked for.
    """

    def __init__(self, mirror: Mirror, http: Http, stop: int) -> None:
        self._mirror = mirror
        self._http = http
        self._stop = stop
        self._open = contextlib.AsyncExitStack()
        self._at: tuple[PurePosixPath, int] | None = None
        self._chunks: AsyncIterator[bytes]
        self._rest = memoryview(b"")

    async def aclose(self) -> None:
        """End the request under way."""
        await self._open.aclose()

    async def read(self, part: Segment) -> AsyncIterator[memoryview]:
        """The bytes of a part as they come, exactly its length.

        Raises:
            Lacking: the mirror does not have the file.
            Faulty, Failed: as in `Http.opened`, `Short` if it sent too few bytes.
        """
        if self._at != (part.file.path, part.offset):
            await self._request(part)
        left = part.length
        while left:
            if not self._rest:
                self._rest = memoryview(await anext(self._chunks, b""))
            if not self._rest:
                raise Short("it sent fewer bytes than were asked for")
            chunk, self._rest = self._rest[:left], self._rest[left:]
            left -= len(chunk)
            yield chunk
        self._at = (part.file.path, part.offset + part.length)

    async def _request(self, part: Segment) -> None:
        await self._open.aclose()
        self._rest = memoryview(b"")
        file = part.file
        span = Span(part.offset, min(file.size, self._stop - file.start), file.size)
        candidates = places(self._mirror.address, file.name)
        first = min(self._mirror.form, len(candidates) - 1)
        why = ""
        for form in sorted(range(len(candidates)), key=lambda form: form != first):
            try:
                self._chunks = await self._open.enter_async_context(
                    self._http.opened(candidates[form], span)
                )
            except Refused as error:
                why = str(error)
            else:
                self._mirror.form = form
                return
        raise Lacking(file.path, why)


class Writer:
    """Writes into files at offsets; makes them, and the folders above them, if needed.

    One file is open at a time: a job may hold thousands of small ones.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._file: LayoutFile | None = None
        self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._handle)
            self._file = None

    def write(self, file: LayoutFile, offset: int, data: memoryview) -> None:
        """Write at an offset in bytes; refuses a link in place of the file.

        Raises:
            StorageFailed: the disk does not take it.
        """
        with storage_errors(self._root / file.path):
            if file is not self._file:
                self.__exit__()
                self._handle = _opened(self._root / file.path)
                self._file = file
            while data:
                written = os.pwrite(self._handle, data, offset)
                data, offset = data[written:], offset + written


def _opened(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)
