"""Mirrors that limit, truncate every response, or hold many small files: requests and seconds.

Run: python benchmarks/mirrors.py. Each server runs in a separate process on loopback. A fetch has
no other source, except in the last rows, where the same small files come from a peer.

- plain: answers everything.
- limiting: five requests per second; all others get 429 with Retry-After: 1.
- cutting: closes the connection after half of every response.
- small files: 12,000 files of 1 to 4 KB, with one request each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import unquote

from download import seeding
from payload import MIB, measure, torrent_of, write_payload

ALONE = ("--listen", "127.0.0.1:0", "--no-discovery", "--timeout", "120")
A_SECOND = 5
"""Requests a second that the limiting server answers."""


class Server:
    """Files over HTTP/1.1 with ranges and open connections, well-behaved or not."""

    def __init__(self, root: Path, manner: str) -> None:
        self.root, self.manner = root, manner
        self.requests = self.refused = 0
        self._window, self._answered = 0.0, 0

    async def run(self, port: Connection) -> None:
        """Serve until the other end of the pipe asks for the counts."""
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        async with server:
            port.send(server.sockets[0].getsockname()[1])
            await asyncio.get_running_loop().run_in_executor(None, port.recv)
            port.send((self.requests, self.refused))

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while await self._answer((await reader.readuntil(b"\r\n\r\n")).decode(), writer):
                await writer.drain()

    async def _answer(self, request: str, writer: asyncio.StreamWriter) -> bool:
        self.requests += 1
        if self.manner == "limiting" and not self._allowed():
            self.refused += 1
            writer.write(b"HTTP/1.1 429 x\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
            return True
        data = (self.root / unquote(request.split()[1].lstrip("/"))).read_bytes()
        found = re.search(r"(?i)range: bytes=(\d+)-(\d+)", request)
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(data))
        body = memoryview(data)[start:stop]
        head = f"Content-Length: {len(body)}\r\nContent-Range: bytes {start}-{stop - 1}/{len(data)}"
        writer.write(f"HTTP/1.1 206 x\r\n{head}\r\n\r\n".encode())
        if self.manner == "cutting":
            body = body[: (len(body) + 1) // 2]
        for at in range(0, len(body), MIB):
            writer.write(body[at : at + MIB])
            await writer.drain()
        return self.manner != "cutting"

    def _allowed(self) -> bool:
        now = time.monotonic()
        if now - self._window >= 1:
            self._window, self._answered = now, 0
        self._answered += 1
        return self._answered <= A_SECOND


def serve(root: Path, manner: str, pipe: Connection) -> None:
    """A server in a process of its own."""
    asyncio.run(Server(root, manner).run(pipe))


@contextlib.contextmanager
def server(root: Path, manner: str) -> Iterator[tuple[int, Connection]]:
    """A running server: its port, and the pipe that tells how many requests it had."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(root, manner, theirs))
    process.start()
    yield ours.recv(), ours
    process.join(10)


def fetch(torrent: Path, folder: Path, *source: str) -> float:
    """Seconds that a whole fetch takes."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "grokfetch", "fetch", torrent, "--to", folder, *ALONE]
    if measure([*command, *source], timeout_s=600) is None:
        print("the fetch has failed")
    return time.perf_counter() - start


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mb", type=int, default=81)
    options.add_argument("--files", type=int, default=12_000)
    options.add_argument("rows", nargs="*", default=["plain", "limiting", "cutting", "small files"])
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="grokfetch-bench-") as name:
        root = Path(name)
        write_payload(root / "large/payload", chosen.mb * 1_000_000 // 8 * 8)
        for number in range(chosen.files):
            path = root / f"small/payload/{number:05}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(number.to_bytes(4, "big") * (256 + number % 768))
        print("| source | requests | refused | seconds |\n| --- | --- | --- | --- |")
        for row in chosen.rows:
            payload = root / ("small" if row == "small files" else "large")
            torrent = root / "it.torrent"
            torrent.write_bytes(torrent_of(payload / "payload", MIB, "http://127.0.0.1:1/"))
            with server(payload, row) as (port, pipe):
                url = f"http://127.0.0.1:{port}/"
                seconds = fetch(torrent, root / row, "--no-trackers", "--web-seed", url)
                pipe.send(None)
                requests, refused = pipe.recv()
            print(f"| {row} | {requests} | {refused} | {seconds:.1f} |", flush=True)
            if row == "small files":
                with seeding(torrent, root / "small") as port:
                    peer = fetch(torrent, root / "peer", "--peer", f"127.0.0.1:{port}")
                print(f"| the same from a peer | | | {peer:.1f} |")
                print(f"| small files over the same from a peer | | | {seconds / peer:.2f} times |")


if __name__ == "__main__":
    main()
