"""A checkpoint that is fetched as it is read, for Python and for `grokfetch inspect`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from grokfetch.errors import GrokfetchError
from grokfetch.events import FetchEvent
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.swarm import SwarmSettings
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.fetch.wanted import Network, Wanted, read_manifest, resolve
from grokfetch.folder.store import Store
from grokfetch.manifest.selection import ON_DEMAND, Extract, Request
from loader.weights.checkpoint import Checkpoint, expect_checkpoint
from loader.weights.headers import is_shard, named, read_headers

__all__ = ["filled_on_demand", "on_demand"]

LIMITS = Limits(save_s=1.0)

Events = Generator[FetchEvent, None, None]


@contextlib.contextmanager
def on_demand(
    source: str | None,
    folder: Path,
    state: Path | None,
    manifest: Path | None,
    network: Network | None,
) -> Iterator[Checkpoint]:
    """The checkpoint of a source; what is read while the block runs is fetched into a folder.

    If no manifest names the tensors, they are first found from the headers of the files, and kept.

    Args:
        source: as of `grokfetch fetch`; None for what the folder was begun with, or else Grok-1.
        folder: where the bytes go.
        state: where our own files are; in the folder by default.
        manifest: a file that says what the payload must be, if the source does not.
        network: whom to ask; everybody by default.

    Raises:
        NoModel: the files are not those of a model.
        GrokfetchError: as `grokfetch.fetch.fetch`, and `expect_checkpoint`.
    """
    network = network or Network(SwarmSettings())
    store = Arriving(folder, state, on_demand=True)
    described = None if manifest is None else read_manifest(manifest)
    begun = source is None and store.manifest_or_none() is not None
    wanted = resolve(str(folder) if begun else source, described, state, network)
    with filled_on_demand(store, wanted, network):
        if not store.manifest().tensors:
            _find_tensors(store)
        yield expect_checkpoint(store, by_parts=True)


def _find_tensors(store: Store) -> None:
    shards = {}
    files = [file for file in store.manifest().files if is_shard(file.path.name)]
    for path, shard in read_headers(store, files):
        if isinstance(shard, GrokfetchError):
            raise shard
        shards[path] = shard
    store.save_tensors(named(shards))


@contextlib.contextmanager
def filled_on_demand(
    store: Arriving,
    wanted: Wanted,
    network: Network,
    shown: Callable[[Events], Events] = lambda events: events,
) -> Iterator[None]:
    """While the block runs, fetch what is required of a folder into it.

    Args:
        store: the folder, on demand.
        wanted: what to fetch, and from where.
        network: whom to ask.
        shown: passes on the events of the fetch, and may show them.

    Raises:
        GrokfetchError: as `grokfetch.fetch.fetch`.
    """
    events = fetch(
        store,
        wanted.pieces(store, network),
        manifest=wanted.manifest,
        limits=LIMITS,
        request=Request(extract=Extract(ON_DEMAND, ())),
        demand=store.demand,
    )
    with store.filled(shown(events)):
        yield
