"""Reading back and hashing data that is there: ours against other checkers and the limit.

Run: python benchmarks/verification.py --gib 4 --rounds 3. Every time is that of the whole process
over the same warm files, in alternation. The limit is one core's SHA-1 rate times the cores.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from payload import MIB, Usage, installed, measure, torrent_of, write_payload

RECHECK = """
import sys, libtorrent as lt
session = lt.session({"listen_interfaces": "127.0.0.1:0", "enable_dht": False, "enable_lsd": False,
                      "enable_upnp": False, "enable_natpmp": False, "hashing_threads": 2,
                      "alert_mask": lt.alert_category.status})
params = lt.load_torrent_file(sys.argv[1])
params.save_path = sys.argv[2]
handle = session.add_torrent(params)
while True:
    session.wait_for_alert(200)
    if any(isinstance(alert, lt.torrent_checked_alert) for alert in session.pop_alerts()):
        break
sys.exit(not handle.status().is_seeding)
"""


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gib", type=float, default=4)
    options.add_argument("--piece-mib", type=int, default=4)
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args()
    size = int(chosen.gib * 1024) // 8 * 8 * MIB
    with tempfile.TemporaryDirectory(prefix="grokfetch-bench-") as folder:
        root = Path(folder)
        write_payload(root / "payload", size)
        torrent = root / "payload.torrent"
        announce = "http://127.0.0.1:9/announce"
        torrent.write_bytes(torrent_of(root / "payload", chosen.piece_mib * MIB, announce))
        one_core = sha1_rate()
        checkers = _checkers(torrent, root)
        taken: dict[str, list[Usage]] = {name: [] for name in checkers}
        # The first call adopts the files by hashing them; from then on they are only verified.
        fetch = [sys.executable, "-m", "grokfetch", "fetch", torrent, "--to", root]
        if measure([*fetch, "--listen", "127.0.0.1:0", "--no-discovery"]) is None:
            sys.exit("our own fetch did not adopt the files")
        for _ in range(chosen.rounds):
            for name, check in checkers.items():
                usage = check()
                if usage is not None:
                    taken[name].append(usage)
        report(size, taken, one_core * (os.cpu_count() or 1))


def _checkers(torrent: Path, root: Path) -> dict[str, Callable[[], Usage | None]]:
    files = sorted(root.joinpath("payload").iterdir())
    found: dict[str, Callable[[], Usage | None]] = {
        "grokfetch": lambda: measure([sys.executable, "-m", "grokfetch", "verify", root]),
        "libtorrent": lambda: measure([sys.executable, "-c", RECHECK, torrent, root]),
        "sha1sum": lambda: measure(["sha1sum", *files]),
    }
    if installed("aria2c"):
        found["aria2c"] = lambda: measure(
            [
                *("aria2c", "--no-conf", "--dir", root, "--check-integrity=true"),
                *("--hash-check-only=true", "--enable-dht=false", "--bt-enable-lpd=false"),
                *("--seed-time=0", "--enable-dht6=false", torrent),
            ]
        )
    return found


def report(size: int, taken: dict[str, list[Usage]], limit: float) -> None:
    """Print medians, and ratios of ours to each."""

    def rate(name: str) -> float:
        return size / 1e6 / statistics.median(usage.wall_s for usage in taken[name])

    print(f"{size / 1e9:.2f} GB\n{'':12} {'MB/s':>6}   {'(runs)':22} anonymous MB  ours/this")
    for name, usages in taken.items():
        if not usages:
            print(f"{name} failed and is left out")
            continue
        runs = ", ".join(f"{size / 1e6 / usage.wall_s:.0f}" for usage in usages)
        anonymous = max(usage.peak_anonymous for usage in usages) / 1e6
        ratio = rate("grokfetch") / rate(name)
        print(f"{name:12} {rate(name):6.0f}   {runs:22} {anonymous:12.0f}  {ratio:9.2f}")
    ratio = rate("grokfetch") / limit
    print(f"{'limit':12} {limit:6.0f}   {'cores x SHA-1':22} {'':12}  {ratio:9.2f}")


def sha1_rate() -> float:
    """MB/s of SHA-1 on one core, in memory."""
    block = os.urandom(64 * MIB)
    start = time.perf_counter()
    for _ in range(8):
        hashlib.sha1(block).digest()
    return 8 * len(block) / 1e6 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
