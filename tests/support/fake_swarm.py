"""A `PieceSource` in memory: a swarm that can drop, stall, corrupt and fail on command."""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from grokfetch.errors import StorageFailed
from grokfetch.events import Arrived, Notice, Origin, Traffic
from grokfetch.fetch.source import Order
from grokfetch.torrent.metainfo import TorrentFile

PEER = Origin("peer", "192.0.2.1")


class TickingClock:
    """A clock for a fetch; a swarm calls `tick` to let a second pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def tick(self):
        self.now += 1.0


@dataclasses.dataclass
class FakeSwarm:
    """Holds a torrent and its content; writes pieces as a torrent client does.

    `corrupt` says for each piece how many more times to write it wrong. After `die_after` pieces
    the process dies: half of the next piece is written, and `Killed` is raised. After `stall_after`
    pieces nothing more comes, and `tick` is called in each iteration. After `full_after` pieces the
    disk is full.
    """

    torrent: TorrentFile
    files: dict[str, bytes]
    magnet: str | None = None
    asked: str | None = None
    corrupt: dict[int, int] = dataclasses.field(default_factory=dict)
    die_after: int | None = None
    stall_after: int | None = None
    full_after: int | None = None
    no_metadata: bool = False
    tick: Callable[[], None] = lambda: None
    on_close: Callable[[], None] = lambda: None
    orders: list[Order] = dataclasses.field(default_factory=list)
    metadata_asked: int = 0
    closed: int = 0
    sent: int = 0

    @property
    def info_hash(self) -> str:
        return self.asked or self.torrent.info_hash

    @property
    def fetched(self) -> list[int]:
        return [piece for order in self.orders for piece in sorted(order.want)]

    def metadata(self) -> Iterator[Traffic | Notice | TorrentFile]:
        self.metadata_asked += 1
        while self.no_metadata:
            self.tick()
            yield Traffic(0, 0.0, 0)
        yield Traffic(0, 0.0, 1)
        yield self.torrent

    def download(self, order: Order) -> Iterator[Arrived | Traffic | Notice]:
        self.orders.append(order)
        try:
            received = count = 0
            left = sorted(order.want)
            while left:
                if count == self.full_after:
                    raise StorageFailed("the disk is full")
                while count == self.stall_after:
                    self.tick()
                    yield Traffic(received, 0.0, 1)
                piece = self._next(order, left)
                left.remove(piece)
                self._write(order, piece, half=count == self.die_after)
                if count == self.die_after:
                    raise Killed
                received += order.layout.piece_size(piece)
                self.sent += order.layout.piece_size(piece)
                yield Arrived((piece,))
                yield Traffic(received, 1.0, 1, {PEER: self.sent})
                count += 1
        finally:
            self.on_close()
            self.closed += 1

    def _next(self, order: Order, left: list[int]) -> int:
        """The piece to bring next."""
        urgent = (*order.demand.waited, *order.demand.ahead)
        return next((piece for piece in urgent if piece in left), left[0])

    def _write(self, order: Order, piece: int, *, half: bool) -> None:
        for part in order.layout.segments(piece):
            if part.file.pad:
                continue
            data = self.files[str(part.file.name.relative_to(order.layout.name))]
            data = data[part.offset : part.offset + part.length]
            if half:
                data = data[: len(data) // 2]
            if self.corrupt.get(piece, 0):
                data = bytes(byte ^ 255 for byte in data)
            write_at(order.root / part.file.path, part.offset, data)
        if self.corrupt.get(piece, 0):
            self.corrupt[piece] -= 1


class Killed(BaseException):
    """Stands for SIGKILL: none of our code may run after it."""


def write_at(path: Path, offset: int, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.seek(offset)
        file.write(data)


class NoPeers:
    """A swarm without peers."""

    magnet = None

    def __init__(self, torrent):
        self.torrent = torrent
        self.info_hash = torrent.info_hash
        self.orders = []
        self.never = threading.Event()

    def metadata(self):
        yield self.torrent

    def download(self, order):
        self.orders.append(order)
        while True:
            # A real swarm waits for something to happen, too.
            self.never.wait(0.01)
            yield Traffic(0, 0.0, 0)


class Elsewhere(NoPeers):
    """A swarm that transfers something, but nothing that was asked for."""

    def download(self, order):
        self.orders.append(order)
        for turn in itertools.count():
            self.never.wait(0.01)
            yield Traffic(turn * 10_000, 1e6, 1)
