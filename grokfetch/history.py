"""How a fetch has gone so far: a short list of samples beside the record, for `grokfetch status`.

It is a convenience and proves nothing: whatever is wrong with the file, it counts as absent, and a
disk that does not take it ends no fetch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from grokfetch.fetch import Event, Status
from grokfetch.storage import replacing
from grokfetch.store import Store

__all__ = ["FILE", "LIMIT", "SCHEMA", "Sample", "decode", "encode", "read", "recorded", "thinned"]

SCHEMA = 1
FILE = "progress.json"
LIMIT = 240
"""Samples that are kept at most. Beyond it every second of them goes, so that the list spans the
whole fetch however long it takes."""

INTERVAL_S = 3.0
"""Seconds between two samples: those between two writings of the record."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A moment: seconds since 1970, proven bytes, peers, payload bytes a second, the phase."""

    time: float
    proven: int
    peers: int
    rate: float
    phase: str


def recorded(
    store: Store,
    events: Generator[Event, None, None],
    *,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], float] = time.time,
) -> Generator[Event, None, None]:
    """The events of a fetch, unchanged; a sample is written every few seconds on the way.

    Args:
        store: of the fetch, which holds its lock between the first event and the last.
        events: of `fetch`.
        clock: monotonic seconds, which say when a sample is due.
        now: seconds since 1970, which are only shown.
    """
    samples: tuple[Sample, ...] = ()
    due = clock()
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Status) and (event.phase == "done" or clock() >= due):
                due = clock() + INTERVAL_S
                sample = Sample(now(), event.proven, event.peers, event.rate, event.phase)
                samples = thinned((*samples, sample))
                _write(store.state / FILE, samples)
            yield event


def thinned(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """At most `LIMIT` samples, the first and the last among them."""
    if len(samples) <= LIMIT:
        return samples
    return (*samples[:-1:2], samples[-1])


def read(store: Store) -> tuple[Sample, ...]:
    """The samples of the latest fetch, oldest first; none if there are none to be read."""
    try:
        return decode((store.state / FILE).read_bytes())
    except (OSError, ValueError):
        return ()


def encode(samples: tuple[Sample, ...]) -> bytes:
    """The samples as JSON."""
    rows = [dataclasses.astuple(sample) for sample in samples]
    return (json.dumps({"schema": SCHEMA, "samples": rows}) + "\n").encode()


def decode(text: bytes) -> tuple[Sample, ...]:
    """The samples that `text` encodes.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    try:
        top: Any = json.loads(text)
        if top["schema"] != SCHEMA:
            raise ValueError("written by another version of grokfetch")
        return tuple(_sample(*row) for row in top["samples"][-LIMIT:])
    except (TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a history: {error}") from None


def _sample(when: float, proven: int, peers: int, rate: float, phase: str) -> Sample:
    return Sample(float(when), int(proven), int(peers), float(rate), str(phase))


def _write(path: Path, samples: tuple[Sample, ...]) -> None:
    # A fetch that cannot begin has no state folder yet, and one on a full disk has other worries.
    with contextlib.suppress(OSError), replacing(path) as file:
        file.write(encode(samples))
