"""One connection to the server, and what its client may take of time and of memory."""

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
"""Seconds in which a request's headers have to come, and the rest of a body that is not read."""

UNREAD_S = 60.0
"""Seconds in which a client has to take something of what was written to it."""

LEAST_RATE = 1 << 10
"""Bytes a second below which a client does not read."""


class Connection(H11Protocol):
    """A connection that is ended where its client does not send or read what it has to.

    To send are a request's headers, and the rest of a body that nobody has read; the others' bodies
    are the gate's. Requests that are sent before the one at work is answered are taken up to
    64 KiB, and what is not read stays below that with the answer that is being written.
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
        """Watch from now on what comes, and what is read."""
        super().connection_made(transport)
        self.flow = _Flow(transport, lambda: len(self.conn.trailing_data[0]))
        self._watch()
        self._look = self.loop.call_later(UNREAD_S, self._check_reading)

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch no more."""
        self._forget()
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for what has to come now."""
        super().on_response_complete()
        if self.conn.our_state is h11.DONE:
            self._watch()
        elif self.conn.our_state is h11.IDLE:
            # What was held of later requests has been used up.
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, if that can still be said."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            # The request has been answered before its malformed body came, or must get no body.
            self.transport.close()
        if self.cycle is not None:
            # The application may be about to answer, too.
            self.cycle.disconnected = True

    def _check_reading(self) -> None:
        """End the connection if little of what lay there the last time has been taken since."""
        unread = self.transport.get_write_buffer_size()
        taken = self._counted.sent - unread
        if taken - self._taken < min(self._unread, LEAST_RATE * UNREAD_S):
            # Closing would wait until all is taken.
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
    """Counts the bytes that it has made for the client."""

    sent = 0

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        parts = super().send_with_data_passthrough(event)
        self.sent += sum(map(len, parts or ()))
        return parts


class _Flow(FlowControl):
    """Reads no more while so much is held of later requests as is of a body.

    The application asks for more with each message that it takes, those of other requests included.
    """

    def __init__(self, transport: asyncio.Transport, held: Callable[[], int]) -> None:
        super().__init__(transport)
        self._held = held

    def resume_reading(self) -> None:
        if self._held() <= HIGH_WATER_LIMIT:
            super().resume_reading()
