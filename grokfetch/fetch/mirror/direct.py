"""HTTP/1.1 to servers without a proxy, at a lower cost for each request than a whole client.

For a file of a few kilobytes, the client's own work takes most of the time. asyncio handles
connecting, TLS and timeouts, and h11 the protocol; this module keeps connections open and uses the
most recently used one for the next request.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator

import h11
import httpcore
import httpx

from grokfetch.fetch.mirror.exchange import Answer, Asked, named
from grokfetch.fetch.mirror.sockets import Sockets

__all__ = ["Direct"]

OPEN_S = 5.0
"""After so many seconds without a request a connection is not used again: servers close it."""

READ = 256 << 10
"""Bytes read at once."""

LONGEST_HEAD = 100 << 10
"""The most bytes in the head of an answer."""

KINDS = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError)

Origin = tuple[str, str, int]
"""Scheme, host and port."""


class Direct:
    """Requests without bodies, to servers reached without a proxy.

    Args:
        connections: the most idle connections to keep open.
        timeout: how long to wait for each operation.
        context: returns the SSL context that checks certificates; making it takes a while.
    """

    def __init__(
        self, connections: int, timeout: httpx.Timeout, context: Callable[[], ssl.SSLContext]
    ) -> None:
        self._most = connections
        self._timeout = timeout
        self._context = context
        self._backend = Sockets()
        self._idle: dict[Origin, list[_Connection]] = {}

    async def answer(self, asked: Asked) -> Answer:
        """The head of the answer, and its body, which the caller reads and closes.

        Raises:
            httpx.TransportError: there is none.
        """
        origin = (asked.scheme, asked.host, asked.port)
        connection = await self._kept(origin)
        if connection is None:
            connection = await self._connected(origin)
        try:
            head = await connection.ask(asked)
        except BaseException:
            await connection.aclose()
            raise
        return Answer(
            asked.url,
            head.status_code,
            named(head.headers),
            _Body(connection, lambda: self._keep(origin, connection)),
            connection.stream.get_extra_info("server_addr"),
        )

    async def aclose(self) -> None:
        """Close the idle connections."""
        for connections in self._idle.values():
            while connections:
                await connections.pop().aclose()

    async def _kept(self, origin: Origin) -> _Connection | None:
        connections = self._idle.get(origin)
        while connections:
            connection = connections.pop()
            if connection.open:
                return connection
            await connection.aclose()
        return None

    async def _connected(self, origin: Origin) -> _Connection:
        scheme, host, port = origin
        timeout_s = self._timeout.connect
        with _as_of_httpx():
            stream = await self._backend.connect_tcp(host, port, timeout=timeout_s)
            if scheme == "https":
                context = self._context()
                context.set_alpn_protocols(["http/1.1"])
                stream = await stream.start_tls(context, host, timeout=timeout_s)
        return _Connection(stream, self._timeout)

    def _keep(self, origin: Origin, connection: _Connection) -> bool:
        """Keep a connection for the next request; return whether there was room for it."""
        if sum(map(len, self._idle.values())) >= self._most or not connection.renew():
            return False
        self._idle.setdefault(origin, []).append(connection)
        return True


class _Connection:
    """An open connection, for one request at a time."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, timeout: httpx.Timeout) -> None:
        self.stream = stream
        self._protocol = h11.Connection(h11.CLIENT, LONGEST_HEAD)
        self._timeout = timeout
        self._renewed_at = 0.0

    @property
    def open(self) -> bool:
        """Whether it may be used again: an idle connection becomes readable only at its end."""
        fresh = time.monotonic() - self._renewed_at < OPEN_S
        return fresh and not self.stream.get_extra_info("is_readable")

    async def ask(self, asked: Asked) -> h11.Response:
        """Send a request, and read the head of its answer."""
        with _as_of_httpx():
            request = h11.Request(method="GET", target=asked.target, headers=list(asked.headers))
            data = (self._protocol.send(request) or b"") + (
                self._protocol.send(h11.EndOfMessage()) or b""
            )
            # A server may answer and close before it has read everything.
            with contextlib.suppress(httpcore.WriteError):
                await self.stream.write(data, timeout=self._timeout.write)
            while isinstance(event := await self._event(), h11.InformationalResponse):
                pass
        if not isinstance(event, h11.Response):
            raise httpx.RemoteProtocolError("the server closed without an answer")
        return event

    async def body(self) -> AsyncIterator[bytes]:
        """What follows the head, up to its end."""
        with _as_of_httpx():
            while isinstance(event := await self._event(), h11.Data):
                yield bytes(event.data)

    async def _event(self) -> type[h11.NEED_DATA | h11.PAUSED] | h11.Event:
        while (event := self._protocol.next_event()) is h11.NEED_DATA:
            data = await self.stream.read(READ, timeout=self._timeout.read)
            if not data and self._protocol.their_state is h11.SEND_RESPONSE:
                raise httpcore.RemoteProtocolError("the server closed without an answer")
            self._protocol.receive_data(data)
        return event

    def renew(self) -> bool:
        """Prepare for the next request; False if the answer was not read to its end."""
        ours, theirs = self._protocol.our_state, self._protocol.their_state
        # Bytes after an answer are not an answer to the next request.
        if ours is not h11.DONE or theirs is not h11.DONE or self._protocol.trailing_data[0]:
            return False
        self._protocol.start_next_cycle()
        self._renewed_at = time.monotonic()
        return True

    async def aclose(self) -> None:
        """End it."""
        await self.stream.aclose()


class _Body(httpx.AsyncByteStream):
    """The body of an answer; closing it keeps or ends the connection."""

    def __init__(self, connection: _Connection, keep: Callable[[], bool]) -> None:
        self._connection = connection
        self._keep = keep
        self._closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._connection.body()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            if not self._keep():
                await self._connection.aclose()


@contextlib.contextmanager
def _as_of_httpx() -> Iterator[None]:
    """Turn httpcore's errors into httpx's of the same names."""
    try:
        yield
    except (*KINDS, h11.ProtocolError) as error:
        kind: type[httpx.TransportError] = getattr(httpx, type(error).__name__)
        raise kind(str(error)) from error
