"""`PieceSource` over libtorrent: metadata from peers, pieces that are on disk when reported."""

from __future__ import annotations

import dataclasses
import errno
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from grokfetch.errors import GrokfetchError, Stalled, StorageFailed, TorrentInvalid, storage_failed
from grokfetch.events import Arrived, Notice, Traffic
from grokfetch.fetch.source import Order
from grokfetch.fetch.swarm.fan_out import FanOut
from grokfetch.fetch.swarm.inquiry import PAD, Inquiry, complete
from grokfetch.fetch.swarm.session import Session, SwarmSettings, address, libtorrent
from grokfetch.fetch.swarm.tally import Tally
from grokfetch.fetch.swarm.urgent import Urgent, priority
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.magnet import Magnet
from grokfetch.torrent.metainfo import TorrentFile, encode_torrent

__all__ = ["Swarm", "file_error", "paths_by_index"]

FLUSH_INTERVAL_S = 0.05
"""How often finished pieces are flushed, so that they can be read back; a kill loses the rest."""

TRAFFIC_INTERVAL_S = 0.5

GIVE_UP_S = 20.0
"""After so long without a byte, peers that a session has banned are tried once more."""

NOWHERE = "/dev/null/nowhere"
"""A place where nothing can be written, not even by root."""


class Swarm:
    """Pieces and metadata from BitTorrent peers. libtorrent is imported when it is needed.

    Args:
        origin: a magnet link, or a torrent whose metadata is known.
        settings: how to take part.

    Raises:
        SourceInvalid: a peer of the settings or the link is not HOST:PORT.
    """

    def __init__(self, origin: Magnet | TorrentFile, settings: SwarmSettings | None = None) -> None:
        self._origin = origin
        self._settings = settings or SwarmSettings()
        named = origin.peers if isinstance(origin, Magnet) else ()
        self._peers = [address(peer) for peer in (*self._settings.peers, *named)]
        self._tally = Tally()

    @property
    def info_hash(self) -> str:
        """Of the torrent, 40 or 64 hexadecimal digits."""
        return self._origin.info_hash

    @property
    def magnet(self) -> str | None:
        """The magnet link, None if the swarm was made from a torrent."""
        return self._origin.text if isinstance(self._origin, Magnet) else None

    def metadata(self) -> Generator[Traffic | Notice | TorrentFile, None, None]:
        """Ask peers for the metadata; a known torrent is returned at once.

        A v2 torrent is returned again whenever more piece hashes have come.

        Raises:
            OutOfReach: libtorrent is not installed.
            Stalled: no peer is known, and there is no way to find any.
            TorrentInvalid: libtorrent refuses the magnet link.
        """
        if isinstance(self._origin, TorrentFile):
            yield self._origin
            if complete(self._origin):
                return
        lt = libtorrent()
        self._refuse_without_peers(
            "metadata", self._origin.trackers, "give the .torrent, as SOURCE"
        )
        with Session(self._settings) as session:
            handle = session.add(self._metadata_params(lt, self._origin), self._peers)
            try:
                yield from Inquiry(lt, session, handle).run()
            finally:
                # Their addresses save the download another search.
                self._peers = list(dict.fromkeys((*self._peers, *_callable_peers(lt, handle))))

    def _metadata_params(self, lt: Any, origin: Magnet | TorrentFile) -> Any:
        try:
            if isinstance(origin, Magnet):
                params = lt.parse_magnet_uri(origin.text)
            else:
                params = lt.load_torrent_buffer(encode_torrent(origin))
        except RuntimeError as error:
            raise TorrentInvalid(f"libtorrent refuses the magnet link: {error}") from None
        params.save_path = NOWHERE
        params.flags |= lt.torrent_flags.default_dont_download | lt.torrent_flags.no_verify_files
        return params

    def download(self, order: Order) -> Generator[Arrived | Traffic | Notice, None, None]:
        """Bring the wanted pieces; each is flushed before it is reported as arrived.

        Raises:
            OutOfReach: libtorrent is not installed.
            Stalled: no peer is known, and there is no way to find any.
            StorageFailed: the disk does not take them.
            TorrentInvalid: libtorrent reads the torrent differently than we do.
        """
        lt = libtorrent()
        peers, received, once_more = self._peers, 0, True
        self._tally.begin()
        yield from self._until_wanted(order, (*order.torrent.trackers, *self._origin.trackers))
        while order.want or order.demand.stays:
            with Session(self._settings) as session:
                params = self._download_params(lt, order)
                trackers = (*order.torrent.trackers, *self._origin.trackers)
                self._refuse_without_peers("data", trackers, "name a mirror: --web-seed URL")
                handle = session.add(params, peers, order.root)
                download = _Download(lt, session, handle, order, self._tally)
                yield from download.run(received, gives_up=once_more)
            arrived = download.arrived
            order = dataclasses.replace(order, have=order.have | arrived, want=download.left)
            peers = [*dict.fromkeys((*peers, *download.banned))]
            received, once_more = download.received, bool(arrived)

    def _until_wanted(self, order: Order, trackers: Sequence[str]) -> Iterator[Traffic]:
        """If no peer can be found, wait until that matters: until something must be brought."""
        rung = threading.Event()
        alone = not self._peers and not self._settings.finds_peers(trackers)
        idle = order.demand.stays and alone
        with order.demand.bell(rung.set):
            while idle and not order.want and order.demand.admitted <= order.have:
                yield Traffic(0, 0.0, 0)
                rung.wait(TRAFFIC_INTERVAL_S)
                rung.clear()

    def _refuse_without_peers(self, what: str, trackers: Sequence[str], otherwise: str) -> None:
        if not self._peers and not self._settings.finds_peers(trackers):
            raise Stalled(
                f"no {what}: no peer is known, and there is no way to find any",
                hint=f"name one: --peer HOST:PORT, or {otherwise}",
            )

    def _download_params(self, lt: Any, order: Order) -> Any:
        try:
            params = lt.load_torrent_buffer(encode_torrent(order.torrent))
        except RuntimeError as error:
            raise TorrentInvalid(f"libtorrent refuses it: {error}") from None
        pieces = range(order.layout.piece_count)
        # Together these say: what is proven is there, nothing else is, and read no file.
        params.have_pieces = [piece in order.have for piece in pieces]
        params.flags |= lt.torrent_flags.no_verify_files
        params.piece_priorities = [
            priority(order.urgency.get(piece, 4)) if piece in order.want else 0 for piece in pieces
        ]
        params.renamed_files = paths_by_index(params.ti, order.layout)
        # `mirror` handles web seeds; otherwise their pieces would be fetched twice.
        params.url_seeds = []
        if isinstance(self._origin, Magnet):
            params.trackers = list(dict.fromkeys((*params.trackers, *self._origin.trackers)))
        return params


