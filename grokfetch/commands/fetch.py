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
"""Files beyond the manifest's that are named one by one."""


@click.command(
    cls=Explained,
    examples=(
        "grokfetch fetch --to /data/grok-1 --layers 0-3",
        "grokfetch fetch 'magnet:?xt=urn:btih:...' --to /data/model",
    ),
    groups={
        "What": ("folder", "manifest_file", "layers", "experts", "only", "everything", "repair"),
        "For one of several hosts": ("num_hosts", "host_id", "mesh"),
        "From whom": NETWORK_NAMES,
        "How fast, how long": ("up", "down", "timeout"),
        "Sharing afterwards": ("go_on", "ratio", "seconds"),
        "For machines and screens": ("json", "plain", "state"),
    },
    extra="SOURCE is one argument: put a magnet link in quotes",
)
@click.argument("source", required=False)
@click.option(
    "--to",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where it is to go; the DIR that SOURCE is, if not given.",
)
@manifest_option
@network_options
@timeout_option
@part_options
@share_options
@click.option("--repair", is_flag=True, help="Read everything back first; fetch what is bad again.")
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
    """Bring a checkpoint to DIR and prove every byte of it.

    SOURCE is a magnet link or an info hash, a .torrent file or a manifest or the https address of
    one, or the DIR of a fetch begun before; without one it is Grok-1, 318 GB. Ctrl-C or a crash
    loses nothing: the same command goes on.

    --layers, --experts and --only narrow each other and ask for a part; each later run with them
    asks for more, and DIR remembers what was asked for. So do --num-hosts, --host-id and --mesh.
    """
    manifest = None if manifest_file is None else read_manifest(manifest_file)
    wanted = resolve(source, manifest, state, network)
    target = folder or wanted.begun
    if target is None:
        raise click.UsageError("say where to: --to DIR")
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
        else f"{target}: complete, all {size}{of} were proven before",
        seconds,
        folder=str(target),
        **dataclasses.asdict(outcome),
    )
    if sharing is not None:
        share(store, network.swarm, sharing)


def _request(part: Request | None, of_host: Share | None) -> Asked | None:
    """What the options ask for, None if they do not say."""
    if of_host is None:
        return part
    if part is not None:
        raise click.UsageError(
            "the options of a host cannot be combined with those that choose a part"
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
    """Fetch with a bar; findings and notices go above it."""
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
