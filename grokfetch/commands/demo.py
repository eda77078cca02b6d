"""`grokfetch demo`: the whole road on one machine, without the internet."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from grokfetch.commands.fetch import bring
from grokfetch.commands.loading import Loading, load
from grokfetch.commands.verify import check_bytes, check_tensors
from grokfetch.errors import Damaged, StorageFailed
from grokfetch.progress import bytes_text, seconds_text

if TYPE_CHECKING:
    from grokfetch.manifest import Manifest
    from grokfetch.store import Store
    from loader.schema import GrokConfig

NAME = "grok-demo"
SHARDS = PurePosixPath("ckpt-0")
PIECE_LENGTH = 64 * 1024
TIMEOUT_S = 30.0
PROMPT = (181, 13, 437)
NEW_TOKENS = 16


@click.command()
@click.option(
    "--keep",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep all files in this folder, which must be new or empty.",
)
def demo(keep: Path | None) -> None:
    """Walk from a magnet link to tokens with a small model on this machine.

    Writes a checkpoint with random weights in the official format, seeds it from a second process,
    fetches it by its magnet link over 127.0.0.1, verifies it, loads it onto all devices, generates.
    """
    with _folder(keep) as folder:
        _walk(folder)
        if keep is not None:
            click.echo(f"kept: {keep}")


def _walk(folder: Path) -> None:
    from grokfetch.store import Store
    from loader.checkpoint import open_checkpoint
    from loader.generate import Sampling

    steps = _Steps()
    config = _config()
    published = folder / "published"
    manifest = _publish(published, config)
    steps.done(
        f"wrote {len(manifest.files)} shards in the official format, "
        f"{bytes_text(manifest.size)}, and their torrent of {PIECE_LENGTH // 1024} KiB pieces"
    )
    with _seeding(published) as port:
        magnet = f"{manifest.magnet}&x.pe=127.0.0.1:{port}"
        steps.done(f"a second process seeds it: {magnet}")
        store = Store(folder / "fetched")
        pieces = _fetch(store, magnet, manifest)
        steps.done(
            f"fetched metadata and {pieces} pieces by that magnet link, each read back and proven"
        )
    summary = check_bytes(store)
    if not summary.complete or check_tensors(store):
        raise Damaged("the fetched checkpoint did not verify", path=store.root)
    steps.done(f"verified {bytes_text(summary.proven)} by its piece hashes, and every tensor")
    with store.lock(exclusive=False):
        engine = load(open_checkpoint(store), Loading("float32"))
        steps.done(f"loaded {len(manifest.tensors)} tensors, int8 kept int8")
        tokens = list(engine.generate(PROMPT, NEW_TOKENS, Sampling()))
    steps.done(f"compiled the model and generated {len(tokens)} tokens")
    click.echo(f"\nprompt {' '.join(map(str, PROMPT))}\ntokens {' '.join(map(str, tokens))}")
    click.echo("(random weights, so the tokens mean nothing; the real ones: fetch --to DIR)")


class _Steps:
    """Numbers what has been done and says how long each step took."""

    def __init__(self) -> None:
        self._count = 0
        self._start = time.perf_counter()

    def done(self, what: str) -> None:
        now = time.perf_counter()
        self._count += 1
        click.echo(f"{self._count}. {what} ({seconds_text(now - self._start)})")
        self._start = now


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="grokfetch-demo-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise StorageFailed("not a new or empty folder", path=keep, hint="choose another one")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def _config() -> GrokConfig:
    """A small Grok-1: same architecture, grouped queries and 8 experts, 4 layers."""
    from loader.schema import GrokConfig

    return GrokConfig(
        vocab_size=1024,
        sequence_len=256,
        emb_size=128,
        widening_factor=2.0,
        key_size=16,
        num_q_heads=16,
        num_kv_heads=8,
        num_layers=4,
        attn_output_multiplier=0.25,
        embedding_multiplier_scale=11.313708498984761,
        output_multiplier_scale=1.0,
    )


def _publish(folder: Path, config: GrokConfig) -> Manifest:
    """Write the checkpoint, its torrent and its manifest, as somebody who publishes one would."""
    from grokfetch.manifest import Manifest, encode
    from grokfetch.metainfo import parse_torrent
    from grokfetch.swarm import make_torrent
    from loader.inventory import expected
    from loader.synthetic import write_checkpoint

    write_checkpoint(folder / NAME / SHARDS, config)
    torrent = make_torrent(folder / NAME, PIECE_LENGTH)
    folder.joinpath(f"{NAME}.torrent").write_bytes(torrent)
    files, tensors = expected(config, SHARDS)
    info_hash = parse_torrent(torrent).info_hash
    manifest = Manifest(
        NAME,
        files,
        info_hash=info_hash,
        magnet=f"magnet:?xt=urn:btih:{info_hash}&dn={NAME}",
        tensors=tensors,
        model=config.to_mapping(),
    )
    folder.joinpath(f"{NAME}.json").write_bytes(encode(manifest))
    return manifest


@contextlib.contextmanager
def _seeding(folder: Path) -> Iterator[int]:
    """A process that seeds what `_publish` wrote; yields its port."""
    # A fresh interpreter: a forked one would share this one's threads and locks.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    seeder = context.Process(target=_seed, args=(folder, theirs), daemon=True)
    seeder.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        seeder.join()


def _seed(folder: Path, pipe: Connection) -> None:
    from grokfetch.swarm import SwarmSettings, seed

    torrent = folder.joinpath(f"{NAME}.torrent").read_bytes()
    with seed(torrent, folder, SwarmSettings.loopback()) as seeder:
        pipe.send(seeder.port)
        # The other end closes when the demo is over, or has died.
        with contextlib.suppress(EOFError):
            pipe.recv()


def _fetch(store: Store, magnet: str, manifest: Manifest) -> int:
    """Fetch by the magnet link alone; the number of pieces that came over the wire."""
    from grokfetch.magnet import parse_magnet
    from grokfetch.swarm import Swarm, SwarmSettings

    swarm = Swarm(parse_magnet(magnet), SwarmSettings.loopback())
    return bring(store, swarm, manifest, timeout_s=TIMEOUT_S).fetched
