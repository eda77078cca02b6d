"""Bytes on demand over a link of a given rate on loopback: a token, a demand, a whole download.

Run: python benchmarks/on_demand.py. It makes a checkpoint with 64 thin layers: like Grok-1 it has 8
experts, of which a token chooses 2, and as many pieces. The seed is another process behind a relay
that passes on what it sends at `--rate`; libtorrent's own limit would send a second's worth at
once, which no link does. It prints

- the share of the checkpoint that prompts of 1, 3 and 10 tokens need,
- the bytes that had arrived when the first token was generated, relative to the bytes that it
  needed: of the tensors, rows and experts that were read, counted exactly,
- the seconds from a demand to its proof, during a download at full rate and when nothing else is
  fetched, relative to the time that its bytes take at the rate of the link,
- the seconds of a whole download with such demands, relative to one without.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import multiprocessing
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from payload import torrent_of

from grokfetch.events import FetchEvent, Status
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.manifest.schema import Manifest
from grokfetch.manifest.selection import ON_DEMAND, Extract, Request
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import TorrentFile, encode_torrent, parse_torrent
from loader.devices.arrangement import Arrangement, Loading
from loader.devices.placement import make_mesh
from loader.inference.loading import load_as_it_comes, load_onto
from loader.inference.sampling import Sampling
from loader.weights.checkpoint import expect_checkpoint, open_folder
from loader.weights.inventory import expected
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig, ParamSpec, parameters
from loader.weights.synthetic import write_checkpoint

Counts = npt.NDArray[np.int64]
CHUNK, QUEUE, BURST_S = 1 << 14, 1 << 16, 0.02
"""Of the link: bytes passed on at once, bytes that it queues, seconds that it may make up for."""

PROMPTS = (1, 3, 10)
PROMPT = list(range(5, 5 + max(PROMPTS)))


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """A checkpoint with its torrent and manifest."""

    root: Path
    config: GrokConfig
    torrent: TorrentFile
    manifest: Manifest


def release(root: Path, config: GrokConfig, piece_length: int) -> Release:
    """Write the checkpoint, its torrent and its manifest."""
    write_checkpoint(root / "payload/ckpt-0", config)
    torrent = parse_torrent(
        torrent_of(root / "payload/ckpt-0", piece_length, "http://127.0.0.1:1/")
    )
    files, tensors = expected(config, PurePosixPath("ckpt-0"))
    manifest = Manifest(
        "thin",
        files,
        info_hash=torrent.info_hash,
        tensors=tensors,
        model=config.to_mapping(),
    )
    return Release(root / "payload", config, torrent, manifest)


def upload(torrent: bytes, root: Path, rate: int, pipe: Connection) -> None:
    """Seed behind a link of that rate until the other end of the pipe says to stop."""
    with (
        seed(torrent, root, SwarmSettings.loopback()) as peer,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        threading.Thread(target=link, args=(listener, peer.port, rate), daemon=True).start()
        pipe.send(listener.getsockname()[1])
        with contextlib.suppress(EOFError):
            pipe.recv()


def link(listener: socket.socket, port: int, rate: int) -> None:
    """Relay connections; to clients at the rate of a link with a short queue."""
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE)
            server.connect(("127.0.0.1", port))
            for given in ((client, server, None), (server, client, rate)):
                threading.Thread(target=relay, args=given, daemon=True).start()


def relay(source: socket.socket, sink: socket.socket, rate: int | None) -> None:
    """Pass on bytes, at most `rate` per second."""
    free_at = time.monotonic()
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            if rate is not None:
                now = time.monotonic()
                free_at = max(free_at, now - BURST_S) + len(data) / rate
                time.sleep(max(0.0, free_at - now))
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def source(made: Release, rate: int) -> Iterator[Swarm]:
    """A swarm of one seed in a process of its own."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    given = (encode_torrent(made.torrent), made.root, rate, theirs)
    process = multiprocessing.get_context("spawn").Process(target=upload, args=given)
    process.start()
    yield Swarm(made.torrent, SwarmSettings.loopback((f"127.0.0.1:{ours.recv()}",)))
    ours.send(None)
    process.join(10)


