"""Shows the progress of loading a model, and why it can no longer be used; not a command."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import click

from grokfetch.events import Loaded, LoadEvent
from grokfetch.folder.store import Store
from grokfetch.output.reporting import lines, refused, reporter
from grokfetch.units import bytes_text, count_text, seconds_text
from loader.weights.lost_pages import explain_lost_pages

__all__ = ["loading_shown", "lost_pages_told"]


def lost_pages_told(store: Store) -> None:
    """From now on, explain the crash if a file of the weights shrinks or cannot be read."""
    tell = functools.partial(refused, click.get_current_context())
    files = {entry.file for entry in store.manifest().tensors}
    explain_lost_pages(store.root, map(store.payload, files), tell)


@contextlib.contextmanager
def loading_shown() -> Iterator[Callable[[LoadEvent], None]]:
    """Show how loading goes: a progress bar while copying, notices, and the time it took."""
    with reporter("load") as sink:

        def take(event: LoadEvent) -> None:
            if isinstance(event, Loaded) and lines() is None:
                sink.say(_loaded_text(event))
            else:
                sink.take(event)

        yield take


def _loaded_text(event: Loaded) -> str:
    copied = event.placement == "sharded"
    return (
        f"{'loaded' if copied else 'mapped'} {bytes_text(event.bytes)} "
        f"{'onto' if copied else 'for'} {count_text(event.devices, f'{event.platform} device')} "
        f"in {seconds_text(event.seconds)}"
    )
