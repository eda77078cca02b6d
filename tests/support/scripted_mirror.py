"""A mirror that answers what a script says, for as long as it says something, and then rightly.

A script is bytes: answers between `<<next>>`, one for each request, whatever it asks for. In them
stand for something: `<<body>>` the bytes that were asked for, `<<half>>` half of them, `<<wrong>>`
as many others, `<<chunks>>` they in chunks; `<<range>>`, `<<length>>`, `<<size>>` what headers say
of them, `<<url>>` the address that was asked for. `<<silence>>` lasts, `<<end>>` ends the
connection, `<<reset>>` breaks it, `<<slowly>>` has all that follows come byte by byte, and
`<<endless>>` has what stands before it, up to the last mark, come again and again.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
from collections import deque

import httpcore

HOST, PORT = "127.0.0.1", 8000
URL = f"http://{HOST}:{PORT}"
BYTES_A_SECOND = 256 << 10
READ = 64 << 10

MARKS = [
    f"<<{word}>>".encode()
    for word in (
        *("next", "body", "half", "wrong", "chunks", "range", "length", "size", "url"),
        *("silence", "end", "reset", "slowly", "endless"),
    )
]


class Mirror:
    """What all connections have in common: files by path, and how much of the script is left.

    `sent` counts the bytes that were taken, `due` those that were asked for.
    """

    def __init__(self, files, script):
        self.files = files
        self.script = deque(script.split(b"<<next>>"))
        self.sent = self.due = 0

    def answer(self, request):
        """What is sent for a request, in parts: bytes, iterators of them without end, or marks."""
        target, asked = _understood(request)
        data = self.files.get(target)
        start, stop = asked or (0, len(data or b""))
        self.due += min(stop, len(data or b"")) - start
        if self.script:
            yield from _told(self.script.popleft(), data or b"", asked, target)
        elif data is None:
            yield b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        else:
            good = b"HTTP/1.1 200 OK\r\nContent-Length: <<size>>\r\n\r\n<<body>>"
            if asked is not None:
                good = (
                    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes <<range>>\r\n"
                    b"Content-Length: <<length>>\r\n\r\n<<body>>"
                )
            yield from _told(good, data, asked, target)


def _understood(request):
    target = request.split(b" ", 2)[1].decode("latin-1").removeprefix("/").partition("?")[0]
    found = re.search(rb"\r\nrange: bytes=(\d+)-(\d+)", request, re.IGNORECASE)
    return target, found and (int(found[1]), int(found[2]) + 1)


def _told(text, data, asked, target):
    start, stop = asked or (0, len(data))
    body = data[start:stop]
    words = {
        b"body": body,
        b"half": body[: len(body) // 2],
        b"wrong": bytes(255 - byte for byte in body),
        b"chunks": b"".join(
            b"%x\r\n%b\r\n" % (len(part), part)
            for part in (body[at : at + 5000] for at in range(0, len(body), 5000))
        )
        + b"0\r\n\r\n",
        b"range": b"%d-%d/%d" % (start, stop - 1, len(data)),
        b"length": b"%d" % len(body),
        b"size": b"%d" % len(data),
        b"url": f"{URL}/{target}".encode("latin-1"),
    }
    before, slow = b"", False
    for literal, mark in itertools.zip_longest(*[iter(re.split(rb"<<([a-z]+)>>", text))] * 2):
        for part in (literal, words.get(mark)):
            if part:
                before = part
                yield from _slow(part) if slow else (part,)
        if mark == b"slowly":
            slow = True
        elif mark == b"endless" and before:
            yield _slow(itertools.cycle(before)) if slow else _again(before)
        elif mark in {b"silence", b"end", b"reset"}:
            yield mark.decode()


def _slow(part):
    for byte in part:
        yield "pause"
        yield bytes([byte])


def _again(part):
    many = part * (1 + READ // len(part))
    while True:
        yield many


class Backend:
    """In place of httpcore's connections to the network."""

    def __init__(self, mirror):
        self.mirror = mirror

    async def connect_tcp(self, host, port, timeout=None, **_):
        if (host, port) != (HOST, PORT):
            raise httpcore.ConnectError("no such host") from socket.gaierror(-2, "unknown")
        await asyncio.sleep(0.001)
        return _Connection(self.mirror)


class _Connection(httpcore.AsyncNetworkStream):
    """One connection; what is slow is nearly as slow as patience allows."""

    def __init__(self, mirror):
        self._mirror = mirror
        self._request = b""
        self._parts = deque()
        self._held = b""
        self._over = False

    async def write(self, buffer, timeout=None):
        if self._over:
            raise httpcore.WriteError("broken")
        self._request += buffer
        while b"\r\n\r\n" in self._request:
            request, _, self._request = self._request.partition(b"\r\n\r\n")
            self._parts.append(self._mirror.answer(request))

    async def read(self, max_bytes, timeout=None):
        part = self._held or self._next()
        while part == "pause":
            await asyncio.sleep(timeout * 0.9)
            part = self._next()
        if part == "silence":
            self._parts.appendleft(iter([part]))
            await asyncio.sleep(timeout)
            raise httpcore.ReadTimeout("silent")
        if part == "reset":
            self._over = True
            raise httpcore.ReadError("broken") from ConnectionResetError(104, "reset by peer")
        if part == "end":
            self._over = True
            self._parts.clear()
            return b""
        data, self._held = part[:max_bytes], part[max_bytes:]
        self._mirror.sent += len(data)
        await asyncio.sleep(len(data) / BYTES_A_SECOND)
        return data

    def _next(self):
        """The next part; iterators are looked into."""
        while self._parts:
            part = next(self._parts[0], None)
            if part is None:
                self._parts.popleft()
            elif isinstance(part, bytes | str):
                return part
            else:
                self._parts.appendleft(part)
        return "end" if self._over else "silence"

    async def aclose(self):
        self._over = True

    async def start_tls(self, *_, **__):
        raise httpcore.ConnectError("no TLS here")

    def get_extra_info(self, info):
        if info == "server_addr":
            return (HOST, PORT)
        return self._over if info == "is_readable" else None
