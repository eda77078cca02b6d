"""Shows how a model is being loaded; no command."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from grokfetch.events import Loaded, LoadEvent
from grokfetch.output.reporting import lines, reporter
from grokfetch.units import bytes_text, seconds_text

__all__ = ["loading_shown"]


@contextlib.contextmanager
def loading_shown() -> Iterator[Callable[[LoadEvent], None]]:
    """Show how a model is being loaded: a bar while it is copied, notices, and the time it took."""
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
        f"{'onto' if copied else 'for'} {event.devices} {event.platform} "
        f"{'device' if event.devices == 1 else 'devices'} in {seconds_text(event.seconds)}"
    )
