"""`run --while-fetching`: its options, and a model that is loaded as its tensors arrive."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import click

from grokfetch.commands.loading import Arrangement, place
from grokfetch.commands.mirroring import Mirrors, mirror_options
from grokfetch.commands.reporting import reporter
from grokfetch.commands.swarm_options import swarm_options

if TYPE_CHECKING:
    from grokfetch.events import FetchEvent
    from grokfetch.fetch import Asked
    from grokfetch.fetch.swarm import SwarmSettings
    from grokfetch.fetch.waiting_store import Arriving
    from grokfetch.output.progress import Sink
    from loader.inference.engine import Engine, Sampling
    from loader.weights.host_share import Share

__all__ = ["Meanwhile", "load_as_it_comes", "meanwhile_options"]

TIMEOUT_S = 600.0
"""How long the fetch waits without a byte."""

BAR_S = 1.0
"""How long text waits for the bar of the fetch to go: no longer, there may be more to fetch."""

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


def load_as_it_comes(
    there: Arrangement, store: Arriving, share: Share, prompt: Sequence[int], sampling: Sampling
) -> Engine:
    """The weights as their bytes arrive, and the model compiled before the last of them.

    What lies outside the layers and the first layer come first. With them a model of one layer is
    compiled, and compiled code serves every layer. Until the rest is there these weights lie on the
    devices twice.

    Args:
        there: the devices.
        store: the folder, which knows its manifest.
        share: what these devices need.
        prompt: what will be asked, for the size of the steps.
        sampling: how tokens will be chosen.
    """
    from loader.devices import placement as placing
    from loader.devices.cluster import meet
    from loader.inference.engine import Engine
    from loader.weights.checkpoint import Checkpoint, expect_checkpoint

    checkpoint = expect_checkpoint(store, share)
    config = checkpoint.config
    first = Checkpoint(dataclasses.replace(config, num_layers=1), checkpoint)
    suited = there.tuned(checkpoint)
    params = (
        placing.load(first, there.mesh, tuning=suited)
        if there.placement == "sharded"
        else placing.share(first, there.mesh, suited)
    )
    engine = Engine(config, params, there.mesh, there.loading.dtype)
    meet("first layer")
    logits, state = engine.prefill([prompt])
    token = engine.sample(logits, sampling, 0)
    # To take it from its row is a program, too.
    token[0].block_until_ready()
    if len(prompt) < config.sequence_len:
        engine.decode(state, token)
    engine.hold(*place(there, checkpoint))
    store.wait_for_end(BAR_S)
    return engine
