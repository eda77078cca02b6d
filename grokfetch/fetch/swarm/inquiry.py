"""The search for metadata: the info dictionary, and the v2 hashes beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from grokfetch.errors import TorrentInvalid
from grokfetch.events import Notice, Traffic
from grokfetch.fetch.swarm.session import WAIT_S, Session
from grokfetch.torrent.info_dictionary import parse_info, right_layers
from grokfetch.torrent.layout import BLOCK, power_of_two_above
from grokfetch.torrent.metainfo import TorrentFile, torrent_file

__all__ = ["PAD", "Inquiry", "complete"]

PAD = 1
"""libtorrent's flag for a pad file."""

FIRST_PAUSE_S, LAST_PAUSE_S = 0.005, 0.5
"""How long not to ask libtorrent for the metadata again: it does not tell when more hashes have
come. Each time without any the pause doubles, because an answer costs as much as the torrent is
large."""


class Inquiry:
    """The search for a torrent's metadata.

    Args:
        lt: libtorrent.
        session: where the torrent was added.
        handle: libtorrent's, of the torrent.
    """

    def __init__(self, lt: Any, session: Session, handle: Any) -> None:
        self._lt = lt
        self._session = session
        self._handle = handle
        self._asked = False
        self._pause = FIRST_PAUSE_S
        self._ask_at = 0.0

    def run(self) -> Iterator[Traffic | Notice | TorrentFile]:
        """Traffic, and the torrent; this again whenever more hashes come, until all have."""
        handed_out: TorrentFile | None = None
        wait_s = WAIT_S
        while True:
            for alert in self._session.alerts(wait_s):
                if isinstance(alert, self._lt.save_resume_data_alert):
                    torrent = self._torrent(alert.params)
                    self._answered(new=torrent != handed_out)
                    if torrent != handed_out:
                        yield torrent
                    handed_out = torrent
                    if complete(torrent):
                        return
                elif isinstance(alert, self._lt.save_resume_data_failed_alert):
                    self._answered(new=False)
                elif isinstance(alert, self._lt.metadata_failed_alert):
                    yield Notice("a peer sent metadata that is not the torrent's")
            status = self._handle.status()
            wait_s = self._ask() if status.has_metadata and not self._asked else WAIT_S
            yield Traffic(0, 0.0, status.num_peers)

    def _ask(self) -> float:
        """Ask if it is time, and return how many seconds there is nothing else to do."""
        pause = self._ask_at - time.monotonic()
        if pause > 0:
            return min(pause, WAIT_S)
        self._handle.save_resume_data(self._lt.torrent_handle.save_info_dict)
        self._asked = True
        return WAIT_S

    def _answered(self, *, new: bool) -> None:
        self._asked = False
        self._pause = FIRST_PAUSE_S if new else min(2 * self._pause, LAST_PAUSE_S)
        self._ask_at = time.monotonic() + self._pause

    def _torrent(self, params: Any) -> TorrentFile:
        """The metadata, with the link's trackers and web seeds, and the v2 hashes so far.

        A hybrid torrent is fetched by its v1 hashes, because peers of its v1 swarm send no others;
        either all of its piece layers are kept, or none.
        """
        info, files = params.ti.info_section(), params.ti.layout()
        layers = right_layers(info, self._layers(params, files))
        large = (
            files.file_size(index) > params.ti.piece_length()
            for index in range(files.num_files())
            if not files.file_flags(index) & PAD
        )
        if params.info_hashes.has_v1() and len(layers) < sum(large):
            layers = {}
        return torrent_file(info, layers, trackers=params.trackers, web_seeds=params.url_seeds)

    def _layers(self, params: Any, files: Any) -> dict[bytes, bytes]:
        """The complete piece layers, by the root of their file.

        libtorrent asks for them once it has the info dictionary, and writes a torrent only when it
        has all; before that, its resume data has the hash trees, with a mask of the hashes it has.
        """
        layers = {}
        length = params.ti.piece_length()
        trees = self._lt.write_resume_data(params).get(b"trees", [])
        for index, tree in enumerate(trees):
            size, hashes = files.file_size(index), tree[b"hashes"]
            if size <= length or not hashes:
                continue
            # The root is node 0; the hashes of the pieces are in one row.
            width = power_of_two_above(-(-size // BLOCK)) * BLOCK // length
            mask = tree.get(b"mask", bytes([255]) * (len(hashes) // 32 // 8 + 1))
            have = "".join(f"{byte:08b}" for byte in mask)
            start, stop = width - 1, width - 1 + -(-size // length)
            if "0" not in have[start:stop]:
                first = have.count("1", 0, start) * 32
                layers[files.root(index).to_bytes()] = hashes[first : first + 32 * (stop - start)]
        return layers


def complete(torrent: TorrentFile) -> bool:
    """Whether no piece hash is missing; also true of a torrent invalid for other reasons."""
    try:
        return not parse_info(torrent.info, torrent.piece_layers).unprovable
    except TorrentInvalid:
        return True
