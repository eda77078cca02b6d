"""`--while-fetching`: options, and the fetch that runs during `run` and `export`; not a command."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PurePosixPath

import click

from grokfetch.commands.options import bundle, network_options
from grokfetch.commands.tokenizer import bring_tokenizer
from grokfetch.events import FetchEvent, Outcome, Status
from grokfetch.fetch import Asked, Limits, fetch
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.fetch.wanted import Network, resolve
from grokfetch.folder.store import Store
from grokfetch.manifest.selection import Request
from grokfetch.output.progress import Sink
from grokfetch.output.reporting import held, lines, reporter

__all__ = ["Meanwhile", "fetching", "meanwhile_options", "reading"]

TIMEOUT_S = 600.0
"""How long the fetch waits without receiving a byte."""

SAVE_S = 1.0
"""Seconds between two writes of the record, which readers wait for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Meanwhile:
    """A fetch that is to run at the same time as the model.

    `source` is None for what the folder was started with, or else Grok-1.
    """

    source: str | None
    network: Network


def _meanwhile(
    *,
    while_fetching: bool,
    source: str | None,
    network: Network,
) -> Meanwhile | None:
    if source is not None and not while_fetching:
        raise click.UsageError("--source requires --while-fetching")
    return Meanwhile(source, network) if while_fetching else None


meanwhile_options = bundle(
    "meanwhile",
    _meanwhile,
    click.option(
        "--while-fetching",
        is_flag=True,
        help="Fetch DIR at the same time, as --source and the options from --peer on say.",
    ),
    click.option(
        "--source",
        metavar="SOURCE",
        help="What to fetch, as for fetch; by default what DIR was started with, or else Grok-1.",
    ),
    network_options,
)


@contextlib.contextmanager
def reading(
    folder: Path,
    state: Path | None,
    meanwhile: Meanwhile | None,
    *,
    asked: Asked | None = None,
    speaking: threading.Event | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Iterator[Store]:
    """A folder, locked against writers; if it is fetched at the same time, an `Arriving`.

    Args:
        folder: where it is; with a fetch it need not exist yet.
        state: where our own files are.
        meanwhile: the fetch that is to run at the same time, if any.
        asked: which part of the checkpoint to fetch, by default all.
        speaking: as of `fetching`.
        watch: called every second while a reader waits; what it raises ends the wait.
    """
    if meanwhile is None:
        store = Store(folder, state)
        with held(store):
            yield store
    else:
        arriving = Arriving(folder, state, watch)
        with fetching(meanwhile, arriving, asked or Request(), speaking or threading.Event()):
            yield arriving


@contextlib.contextmanager
def fetching(
    meanwhile: Meanwhile, store: Arriving, asked: Asked, speaking: threading.Event
) -> Iterator[None]:
    """Fetch into a folder, with a progress bar, while the block runs under the folder's lock.

    When the block starts, the manifest and the tokenizer are there.

    Args:
        meanwhile: what to fetch, and how.
        store: the folder.
        asked: which part of the checkpoint to fetch.
        speaking: set while text is written, so that the bar stays hidden.
    """
    begun = meanwhile.source is None and store.manifest_or_none() is not None
    wanted = resolve(
        str(store.root) if begun else meanwhile.source, None, store.state, meanwhile.network
    )
    events = fetch(
        store,
        wanted.pieces(store, meanwhile.network),
        manifest=wanted.manifest,
        limits=Limits(metadata_s=TIMEOUT_S, stall_s=TIMEOUT_S, save_s=SAVE_S),
        request=asked,
        demand=store.demand,
    )
    with store.filled(_shown(events, reporter("fetch"), speaking)):
        bring_tokenizer(store, meanwhile.network)
        _await_tokenizer(store)
        yield


def _shown(
    events: Generator[FetchEvent, None, None], sink: Sink, speaking: threading.Event
) -> Generator[FetchEvent, None, None]:
    """The same events; the bar is removed before the last one, so that text may follow."""
    with contextlib.closing(events):
        with sink:
            for event in events:
                if speaking.is_set() and isinstance(event, Status) and lines() is None:
                    sink.hide()
                else:
                    sink.take(event)
                if isinstance(event, Outcome):
                    break
                yield event
        yield event


def _await_tokenizer(store: Arriving) -> None:
    """Wait for a tokenizer that is one of the files being fetched.

    Raises:
        GrokfetchError: what ended the fetch before the tokenizer arrived.
    """
    manifest = store.manifest()
    if manifest.tokenizer is not None:
        path = PurePosixPath(manifest.tokenizer.path)
        if any(file.path == path for file in manifest.files):
            store.require(path)
