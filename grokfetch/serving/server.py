"""Listens, and ends on a signal: requests in progress are answered first."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from grokfetch.errors import OutOfReach
from grokfetch.serving.connection import Connection

__all__ = ["KEEP_ALIVE_S", "Server", "bound", "listen"]

KEEP_ALIVE_S = 75
"""Seconds that a connection is kept between two requests: more than proxies and clients keep theirs
(60 s), lest one sends a request into a connection that is just being closed."""


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address; nobody can connect before `listen`.

    Args:
        host: a name or an address, of IPv4 or IPv6.
        port: 0 for any free one.

    Raises:
        OutOfReach: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OutOfReach(
            f"cannot listen on {host} port {port}: {error.strerror}",
            hint="choose another one: --host, --port",
        ) from error
    return listener


def listen(app: Starlette, at: socket.socket, say: Callable[[str], object], name: str) -> None:
    """Serve until SIGTERM or Ctrl-C, and until the requests then in progress are answered.

    Args:
        app: the application.
        at: from `bound`; closed in the end.
        say: called with a line when it listens, and when it stops.
        name: of what is served.
    """
    with at, _signals_end_nothing():
        Server(app, say, name).run([at])


class Server(uvicorn.Server):
    """Uvicorn over an application, with bounds for how long clients may take.

    Args:
        app: the application.
        say: called with a line when it listens, and when it stops.
        name: of what is served.
    """

    def __init__(self, app: Starlette, say: Callable[[str], object], name: str) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._say = say
        self._name = name

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        assert sockets
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._say(f"serving {self._name} on http://{shown}:{port}/v1; Ctrl-C stops it")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests; a second signal ends those at work."""
        if not self.should_exit:
            self._say(
                "no new requests; those at work are answered first, a second Ctrl-C ends them"
            )
        super().handle_exit(sig, frame)


@contextlib.contextmanager
def _signals_end_nothing() -> Iterator[None]:
    """When done, uvicorn raises the signal that ended it again; here such an end is a success."""
    names = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: None) for number in names]
    try:
        yield
    finally:
        for number, handler in zip(names, before, strict=True):
            signal.signal(number, handler)
