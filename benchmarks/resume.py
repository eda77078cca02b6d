"""What SIGKILL costs: a download over loopback is killed at random points and started again.

Run: python benchmarks/resume.py --gib 4 --kills 20. After each kill the next start is observed:
which pieces it requests, which it reads back, and how soon pieces arrive again. The last start
completes the download. What was fetched twice is what the seed has sent in addition to the size of
the payload, including bytes in flight to a dead process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from payload import MIB, torrent_of, write_payload

from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.folder.store import Store

CHILD = """
import json, os, sys, time
from pathlib import Path
from grokfetch.fetch import bringing as fetching
from grokfetch.torrent.metainfo import parse_torrent
from grokfetch.fetch.source import Arrived
from grokfetch.folder.store import Store
from grokfetch.fetch.swarm import Swarm, SwarmSettings

log = os.open(sys.argv[4], os.O_WRONLY | os.O_APPEND)
def say(what, pieces=()):
    os.write(log, (json.dumps([what, time.time(), list(pieces)]) + "\\n").encode())

phase = "read back"
real = fetching.check_pieces
def watched(root, layout, pieces, buffer):
    if phase == "read back":
        say(phase, pieces)
    return real(root, layout, pieces, buffer)
fetching.check_pieces = watched

class Watched(Swarm):
    def download(self, order):
        global phase
        phase = "download"
        say("want", order.want)
        for event in super().download(order):
            if isinstance(event, Arrived):
                say("arrived", event.pieces)
            yield event

torrent = parse_torrent(Path(sys.argv[2]).read_bytes())
swarm = Watched(torrent, SwarmSettings.loopback((sys.argv[3],)))
for event in fetching.fetch(Store(Path(sys.argv[1])), swarm):
    pass
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """One start: pieces asked for although proven, pieces read back, seconds to order and piece.

    The seconds are None where nothing was left to ask for.
    """

    asked_again: int
    read_back: int
    order_s: float | None
    piece_s: float | None


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gib", type=float, default=4)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--piece-mib", type=int, nargs="+", default=[4, 16])
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    size = int(chosen.gib * 1024) // 8 * 8 * MIB
    with tempfile.TemporaryDirectory(prefix="grokfetch-bench-") as name:
        root = Path(name)
        write_payload(root / "seed/payload", size)
        print(f"{size / 1e9:.2f} GB, {chosen.kills} kills, random seed {chosen.seed}")
        for piece_mib in chosen.piece_mib:
            measure(root, size, piece_mib, chosen.kills, random.Random(chosen.seed))


def measure(root: Path, size: int, piece_mib: int, kills: int, dice: random.Random) -> None:
    """Kill and start again until the end; then print one row of the table."""
    torrent = root / f"{piece_mib}.torrent"
    torrent.write_bytes(
        torrent_of(root / "seed/payload", piece_mib * MIB, "http://127.0.0.1:9/announce")
    )
    run = Run(root / f"out-{piece_mib}", torrent, root / f"{piece_mib}.log")
    count = -(-size // (piece_mib * MIB))
    points = sorted(dice.randrange(count) for _ in range(kills))
    with seed(torrent.read_bytes(), root / "seed", SwarmSettings.loopback()) as seeder:
        peer = f"127.0.0.1:{seeder.port}"
        starts = [run.start(peer, it, dice.uniform(0, 0.1)) for it in (*points, None)]
        for _ in range(5):
            seeder.wait()
        twice = seeder.uploaded() - size
    report(piece_mib, starts, twice, whole=len(run.proven()) == count)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A download that is started again and again."""

    folder: Path
    torrent: Path
    log: Path

    def proven(self) -> frozenset[int]:
        """What the record claims."""
        return Store(self.folder).record().pieces

    def start(self, peer: str, point: int | None, late_s: float) -> Start:
        """Start, and kill a moment after `point` pieces are proven or arrived; None: never."""
        self.log.write_bytes(b"")
        known, began = self.proven(), time.time()
        command = [sys.executable, "-c", CHILD, self.folder, self.torrent, peer, self.log]
        with subprocess.Popen(command) as child:
            while child.poll() is None:
                arrived = sum(map(len, pieces(self.log, "arrived")))
                if point is not None and arrived and arrived + len(known) >= point:
                    time.sleep(late_s)
                    child.kill()
                    break
                time.sleep(0.005)
        asked = {piece for order in pieces(self.log, "want") for piece in order}
        times = {what: at - began for what, at, _ in reversed(entries(self.log))}
        return Start(
            len(asked & known),
            sum(map(len, pieces(self.log, "read back"))),
            times.get("want"),
            times.get("arrived"),
        )


def entries(log: Path) -> list[tuple[str, float, list[int]]]:
    """What the child has printed, only complete lines."""
    return [
        tuple(json.loads(line)) for line in log.read_text().splitlines(True) if line[-1] == "\n"
    ]


def pieces(log: Path, what: str) -> list[list[int]]:
    """The pieces of one kind of entry."""
    return [found for kind, _, found in entries(log) if kind == what]


def report(piece_mib: int, starts: list[Start], twice: int, *, whole: bool) -> None:
    """Print what the kills cost."""
    after = starts[1:]
    kills = len(after)
    read = [one.read_back for one in after]
    print(f"\n{piece_mib} MiB pieces, {'whole in the end' if whole else 'NOT WHOLE'}")
    print(f"proven pieces fetched again  {sum(one.asked_again for one in starts)}")
    print(
        f"fetched twice, a kill        {twice / kills / 1e6:.0f} MB, "
        f"{twice / kills / (piece_mib * MIB):.1f} pieces"
    )
    print(
        f"read back, a start           {statistics.mean(read) * piece_mib * MIB / 1e6:.0f} MB, "
        f"{statistics.mean(read):.1f} pieces, at most {max(read)}"
    )
    for name, taken in (
        ("process start to order", [one.order_s for one in after if one.order_s is not None]),
        ("process start to a piece", [one.piece_s for one in after if one.piece_s is not None]),
    ):
        print(f"{name:28} {statistics.median(taken):.2f} s, at most {max(taken):.2f} s")


if __name__ == "__main__":
    main()