class _Download:
    """One order under way in one session.

    A session does not forget which peers it has banned. If a piece had blocks from a liar and from
    others, it cannot always tell whose were wrong, and may be left without a good peer: then it
    gives up, and a new session tries all peers once more.

    Attributes:
        received: payload bytes since the order, including earlier sessions.
        arrived: pieces that have arrived.
        banned: addresses of banned peers.
    """

    def __init__(self, lt: Any, session: Session, handle: Any, order: Order, tally: Tally) -> None:
        self._lt = lt
        self._session = session
        self._handle = handle
        self._order = order
        self._tally = tally
        self._before = self.received = 0
        self._moved_at = time.monotonic()
        self.banned: list[tuple[str, int]] = []
        self._left = set(order.want)
        self._known = order.want | order.have
        self.arrived: frozenset[int] = frozenset()
        self._finished: set[int] = set()
        self._flushing: set[int] = set()
        self._flush_at = 0.0
        self._traffic_at = 0.0
        self._fan_out = FanOut(session, handle, order, Urgent(session, handle, order))

    @property
    def left(self) -> frozenset[int]:
        """The wanted pieces that have not arrived."""
        return frozenset(self._left)

    def run(self, received: int, *, gives_up: bool) -> Iterator[Arrived | Traffic | Notice]:
        """Bring what is left.

        Args:
            received: payload bytes in earlier sessions of the same order.
            gives_up: whether to end early when banned peers should get another chance.
        """
        self._before = self.received = received
        with self._order.demand.bell(self._session.wake):
            yield from self._bring(gives_up=gives_up)
        yield self._traffic()

    def _bring(self, *, gives_up: bool) -> Iterator[Arrived | Traffic | Notice]:
        demand, version = self._order.demand, 0
        while self._left or demand.stays:
            if demand.stays and demand.version != version:
                # The caller must learn of it before anything can be done.
                version, self._traffic_at = demand.version, 0.0
            new = demand.admitted - self._known
            if new:
                self._known |= new
                self._left |= new
            self._fan_out.heed(self._left, self._finished | self._flushing)
            for alert in self._session.alerts():
                yield from self._take(alert)
            now = time.monotonic()
            due = (
                now >= self._flush_at
                or len(self._finished) == len(self._left)
                or not self._finished.isdisjoint(demand.waited)
            )
            if self._finished and not self._flushing and due:
                self._flush_at = now + FLUSH_INTERVAL_S
                self._flushing, self._finished = self._finished, set()
                self._handle.flush_cache()
            if now >= self._traffic_at:
                self._traffic_at = now + TRAFFIC_INTERVAL_S
                yield self._traffic()
                if gives_up and self.banned and now - self._moved_at > GIVE_UP_S:
                    yield Notice("nothing comes any more; banned peers get another chance")
                    return

    def _traffic(self) -> Traffic:
        status = self._handle.status()
        if status.is_finished and not self._finished and not self._flushing:
            # An alert may have been dropped when the queue was full.
            had = self._handle.status(self._lt.torrent_handle.query_pieces).pieces
            self._finished = {piece for piece in self._left if had[piece]}
        received = self._before + status.total_payload_download
        if received > self.received:
            self.received, self._moved_at = received, time.monotonic()
        self._fan_out.look(status.total_payload_download, self._finished | self._flushing)
        self._tally.look((peer.ip, peer.total_download) for peer in self._handle.get_peer_info())
        return Traffic(
            received,
            float(status.download_payload_rate),
            status.num_peers,
            self._tally.sent(received),
        )

    def _take(self, alert: Any) -> Iterator[Arrived | Notice]:
        lt = self._lt
        if isinstance(alert, lt.piece_finished_alert):
            # It comes for the pieces of `have`, too.
            piece = alert.piece_index
            if piece in self._left and piece not in self._flushing:
                self._finished.add(piece)
        elif isinstance(alert, lt.cache_flushed_alert):
            arrived, self._flushing = self._flushing, set()
            self._left -= arrived
            self.arrived |= arrived
            if arrived:
                yield Arrived(tuple(sorted(arrived)))
        elif isinstance(alert, lt.hash_failed_alert):
            yield Notice(f"piece {alert.piece_index} came with a wrong hash and is asked for again")
        elif isinstance(alert, lt.peer_ban_alert):
            self.banned.append(alert.endpoint)
            yield Notice(f"peer {alert.endpoint[0]}:{alert.endpoint[1]} is banned for bad data")
        elif isinstance(alert, lt.file_error_alert):
            raise file_error(alert)
        elif isinstance(alert, lt.torrent_error_alert):
            raise StorageFailed(alert.message(), path=self._order.root)