class Watch:
    """The events of a fetch: how many bytes have come, and how many peers there are."""

    def __init__(self) -> None:
        self.received = self.peers = 0

    def follow(self, events: Iterator[FetchEvent]) -> Iterator[FetchEvent]:
        """The same events."""
        for event in events:
            if isinstance(event, Status):
                self.received = max(self.received, event.received)
                self.peers = event.peers
            yield event


@contextlib.contextmanager
def fetching(
    made: Release, swarm: Swarm, folder: Path, watch: Watch, *, on_demand: bool = False
) -> Iterator[Arriving]:
    """A folder that is being filled, with everything or on demand."""
    store = Arriving(folder, on_demand=on_demand)
    events = fetch(
        store,
        swarm,
        manifest=made.manifest,
        limits=Limits(60, 120, save_s=1.0),
        request=Request(extract=Extract(ON_DEMAND, ())) if on_demand else None,
        demand=store.demand,
    )

    def followed() -> Iterator[FetchEvent]:
        with contextlib.closing(events):
            yield from watch.follow(events)

    with store.filled(followed()):
        yield store


# --- what a token needs -------------------------------------------------------------------------


def needed(config: GrokConfig, counts: Counts) -> int:
    """Bytes that some tokens read, given how often each layer chose each expert."""

    def of(spec: ParamSpec) -> int:
        if spec.layer is None or spec.axes[0] != "expert":
            return spec.nbytes
        weight = math.prod(spec.shape)
        chosen = int(np.count_nonzero(counts[spec.layer]))
        return spec.nbytes - weight + weight * chosen // config.num_experts

    return sum(map(of, parameters(config)))


def arrangement(made: Release) -> Arrangement:
    """The devices, as `run --while-fetching` has them."""
    return Arrangement(make_mesh(made.config, MeshShape()), "mapped", Loading("float32"))


# --- measures -----------------------------------------------------------------------------------


def shares(made: Release) -> None:
    """Print which part of the checkpoint prompts need."""
    print("| tokens of the prompt | bytes needed | of all |\n| --- | --- | --- |")
    engine = load_onto(arrangement(made), open_folder(made.root / "ckpt-0", made.config))
    for count in PROMPTS:
        choices = engine.count_experts()
        next(iter(engine.generate(PROMPT[:count], 1)))
        size = needed(made.config, choices.counts())
        print(f"| {count} | {size / 1e6:.0f} MB | {size / made.manifest.size:.0%} |", flush=True)


def first_token(made: Release, rate: int, folder: Path) -> float:
    """Print what had arrived at the first token; returns the seconds of the whole download."""
    watch, start = Watch(), time.perf_counter()
    with source(made, rate) as swarm, fetching(made, swarm, folder, watch) as store:
        checkpoint = expect_checkpoint(store, by_parts=True)
        engine = load_as_it_comes(arrangement(made), checkpoint, PROMPT[:1], Sampling())
        choices = engine.count_experts()
        next(iter(engine.generate(PROMPT[:1], 1)))
        seconds, received = time.perf_counter() - start, watch.received
        size = needed(made.config, choices.counts())
        print(
            f"first token after {seconds:.1f} s, {received / 1e6:.1f} MB had come, it needed "
            f"{size / 1e6:.1f} MB: {received / size:.3f}",
            flush=True,
        )
    return time.perf_counter() - start


def whole(made: Release, rate: int, folder: Path) -> float:
    """The seconds of a download without demands."""
    start = time.perf_counter()
    with source(made, rate) as swarm, fetching(made, swarm, folder, Watch()):
        pass
    return time.perf_counter() - start


