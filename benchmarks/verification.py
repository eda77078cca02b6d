"""Reading back and hashing existing data: ours against other checkers and the limit.

Run: python benchmarks/verification.py --gib 4 --rounds 3. Every time is that of the whole process
over the same files, alternating; the time to start is reported separately. The limit is the SHA-1
rate of one core over memory in its cache, times the cores. With --cold the files leave the page
cache before each run, and the other limit is reading them past it, with one read in flight for each
core.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    options.add_argument("--cold", action="store_true")
    chosen = options.parse_args()
    size = int(chosen.gib * 1024) // 8 * 8 * MIB
    with tempfile.TemporaryDirectory(prefix="grokfetch-bench-") as folder:
        root = Path(folder)
        write_payload(root / "payload", size)
        torrent = root / "payload.torrent"
        announce = "http://127.0.0.1:9/announce"
        torrent.write_bytes(torrent_of(root / "payload", chosen.piece_mib * MIB, announce))
        limits = {"cores x SHA-1": sha1_rate() * (os.cpu_count() or 1)}
        checkers = _checkers(torrent, root)
        taken: dict[str, list[Usage]] = {name: [] for name in checkers}
        files = sorted(root.joinpath("payload").iterdir())
        # The first call adopts the files by hashing them; from then on they are only verified.
        fetch = [sys.executable, "-m", "grokfetch", "fetch", torrent, "--to", root]
        if measure([*fetch, "--listen", "127.0.0.1:0", "--no-discovery"]) is None:
            sys.exit("our own fetch did not adopt the files")
        disk = []
        for _ in range(chosen.rounds):
            for name, check in checkers.items():
                if chosen.cold:
                    forget(files)
                usage = check()
                if usage is not None:
                    taken[name].append(usage)
            if chosen.cold:
                disk.append(direct_rate(files))
        if disk:
            limits["direct reads"] = statistics.median(disk)
        start = measure([sys.executable, "-m", "grokfetch", "verify", "--help"])
        report(size, taken, limits, start)


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


def report(
    size: int, taken: dict[str, list[Usage]], limits: dict[str, float], start: Usage | None
) -> None:
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
    for name, limit in limits.items():
        print(f"{'limit':12} {limit:6.0f}   {name:22} {'':12}  {rate('grokfetch') / limit:9.2f}")
    if start is not None:
        wall = statistics.median(usage.wall_s for usage in taken["grokfetch"])
        alone = size / 1e6 / (wall - start.wall_s)
        print(f"of its time {start.wall_s:.2f} s to start; without that {alone:.0f} MB/s", end="")
        print(f", {alone / min(limits.values()):.2f} of the lower limit")


def sha1_rate() -> float:
    """MB/s of SHA-1 on one core, over memory that is in its cache; the best of five."""
    block = os.urandom(MIB // 4)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(1024):
            hashlib.sha1(block).digest()
        taken.append(time.perf_counter() - start)
    return 1024 * len(block) / 1e6 / min(taken)


def forget(files: list[Path]) -> None:
    """Have the page cache let go of files."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def direct_rate(files: list[Path]) -> float:
    """MB/s of reading files past the page cache, one on each core at a time."""

    def read(path: Path) -> int:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        total = 0
        with mmap.mmap(-1, 4 * MIB) as aligned:
            while count := os.preadv(handle, [aligned], total):
                total += count
        os.close(handle)
        return total

    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        total = sum(pool.map(read, files))
    return total / 1e6 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
