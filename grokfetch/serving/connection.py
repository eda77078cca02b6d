"""One connection to the server, with limits on the time and memory that its client may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

__all__ = ["HEADERS_S", "UNREAD_S", "Connection"]

HEADERS_S = 60.0
"""Timeout in seconds for a request's headers, and for the rest of a body that is not read."""

UNREAD_S = 60.0
"""Seconds within which a client must read some of what was written to it."""

LEAST_RATE = 1 << 10
"""A client that reads fewer bytes per second counts as not reading."""


class Connection(H11Protocol):
    """A connection that is closed if its client does not send or read in time.

    A client must send a request's headers, and the rest of a body that nobody reads; other bodies
    have a timeout in the gate. Pipelined requests are buffered up to 64 KiB while an earlier one is
    answered; backpressure keeps unread data below that.
    """

    _deadline: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = self._counted = _Counted(h11.SERVER)
        self._unread = self._taken = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeouts for sending and reading."""
        super().connection_made(transport)
        self.flow = _Flow(transport, lambda: len(self.conn.trailing_data[0]))
        self._watch()
        self._look = self.loop.call_later(UNREAD_S, self._check_reading)

    def data_received(self, data: bytes) -> None:
        """Receive data from the client."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timeouts."""
        self._forget()
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the timeout for the next request, or for the rest of this one's body."""
        super().on_response_complete()
        if self.conn.our_state is h11.DONE:
            self._watch()
        elif self.conn.our_state is h11.IDLE:
            # The buffered data of later requests has been used up.
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, if a response can still be sent."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            # The request was answered before its malformed body came, or allows no response body.
            self.transport.close()
        if self.cycle is not None:
            # Keep the application from answering as well.
            self.cycle.disconnected = True

    def _check_reading(self) -> None:
        """Close the connection if too little has been read since the last check."""
        unread = self.transport.get_write_buffer_size()
        taken = self._counted.sent - unread
        if taken - self._taken < min(self._unread, LEAST_RATE * UNREAD_S):
            # `close` would wait until everything is read.
            self.transport.abort()
            return
        self._unread, self._taken = unread, taken
        self._look = self.loop.call_later(UNREAD_S, self._check_reading)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_S, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Counted(h11.Connection):
    """Counts the bytes produced for the client."""

    sent = 0

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        parts = super().send_with_data_passthrough(event)
        self.sent += sum(map(len, parts or ()))
        return parts


class _Flow(FlowControl):
    """Stops reading while the buffer of later requests is over the limit for a body.

    The application resumes reading with each message that it takes, also for other requests.
    """

    def __init__(self, transport: asyncio.Transport, held: Callable[[], int]) -> None:
        super().__init__(transport)
        self._held = held

    def resume_reading(self) -> None:
        if self._held() <= HIGH_WATER_LIMIT:
            super().resume_reading()
