"""`run --while-fetching`: its options, and the fetch that runs beside the model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import click

from grokfetch.commands.mirroring import Mirrors, mirror_options
from grokfetch.commands.reporting import reporter
from grokfetch.commands.swarm_options import swarm_options

if TYPE_CHECKING:
    from grokfetch.events import FetchEvent
    from grokfetch.fetch import Asked
    from grokfetch.fetch.swarm import SwarmSettings
    from grokfetch.fetch.waiting_store import Arriving
    from grokfetch.output.progress import Sink

__all__ = ["Meanwhile", "meanwhile_options"]

TIMEOUT_S = 600.0
"""How long the fetch waits without a byte."""

SAVE_S = 1.0
"""Seconds between two writings of the record, which readers wait for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Meanwhile:
    """A fetch that is to run beside the model.

    `source` is None for what the folder was begun with, or else Grok-1.
    """

    source: str | None
    swarm: SwarmSettings
    mirrors: Mirrors

    @contextlib.contextmanager
    def fetching(self, store: Arriving, asked: Asked) -> Iterator[None]:
        """Fetch into a folder, with a bar, while the block runs under the folder's lock.

        When the block begins it is known what the folder is to hold, and the tokenizer is there.

        Args:
            store: the folder.
            asked: what to fetch of the checkpoint.
        """
        from grokfetch.commands.fetch import resolve
        from grokfetch.fetch import Limits, fetch
        from grokfetch.fetch.swarm import Swarm

        begun = self.source is None and store.manifest_or_none() is not None
        wanted = resolve(str(store.root) if begun else self.source, None, store.state)
        pieces = Swarm(wanted.origin, self.swarm)
        events = fetch(
            store,
            self.mirrors.beside(pieces, wanted.origin, store, wanted.manifest),
            manifest=wanted.manifest,
            limits=Limits(metadata_s=TIMEOUT_S, stall_s=TIMEOUT_S, save_s=SAVE_S),
            request=asked,
        )
        with store.filled(_shown(events, reporter("fetch"))):
            store.wait_for_manifest()
            self.mirrors.bring_tokenizer(store)
            _await_tokenizer(store)
            yield


def _shown(
    events: Generator[FetchEvent, None, None], sink: Sink
) -> Generator[FetchEvent, None, None]:
    """The same events; the bar has gone when the last one comes, and text may follow."""
    from grokfetch.events import Outcome

    with contextlib.closing(events):
        with sink:
            for event in events:
                sink.take(event)
                if isinstance(event, Outcome):
                    break
                yield event
        yield event


def meanwhile_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it gets them as `Meanwhile` named `meanwhile`, or None."""

    @functools.wraps(command)
    def wired(
        *args: Any,
        while_fetching: bool,
        source: str | None,
        swarm: SwarmSettings,
        mirrors: Mirrors,
        **kwargs: Any,
    ) -> None:
        if source is not None and not while_fetching:
            raise click.UsageError("--source goes with --while-fetching")
        meanwhile = Meanwhile(source, swarm, mirrors) if while_fetching else None
        command(*args, meanwhile=meanwhile, **kwargs)

    options = (
        click.option(
            "--while-fetching",
            is_flag=True,
            help="Fetch DIR at the same time; --source, and --peer and what follows it, say how.",
        ),
        click.option(
            "--source",
            metavar="SOURCE",
            help="Where from, as for fetch; by default what DIR was begun with, or else Grok-1.",
        ),
        swarm_options,
        mirror_options,
    )
    for option in reversed(options):
        wired = option(wired)
    return wired


def _await_tokenizer(store: Arriving) -> None:
    """Wait for a tokenizer that is one of the files being fetched.

    Raises:
        GrokfetchError: what ended the fetch before it came.
    """
    manifest = store.manifest()
    if manifest.tokenizer is not None:
        path = PurePosixPath(manifest.tokenizer.path)
        if any(file.path == path for file in manifest.files):
            store.require(path)
