"""The interface between a fetch and what brings its pieces. Pure."""

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
    """What a source must bring: the pieces of `want`, into the files below `root`.

    The pieces of `have` are on the disk and proven; the source may share them and must not write
    them. It must neither fetch nor trust any others. `urgency`, from 7 down to 1, says which pieces
    are wanted earlier; pieces without one are in the middle. The pieces of `demand` come before all
    these, in its order, which changes while the source works; pieces that `demand` admits are
    brought as if they were in `want`, and if `demand.stays`, the source does not end.
    """

    torrent: TorrentFile
    layout: Layout
    root: Path
    have: frozenset[int]
    want: frozenset[int]
    urgency: Mapping[int, int] = dataclasses.field(default_factory=dict)
    demand: Demand = dataclasses.field(default_factory=Demand)


class PieceSource(Protocol):
    """Where metadata and pieces come from. It turns foreign exceptions into ours."""

    @property
    def info_hash(self) -> str:
        """The info hash of its torrent, 40 or 64 hexadecimal digits."""

    @property
    def magnet(self) -> str | None:
        """The magnet link it was made from, or None if it was made from something else."""

    def metadata(self) -> Generator[Traffic | Notice | TorrentFile, None, None]:
        """Look for the metadata: traffic at least every second, then the torrent, then the end.

        A v2 torrent comes again whenever more of its piece hashes have arrived, and the end comes
        once all have.
        """

    def download(self, order: Order) -> Generator[Arrived | Traffic | Notice, None, None]:
        """Bring pieces: traffic at least every second; ends when all of them have arrived.

        When it is closed, or has raised, nothing writes to the files any more.

        Raises:
            StorageFailed: the disk does not take them.
        """
