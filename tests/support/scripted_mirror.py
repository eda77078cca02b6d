"""A mirror that gives the answers of a script and, when the script has ended, correct answers.

A script is bytes: answers separated by `<<next>>`, one for each request, whatever it asks for.
Marks in them stand for something else: `<<body>>` for the bytes that were asked for, `<<half>>` for
half of them, `<<wrong>>` for as many wrong ones, `<<chunks>>` for the bytes in chunks; `<<range>>`,
`<<length>>` and `<<size>>` for what headers say about them; `<<url>>` for the address that was
asked for. `<<silence>>` sends nothing for ever, `<<end>>` ends the connection, `<<reset>>` breaks
it. After `<<slowly>>` everything is sent byte by byte, and `<<endless>>` repeats what comes before
it, back to the previous mark; `<<here>>` is only a mark for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import socketserver
import struct
import threading
from collections import deque

import httpcore

from support.virtual_time import Hung

HOST, PORT = "127.0.0.1", 8000
URL = f"http://{HOST}:{PORT}"
BYTES_A_SECOND = 64 << 10
READ = 64 << 10

SLACK = 1_300_000
"""Bytes that may come before those that were asked for; only time limits interim responses."""

MARKS = [
    f"<<{word}>>".encode()
    for word in (
        *("next", "body", "half", "wrong", "chunks", "range", "length", "size", "url"),
        *("silence", "end", "reset", "slowly", "endless", "here"),
    )
]


class Mirror:
    """What all connections share: files by path, and the rest of the script.

    `sent` counts the bytes that were read, `due` those that were asked for. Even if an answer is
    endless, `sent` must not be much larger.
    """

    def __init__(self, files, script, url=URL):
        self.files = files
        self.url = url
        self.script = deque(script.split(b"<<next>>"))
        self.answers = len(self.script) + 1
        self.sent = self.due = 0

    def answer(self, request):
        """What is sent for a request: bytes, "pause" and marks; it may be endless."""
        target, asked = _understood(request)
        data = self.files.get(target)
        start, stop = asked or (0, len(data or b""))
        self.due += min(stop, len(data or b"")) - start
        if self.script:
            yield from _told(self.script.popleft(), data or b"", asked, f"{self.url}/{target}")
        elif data is None:
            yield b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        else:
            good = b"HTTP/1.1 200 OK\r\nContent-Length: <<size>>\r\n\r\n<<body>>"
            if asked is not None:
                good = (
                    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes <<range>>\r\n"
                    b"Content-Length: <<length>>\r\n\r\n<<body>>"
                )
            yield from _told(good, data, asked, f"{self.url}/{target}")


def _understood(request):
    target = request.split(b" ", 2)[1].decode("latin-1").removeprefix("/").partition("?")[0]
    found = re.search(rb"\r\nrange: bytes=(\d+)-(\d+)", request, re.IGNORECASE)
    return target, found and (int(found[1]), int(found[2]) + 1)


def _told(text, data, asked, url):
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
        b"url": url.encode("latin-1"),
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
            yield from _slow(itertools.cycle(before)) if slow else _again(before)
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


async def connected(mirror, host, port):
    """A connection to a mirror instead of the network."""
    if (host, port) != (HOST, PORT):
        raise httpcore.ConnectError("no such host") from socket.gaierror(-2, "unknown")
    await asyncio.sleep(0.001)
    return _Connection(mirror)


class _Connection(httpcore.AsyncNetworkStream):
    """One connection; slow parts come just before the client's timeout."""

    def __init__(self, mirror):
        self._mirror = mirror
        self._request = b""
        self._parts = deque()
        self._held = b""
        self._over = False

    async def write(self, buffer, **_):
        if self._over:
            raise httpcore.WriteError("broken")
        self._request += buffer
        while b"\r\n\r\n" in self._request:
            request, _, self._request = self._request.partition(b"\r\n\r\n")
            self._parts.append(self._mirror.answer(request))

    async def read(self, max_bytes, **bounds):
        timeout = bounds["timeout"]
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
        if self._mirror.sent > self._mirror.due + SLACK * self._mirror.answers:
            raise Hung("it reads on and on")
        await asyncio.sleep(len(data) / BYTES_A_SECOND)
        return data

    def _next(self):
        while self._parts:
            part = next(self._parts[0], None)
            if part is not None:
                return part
            self._parts.popleft()
        return "end" if self._over else "silence"

    async def aclose(self):
        self._over = True

    async def start_tls(self, *_, **__):
        raise httpcore.ConnectError("no TLS here")

    def get_extra_info(self, info):
        if info == "server_addr":
            return (HOST, PORT)
        return self._over if info == "is_readable" else None


class PlayedMirror(socketserver.ThreadingTCPServer):
    """The same on 127.0.0.1, where slow parts are less slow; `play` begins another script."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), _Player)
        self._files = files
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self._thread.join()

    def play(self, script):
        url = f"http://127.0.0.1:{self.server_address[1]}"
        self.mirror = Mirror(self._files, script, url)
        return self.mirror


class _Player(socketserver.StreamRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):
            while request := self._request():
                for part in self.server.mirror.answer(request):
                    if isinstance(part, bytes):
                        self.request.sendall(part)
                    elif not self._obeyed(part):
                        return

    def _request(self):
        lines = list(itertools.takewhile(lambda line: line.strip(), self.rfile))
        return b"".join(lines).rstrip()

    def _obeyed(self, mark):
        """Obey a mark; returns whether to continue."""
        if mark == "pause":
            # Only a client that has left ends it.
            self.request.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                return bool(self.request.recv(1, socket.MSG_PEEK))
            self.request.settimeout(None)
            return True
        if mark == "silence":
            self.rfile.read()
        elif mark == "reset":
            linger = struct.pack("ii", 1, 0)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return False
