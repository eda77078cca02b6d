"""`grokfetch publish`: make a torrent, a magnet link and a manifest of a folder."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.options import (
    SWARM_NAMES,
    config_option,
    plain_option,
    state_option,
    swarm_options,
)
from grokfetch.commands.publish_mirror import MirrorSource, publish_mirror
from grokfetch.commands.published import describe, put_out, warn_of_look_alikes
from grokfetch.commands.seed import Goal, share, sharing_options
from grokfetch.commands.value_types import Integer
from grokfetch.errors import Contradiction, StateLocked, StorageFailed
from grokfetch.events import Hashed
from grokfetch.fetch.mirror.addresses import PATH, unusable
from grokfetch.fetch.swarm import SwarmSettings
from grokfetch.fetch.wanted import Network
from grokfetch.folder.known import keep_published, made_here
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest
from grokfetch.output.progress import Bar
from grokfetch.output.terminal import plain
from grokfetch.torrent import create as making
from grokfetch.torrent.create import Made
from grokfetch.torrent.listing import leftovers, list_files

LARGEST_PIECE = 1 << 30


Checked = Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[str, ...]]


def _addresses(*schemes: str) -> Checked:
    """A callback that refuses anything but a URL with one of these schemes."""

    def check(_: click.Context, __: click.Parameter, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            try:
                sound = urlsplit(url).scheme in schemes and urlsplit(url).hostname
            except ValueError:
                sound = None
            if not sound:
                raise click.BadParameter(f"{url!r:.100} is not a {' or '.join(schemes)} URL")
        return urls

    return check


def _power_of_two(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
    if value is not None and value & (value - 1):
        raise click.BadParameter("must be a power of two")
    return value


class FolderOrTemplate(click.Path):
    """An existing folder, or a URL with `{path}` in it, which stays a string."""

    def convert(  # noqa: D102 - as click has it
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if not isinstance(value, str) or not re.match("https?://", value, re.IGNORECASE):
            return super().convert(value, param, ctx)
        why = unusable(value, stranger=False)
        if why is None and value.count(PATH) != 1:
            why = "it must contain {path} once, where the path of a file belongs"
        return value if why is None else self.fail(f"{value!r:.100}: {why}", param, ctx)


@click.command(
    cls=Explained,
    examples=(
        "grokfetch publish my-model --tracker udp://tracker.example.org:1337/announce",
        "grokfetch publish 'https://example.org/my-model/{path}' --files list.txt",
    ),
    groups={
        "What to publish": ("config", "with_leftovers"),
        "Files at a URL": ("listed", "manifest_file", "name"),
        "The torrent": ("output", "trackers", "web_seeds", "piece_length", "v1_only"),
        "Seeding afterwards": ("go_on", "ratio", "seconds", "up", "down", *SWARM_NAMES),
        "Output and state": ("plain", "state"),
    },
)
@click.argument(
    "source", metavar="DIR", type=FolderOrTemplate(file_okay=False, exists=True, path_type=Path)
)
@click.option(
    "--files",
    "listed",
    metavar="LIST",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="List of the files at a URL: a text file with one path per line.",
)
@click.option(
    "--manifest",
    "manifest_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The same from a manifest, whose sizes and sha256 must be right.",
)
@click.option(
    "--name",
    help="Name of the torrent's folder, for a URL; by default taken from the manifest or the URL.",
)
@click.option(
    "--output",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write; by default beside DIR, or for a URL in the current folder.",
)
@click.option(
    "--tracker",
    "trackers",
    metavar="URL",
    callback=_addresses("udp", "http", "https"),
    multiple=True,
    help="Tracker to put into the torrent; may be repeated.",
)
@click.option(
    "--web-seed",
    "web_seeds",
    metavar="URL",
    callback=_addresses("http", "https"),
    multiple=True,
    help="URL of a folder that contains a copy of DIR under its name; may be repeated.",
)
@click.option(
    "--piece-length",
    metavar="BYTES",
    type=Integer(16 * 1024, LARGEST_PIECE),
    callback=_power_of_two,
    help="A power of two; by default chosen so that there are at most 20,000 pieces.",
)
@config_option
@click.option(
    "--v1",
    "v1_only",
    is_flag=True,
    help="Make a torrent of BitTorrent v1 only, for clients that cannot read hybrid torrents, "
    "such as Transmission 3 and aria2 1.36; it has another info hash.",
)
@click.option(
    "--leftovers",
    "with_leftovers",
    is_flag=True,
    help="Also publish files that other programs leave in folders: .DS_Store, ._*, "
    ".cache/huggingface.",
)
@sharing_options
@swarm_options
@plain_option
@state_option
def publish(
    source: Path | str,
    *,
    listed: Path | None,
    manifest_file: Path | None,
    name: str | None,
    output: Path | None,
    trackers: tuple[str, ...],
    web_seeds: tuple[str, ...],
    piece_length: int | None,
    config: Path | None,
    v1_only: bool,
    with_leftovers: bool,
    sharing: Goal | None,
    swarm: SwarmSettings,
    state: Path | None,
) -> None:
    """Make a torrent, a magnet link and a manifest of DIR, so that others can fetch it.

    Writes NAME.torrent (BitTorrent v1 and v2 in one) and NAME.json, and prints the magnet link.
    DIR can be any folder; without official shards or --config, the manifest lists plain files.
    Afterwards verify, status, run and seed work on DIR. --seed shares it right away.

    DIR may be a URL in which {path} stands for the path of a file. Its files are hashed while they
    are downloaded, and only hashes are kept. The URL becomes a web seed and a mirror. If it is
    interrupted, the same command resumes; files in progress start over.
    """
    start = time.perf_counter()
    if isinstance(source, str):
        if v1_only or with_leftovers or sharing is not None or state is not None:
            raise click.UsageError("--v1, --leftovers, --seed and --state need a folder, not a URL")
        publish_mirror(
            MirrorSource(source, listed, manifest_file, name, config, piece_length),
            Path.cwd() if output is None else output.resolve(),
            Network(swarm).mirror_settings(),
            trackers=trackers,
            web_seeds=web_seeds,
            start=start,
        )
        return
    if listed is not None or manifest_file is not None or name is not None:
        raise click.UsageError("--files, --manifest and --name need a URL, not a folder")
    folder = source.resolve()
    target = folder.parent if output is None else output.resolve()
    if target.is_relative_to(folder):
        raise click.UsageError("--output must not be inside DIR, or it would be published too")
    store = Store(folder, None if state is None else state.resolve())
    if state is not None and store.state.is_relative_to(folder):
        raise click.UsageError("--state must not be inside DIR, or it would be published too")
    with _settled(Store(folder)), _settled(store):
        described = describe(folder, config)
        hashing = partial(making.make, trackers=trackers, web_seeds=web_seeds, v1_only=v1_only)
        left_out = [] if with_leftovers else leftovers(folder)
        published = _make(folder, list_files(folder, left_out), piece_length, hashing)
    magnet, manifest = put_out(described, published, target, start)
    if left_out:
        click.echo(
            f"left out: {left_out[0]}{' and others' if left_out[1:] else ''}, which other programs"
            " leave in folders; to publish these too: --leftovers",
            err=True,
        )
    click.echo(magnet)
    _keep(store, published, manifest, must=sharing is not None or state is not None)
    if sharing is not None:
        share(store, swarm, sharing)


def _keep(store: Store, made: Made, manifest: Manifest, *, must: bool) -> None:
    """Make the folder known to the other commands; with `must`, a failure is an error."""
    try:
        with store.lock():
            keep_published(store, made, manifest)
    except (StorageFailed, StateLocked, Contradiction) as error:
        if must:
            raise
        click.echo(f"note: {error}", err=True)


@contextlib.contextmanager
def _settled(store: Store) -> Iterator[None]:
    """Keep others from writing the folder; everything that was fetched into it must be proven.

    A folder without our state gets none before it is hashed.

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


def _make(
    folder: Path,
    files: Sequence[tuple[PurePosixPath, int]],
    piece_length: int | None,
    hashing: Callable[..., Iterator[Hashed | Made]],
) -> Made:
    warn_of_look_alikes(path for path, _ in files)
    sizes = [size for _, size in files]
    length = piece_length or making.suitable_piece_length(sizes)
    with Bar("hash", plain=plain()) as bar:
        for event in hashing(folder, files, length):
            if isinstance(event, Hashed):
                bar.show(event.done // 2, sum(sizes))
            else:
                torrent = event
    return torrent
