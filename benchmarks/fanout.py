"""One seed to several hosts: ours, libtorrent alone or with super-seeding, and the bound.

Run: python benchmarks/fanout.py --hosts 8, on Linux with `ip`, `tc` and `unshare`. Every host is a
network namespace behind one bridge, and the kernel limits what it sends (by a token bucket), as a
link would; libtorrent's own rate limit reaches only part of the rate on one connection. Time is
counted from when the seed listens, after all hosts, until the last host has everything; ours
includes reading back, hashing again and flushing to the disk. A host that has everything continues
to share. With readers, each host waits for one of eight files after another, and all for the same
first one; with readers apart, each begins with a different one. Processor time is that of hosts and
seed. The bound is the larger of size / rate and hosts * size / ((hosts + 1) * rate), with the rate
of the link, of which packet headers take three hundredths.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from payload import MIB, torrent_of, write_payload

from grokfetch.fetch import fetch
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.torrent.metainfo import parse_torrent

PORT = 6881
LISTENING = f":{PORT:04X} "
TIMEOUT_S = 140.0


def address(number: int) -> str:
    """Of a host; 0 is the seed."""
    return f"10.9.0.{number + 1}"


@contextlib.contextmanager
def network(count: int, rate: int) -> Iterator[list[int]]:
    """Hosts behind one bridge that each send at most `rate` bytes a second.

    Yields:
        A process in the network namespace of each.
    """
    ip("link add name fan type bridge")
    ip("link set dev fan up")
    holders = [subprocess.Popen(["unshare", "-n", "sleep", "infinity"]) for _ in range(count)]
    try:
        for number, holder in enumerate(holders):
            here = Path("/proc/self/ns/net").readlink()
            while Path(f"/proc/{holder.pid}/ns/net").readlink() == here:
                time.sleep(0.01)
            ip(f"link add name fan{number} type veth peer name link netns {holder.pid}")
            ip(f"link set dev fan{number} master fan up")
            ip("link set dev lo up", holder.pid)
            ip(f"addr add {address(number)}/24 dev link", holder.pid)
            ip("link set dev link up", holder.pid)
            shape = f"tc qdisc add dev link root tbf rate {8 * rate}bit burst 32k latency 100ms"
            subprocess.run([*inside(holder.pid), *shape.split()], check=True)
        yield [holder.pid for holder in holders]
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
        ip("link del dev fan")


def inside(holder: int) -> list[str]:
    """The beginning of a command that runs in the namespace of a process."""
    return ["nsenter", "-t", str(holder), "-n"]


def ip(words: str, holder: int | None = None) -> None:
    """Run `ip`, in the namespace of a process if one is given."""
    subprocess.run([*(inside(holder) if holder else ()), "ip", *words.split()], check=True)


def host_command(client: str, torrent: Path, folder: Path, number: int, count: int) -> list[str]:
    """The command of a host, which prints when it has everything."""
    peers = [address(other) for other in range(count) if other != number]
    if client == "grokfetch":
        command = [sys.executable, "-m", "grokfetch", "fetch", str(torrent), "--to", str(folder)]
        command += ["--listen", f"{address(number)}:{PORT}", "--no-discovery", "--json"]
        command += ["--seed", "--for", f"{TIMEOUT_S:.0f}s"]
        return command + [word for peer in peers for word in ("--peer", f"{peer}:{PORT}")]
    parts = {"with readers": "reader", "readers apart": "reader apart"}
    return role(parts.get(client, "alone"), torrent, folder, number, count)


def role(name: str, torrent: Path, folder: Path, number: int, count: int) -> list[str]:
    """The command that runs this script in another role."""
    words = [str(word) for word in (torrent, folder, number, count)]
    return [sys.executable, __file__, "--role", name, *words]


def play(name: str, torrent: Path, folder: Path, number: int, count: int) -> None:
    """Run libtorrent alone as a host or as the seed, our seed, or one of our hosts with a reader.

    Only a signal ends it.
    """
    peers = tuple(f"{address(other)}:{PORT}" for other in range(count) if other != number)
    settings = SwarmSettings(f"{address(number)}:{PORT}", discovery=False, peers=peers)
    if name in {"reader", "reader apart"}:
        first = number if name == "reader apart" else 0
        read_while_fetching(torrent.read_bytes(), folder, settings, first)
    if name in {"our seed", "reader", "reader apart"}:
        with seed(torrent.read_bytes(), folder, settings) as seeder:
            while True:
                seeder.wait()
                print(json.dumps({"uploaded": seeder.uploaded()}), flush=True)
    import libtorrent as lt

    off = dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False)
    session = lt.session({"listen_interfaces": f"{address(number)}:{PORT}", **off})
    params = lt.load_torrent_file(str(torrent))
    params.save_path = str(folder)
    params.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
    if number == 0:
        params.flags |= lt.torrent_flags.seed_mode
    if name == "super":
        params.flags |= lt.torrent_flags.super_seeding
    params.peers = [(peer.rpartition(":")[0], PORT) for peer in peers]
    handle = session.add_torrent(params)
    told = False
    while True:
        time.sleep(0.1)
        status = handle.status()
        if number == 0:
            print(json.dumps({"uploaded": status.total_payload_upload}), flush=True)
        elif status.is_seeding and not told:
            told = True
            print(json.dumps({"event": "finished"}), flush=True)


def read_while_fetching(torrent: bytes, folder: Path, settings: SwarmSettings, first: int) -> None:
    """Fetch while a reader waits for one file after another, as a model that is being loaded.

    Args:
        torrent: the bytes of a .torrent.
        folder: where to fetch to.
        settings: of the swarm.
        first: the file to begin with; after the last come those before it.
    """
    store = Arriving(folder)
    source = Swarm(parse_torrent(torrent), settings)
    with store.filled(fetch(store, source, demand=store.demand)):
        layout = store.layout()
        assert layout is not None
        files = layout.payload
        for place in range(len(files)):
            store.require(files[(first + place) % len(files)].path)
            print(json.dumps({"event": "file"}), flush=True)
    print(json.dumps({"event": "finished"}), flush=True)


def measure(client: str, torrent: Path, source: Path, work: Path, holders: Sequence[int]) -> Any:
    """Measure one client.

    Returns:
        Seconds until each host had all, bytes that the seed had sent by then, load of processors,
        seconds until the reader of each host had its first file, if there were readers.
    """
    count = len(holders)
    with contextlib.ExitStack() as stack:
        start = functools.partial(
            subprocess.Popen, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        outputs = [stack.enter_context(work.joinpath(f"{i}.out").open("w+")) for i in range(count)]
        children = []
        for number in range(1, count):
            folder = work / f"{client}-{number}"
            folder.mkdir()
            command = host_command(client, torrent, folder, number, count)
            child = start([*inside(holders[number]), *command], stdout=outputs[number])
            stack.callback(end, child)
            children.append(child)
        wait_until_listening(holders[1:])
        by_client = {"libtorrent": "alone", "super-seeding": "super"}
        command = role(by_client.get(client, "our seed"), torrent, source, 0, count)
        child = start([*inside(holders[0]), *command], stdout=outputs[0])
        stack.callback(end, child)
        children.append(child)
        wait_until_listening(holders[:1])
        begin = time.monotonic()
        before = sum(map(processor_seconds, children))
        finished: dict[int, float] = {}
        read: dict[int, float] = {}
        while len(finished) < count - 1:
            time.sleep(0.05)
            for number in range(1, count):
                said = "" if number in finished else work.joinpath(f"{number}.out").read_text()
                if '"finished"' in said:
                    finished[number] = time.monotonic() - begin
                if '"file"' in said:
                    read.setdefault(number, time.monotonic() - begin)
            if time.monotonic() - begin > TIMEOUT_S:
                raise TimeoutError(f"{client}: {len(finished)} of {count - 1} hosts have all")
        last = work.joinpath("0.out").read_text().rsplit("\n", 2)[-2]
        used = sum(map(processor_seconds, children)) - before
        busy = used / max(finished.values()) / (os.cpu_count() or 1)
        return finished.values(), json.loads(last)["uploaded"], busy, read.values()


def processor_seconds(child: subprocess.Popen[bytes]) -> float:
    """What a process has used so far."""
    words = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_listening(holders: Sequence[int]) -> None:
    """Return when somebody listens in the namespace of each process."""
    for holder in holders:
        while LISTENING not in Path(f"/proc/{holder}/net/tcp").read_text():
            time.sleep(0.02)


def end(child: subprocess.Popen[bytes]) -> None:
    """End a process that we have started."""
    child.kill()
    child.wait()


def why_not() -> str | None:
    """What this machine lacks for separate networks; None if nothing."""
    for tool in ("unshare", "nsenter", "ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` here"
    tried = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False, text=True)
    if tried.returncode:
        return f"network namespaces are not allowed here ({tried.stderr.strip()})"
    return None


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--hosts", type=int, nargs="+", default=[8])
    options.add_argument("--mb", type=int, default=200)
    options.add_argument("--mb-per-s", type=float, default=10)
    options.add_argument("--piece-kib", type=int, default=1024)
    clients = ["grokfetch", "with readers", "readers apart", "libtorrent", "super-seeding"]
    options.add_argument("--clients", nargs="+", choices=clients, default=clients)
    chosen = options.parse_args()
    size, rate = chosen.mb * 1_000_000 // 8 * 8, int(chosen.mb_per_s * 1e6)
    with tempfile.TemporaryDirectory(prefix="grokfetch-bench-") as name:
        root = Path(name)
        write_payload(root / "seed/payload", size)
        torrent = root / "payload.torrent"
        torrent.write_bytes(torrent_of(root / "seed/payload", chosen.piece_kib * MIB // 1024, ""))
        for hosts in chosen.hosts:
            bound = max(size / rate, hosts * size / ((hosts + 1) * rate))
            print(f"{chosen.mb} MB to {hosts} hosts at {chosen.mb_per_s:g} MB/s each: ", end="")
            print(f"bound {bound:.1f} s", flush=True)
            for client in chosen.clients:
                with (
                    network(hosts + 1, rate) as holders,
                    tempfile.TemporaryDirectory(dir=root) as work,
                ):
                    ends, sent, busy, read = measure(
                        client, torrent, root / "seed", Path(work), holders
                    )
                figures = f"last {max(ends):6.1f} s, first {min(ends):6.1f} s"
                ratio = f"{max(ends) / bound:.2f} of the bound"
                reading = f", first file read {min(read):.1f} to {max(read):.1f} s" if read else ""
                print(
                    f"{client:14} {figures}, {ratio}, the seed sent {sent / size:.2f} copies, "
                    f"processors {busy:.0%} busy{reading}",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        play(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), *map(int, sys.argv[5:]))
    elif os.environ.get("FANOUT") is not None:
        main()
    elif missing := why_not():
        print(f"left out: {missing}")
    else:
        os.environ["FANOUT"] = "inside"
        os.execvp("unshare", ["unshare", "-rn", sys.executable, *sys.argv])
