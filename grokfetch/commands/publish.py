"""`grokfetch publish`: a folder becomes a torrent, a magnet link and a manifest for others."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.manifest import (
    FIRST_SHARD,
    TOKENIZER,
    find_checkpoint,
    read_config,
    write_file,
)
from grokfetch.commands.options import (
    Goal,
    goal_options,
    plain_option,
    state_option,
    swarm_options,
)
from grokfetch.commands.seed import share
from grokfetch.commands.value_types import Integer
from grokfetch.errors import Contradiction, StateLocked, StorageFailed, storage_failed
from grokfetch.events import Hashed
from grokfetch.fetch.swarm import SwarmSettings
from grokfetch.folder.known import keep_published, made_here
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, ManifestFile, TokenizerSource, encode
from grokfetch.output.progress import Bar
from grokfetch.output.terminal import plain
from grokfetch.torrent import create as making
from grokfetch.torrent.create import Made
from grokfetch.torrent.listing import leftovers, list_files
from grokfetch.torrent.metainfo import TorrentFile, encode_torrent
from grokfetch.torrent.names import look_alikes, with_ending
from grokfetch.units import bytes_text, seconds_text

LARGEST_PIECE = 1 << 30


Checked = Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[str, ...]]


def _addresses(*schemes: str) -> Checked:
    """A callback that refuses what is not an address of one of these schemes."""

    def check(_: click.Context, __: click.Parameter, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            try:
                sound = urlsplit(url).scheme in schemes and urlsplit(url).hostname
            except ValueError:
                sound = None
            if not sound:
                raise click.BadParameter(f"{url!r:.100} is not a {' or '.join(schemes)} address")
        return urls

    return check


def _power_of_two(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
    if value is not None and value & (value - 1):
        raise click.BadParameter("must be a power of two")
    return value


@click.command(
    cls=Explained,
    examples=(
        "grokfetch publish my-model",
        "grokfetch publish my-model --tracker udp://tracker.example.org:1337/announce",
    ),
)
@click.argument(
    "folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option(
    "--output",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write; beside DIR if not given.",
)
@click.option(
    "--tracker",
    "trackers",
    metavar="URL",
    callback=_addresses("udp", "http", "https"),
    multiple=True,
    help="Where peers can be asked for.",
)
@click.option(
    "--web-seed",
    "web_seeds",
    metavar="URL",
    callback=_addresses("http", "https"),
    multiple=True,
    help="A folder on the web that holds a copy of DIR under its name.",
)
@click.option(
    "--piece-length",
    metavar="BYTES",
    type=Integer(16 * 1024, LARGEST_PIECE),
    callback=_power_of_two,
    help="A power of two; by default what makes at most 20,000 pieces.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Hyperparameters of the checkpoint as JSON; the official model's if not given.",
)
@click.option(
    "--v1",
    "v1_only",
    is_flag=True,
    help="Make a torrent of BitTorrent v1 only, for clients that cannot read hybrids, such as "
    "Transmission 3 and aria2 1.36; it has another info hash.",
)
@click.option(
    "--leftovers",
    "with_leftovers",
    is_flag=True,
    help="Publish also what other programs leave beside the payload: .DS_Store, ._*, "
    ".cache/huggingface.",
)
@click.option("--seed", "go_on", is_flag=True, help="Share it with others afterwards.")
@goal_options
@swarm_options
@plain_option
@state_option
def publish(
    folder: Path,
    *,
    output: Path | None,
    trackers: tuple[str, ...],
    web_seeds: tuple[str, ...],
    piece_length: int | None,
    config: Path | None,
    v1_only: bool,
    with_leftovers: bool,
    go_on: bool,
    goal: Goal,
    swarm: SwarmSettings,
    state: Path | None,
) -> None:
    """Make a torrent, a magnet link and a manifest of DIR, so that others can fetch it.

    Writes NAME.torrent (BitTorrent v1 and v2 in one) and NAME.json, and prints the magnet link.
    Without official shards or --config, DIR is any folder and the manifest one of plain files.
    Afterwards verify, status, run and seed work on DIR, and --seed goes on sharing it.
    """
    if goal != Goal() and not go_on:
        raise click.UsageError("--ratio and --for go with --seed")
    start = time.perf_counter()
    folder = folder.resolve()
    target = folder.parent if output is None else output.resolve()
    if target.is_relative_to(folder):
        raise click.UsageError("--output must not lie in DIR, or it would be published too")
    store = Store(folder, None if state is None else state.resolve())
    if state is not None and store.state.is_relative_to(folder):
        raise click.UsageError("--state must not lie in DIR, or it would be published too")
    with _settled(Store(folder)), _settled(store):
        described = _describe(folder, config)
        hashing = partial(making.make, trackers=trackers, web_seeds=web_seeds, v1_only=v1_only)
        left_out = [] if with_leftovers else leftovers(folder)
        published = _make(folder, list_files(folder, left_out), piece_length, hashing)
    magnet = magnet_of(published.torrent, folder.name, sum(file.size for file in published.files))
    manifest = _complete(described, published, magnet)
    torrent_path, manifest_path = (
        target / with_ending(folder.name, ending) for ending in (".torrent", ".json")
    )
    _write(published.torrent, torrent_path, manifest, manifest_path)
    click.echo(
        f"{torrent_path} and {manifest_path}: {len(manifest.files)} files, "
        f"{len(manifest.tensors)} tensors, {bytes_text(manifest.size)} "
        f"in {seconds_text(time.perf_counter() - start)}",
        err=True,
    )
    if left_out:
        click.echo(
            f"left out: {left_out[0]}{' and others' if left_out[1:] else ''}, which other programs"
            " leave in folders; --leftovers publishes that too",
            err=True,
        )
    click.echo(magnet)
    _keep(store, published, manifest, must=go_on or state is not None)
    if go_on:
        share(store, swarm, goal)


def _keep(store: Store, made: Made, manifest: Manifest, *, must: bool) -> None:
    """Make the folder known to the other commands; `must` says that a failure is an error."""
    try:
        with store.lock():
            keep_published(store, made, manifest)
    except (StorageFailed, StateLocked, Contradiction) as error:
        if must:
            raise
        click.echo(f"note: {error}", err=True)


@contextlib.contextmanager
def _settled(store: Store) -> Iterator[None]:
    """Nobody writes the folder meanwhile; what was fetched into it is proven.

    A folder without our state stays without it until it is hashed.

    Raises:
        StateLocked: a fetch is writing it.
        NotProven: a fetch of it is not complete.
    """
    if not store.state.is_dir():
        yield
        return
    with store.lock(exclusive=False):
        if store.manifest_or_none() is not None and not made_here(store):
            store.require_all()
        yield


def _describe(folder: Path, config: Path | None) -> Manifest:
    """The manifest without files and digests: name, and tensors where it is a checkpoint."""
    if config is None and next(folder.rglob(FIRST_SHARD), None) is None:
        return Manifest(folder.name, ())
    from loader.weights.inventory import found

    checkpoint = find_checkpoint(folder, read_config(config))
    _, tensors = found(checkpoint, folder.parent)
    return Manifest(folder.name, (), tensors=tensors, model=checkpoint.config.to_mapping())


def _make(
    folder: Path,
    files: Sequence[tuple[PurePosixPath, int]],
    piece_length: int | None,
    hashing: Callable[..., Iterator[Hashed | Made]],
) -> Made:
    _warn_of_look_alikes(path for path, _ in files)
    sizes = [size for _, size in files]
    length = piece_length or making.suitable_piece_length(sizes)
    with Bar("hash", plain=plain()) as bar:
        for event in hashing(folder, files, length):
            if isinstance(event, Hashed):
                bar.show(event.done // 2, sum(sizes))
            else:
                torrent = event
    return torrent


def _warn_of_look_alikes(paths: Iterable[PurePosixPath]) -> None:
    for one, other, *_ in look_alikes(paths):
        click.echo(
            f"warning: {str(one)!r} and {str(other)!r} are the same name on many file systems, on "
            "macOS and Windows for example; there nobody can fetch this",
            err=True,
        )


def magnet_of(torrent: TorrentFile, name: str, size: int) -> str:
    """The link with the info hashes there are, name, size in bytes, trackers and web seeds."""
    pairs = [("dn", name), ("xl", str(size))]
    pairs += [("tr", url) for url in torrent.trackers]
    pairs += [("ws", url) for url in torrent.web_seeds]
    topics = f"xt=urn:btih:{torrent.v1}"
    if torrent.v2 is not None:
        topics += f"&xt=urn:btmh:1220{torrent.v2}"
    return f"magnet:?{topics}" + "".join(f"&{key}={quote(value, safe='')}" for key, value in pairs)


def _complete(described: Manifest, made: Made, magnet: str) -> Manifest:
    files = tuple(ManifestFile(file.path, file.size, file.sha256) for file in made.files)
    return dataclasses.replace(
        described,
        files=files,
        info_hash=made.torrent.info_hash,
        magnet=magnet,
        tokenizer=_tokenizer(PurePosixPath(described.name) / TOKENIZER, files),
    )


def _tokenizer(path: PurePosixPath, files: Sequence[ManifestFile]) -> TokenizerSource | None:
    """The tokenizer among the files, which the torrent brings like any other."""
    file = next((file for file in files if file.path == path), None)
    if file is None or file.sha256 is None:
        return None
    return TokenizerSource(path, file.size, file.sha256)


def _write(torrent: TorrentFile, torrent_path: Path, manifest: Manifest, path: Path) -> None:

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_failed(error, path.parent) from error
    write_file(torrent_path, encode_torrent(torrent))
    write_file(path, encode(manifest))
