"""`grokfetch fetch`: from a magnet link, a torrent or a manifest to proven bytes on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grokfetch.commands.hosts import share_options, share_request
from grokfetch.commands.mirroring import Mirrors, mirror_options
from grokfetch.commands.reporting import ended, json_option, reporter
from grokfetch.commands.seed import Goal, goal_options, share
from grokfetch.commands.state_option import state_option
from grokfetch.commands.swarm_options import swarm_options
from grokfetch.errors import SourceInvalid, TorrentInvalid
from grokfetch.output.terminal import plain_option
from grokfetch.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from grokfetch.events import Outcome
    from grokfetch.fetch import Asked
    from grokfetch.fetch.source import PieceSource
    from grokfetch.fetch.swarm import SwarmSettings
    from grokfetch.folder.store import Store
    from grokfetch.manifest.schema import Manifest
    from grokfetch.torrent.magnet import Magnet
    from grokfetch.torrent.metainfo import TorrentFile
    from loader.weights.host_share import Share


MOST_EXTRAS = 10
"""Files beyond the manifest's that are named one by one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What SOURCE stands for: where the pieces come from, and what they must be if that is known.

    `begun` is the folder of an earlier fetch if SOURCE is one.
    """

    origin: Magnet | TorrentFile
    manifest: Manifest | None
    begun: Path | None = None


@click.command()
@click.argument("source", required=False)
@click.option("--to", "folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    "manifest_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What the payload must be; else a shipped manifest of that torrent, if there is one.",
)
@swarm_options
@mirror_options
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Give up after so long without a byte.",
)
@click.option("--layers", metavar="0-3,7", help="Only these layers, and what lies outside layers.")
@click.option("--experts", metavar="0,4", help="Of each mixture of experts only these.")
@click.option(
    "--only",
    metavar="GLOB",
    multiple=True,
    help="Only tensors or files whose name matches; may be repeated.",
)
@share_options
@click.option("--all", "everything", is_flag=True, help="All that earlier runs left out, too.")
@click.option("--repair", is_flag=True, help="Read everything back first; fetch what is bad again.")
@click.option("--seed", "go_on", is_flag=True, help="Share it with others afterwards.")
@goal_options
@plain_option
@state_option
@json_option
def fetch(
    source: str | None,
    folder: Path | None,
    manifest_file: Path | None,
    *,
    swarm: SwarmSettings,
    mirrors: Mirrors,
    timeout: float,
    layers: str | None,
    experts: str | None,
    only: tuple[str, ...],
    of_host: Share | None,
    everything: bool,
    repair: bool,
    go_on: bool,
    goal: Goal,
    state: Path | None,
) -> None:
    """Bring a checkpoint to DIR and prove every byte of it.

    SOURCE is a magnet link, a .torrent file, a manifest, or the DIR of a fetch begun before;
    without one it is Grok-1, 318 GB. Ctrl-C or a crash loses nothing: the same command goes on.

    --layers, --experts and --only narrow each other and ask for a part; each later run with them
    asks for more, and DIR remembers what was asked for. So do --num-hosts, --host-id and --mesh.
    """
    from grokfetch.fetch.swarm import Swarm
    from grokfetch.folder.store import Store

    known = None if manifest_file is None else read_manifest(manifest_file)
    wanted = resolve(source, known, state)
    target = folder or wanted.begun
    if target is None:
        raise click.UsageError("say where to: --to DIR")
    if goal != Goal() and not go_on:
        raise click.UsageError("--ratio and --for go with --seed")
    request = _request(layers, experts, only, of_host, everything=everything)
    store = Store(target, state)
    start = time.perf_counter()
    pieces = mirrors.beside(Swarm(wanted.origin, swarm), wanted.origin, store, wanted.manifest)
    outcome = bring(
        store, pieces, wanted.manifest, timeout_s=timeout, repair=repair, request=request
    )
    _name_extras(store, wanted.manifest)
    mirrors.bring_tokenizer(store)
    seconds = time.perf_counter() - start
    new = outcome.fetched or outcome.rehashed or repair
    size, selection = bytes_text(outcome.total), store.selection()
    of = "" if selection is None else f" ({selection})"
    ended(
        f"{target}: {size}{of} proven in {seconds_text(seconds)}"
        if new
        else f"{target}: complete, all {size}{of} were proven before",
        seconds,
        folder=str(target),
        **dataclasses.asdict(outcome),
    )
    if go_on:
        share(store, swarm, goal)


def _request(
    layers: str | None,
    experts: str | None,
    only: tuple[str, ...],
    of_host: Share | None,
    *,
    everything: bool,
) -> Asked | None:
    """What the options ask for, None if they do not say."""
    from grokfetch.manifest.selection import Request, parse_numbers

    some = layers is not None or experts is not None or bool(only)
    if (everything and (some or of_host)) or (some and of_host):
        raise click.UsageError("--all, and what a host needs, go with no other choice")
    if everything:
        return Request()
    if of_host is not None:
        return functools.partial(share_request, of_host)
    if not some:
        return None

    def numbers(text: str | None) -> tuple[int, ...] | None:
        return None if text is None else parse_numbers(text)

    return Request(numbers(layers), numbers(experts), only)


def bring(
    store: Store,
    source: PieceSource,
    manifest: Manifest | None,
    *,
    timeout_s: float,
    repair: bool = False,
    request: Asked | None = None,
) -> Outcome:
    """Fetch with a bar; findings and notices go above it."""
    from grokfetch import fetch as fetching
    from grokfetch.events import Outcome

    limits = fetching.Limits(metadata_s=timeout_s, stall_s=timeout_s)
    events = fetching.fetch(
        store, source, manifest=manifest, limits=limits, repair=repair, request=request
    )
    with reporter("fetch") as sink, contextlib.closing(events):
        for event in events:
            sink.take(event)
            if isinstance(event, Outcome):
                outcome = event
        for warning in store.warnings:
            sink.say(f"warning: {warning}")
    return outcome


def _name_extras(store: Store, manifest: Manifest | None) -> None:
    """List the files that the torrent has beyond those of the manifest a person fetched by."""
    extra = () if manifest is None else store.manifest().files[len(manifest.files) :]
    for file in extra[:MOST_EXTRAS]:
        click.echo(f"also in the torrent: {file.path}, {bytes_text(file.size)}", err=True)
    if len(extra) > MOST_EXTRAS:
        click.echo(f"also in the torrent: {len(extra) - MOST_EXTRAS} more files", err=True)


def resolve(source: str | None, manifest: Manifest | None, state: Path | None = None) -> Wanted:
    """What a SOURCE argument means.

    Args:
        source: a magnet link, or the path of a torrent, a manifest or a folder; None for Grok-1.
        manifest: what a person says the payload must be.
        state: where the state of a folder lies, if it is not in the folder.

    Raises:
        SourceInvalid: it is none of these.
        TorrentInvalid, ManifestInvalid: it is one, but malformed.
    """
    from grokfetch.folder.store import Store
    from grokfetch.manifest.shipped import grok_1
    from grokfetch.torrent.magnet import parse_magnet

    if source is None:
        return _from_manifest(manifest or grok_1(), "the manifest")
    if source.startswith("magnet:"):
        magnet = parse_magnet(source)
        return Wanted(magnet, manifest or _shipped(magnet.info_hash))
    path = Path(source)
    if not source:
        raise SourceInvalid("SOURCE is empty", hint="leave it out for Grok-1")
    if path.is_dir():
        return begun_in(Store(path, state), manifest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceInvalid(
            f"no magnet link, and cannot be read as a file ({error.strerror})", path=source
        ) from None
    return _from_file(data, source, manifest)


def _from_file(data: bytes, name: str, manifest: Manifest | None) -> Wanted:
    from grokfetch.manifest.schema import parse
    from grokfetch.torrent.metainfo import parse_torrent

    if data.lstrip()[:1] == b"{":
        return _from_manifest(parse(data, name) if manifest is None else manifest, name)
    try:
        torrent = parse_torrent(data)
    except TorrentInvalid as error:
        raise TorrentInvalid(error.what, path=name) from None
    return Wanted(torrent, manifest or _shipped(torrent.v1) or _shipped(torrent.v2))


def begun_in(store: Store, manifest: Manifest | None = None) -> Wanted:
    """What a fetch that was begun in a folder stands for.

    Raises:
        SourceInvalid: none was.
    """
    torrent, earlier = store.torrent(), store.manifest_or_none()
    if torrent is not None:
        return Wanted(torrent, manifest, store.root)
    if earlier is None:
        raise SourceInvalid(
            "no fetch was begun in this folder",
            path=store.root,
            hint="name a SOURCE, and --to DIR",
        )
    found = _from_manifest(manifest or earlier, str(store.root))
    return dataclasses.replace(found, begun=store.root)


def _from_manifest(manifest: Manifest, name: str) -> Wanted:
    from grokfetch.torrent.magnet import parse_magnet

    if manifest.magnet is None:
        raise SourceInvalid(
            "the manifest has no magnet link",
            path=name,
            hint="name a SOURCE, and the manifest with --manifest",
        )
    return Wanted(parse_magnet(manifest.magnet), manifest)


def _shipped(info_hash: str | None) -> Manifest | None:
    from grokfetch.manifest.shipped import shipped

    return next((known for known in shipped() if info_hash and known.info_hash == info_hash), None)


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        ManifestInvalid: it is malformed.
        SourceInvalid: it cannot be read.
    """
    from grokfetch.manifest.schema import parse

    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceInvalid(f"cannot be read: {error.strerror}", path=path) from None
