"""Ranges of files over HTTP: redirects, and the meaning of servers' answers.

Nothing that a server says is trusted unless it is checked here; the caller hashes its bytes.
Foreign exceptions become one of ours: the mirror does not have this file (`Refused`), it cannot
serve us at all (`Faulty`), or it may do better next time (`Failed`, `Limited`, `Short`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self

import httpx

from grokfetch import __version__
from grokfetch.fetch.mirror.addresses import Zone, zone
from grokfetch.fetch.mirror.answers import (
    Failed,
    Faulty,
    Limited,
    Refused,
    Short,
    Span,
    check,
    quoted,
)
from grokfetch.fetch.mirror.environment import Environment, ProxyUnusable
from grokfetch.fetch.mirror.exchange import Answer, Asked, Asking
from grokfetch.fetch.mirror.routes import ProxyServer, Routes

__all__ = ["Http", "redirected"]

MOST_REDIRECTS = 10

CONNECT_TIMEOUT_S = 15.0

LEAST_RATE = 1 << 10
"""Bytes a second below which a server counts as silent, however often it sends one."""

HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "keep-alive",
    "User-Agent": f"grokfetch/{__version__}",
}


class Http:
    """A client with open connections, for one event loop.

    Args:
        connections: how many at most are kept open.
        patience_s: how long a server may be silent.
        proxy: for everything; without it, those of the environment are used.
        environment: proxies, certificates, and the token for the Hub.
    """

    def __init__(
        self,
        connections: int,
        patience_s: float,
        proxy: ProxyServer | None = None,
        environment: Environment | None = None,
    ) -> None:
        environment = environment or Environment()
        self._asking = Asking(HEADERS, environment)
        # Not httpx's client: for small files it costs more than the answer, and it keeps cookies.
        connect_s = min(patience_s, CONNECT_TIMEOUT_S)
        timeout = httpx.Timeout(patience_s, connect=connect_s, pool=None)
        self._routes = Routes(connections, environment, proxy, timeout)
        self._patience_s = patience_s
        # Where redirects led, so that later ranges skip them.
        self._direct: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._routes.aclose()

    @contextlib.asynccontextmanager
    async def opened(self, url: str, span: Span) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of a span as they come; the caller must check their number.

        Raises:
            Refused, Faulty, Failed: here; while the bytes are read, only `Short`, or `Failed` for
                silence.
        """
        answer = await self._open(url, span)
        try:
            # A generator left to the garbage collector costs a task of its own.
            async with contextlib.aclosing(self._chunks(answer)) as chunks:
                yield chunks
        finally:
            await answer.body.aclose()

    async def document(self, url: str, largest: int) -> bytes:
        """Everything at an address.

        Raises:
            Refused, Faulty, Failed: there is nothing, or more than `largest` bytes.
        """
        answer = await self._ask(url, None)
        data = bytearray()
        try:
            async for chunk in self._chunks(answer):
                data += chunk
                if len(data) > largest:
                    raise Refused(f"it is larger than {largest:,} bytes")
        finally:
            await answer.body.aclose()
        return bytes(data)

    async def length(self, url: str) -> tuple[int, str | None]:
        """The size in bytes of the file at an address, and its ETag; nothing of it is read.

        Raises:
            Refused, Faulty, Failed: there is nothing, or the server does not say its size.
        """
        answer = await self._ask(url, None)
        await answer.body.aclose()
        size, etag = answer.headers.get("content-length"), answer.headers.get("etag")
        if size is None:
            raise Faulty("it does not say how long the file is")
        return int(size), etag

    async def _chunks(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        left = int(answer.headers.get("content-length", "0"))
        stream = _Stream(answer.body, self._patience_s)
        try:
            with self._translated():
                chunk = await stream.next()
                while chunk:
                    left -= len(chunk)
                    # Only an answer that was read to its end leaves its connection open.
                    ahead = b"" if left else await stream.next()
                    yield chunk
                    chunk = ahead or await stream.next()
        except _Broken:
            raise Short("its connection ended in the middle of an answer") from None

    async def _open(self, url: str, span: Span) -> Answer:
        remembered = self._direct.get(url)
        if remembered is not None:
            try:
                return await self._ask(remembered, span)
            except Limited:
                raise
            except (Refused, Faulty, Failed):
                # Signed addresses expire, some with a page instead of an error, so the redirect is
                # asked for again.
                self._direct.pop(url, None)
        answer = await self._ask(url, span)
        if answer.url != url:
            self._direct[url] = answer.url
        return answer

    async def _ask(self, url: str, span: Span | None) -> Answer:
        for _ in range(MOST_REDIRECTS + 1):
            with self._translated():
                answer = await self._send(self._asking.asked(url, span))
            try:
                if not answer.redirects:
                    check(answer.status, answer.headers, span)
                    return answer
                url = redirected(url, answer.headers["location"], answer.server)
            except BaseException:
                await answer.body.aclose()
                raise
            await answer.body.aclose()
        raise Failed(f"it redirects more than {MOST_REDIRECTS} times")

    async def _send(self, asked: Asked) -> Answer:
        # httpx only limits the time between two bytes.
        async with asyncio.timeout(CONNECT_TIMEOUT_S + self._patience_s):
            try:
                return await self._routes.answer(asked)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # A server may close a connection just when it is used again (RFC 9112, 9.3.1).
                return await self._routes.answer(asked)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.TimeoutException, TimeoutError):
            raise Failed(f"it was silent for {self._patience_s:g} s") from None
        except httpx.InvalidURL as error:
            raise Faulty(f"its address cannot be used: {quoted(str(error))}") from None
        except ProxyUnusable as error:
            raise Faulty(str(error)) from None
        except httpx.ProxyError as error:
            raise Failed(f"the proxy refuses: {quoted(str(error))}") from None
        except httpx.HTTPError as error:
            raise _meaning(error) from None


