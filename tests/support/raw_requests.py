"""Gives a client's raw bytes to the server's protocol without a socket, in virtual time.

A client sends bytes and marks. `<<next>>` ends a packet. `<<length>>` stands for the number of
bytes of the body that follows, up to the next mark. `<<silence>>` is a pause longer than any
timeout. After `<<slowly>>` everything is sent byte by byte. `<<endless>>` repeats what comes before
it, back to the previous mark. `<<end>>` ends what is sent, `<<reset>>` breaks the connection. After
`<<deaf>>` the client reads no more, after `<<sips>>` it reads slowly.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import threading
from types import SimpleNamespace

from uvicorn.server import ServerState

from loader.inference.batching import Emission, Scored

SILENCE_S, SLOW_S = 400.0, 25.0
PACKET = 64 << 10
MOST_HELD = 4 * PACKET
"""Most bytes from a client that may be held before the application has asked for them."""

MOST_UNREAD = 2 * PACKET
"""Most bytes that may wait for a client that does not read when more of an answer is added."""

SIP = 16 << 10
"""Bytes that a client with `<<sips>>` reads each second."""

MOST_SIPS = 1000
"""How often such a client reads before it leaves."""

MOST_SILENCE_S = 200.0
"""How long a connection may stay open after the last bytes."""

MARKS = [
    f"<<{word}>>".encode()
    for word in (
        *("next", "length", "silence", "slowly", "endless", "end", "reset"),
        *("deaf", "sips"),
    )
]


def parts(text):
    """What a client does: bytes, pauses in seconds, "deaf", "sips", "end" or "reset"."""
    texts = re.split(rb"<<(next|silence|slowly|endless|end|reset|deaf|sips)>>", text)
    before, slow = b"", False
    for literal, mark in itertools.zip_longest(*[iter(texts)] * 2):
        part = _with_length(literal)
        if part:
            before = part
            yield from _slow(part) if slow else (part,)
        if mark == b"slowly":
            slow = True
        elif mark == b"silence":
            yield SILENCE_S
        elif mark == b"endless" and before:
            yield from _slow(itertools.cycle(before)) if slow else _again(before)
        elif mark in {b"deaf", b"sips"}:
            yield mark.decode()
        elif mark in {b"end", b"reset"}:
            yield mark.decode()
            return


def _with_length(text):
    _, _, body = text.partition(b"\r\n\r\n")
    return text.replace(b"<<length>>", b"%d" % len(body))


def _slow(part):
    for byte in part:
        yield bytes([byte])
        yield SLOW_S


def _again(part):
    # This is more than any buffer holds; a truly endless text would only take longer.
    return itertools.repeat(part * (1 + PACKET // len(part)), 1 + MOST_HELD // PACKET)


class Transport(asyncio.Transport):
    """Holds what the server writes, whether it wants to read, and how its client reads."""

    def __init__(self, protocol, loop):
        super().__init__()
        self._protocol = protocol
        self._loop = loop
        self.told = bytearray()
        self.reads = asyncio.Event()
        self.reads.set()
        self.closed = False
        self.reader = ""
        self._unread = bytearray()
        self._paused = self._lost = False
        self._sips = 0
        self.ended = asyncio.Event()

    def get_extra_info(self, name, default=None):
        addresses = {"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 80)}
        return addresses.get(name, default)

    def write(self, data):
        if self.closed:
            return
        if not self.reader:
            self.told += data
            return
        assert len(self._unread) <= MOST_UNREAD
        self._unread += data
        if len(self._unread) > PACKET and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self):
        return len(self._unread)

    def listen(self, reader):
        """Make the client "deaf" or one that "sips"; the first call decides."""
        if not self.reader:
            self.reader = reader
            if reader == "sips":
                self._sip()

    def _sip(self):
        self.told += self._unread[:SIP]
        del self._unread[:SIP]
        if len(self._unread) <= PACKET // 4 and self._paused:
            self._paused = False
            self._protocol.resume_writing()
        self._sips += 1
        if self._sips == MOST_SIPS:
            self.lose(ConnectionResetError(104, "reset by peer"))
        elif self.closed and not self._unread:
            self.lose(None)
        elif not self._lost:
            self._loop.call_later(1.0, self._sip)

    def close(self):
        self.closed = True
        self.reads.set()
        if not self._unread:
            self.lose(None)

    def abort(self):
        self.lose(None)

    def lose(self, error):
        if not self._lost:
            self.closed = self._lost = True
            self.reads.set()
            self.ended.set()
            self._loop.call_soon(self._protocol.connection_lost, error)

    async def end(self):
        """Wait for the connection to end; longer only if the client is still reading."""
        while not self._lost:
            before = len(self.told)
            try:
                async with asyncio.timeout(MOST_SILENCE_S):
                    await self.ended.wait()
            except TimeoutError:
                if self.reader != "sips" or len(self.told) == before:
                    raise

    @property
    def left(self):
        """Whether the client has left before it had read everything."""
        return self.reader == "deaf" or self._sips >= MOST_SIPS

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        self.reads.clear()

    def resume_reading(self):
        self.reads.set()


class Endpoint:
    """A server's protocol over an application.

    `left` is whether the latest client has left before it had read everything.
    """

    left = False

    def __init__(self, config, protocol):
        self._config = config
        self._protocol = protocol
        self.state = ServerState()

    async def converse(self, text):
        """Everything that is answered until the connection ends, as it must."""
        loop = asyncio.get_running_loop()
        protocol = self._protocol(self._config, self.state, {}, loop)
        transport = Transport(protocol, loop)
        protocol.connection_made(transport)
        for part in parts(text):
            if transport.closed:
                break
            if isinstance(part, float):
                await asyncio.sleep(part)
            elif part == "reset":
                transport.lose(ConnectionResetError(104, "reset by peer"))
            elif part == "end":
                if not protocol.eof_received():
                    transport.close()
            elif isinstance(part, str):
                transport.listen(part)
            else:
                while not transport.reads.is_set():
                    await transport.reads.wait()
                if not transport.closed:
                    protocol.data_received(part)
                    assert len(protocol.conn.trailing_data[0]) <= MOST_HELD
                await asyncio.sleep(0)
        await transport.end()
        async with asyncio.timeout(MOST_SILENCE_S):
            await asyncio.gather(*self.state.tasks)
        await asyncio.sleep(0)
        self.left = transport.left
        return bytes(transport.told)


LONG = 50
"""Tokens of a text that is long enough for a client to leave while it is generated."""


class Echo:
    """Stands for a batch: repeats the last token of a prompt; all tokens must be below `most`.

    Long texts take a while until `pauses` are used up. After `steps` steps each text ends with its
    next token, as at an end of text; otherwise requests without a limit would take minutes.
    """

    def __init__(self, most):
        self.jobs = {}
        self.prefix_cache = SimpleNamespace(hits=0, tokens=0, nbytes=0)
        self._most = most
        self._never = threading.Event()
        self.pauses = 0
        self.steps = math.inf

    @property
    def busy(self):
        return bool(self.jobs)

    @property
    def working(self):
        return len(self.jobs)

    def add(self, number, job):
        assert number not in self.jobs
        assert all(0 <= token < self._most for token in (*job.prompt, *job.penalties.bias))
        self.jobs[number] = [job, 0]

    def drop(self, number):
        self.jobs.pop(number, None)

    def reset(self):
        self.jobs.clear()

    def step(self):
        if self.pauses and any(job.max_tokens >= LONG for job, _ in self.jobs.values()):
            self.pauses -= 1
            self._never.wait(0.0005)
        self.steps -= 1
        return [self._next(number) for number in tuple(self.jobs)]

    def _next(self, number):
        job, count = self.jobs[number]
        self.jobs[number][1] = count = count + 1
        best = tuple((token, -1.0) for token in range(job.logprobs or 0))
        scored = Scored(job.prompt[-1], None if job.logprobs is None else -0.5, best)
        prompt = tuple(map(Scored, job.prompt)) if job.echo and count == 1 else ()
        reason = "length" if count >= job.max_tokens else "stop" if self.steps < 0 else None
        if reason is not None:
            del self.jobs[number]
        token = scored if job.max_tokens else None
        return Emission(number, prompt, token, reason)


def answers(told, methods, *, broken=False):
    """The responses in some bytes, as (status, headers, body); the last may be truncated.

    Args:
        told: what a server wrote.
        methods: of the requests that its application saw, in order.
        broken: whether its client left before it had read everything. The last response may then
            end within its headers, and is left out.
    """
    methods = iter(methods)
    while told:
        head, found, told = told.partition(b"\r\n\r\n")
        if broken and not found:
            return
        assert found, f"no headers: {head[:80]}"
        lines = head.split(b"\r\n")
        status = int(re.fullmatch(rb"HTTP/1\.1 (\d{3}) .*", lines[0])[1])
        if status < 200:
            continue
        headers = {}
        for line in lines[1:]:
            name, colon, value = line.partition(b": ")
            assert colon, line
            headers[name.lower()] = value
        body = b""
        if next(methods, b"GET") != "HEAD":
            body, told = _body(headers, told)
        yield status, headers, body


def _body(headers, told):
    if b"content-length" in headers:
        length = int(headers[b"content-length"])
        return told[:length], told[length:]
    if headers.get(b"transfer-encoding") != b"chunked":
        assert headers[b"connection"] == b"close"
        return told, b""
    body = b""
    while told:
        size, _, told = told.partition(b"\r\n")
        length = int(size or b"0", 16)
        body += told[:length]
        told = told[length + 2 :]
        if not length:
            break
    return body, told


def check_body(headers, body, *, head):
    """Check that a body has the given length, JSON is valid, and a stream of events ends right."""
    kind = headers.get(b"content-type", b"")
    if head:
        assert not body
        return
    assert headers.get(b"content-length", b"%d" % len(body)) == b"%d" % len(body)
    if kind == b"application/json":
        json.loads(body)
    elif kind.startswith(b"text/event-stream"):
        events = body.decode().removesuffix("\n\n").split("\n\n")
        assert all(event.startswith("data: ") for event in events)
        assert events[-1] == "data: [DONE]"
        for event in events[:-1]:
            json.loads(event.removeprefix("data: "))