def _callable_peers(lt: Any, handle: Any) -> list[tuple[str, int]]:
    """The addresses of peers to which we opened the connection."""
    ours = lt.peer_info.outgoing_connection
    return [peer.ip for peer in handle.get_peer_info() if peer.flags & ours]


def paths_by_index(theirs: Any, ours: Layout) -> dict[int, str]:
    """Where libtorrent must put each of its files so that they are where our layout has them.

    By default libtorrent removes formatting and control characters from names, truncates parts of
    more than 240 bytes, and renames files whose names differ only in case; this last change shows
    only after the torrent was added. So files are matched by order, size and start, never by name,
    and each is given its path.

    Args:
        theirs: libtorrent's `torrent_info`.
        ours: the layout of the same torrent.

    Returns:
        Path by libtorrent's index, without pads.

    Raises:
        TorrentInvalid: libtorrent sees other files or pieces than we do.
    """
    files = theirs.layout()
    indices = [i for i in range(files.num_files()) if not files.file_flags(i) & PAD]
    same = len(indices) == len(ours.payload) and all(
        files.file_size(index) == file.size
        and (files.file_offset(index) == file.start or not file.size)
        for index, file in zip(indices, ours.payload, strict=True)
    )
    pieces = (theirs.piece_length(), theirs.num_pieces())
    if not same or pieces != (ours.piece_length, ours.piece_count):
        raise TorrentInvalid("libtorrent would lay its files down otherwise than we read them")
    return {index: str(file.path) for index, file in zip(indices, ours.payload, strict=True)}


def file_error(alert: Any) -> GrokfetchError:
    """Our error for an alert about a file."""
    number = alert.error.value()
    path = Path(alert.filename())
    if number in errno.errorcode:
        return storage_failed(OSError(number, alert.error.message()), path)
    return StorageFailed(alert.error.message(), path=path)
