"""Connections to mirrors, on asyncio's own transports."""

import asyncio
import gc
import socket

import pytest

from grokfetch.fetch.mirror.sockets import Sockets


@pytest.mark.parametrize("steps", range(12))
def test_a_connection_that_is_given_up_while_it_is_made_is_closed(steps):
    async def give_up(port):
        making = asyncio.ensure_future(Sockets().connect_tcp("127.0.0.1", port))
        for _ in range(steps):
            await asyncio.sleep(0)
        making.cancel()
        made = await asyncio.gather(making, return_exceptions=True)
        if not isinstance(made[0], BaseException):
            await made[0].aclose()

    with socket.create_server(("127.0.0.1", 0)) as server:
        asyncio.run(give_up(server.getsockname()[1]))
        # A socket that was not closed is reported when it is collected, which is an error here.
        gc.collect()