class _Stream:
    """The bytes of an answer as they come, each waited for no longer than `patience_s`."""

    def __init__(self, body: httpx.AsyncByteStream, patience_s: float) -> None:
        self._chunks = aiter(body)
        self._patience_s = patience_s
        self._received = 0
        self._waited_s = 0.0

    async def next(self) -> bytes:
        """The next bytes; none at the end.

        Raises:
            TimeoutError: none came.
            Failed: they come too slowly.
        """
        began = time.monotonic()
        async with asyncio.timeout(self._patience_s):
            chunk = await anext(self._chunks, b"")
        self._waited_s += time.monotonic() - began
        self._received += len(chunk)
        if chunk and self._received < LEAST_RATE * (self._waited_s - self._patience_s):
            raise Failed(f"it sends less than {LEAST_RATE:,} bytes a second")
        return chunk


class _Broken(Failed):
    """The connection ended."""


def _meaning(error: httpx.HTTPError) -> Exception:
    """What a connection error means, judged by its cause."""
    cause: BaseException | None = error
    text = str(error) or "the connection ended"
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Faulty(f"its certificate is not valid: {cause.verify_message}")
        if isinstance(cause, ssl.SSLError):
            return Failed(f"no secure connection: {cause.reason or cause}")
        if isinstance(cause, socket.gaierror):
            return Failed(f"the host cannot be resolved ({cause.strerror})")
        if isinstance(cause, ConnectionRefusedError):
            return Failed("the connection is refused")
        if isinstance(cause, OSError) and cause.strerror:
            text = cause.strerror
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        else:
            cause = cause.__cause__ or cause.__context__
    return _Broken(quoted(text))


def redirected(url: str, location: str, server: tuple[Any, ...] | None) -> str:
    """Where a redirect leads.

    Args:
        url: what was asked for.
        location: what the answer names instead.
        server: the address that answered, host first, if it is known.

    Raises:
        Faulty: its address cannot be followed.
    """
    here = httpx.URL(url)
    try:
        target = here.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        why = quoted(str(error))
        raise Faulty(f"it redirects to an address that cannot be used: {why}") from None
    if target.scheme not in ("http", "https"):
        raise Faulty(f"it redirects to {quoted(target.scheme)}, which is not HTTP")
    if here.scheme == "https" and target.scheme != "https":
        raise Faulty("it redirects from https to http")
    ends, begins = zone(target.host), _zone(here.host, server)
    if ends not in ("world", begins) and begins != "machine":
        raise Faulty("it redirects into the private network")
    return str(target)


def _zone(host: str, server: tuple[Any, ...] | None) -> Zone:
    """Where the answering host is: by its name or, if that is public, by its known address."""
    by_name = zone(host)
    return by_name if by_name != "world" or server is None else zone(str(server[0]))
