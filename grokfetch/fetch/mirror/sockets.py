"""Connections on asyncio's own transports, with httpcore's interface.

httpcore's own connections start and stop reading in the event loop around every read, and yield to
other tasks before every write; for a file of a few kilobytes that is much of the cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import select
import ssl
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore

__all__ = ["Sockets"]

HELD = 256 << 10
"""Bytes received but not yet taken, above which reading pauses."""

NEXT_ADDRESS_S = 0.25
"""Seconds after which the next address of a host is tried in parallel."""


class Sockets(httpcore.AsyncNetworkBackend):
    """Connects to hosts."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the interface has it
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection.

        Raises:
            httpcore.ConnectError, httpcore.ConnectTimeout: there is none.
        """
        assert local_address is None
        assert socket_options is None
        # A race with a single address would leave its socket open if cancelled just as it connects.
        delay = None if _is_address(host) else NEXT_ADDRESS_S
        with _connecting():
            async with asyncio.timeout(timeout):
                _, protocol = await asyncio.get_running_loop().create_connection(
                    _Protocol, host, port, happy_eyeballs_delay=delay
                )
        return _Socket(protocol)


class _Protocol(asyncio.Protocol):
    """What has come on a connection and has not been read yet."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.held = 0
        self.over = False
        self.error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.chunks.append(data)
        self.held += len(data)
        if self.held > HELD:
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self.over = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over, self.error = True, exc
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Wait until something happens."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def take(self, most: int) -> bytes:
        """Some of what has come."""
        chunk = self.chunks.popleft()
        if len(chunk) > most:
            self.chunks.appendleft(chunk[most:])
            chunk = chunk[:most]
        if self.held > HELD >= self.held - len(chunk) and not self.transport.is_closing():
            self.transport.resume_reading()
        self.held -= len(chunk)
        return chunk


class _Socket(httpcore.AsyncNetworkStream):
    """An open connection."""

    def __init__(self, protocol: _Protocol) -> None:
        self._protocol = protocol
        self._transport = protocol.transport
        self._poll = select.poll()
        self._poll.register(self._transport.get_extra_info("socket"), select.POLLIN)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """The next bytes, none at the end.

        Raises:
            httpcore.ReadError, httpcore.ReadTimeout: there are none.
        """
        protocol = self._protocol
        if not protocol.chunks and not protocol.over:
            try:
                async with asyncio.timeout(timeout):
                    await protocol.wait()
            except TimeoutError:
                raise httpcore.ReadTimeout from None
        if protocol.chunks:
            return protocol.take(max_bytes)
        if protocol.error is not None:
            raise httpcore.ReadError(str(protocol.error)) from protocol.error
        return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002, ASYNC109
        """Send bytes, or queue them: requests are too small to wait for.

        Raises:
            httpcore.WriteError: the connection has ended.
        """
        if self._protocol.over or self._transport.is_closing():
            raise httpcore.WriteError("the connection has ended")
        self._transport.write(buffer)

    async def aclose(self) -> None:
        """End it at once."""
        self._transport.abort()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        """The same connection, encrypted from now on.

        Raises:
            httpcore.ConnectError, httpcore.ConnectTimeout: that failed; the connection has ended.
        """
        try:
            with _connecting():
                async with asyncio.timeout(timeout):
                    encrypted = await asyncio.get_running_loop().start_tls(
                        self._transport,
                        self._protocol,
                        ssl_context,
                        server_hostname=server_hostname,
                    )
        except BaseException:
            await self.aclose()
            raise
        if encrypted is None:
            raise httpcore.ConnectError("the connection has ended")
        self._protocol.transport = self._transport = encrypted
        return self

    def get_extra_info(self, info: str) -> Any:
        """The address of the server, or whether there is something to read."""
        if info == "server_addr":
            return self._transport.get_extra_info("peername")
        if info == "is_readable":
            protocol = self._protocol
            return protocol.over or bool(protocol.chunks) or bool(self._poll.poll(0))
        return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _connecting() -> Iterator[None]:
    """Turn connection errors into httpcore's, by their cause."""
    try:
        yield
    except TimeoutError as error:
        kind = httpcore.ConnectTimeout if error.errno is None else httpcore.ConnectError
        raise kind(str(error)) from error
    except OSError as error:
        # If several addresses have failed, asyncio gives the error number only in the text.
        number = re.search(r"\[Errno (\d+)\]", str(error)) if error.errno is None else None
        cause = error if number is None else OSError(int(number[1]), os.strerror(int(number[1])))
        raise httpcore.ConnectError(str(error)) from cause
