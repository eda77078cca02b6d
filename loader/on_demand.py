"""A checkpoint that is fetched as it is read, for Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.swarm import SwarmSettings
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.fetch.wanted import Network, read_manifest, resolve
from grokfetch.manifest.selection import ON_DEMAND, Extract, Request
from loader.weights.checkpoint import Checkpoint, expect_checkpoint

__all__ = ["on_demand"]

LIMITS = Limits(save_s=1.0)


@contextlib.contextmanager
def on_demand(
    source: str | None,
    folder: Path,
    state: Path | None,
    manifest: Path | None,
    network: Network | None,
) -> Iterator[Checkpoint]:
    """The checkpoint of a source, of which a folder receives what is read while the block runs.

    Args:
        source: as of `grokfetch fetch`; None for what the folder was begun with, or else Grok-1.
        folder: where the bytes go.
        state: where our own files are; in the folder by default.
        manifest: a file that says what the payload must be, if the source does not.
        network: whom to ask; everybody by default.

    Raises:
        GrokfetchError: as `grokfetch.fetch.fetch`, and `expect_checkpoint`.
    """
    network = network or Network(SwarmSettings())
    store = Arriving(folder, state, on_demand=True)
    described = None if manifest is None else read_manifest(manifest)
    begun = source is None and store.manifest_or_none() is not None
    wanted = resolve(str(folder) if begun else source, described, state, network)
    events = fetch(
        store,
        wanted.pieces(store, network),
        manifest=wanted.manifest,
        limits=LIMITS,
        request=Request(extract=Extract(ON_DEMAND, ())),
        demand=store.demand,
    )
    with store.filled(events):
        yield expect_checkpoint(store, by_parts=True)
