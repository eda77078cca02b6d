"""Torrents made of folders, and their seeds: what somebody who publishes a checkpoint needs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from grokfetch.errors import StorageFailed, TorrentInvalid
from grokfetch.metainfo import parse_torrent
from grokfetch.swarm.session import Session, SwarmSettings, libtorrent

__all__ = ["Seeder", "make_torrent", "seed"]

_FLAGS = {"hybrid": 0, "v2": 32, "v1": 64}


def make_torrent(
    folder: Path,
    piece_length: int,
    *,
    version: Literal["hybrid", "v1", "v2"] = "hybrid",
    trackers: Sequence[str] = (),
) -> bytes:
    """The `.torrent` of a folder, reproducible: same files, same info hash.

    Args:
        folder: becomes the torrent's top folder.
        piece_length: bytes, a power of two from 16 KiB on.
        version: of BitTorrent.
        trackers: where peers can be asked for.

    Raises:
        OutOfReach: libtorrent is not installed.
        StorageFailed: the folder cannot be read, or holds no file.
    """
    lt = libtorrent()
    try:
        files = sorted(lt.list_files(str(folder)), key=lambda file: str(file.filename))
        made = lt.create_torrent(files, piece_length, _FLAGS[version])
        for tracker in trackers:
            made.add_tracker(tracker)
        lt.set_piece_hashes(made, str(folder.parent))
        return bytes(lt.bencode(made.generate()))
    except RuntimeError as error:
        raise StorageFailed(f"no torrent can be made of it: {error}", path=folder) from None


@dataclasses.dataclass(frozen=True, slots=True)
class Seeder:
    """A torrent being seeded.

    `port` is where it listens; `uploaded` tells the payload bytes sent so far.
    """

    port: int
    uploaded: Callable[[], int]


@contextlib.contextmanager
def seed(torrent: bytes, root: Path, settings: SwarmSettings | None = None) -> Iterator[Seeder]:
    """Share files, believed to be whole, until the block ends.

    Args:
        torrent: a `.torrent`.
        root: the folder that holds the torrent's top folder.
        settings: how to take part.

    Raises:
        OutOfReach: libtorrent is not installed.
        TorrentInvalid: it is no torrent.
    """
    lt = libtorrent()
    parse_torrent(torrent)
    with Session(settings or SwarmSettings()) as session:
        try:
            params = lt.load_torrent_buffer(torrent)
        except RuntimeError as error:
            raise TorrentInvalid(f"libtorrent refuses it: {error}") from None
        params.save_path = str(root)
        params.flags |= lt.torrent_flags.seed_mode
        handle = session.add(params)
        # Before that a peer would be turned away, and try again only seconds later.
        while not any(isinstance(alert, lt.torrent_checked_alert) for alert in session.alerts()):
            pass
        yield Seeder(session.port, lambda: int(handle.status().total_payload_upload))
