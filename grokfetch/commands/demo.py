"""`grokfetch demo`: from a magnet link to tokens on one machine, without the internet."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import signal
import tempfile
import textwrap
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from grokfetch.commands.fetch import bring
from grokfetch.commands.help import Explained
from grokfetch.commands.loading import loading_shown
from grokfetch.commands.tokenizer import find_tokenizer
from grokfetch.commands.verify import check_bytes, check_tensors
from grokfetch.errors import Damaged, StorageFailed, storage_errors
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.folder.store import Store
from grokfetch.interruption import Held
from grokfetch.manifest.schema import Manifest, parse
from grokfetch.manifest.shipped import demo_folder
from grokfetch.torrent.magnet import parse_magnet
from grokfetch.units import bytes_text, seconds_text
from loader.devices.jax_environment import require_jax

if TYPE_CHECKING:
    from loader.inference.engine import Engine

NAME = "grok-demo"
TEXT = PurePosixPath(NAME, "text.txt")
TIMEOUT_S = 30.0
PROMPT = "In the demo"
MOST_TOKENS = 200
"""More tokens than the text has after the prompt; the model stops by itself at its end."""
WIDTH = 80
LOOK = "keep the files and check them: grokfetch demo --keep DIR; grokfetch verify DIR/fetched"


@click.command(
    cls=Explained,
    examples=(
        "grokfetch demo",
        "grokfetch demo --keep grok-demo",
    ),
)
@click.option(
    "--keep",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep all files in this folder, which must be new or empty.",
)
def demo(keep: Path | None) -> None:
    """Go from a magnet link to tokens with a small model on this machine.

    Copies a checkpoint that comes with grokfetch, a Grok-1 of 1.2 million parameters that has
    memorised a text, seeds it from a second process, fetches it by its magnet link over 127.0.0.1,
    verifies it, loads it onto all devices and generates the text.
    """
    require_jax()
    with _folder(keep) as folder:
        _walk(folder)
        if keep is not None:
            click.echo(f"kept: {keep}")


def _walk(folder: Path) -> None:
    from loader.inference.loading import load_model
    from loader.weights.checkpoint import open_checkpoint

    steps = _Steps()
    published = folder / "published"
    manifest = _publish(published)
    steps.done(
        f"copied {len(manifest.tensors)} shards in the official format, a tokenizer and a text, "
        f"{bytes_text(manifest.size)}, and their torrent"
    )
    with _seeding(published) as port:
        magnet = f"{manifest.magnet}&x.pe=127.0.0.1:{port}"
        steps.done(f"a second process seeds it: {magnet}")
        store = Store(folder / "fetched")
        pieces = _fetch(store, magnet, manifest)
        steps.done(
            f"fetched the metadata and {pieces} pieces by that magnet link, each read back and "
            "proven"
        )
    summary = check_bytes(store)
    if not summary.complete or check_tensors(store):
        raise Damaged("the fetched checkpoint did not verify", path=store.root, hint=LOOK)
    steps.done(f"verified {bytes_text(summary.proven)} by its piece hashes, and every tensor")
    with store.lock(exclusive=False):
        with loading_shown() as report:
            engine = load_model(open_checkpoint(store), dtype="float32", report=report)
        steps.done(f"loaded {len(manifest.tensors)} tensors, int8 weights kept as int8")
        text, count = _recite(store, engine)
    steps.done(f"compiled the model and generated {count} tokens, word for word as trained")
    click.echo(f"\n{text}\n")
    click.echo(
        "(a small model that has memorised one text; for the real one: grokfetch fetch --to DIR)"
    )
    click.echo(
        "(llama.cpp can recite it, too: grokfetch demo --keep DIR; "
        "grokfetch export DIR/fetched OUT --pad)"
    )


class _Steps:
    """Numbers the finished steps and says how long each one took."""

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
        try:
            temporary = tempfile.TemporaryDirectory(prefix="grokfetch-demo-")
        except OSError as error:
            raise StorageFailed(
                f"cannot create temporary files: {error.strerror}",
                hint="set TMPDIR=/folder, or keep all files in a folder: --keep DIR",
            ) from error
        with temporary as folder:
            yield Path(folder)
        return
    with storage_errors(keep):
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise StorageFailed("not a new or empty folder", path=keep, hint="choose another one")
        keep.mkdir(parents=True, exist_ok=True)
    yield keep


def _publish(folder: Path) -> Manifest:
    """Lay out the checkpoint that comes with grokfetch, as `grokfetch publish` left it."""
    with storage_errors(folder):
        # Contents only: an installation may be read-only, its copy must not be.
        for source in demo_folder().rglob("*"):
            target = folder / source.relative_to(demo_folder())
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        text = folder.joinpath(f"{NAME}.json").read_bytes()
    return parse(text, f"{NAME}.json")


def _recite(store: Store, engine: Engine) -> tuple[str, int]:
    """The text that the model generates, wrapped, and the number of its tokens.

    Raises:
        Damaged: it is not the text that the model has memorised.
    """
    from loader.inference.engine import Sampling

    tokenizer = find_tokenizer(store, None)
    tokens = list(engine.generate(tokenizer.encode(PROMPT), MOST_TOKENS, Sampling()))
    stream = tokenizer.stream()
    text = "".join([*map(stream.push, tokens), stream.finish()])
    text_known = store.payload(TEXT).read_text(encoding="utf-8")
    if f"{PROMPT}{text}" not in " ".join(text_known.splitlines()):
        raise Damaged(
            f"the model did not recite its text, but: {text!r}", path=store.root, hint=LOOK
        )
    lines = textwrap.wrap(text.strip(), WIDTH, initial_indent="text    ", subsequent_indent=" " * 8)
    return "\n".join([f"prompt  {PROMPT}", *lines]), len(tokens)


@contextlib.contextmanager
def _seeding(folder: Path) -> Iterator[int]:
    """A process that seeds what `_publish` wrote; yields its port."""
    # A fresh interpreter: a forked one would share this one's threads and locks.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    seeder = context.Process(target=_seed, args=(folder, theirs), daemon=True)
    try:
        # An interruption between the start of a process and the first data sent to it would make
        # it fail with a traceback. Ctrl-C reaches every process of the terminal, so it stays
        # blocked in the seeder, which ends when this process does.
        with Held():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                seeder.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        yield ours.recv()
    finally:
        ours.close()
        if seeder.pid is not None:
            seeder.join()


def _seed(folder: Path, pipe: Connection) -> None:
    torrent = folder.joinpath(f"{NAME}.torrent").read_bytes()
    with (
        seed(torrent, folder, SwarmSettings.loopback()) as seeder,
        # The other end closes when the demo is over, or has died.
        contextlib.suppress(EOFError, BrokenPipeError),
    ):
        pipe.send(seeder.port)
        pipe.recv()


def _fetch(store: Store, magnet: str, manifest: Manifest) -> int:
    """Fetch by the magnet link alone; returns the number of pieces downloaded."""
    swarm = Swarm(parse_magnet(magnet), SwarmSettings.loopback())
    return bring(store, swarm, manifest, timeout_s=TIMEOUT_S).fetched
