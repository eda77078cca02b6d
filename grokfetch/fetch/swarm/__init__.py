"""The BitTorrent swarm as a `PieceSource`, and seeds and torrents for others.

Only this package imports libtorrent, and only when a swarm is joined. libtorrent 2.1 is not simply
trusted: a finished piece is reported only after the cache was flushed, its own check of files and
resume data is never used, and its layout of a torrent must equal ours.
"""

from __future__ import annotations

from grokfetch.fetch.swarm.download import Swarm
from grokfetch.fetch.swarm.seeding import Seeder, Shared, seed
from grokfetch.fetch.swarm.session import Proxy, SwarmSettings

__all__ = ["Proxy", "Seeder", "Shared", "Swarm", "SwarmSettings", "seed"]
