"""`grokfetch fetch`: from a magnet link, a torrent or a manifest to proven bytes on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from pathlib import Path

import click

from grokfetch import fetch as fetching
from grokfetch.commands.help import Explained
from grokfetch.commands.host_options import share_options
from grokfetch.commands.hosts import share_request
from grokfetch.commands.options import (
    NETWORK_NAMES,
    json_option,
    manifest_option,
    network_options,
    part_options,
    plain_option,
    state_option,
    timeout_option,
)
from grokfetch.commands.seed import Goal, share, sharing_options
from grokfetch.commands.tokenizer import bring_tokenizer
from grokfetch.events import Outcome
from grokfetch.fetch import Asked
from grokfetch.fetch.mirror import Mirrors
from grokfetch.fetch.source import PieceSource
from grokfetch.fetch.wanted import Network, read_manifest, resolve
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest
from grokfetch.manifest.selection import Request
from grokfetch.output.reporting import ended, notice, reporter
from grokfetch.units import bytes_text, seconds_text
from loader.weights.host_share import Share

MOST_EXTRAS = 10
"""At most this many files that the manifest does not list are named one by one."""


@click.command(
    cls=Explained,
    examples=(
        "grokfetch fetch --to /data/grok-1 --layers 0-3",
        "grokfetch fetch 'magnet:?xt=urn:btih:...' --to /data/model",
    ),
    groups={
        "What to fetch": (
            *("folder", "manifest_file", "layers", "experts", "only", "everything", "repair"),
        ),
        "For one of several hosts": ("num_hosts", "host_id", "mesh"),
        "Peers and mirrors": NETWORK_NAMES,
        "Rates and timeout": ("up", "down", "timeout"),
        "Seeding afterwards": ("go_on", "ratio", "seconds"),
        "Output and state": ("json", "plain", "state"),
    },
    extra="SOURCE is one argument: put a magnet link in quotes",
)
@click.argument("source", required=False)
@click.option(
    "--to",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder to download into; by default SOURCE, if that is a DIR.",
)
@manifest_option
@network_options
@timeout_option
@part_options
@share_options
@click.option("--repair", is_flag=True, help="Read everything back first; fetch again what is bad.")
@sharing_options
@plain_option
@state_option
@json_option
def fetch(
    source: str | None,
    folder: Path | None,
    manifest_file: Path | None,
    *,
    network: Network,
    timeout: float,
    part: Request | None,
    of_host: Share | None,
    repair: bool,
    sharing: Goal | None,
    state: Path | None,
) -> None:
    """Download a checkpoint into DIR and prove every byte of it.

    SOURCE is a magnet link, an info hash, a .torrent file or a manifest, the https address of one
    of these files, or the DIR of an earlier fetch; without SOURCE it is Grok-1, 318 GB. Ctrl-C or
    a crash loses nothing: the same command resumes the fetch.

    --layers, --experts and --only select a part, and narrow each other; each later run with them
    adds to the selection, which DIR remembers. So do --num-hosts, --host-id and --mesh.
    """
    manifest = None if manifest_file is None else read_manifest(manifest_file)
    wanted = resolve(source, manifest, state, network)
    target = folder or wanted.begun
    if target is None:
        raise click.UsageError("no folder to download into: give --to DIR")
    request = _request(part, of_host) or wanted.request
    store = Store(target, state)
    start = time.perf_counter()
    for warning in wanted.warnings:
        notice(f"warning: {warning}")
    pieces = wanted.pieces(store, network)
    outcome = bring(
        store, pieces, wanted.manifest, timeout_s=timeout, repair=repair, request=request
    )
    _name_extras(store, wanted.manifest)
    bring_tokenizer(store, network)
    seconds = time.perf_counter() - start
    new = outcome.fetched or outcome.rehashed or repair
    size, selection = bytes_text(outcome.total), store.selection()
    of = "" if selection is None else f" ({selection})"
    ended(
        f"{target}: {size}{of} proven in {seconds_text(seconds)}"
        if new
        else f"{target}: already complete, all {size}{of} proven before",
        seconds,
        folder=str(target),
        **dataclasses.asdict(outcome),
    )
    if sharing is not None:
        share(store, network.swarm, sharing)


def _request(part: Request | None, of_host: Share | None) -> Asked | None:
    """What the options ask for; None if they are not given."""
    if of_host is None:
        return part
    if part is not None:
        raise click.UsageError(
            "--num-hosts, --host-id and --mesh cannot be combined with options that select a part"
        )
    return functools.partial(share_request, of_host)


def bring(
    store: Store,
    source: PieceSource | Mirrors,
    manifest: Manifest | None,
    *,
    timeout_s: float,
    repair: bool = False,
    request: Asked | None = None,
) -> Outcome:
    """Fetch with a progress bar; findings and notices go above it."""
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
    """List the torrent's files that are missing from the manifest given by the user."""
    extra = () if manifest is None else store.manifest().files[len(manifest.files) :]
    for file in extra[:MOST_EXTRAS]:
        click.echo(f"also in the torrent: {file.path}, {bytes_text(file.size)}", err=True)
    if len(extra) > MOST_EXTRAS:
        click.echo(f"also in the torrent: {len(extra) - MOST_EXTRAS} more files", err=True)
