"""A download over loopback from one seed: ours against aria2c, transmission and qbittorrent-nox.

Run: python benchmarks/download.py --gib 4 --rounds 3. All clients find the same seed through the
same tracker, alternating, each into an empty folder. Every time is that of the whole process, from
its start to the last byte; ours includes reading everything back, hashing it again and flushing it
to the disk, which no other client does. The disk is also measured in each round, before the
clients, so that no client is the first for which a virtual machine must find its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from payload import MIB, Usage, free_port, installed, measure, torrent_of, tracker, write_payload

from grokfetch.fetch.swarm import SwarmSettings, seed

Client = Callable[[Path, Path, int], Usage | None]
"""(torrent file, empty folder, port of the seed) to what the download took."""


def ours(torrent: Path, folder: Path, port: int) -> Usage | None:
    """Our own fetch, as a user runs it."""
    command = [sys.executable, "-m", "grokfetch", "fetch", torrent, "--to", folder]
    return measure(
        [*command, "--peer", f"127.0.0.1:{port}", "--listen", "127.0.0.1:0", "--no-discovery"]
    )


def aria2c(torrent: Path, folder: Path, port: int) -> Usage | None:
    """aria2c, which ends when it has everything."""
    del port
    return measure(
        [
            *("aria2c", "--no-conf", "--dir", folder, "--seed-time=0", "--file-allocation=none"),
            *("--enable-dht=false", "--enable-dht6=false", "--bt-enable-lpd=false"),
            *("--enable-peer-exchange=false", f"--listen-port={free_port()}", torrent),
        ]
    )


def transmission(torrent: Path, folder: Path, port: int) -> Usage | None:
    """transmission-cli, which calls a script when it has everything."""
    del port
    script, finished = folder / "finished.sh", folder / "finished"
    script.write_text(f"#!/bin/sh\ntouch {finished}\n")
    script.chmod(0o755)
    command = ["transmission-cli", "-M", "-w", folder, "-g", folder / "config", "-f", script]
    command += ["-p", str(free_port()), torrent]

    def has_data() -> bool:
        return any(path.stat().st_blocks for path in folder.glob("payload/*"))

    if measure(command, done=has_data, timeout_s=15) is None:
        return None
    shutil.rmtree(folder / "payload")
    return measure(command, done=finished.exists, timeout_s=300)


def qbittorrent(torrent: Path, folder: Path, port: int) -> Usage | None:
    """qbittorrent-nox, asked through its web interface whether it has everything."""
    del port
    web = free_port()
    settings = folder / "qBittorrent/config/qBittorrent.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        "[LegalNotice]\nAccepted=true\n[BitTorrent]\nSession\\DHTEnabled=false\n"
        "Session\\LSDEnabled=false\nSession\\PeXEnabled=false\n"
        f"[Preferences]\nWebUI\\LocalHostAuth=false\nWebUI\\Port={web}\nWebUI\\Address=127.0.0.1\n"
    )

    def done() -> bool:
        with contextlib.suppress(OSError, ValueError):
            address = f"http://127.0.0.1:{web}/api/v2/torrents/info"
            with urllib.request.urlopen(address, timeout=1) as answer:
                return any(torrent["progress"] == 1 for torrent in json.load(answer))
        return False

    command = ["qbittorrent-nox", f"--profile={folder}", f"--save-path={folder}", torrent]
    return measure([*command, "--skip-dialog=true"], done=done, timeout_s=300)


CLIENTS: dict[str, tuple[str, Client]] = {
    "grokfetch": (sys.executable, ours),
    "aria2c": ("aria2c", aria2c),
    "transmission": ("transmission-cli", transmission),
    "qbittorrent": ("qbittorrent-nox", qbittorrent),
}


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gib", type=float, default=4)
    options.add_argument("--piece-mib", type=int, nargs="+", default=[4, 16])
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args()
    size = int(chosen.gib * 1024) // 8 * 8 * MIB
    with tempfile.TemporaryDirectory(prefix="grokfetch-bench-") as name:
        root = Path(name)
        print(f"{size / 1e9:.2f} GB of random bytes, {os.cpu_count()} cores")
        write_payload(root / "seed/payload", size)
        hashing = hash_rate()
        for piece_mib in chosen.piece_mib:
            compare(root, size, piece_mib, chosen.rounds, hashing)


def compare(root: Path, size: int, piece_mib: int, rounds: int, hashing: float) -> None:
    """All clients in alternation over one piece length."""
    seed_port = 0
    with tracker(lambda: [seed_port]) as announce:
        torrent = root / f"{piece_mib}.torrent"
        torrent.write_bytes(torrent_of(root / "seed/payload", piece_mib * MIB, announce))
        clients = {name: call for name, (program, call) in CLIENTS.items() if installed(program)}
        taken: dict[str, list[Usage]] = {name: [] for name in clients}
        disk = []
        with seeding(torrent, root / "seed") as seed_port:
            for _ in range(rounds):
                disk.append(disk_rate(root, size))
                for name in list(clients):
                    folder = root / "out"
                    folder.mkdir()
                    usage = clients[name](torrent, folder, seed_port)
                    shutil.rmtree(folder)
                    if usage is None:
                        print(f"{name} got no data on loopback and is left out")
                        del clients[name]
                    else:
                        taken[name].append(usage)
    report(size, piece_mib, taken, min(statistics.median(disk), hashing))


def report(size: int, piece_mib: int, taken: dict[str, list[Usage]], limit: float) -> None:
    """Print medians, and ratios of ours to each."""

    def rate(name: str) -> float:
        return size / 1e6 / statistics.median(usage.wall_s for usage in taken[name])

    print(f"\n{piece_mib} MiB pieces")
    print(f"{'':14} {'MB/s':>6}   {'(runs)':22} CPU s/GB  anonymous MB  ours/this")
    for name, usages in taken.items():
        if usages:
            runs = ", ".join(f"{size / 1e6 / usage.wall_s:.0f}" for usage in usages)
            cpu = statistics.median(usage.cpu_s for usage in usages) / (size / 1e9)
            anonymous = max(usage.peak_anonymous for usage in usages) / 1e6
            ratio = rate("grokfetch") / rate(name)
            figures = f"{cpu:8.2f}  {anonymous:12.0f}  {ratio:9.2f}"
            print(f"{name:14} {rate(name):6.0f}   {runs:22} {figures}")
    ratio = rate("grokfetch") / limit
    print(f"{'limit':14} {limit:6.0f}   slower of disk and hashing {ratio:33.2f}")


def disk_rate(root: Path, size: int) -> float:
    """MB/s of writing so many bytes and flushing them."""
    block = os.urandom(16 * MIB)
    start = time.perf_counter()
    with root.joinpath("disk").open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = size / 1e6 / (time.perf_counter() - start)
    root.joinpath("disk").unlink()
    print(f"disk write, flushed: {rate:.0f} MB/s")
    return rate


def hash_rate() -> float:
    """MB/s of SHA-1 on all cores, in memory."""
    block = os.urandom(64 * MIB)
    cores = os.cpu_count() or 1
    start = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(lambda _: hashlib.sha1(block).digest(), range(8 * cores)))
    rate = 8 * cores * len(block) / 1e6 / (time.perf_counter() - start)
    print(f"SHA-1 on {cores} cores: {rate:.0f} MB/s")
    return rate


@contextlib.contextmanager
def seeding(torrent: Path, root: Path) -> Iterator[int]:
    """A process of its own that seeds; yields its port."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_seed, args=(torrent, root, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here.recv()
    finally:
        here.close()
        process.join()


def _seed(torrent: Path, root: Path, pipe: Connection) -> None:
    with seed(torrent.read_bytes(), root, SwarmSettings.loopback()) as seeder:
        pipe.send(seeder.port)
        with contextlib.suppress(EOFError):
            pipe.recv()


if __name__ == "__main__":
    main()