def demands(made: Release, rate: int, folder: Path) -> float:
    """Print the time of demands during a full download; returns the seconds of the download."""
    watch, start = Watch(), time.perf_counter()
    with source(made, rate) as swarm, fetching(made, swarm, folder, watch) as store:
        while watch.received < rate:
            time.sleep(0.1)
        ask(made, store, rate, "beside a download")
    return time.perf_counter() - start


def idle(made: Release, rate: int, folder: Path) -> None:
    """Print the time of demands when nothing else is fetched."""
    watch = Watch()
    with (
        source(made, rate) as swarm,
        fetching(made, swarm, folder, watch, on_demand=True) as store,
    ):
        while not watch.peers:
            time.sleep(0.1)
        ask(made, store, rate, "idle")


def ask(made: Release, store: Arriving, rate: int, when: str) -> None:
    """Demand tensors and layers one after another, and print how long each takes."""
    for layer in range(made.config.num_layers - 1, made.config.num_layers - 9, -2):
        specs = [it for it in parameters(made.config) if it.layer == layer]
        largest = [max(specs, key=lambda spec: spec.nbytes)]
        for what, some in (("a tensor", largest), ("the rest of its layer", specs)):
            spans = missing(store, [spec.file for spec in some])
            size = sum(length for _, _, length in spans)
            seconds = timed(lambda spans=spans: require(store, spans))
            ratio = seconds * rate / max(size, 1)
            row = f"{what}, {when} | {size / 1e6:.1f} MB | {seconds:.2f} | {ratio:.2f}"
            print(f"| {row} |", flush=True)


Part = tuple[PurePosixPath, int, int]
"""A file, and start and length of bytes of it."""


def missing(store: Arriving, names: list[str]) -> list[Part]:
    """The parts of some files that have not arrived yet, by pieces."""
    layout = store.layout()
    parts = []
    for name in names:
        file = layout.file(PurePosixPath("ckpt-0", name))
        pieces = layout.pieces_over(file)
        there = store.demand.proven(pieces)
        parts += [
            (file.path, part.offset, part.length)
            for piece in pieces
            if piece not in there
            for part in layout.segments(piece)
            if part.file == file
        ]
    return parts


def require(store: Arriving, parts: list[Part]) -> None:
    """Demand parts of files, and wait for all of them."""
    for part in parts:
        store.expect(*part, at_once=True)
    for part in parts:
        store.require(*part)


def timed(act: Callable[[], object]) -> float:
    """The seconds that something takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=64)
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--piece-kib", type=int, default=32)
    options.add_argument("--rate", type=int, default=2_000_000, help="bytes a second")
    chosen = options.parse_args()
    config = GrokConfig(
        vocab_size=512, emb_size=chosen.width, num_layers=chosen.layers, num_q_heads=8,
        num_kv_heads=8, key_size=chosen.width // 8, widening_factor=8, sequence_len=64,
        attn_output_multiplier=0.2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="grokfetch-bench-") as name:
        made = release(Path(name), config, chosen.piece_kib << 10)
        pieces = len(parse_info(made.torrent.info, made.torrent.piece_layers).hashes) // 20
        print(
            f"{made.manifest.size / 1e6:.0f} MB in {len(made.manifest.files)} files and "
            f"{pieces:,} pieces, {chosen.rate / 1e6:g} MB/s"
        )
        shares(made)
        token = first_token(made, chosen.rate, Path(name, "token"))
        print(
            "| demanded | bytes | seconds | over those at the link's rate |\n"
            "| --- | --- | --- | --- |"
        )
        asked = demands(made, chosen.rate, Path(name, "demands"))
        idle(made, chosen.rate, Path(name, "idle"))
        plain = whole(made, chosen.rate, Path(name, "whole"))
        print(
            f"the whole download took {plain:.1f} s, {token / plain:.3f} times as long with a "
            f"token and {asked / plain:.3f} times with demands"
        )


if __name__ == "__main__":
    main()
