"""The seam between a fetch and the outside: what brings pieces, and how it says so. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Protocol

from grokfetch.events import Arrived, Notice, Traffic
from grokfetch.fetch.demand import Demand
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import TorrentFile

__all__ = ["Order", "PieceSource"]


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """What a source is to bring: the pieces of `want`, into the files below `root`.

    The pieces of `have` are on the disk and proven; the source may share them and must not write
    them. All others are neither to be fetched nor to be trusted. `urgency` says from 7 down to 1
    which pieces are wanted earlier; the others are in the middle. Those of `demand` come before all
    of them, in its order, which changes while the source is at work; what that admits is
    brought as if it stood in `want`, and where it stays the source does not end.
    """

    torrent: TorrentFile
    layout: Layout
    root: Path
    have: frozenset[int]
    want: frozenset[int]
    urgency: Mapping[int, int] = dataclasses.field(default_factory=dict)
    demand: Demand = dataclasses.field(default_factory=Demand)


class PieceSource(Protocol):
    """Where metadata and pieces come from. Foreign exceptions become ours inside."""

    @property
    def info_hash(self) -> str:
        """Of the torrent it is about, 40 or 64 hexadecimal digits."""

    @property
    def magnet(self) -> str | None:
        """The magnet link it was made from, None if it was another thing."""

    def metadata(self) -> Generator[Traffic | Notice | TorrentFile, None, None]:
        """Look for the metadata: traffic at least every second, then the torrent, then the end.

        A v2 torrent comes again whenever more of its piece hashes have, and the end once all have.
        """

    def download(self, order: Order) -> Generator[Arrived | Traffic | Notice, None, None]:
        """Bring pieces: traffic at least every second; ends when all of them have arrived.

        When it is closed, or has raised, nothing writes to the files any more.

        Raises:
            StorageFailed: the disk does not take them.
        """
