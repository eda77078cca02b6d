"""Seeds: sharing the proven pieces of a folder with others."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from grokfetch.errors import TorrentInvalid
from grokfetch.fetch.swarm.download import file_error, paths_by_index
from grokfetch.fetch.swarm.session import Session, SwarmSettings, address, libtorrent
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import parse_torrent

__all__ = ["Seeder", "Shared", "seed"]


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """How a seed is doing: payload bytes sent so far, bytes a second now, peers."""

    uploaded: int
    rate: float
    peers: int


class Seeder:
    """A torrent being seeded, made by `seed`.

    Attributes:
        port: where it listens.
        handle: libtorrent's, of the torrent.
    """

    def __init__(self, session: Session, handle: Any) -> None:
        self._session = session
        self.handle = handle
        self.port = session.port

    def uploaded(self) -> int:
        """The payload bytes sent so far."""
        return int(self.handle.status().total_payload_upload)

    def wait(self) -> Shared:
        """How it is doing, after waiting for something to happen, but not for long.

        Raises:
            StorageFailed: a file cannot be read any more.
        """
        lt = libtorrent()
        for alert in self._session.alerts():
            if isinstance(alert, lt.file_error_alert):
                raise file_error(alert)
        status = self.handle.status()
        return Shared(
            int(status.total_payload_upload), float(status.upload_payload_rate), status.num_peers
        )


@contextlib.contextmanager
def seed(
    torrent: bytes,
    root: Path,
    settings: SwarmSettings | None = None,
    have: Collection[int] | None = None,
    layout: Layout | None = None,
) -> Iterator[Seeder]:
    """Share files until the block ends.

    Args:
        torrent: a `.torrent`.
        root: the folder that holds the torrent's top folder.
        settings: how to take part.
        have: the pieces to share, known to be right. By default all are assumed to be there, and
            libtorrent hashes each one before it first sends it.
        layout: where the files are, if not all are where the torrent says.

    Raises:
        OutOfReach: libtorrent is not installed.
        SourceInvalid: a peer of the settings is not HOST:PORT.
        TorrentInvalid: it is not a torrent, or its files cannot be stored.
    """
    lt = libtorrent()
    known = parse_torrent(torrent)
    layout = layout or parse_info(known.info, known.piece_layers)
    settings = settings or SwarmSettings()
    peers = [address(peer) for peer in settings.peers]
    with Session(settings) as session:
        try:
            params = lt.load_torrent_buffer(torrent)
        except RuntimeError as error:
            raise TorrentInvalid(f"libtorrent refuses it: {error}") from None
        params.renamed_files = paths_by_index(params.ti, layout)
        count = params.ti.num_pieces()
        if have is None or len(have) == count:
            params.flags |= lt.torrent_flags.seed_mode
        else:
            # Missing pieces are neither looked for on the disk nor asked for.
            params.have_pieces = [piece in have for piece in range(count)]
            params.piece_priorities = [0] * count
            params.flags |= lt.torrent_flags.no_verify_files | lt.torrent_flags.upload_mode
        handle = session.add(params, peers, root)
        # Before that a peer would be refused, and would try again only seconds later.
        while not any(isinstance(alert, lt.torrent_checked_alert) for alert in session.alerts()):
            pass
        yield Seeder(session, handle)
