"""SIGKILL at random moments, again and again; every promise is checked after each."""

import dataclasses
import json
import random
import subprocess
import sys
import time

import pytest
from support.release import publish_files
from support.torrents import content

from grokfetch.events import Summary
from grokfetch.fetch.swarm import SwarmSettings, seed, session
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import parse_torrent
from grokfetch.torrent.read_back import CHUNK, check_pieces

PIECE = 1 << 17
FILES = {
    "a": content(50 * PIECE + 1),
    "b": content(60 * PIECE - 1),
    "c": content(PIECE // 3),
    "d": content(40 * PIECE),
}
SIZE = sum(map(len, FILES.values()))
RATE = 15_000_000
KILLS = 5
LOST = {1: 10, 2: 30}
"""Pieces that a kill may cost, by version; libtorrent keeps those of v2 in memory until flushed."""

CHILD = """
import json, os, sys
from pathlib import Path
from grokfetch.fetch import loop as fetching
from grokfetch.torrent.metainfo import parse_torrent
from grokfetch.folder.store import Store
from grokfetch.fetch.swarm import Swarm, SwarmSettings

log = os.open(sys.argv[4], os.O_WRONLY | os.O_APPEND)
def say(*what):
    os.write(log, (json.dumps(what) + "\\n").encode())

phase = ""
real = fetching.check_pieces
def watched(root, layout, pieces, buffer):
    say("hash", phase, list(pieces))
    return real(root, layout, pieces, buffer)
fetching.check_pieces = watched

class Watched(Swarm):
    def download(self, order):
        global phase
        phase = "downloading"
        say("want", phase, sorted(order.want))
        return super().download(order)

swarm = Watched(
    parse_torrent(Path(sys.argv[2]).read_bytes()), SwarmSettings.loopback((sys.argv[3],))
)
limits = fetching.Limits(20, 20, save_s=0.05)
*_, outcome = fetching.fetch(Store(Path(sys.argv[1])), swarm, limits=limits)
say("done", outcome.fetched, [])
"""


@dataclasses.dataclass
class Watch:
    """What one run requested and hashed, according to its log."""

    fetched: set[int]
    rehashed: list[int]
    hashed: set[int]
    done: bool


@pytest.fixture(
    params=["hybrid", *(pytest.param(it, marks=pytest.mark.slow) for it in ("v1", "v2"))]
)
def published(request, tmp_path):
    return tmp_path, publish_files(tmp_path / "ours", FILES, PIECE, request.param)


def run(folder, seeder, target):
    """Run a fetch until the seed has sent some bytes in all, then kill it; None: to the end."""
    log = folder / "log"
    log.write_bytes(b"")
    arguments = (folder / "theirs", folder / "ours/top.torrent", f"127.0.0.1:{seeder.port}", log)
    with subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)]) as child:
        if target is None:
            assert child.wait(60) == 0
        deadline = time.monotonic() + 30
        while child.poll() is None and seeder.wait().uploaded < target:
            assert time.monotonic() < deadline
        child.kill()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return Watch(
        {piece for what, _, pieces in entries if what == "want" for piece in pieces},
        [p for what, phase, pieces in entries if (what, phase) == ("hash", "") for p in pieces],
        {piece for what, _, pieces in entries if what == "hash" for piece in pieces},
        any(what == "done" for what, _, _ in entries),
    )


def test_whatever_moment_the_process_is_killed_at_nothing_proven_is_lost(published, monkeypatch):
    plain = session.session_settings
    # Upload in many small steps instead of one each half second.
    monkeypatch.setattr(
        session, "session_settings", lambda *args: {**plain(*args), "tick_interval": 20}
    )
    folder, data = published
    known = parse_torrent(data)
    layout = parse_info(known.info, known.piece_layers)
    dice = random.Random(str(known.info_hash))
    proven, begun, sent = set(), set(), 0
    settings = dataclasses.replace(SwarmSettings.loopback(), up=RATE)
    with seed(data, folder / "ours", settings) as seeder:
        for kill in range(KILLS + 1):
            target = None if kill == KILLS else sent + dice.randrange(SIZE // KILLS)
            watch = run(folder, seeder, target)
            # What was proven before is neither requested nor read again.
            assert not watch.fetched & proven
            assert not watch.hashed & proven
            # Pieces that had begun to arrive and were not recorded are read again once. File
            # systems distinguish data from holes by the block, and pieces here end within one, so
            # the neighbours of a piece may be read as well.
            assert len(watch.rehashed) == len(set(watch.rehashed))
            assert set(watch.rehashed) <= {piece + step for piece in begun for step in (-1, 0, 1)}
            now = set(Store(folder / "theirs").record().pieces)
            assert proven <= now
            assert claims_are_right(folder / "theirs", layout, now)
            proven, begun, sent = now, pieces_begun(folder / "theirs", layout), seeder.uploaded()
    assert watch.done
    assert len(proven) == layout.piece_count
    # A kill costs what was unfinished, and no more.
    assert sent <= SIZE + KILLS * LOST[layout.version] * PIECE
    assert {name: (folder / "theirs/top" / name).read_bytes() for name in FILES} == FILES
    *_, summary = verify(Store(folder / "theirs"))
    assert isinstance(summary, Summary)
    assert summary.complete


def pieces_begun(root, layout):
    """The pieces with any byte on the disk; the content has no long runs of zeros."""

    def lies_there(part):
        path = root / part.file.path
        if part.file.pad or not path.exists():
            return False
        with path.open("rb") as file:
            file.seek(part.offset)
            return any(file.read(part.length))

    return {p for p in range(layout.piece_count) if any(map(lies_there, layout.segments(p)))}


def claims_are_right(root, layout, pieces):
    results = check_pieces(root, layout, sorted(pieces), memoryview(bytearray(CHUNK)))
    return all(result.verdict == "good" for result in results)
