"""What the fetch benchmarks share: random data, torrents, a loopback tracker, measured children."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from grokfetch.torrent.bencode import encode

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a child process took: seconds, processor seconds, peak anonymous memory in bytes."""

    wall_s: float
    cpu_s: float
    peak_anonymous: int


def write_payload(folder: Path, size: int) -> None:
    """Eight files of random bytes, `size` in all."""
    folder.mkdir(parents=True)
    for index in range(8):
        with folder.joinpath(f"part{index}").open("wb") as file:
            left = size // 8
            while left:
                left -= file.write(os.urandom(min(left, 16 * MIB)))
    os.sync()


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def tracker(peers: Callable[[], Sequence[int]]) -> Iterator[str]:
    """A tracker on loopback that names the given ports; yields its announce address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            compact = b"".join(
                socket.inet_aton("127.0.0.1") + port.to_bytes(2, "big") for port in peers()
            )
            answer = encode({b"interval": 5, b"min interval": 1, b"peers": compact})
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/announce"
    finally:
        server.shutdown()
        server.server_close()


def torrent_of(folder: Path, piece_length: int, announce: str) -> bytes:
    """A v1 torrent, which every client reads."""
    hashes, piece = bytearray(), bytearray()
    paths = sorted(folder.iterdir())
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(piece_length - len(piece)):
                piece += block
                if len(piece) == piece_length:
                    hashes += hashlib.sha1(piece).digest()
                    piece.clear()
    if piece:
        hashes += hashlib.sha1(piece).digest()
    info = {
        b"name": folder.name.encode(),
        b"piece length": piece_length,
        b"pieces": bytes(hashes),
        b"files": [
            {b"length": path.stat().st_size, b"path": [path.name.encode()]} for path in paths
        ],
    }
    return encode({b"announce": announce.encode(), b"info": info})


def measure(
    command: Sequence[str | Path],
    *,
    done: Callable[[], bool] | None = None,
    timeout_s: float = 600,
    environment: dict[str, str] | None = None,
) -> Usage | None:
    """Run a command until it exits, or until `done`; None if it failed or took too long."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    child = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    peak, finished = 0, False
    while child.poll() is None and not finished:
        peak = max(peak, _anonymous(child.pid))
        finished = done is not None and done()
        if time.perf_counter() - start > timeout_s:
            break
        time.sleep(0.02)
    wall = time.perf_counter() - start
    cpu = _cpu(child.pid)
    if child.poll() is None:
        child.terminate()
    child.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if cpu is None:
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ended_well = finished or (done is None and child.returncode == 0)
    return Usage(wall, cpu, peak) if ended_well else None


def _cpu(pid: int) -> float | None:
    """Processor seconds of a process that still runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def installed(program: str) -> bool:
    """Whether a peer is there; says so if it is not."""
    if shutil.which(program):
        return True
    print(f"{program} is not installed and is left out")
    return False
