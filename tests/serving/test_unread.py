"""Clients that do not read the responses to their requests, over sockets with small buffers."""

from __future__ import annotations

import contextlib
import json
import socket

import psutil
import pytest
from support.patience import wait_for
from support.raw_requests import Echo
from support.serving import DEADLINE_S, P1, SERVED, post, serving

from grokfetch.commands.serve import Jobs
from grokfetch.serving import connection

SMALL = 4096
LONG = {"prompt": P1, "max_tokens": 100, "n": 4, "logprobs": 5, "echo": True}
LEAST = 65536
"""The least number of bytes in the response to `LONG`, far more than both buffers hold."""


@pytest.fixture
def server(monkeypatch):
    """The address and the worker of a server with small socket buffers."""
    monkeypatch.setattr(connection, "UNREAD_S", 0.3)
    real = socket.socket.listen

    def listen(listener, *backlog):
        # Connections inherit this from the listener.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        real(listener, *backlog)

    monkeypatch.setattr(socket.socket, "listen", listen)
    with serving(Jobs(Echo(SERVED.vocabulary)), queue=8) as known:
        yield known


@contextlib.contextmanager
def asking(url, **fields):
    """A connection with a request."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(LONG | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as client:
        client.settimeout(DEADLINE_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.connect((host, int(port)))
        client.sendall(head.encode() + body)
        yield client


def held(url):
    """The connections that the server holds, by their clients' ports."""
    port = int(url.rsplit(":", 1)[1])
    return {
        it.raddr.port
        for it in psutil.Process().net_connections("tcp")
        if it.laddr.port == port and it.raddr and it.status == psutil.CONN_ESTABLISHED
    }


def rest(client):
    told = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            told += part
    return told


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_its_answer_holds_neither_slot_nor_connection(server, stream):
    url, worker = server
    with asking(url, stream=stream) as client:
        begun = client.recv(1)
        assert post(url).status_code == 200
        wait_for(lambda: client.getsockname()[1] not in held(url))
        wait_for(lambda: not worker.texts)
        assert post(url).status_code == 200
        told = begun + rest(client)
    assert told.startswith(b"HTTP/1.1 200")
    assert len(told) < LEAST
