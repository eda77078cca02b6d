"""The seam between a fetch and the outside: what brings pieces, and how it says so. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Literal, Protocol

from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import TorrentFile

__all__ = ["Arrived", "Notice", "Order", "Origin", "PieceSource", "Traffic"]


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """What a source is to bring: the pieces of `want`, into the files below `root`.

    The pieces of `have` are on the disk and proven; the source may share them and must not write
    them. All others are neither to be fetched nor to be trusted. `urgency` says from 7 down to 1
    which pieces are wanted earlier; the others are in the middle.
    """

    torrent: TorrentFile
    layout: Layout
    root: Path
    have: frozenset[int]
    want: frozenset[int]
    urgency: Mapping[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Arrived:
    """Pieces that are on the disk now, flushed so that any process reads them."""

    pieces: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Who sends bytes: a peer by its address, or a mirror by its address for people.

    An empty name stands for those that are not told apart.
    """

    kind: Literal["peer", "mirror"]
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """How the source is doing: payload bytes received since the order, bytes a second, peers.

    `sent` is who has sent how many payload bytes since the source was made, over all orders.
    """

    received: int
    rate: float
    peers: int
    sent: Mapping[Origin, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Notice:
    """Something about the source that a person may want to know: a peer banned for bad data."""

    text: str


class PieceSource(Protocol):
    """Where metadata and pieces come from. Foreign exceptions become ours inside."""

    @property
    def info_hash(self) -> str:
        """Of the torrent it is about, 40 or 64 hexadecimal digits."""

    @property
    def magnet(self) -> str | None:
        """The magnet link it was made from, None if it was another thing."""

    def metadata(self) -> Generator[Traffic | Notice | TorrentFile, None, None]:
        """Look for the metadata: traffic at least every second, then the torrent, then the end."""

    def download(self, order: Order) -> Generator[Arrived | Traffic | Notice, None, None]:
        """Bring pieces: traffic at least every second; ends when all of them have arrived.

        When it is closed, or has raised, nothing writes to the files any more.

        Raises:
            StorageFailed: the disk does not take them.
        """
