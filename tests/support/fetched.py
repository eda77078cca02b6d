"""A small torrent of four files, fetched from a swarm in memory, and the result."""

from pathlib import PurePosixPath

from grokfetch.events import Outcome, Summary
from grokfetch.fetch import fetch
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.torrent.metainfo import parse_torrent
from support.torrents import content, v1_torrent, v2_torrent

PIECE = 32768
FILES = {"a": content(3 * PIECE - 100), "b": content(1000), "c": content(5 * PIECE), "e": b""}
V1 = v1_torrent(FILES, PIECE)
V2 = parse_torrent(v2_torrent(FILES, PIECE))
SIZE = sum(map(len, FILES.values()))
A, B, C = (PurePosixPath("top", name) for name in "abc")


def run(root, swarm, **kwargs):
    """All events of a fetch with a fresh store."""
    return list(fetch(Store(root), swarm, **kwargs))


def outcome(events):
    assert isinstance(events[-1], Outcome)
    return events[-1]


def content_of(root):
    return {name: (root / "top" / name).read_bytes() for name in FILES}


def whole(root):
    *_, summary = verify(Store(root))
    assert isinstance(summary, Summary)
    return summary.complete and content_of(root) == FILES
