"""The history of the fetches into a folder: samples over time, and bytes sent by each peer.

The list continues from one fetch to the next, so that an interrupted fetch of days appears as one.
A convenience, see `advisory`: it proves nothing.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from grokfetch.errors import GrokfetchError
from grokfetch.events import FetchEvent, Origin, Status
from grokfetch.folder import advisory
from grokfetch.folder.store import Store

__all__ = [
    "FILE",
    "LIMIT",
    "SCHEMA",
    "Ended",
    "History",
    "Sample",
    "rates",
    "read",
    "recorded",
    "thinned",
]

SCHEMA = 2
FILE = "progress.json"
LIMIT = 240
"""The most samples that are kept, evenly spread over the running time."""

SENDERS = 100
"""The most peers and mirrors that are listed separately: those that sent most."""

NOT_COUNTED = ("metadata", "checking")
"""Phases in which proven bytes may not be counted yet; the previous number is used."""

INTERVAL_S = 3.0
"""Seconds between two samples, the same as between two writes of the record."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A moment of a fetch.

    time: seconds since 1970. worked: seconds that all fetches so far have run. proven: bytes.
    received: payload bytes of all fetches so far. peers: connected. rate: payload bytes a second.
    """

    time: float
    worked: float
    proven: int
    received: int
    peers: int
    rate: float
    phase: str


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """Samples, oldest first, and who has sent how many payload bytes in all fetches.

    `ended` says how the last fetch ended and why, None while it is at work, and for ever if it was
    killed. `demanded` are pieces that somebody waited for when it was written.
    """

    samples: tuple[Sample, ...] = ()
    sent: Mapping[Origin, int] = dataclasses.field(default_factory=dict)
    ended: Ended | None = None
    demanded: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How a fetch ended: complete, interrupted, or failed and with what; seconds since 1970."""

    time: float
    how: str
    why: str = ""


def recorded(
    store: Store,
    events: Generator[FetchEvent, None, None],
    clock: Callable[[], float] = time.monotonic,
) -> Generator[FetchEvent, None, None]:
    """The events of a fetch, unchanged; a sample is written every few seconds on the way.

    Args:
        store: of the fetch, which holds its lock between the first event and the last.
        events: of `fetch`.
        clock: monotonic seconds, which say when a sample is due.
    """
    start = due = clock()
    before: History | None = None
    history = History()
    ended: Ended | None = None
    try:
        with contextlib.closing(events):
            for event in events:
                if before is None:
                    history = before = dataclasses.replace(read(store), ended=None)
                if isinstance(event, Status) and (event.phase == "done" or clock() >= due):
                    at = clock()
                    due = at + INTERVAL_S
                    samples = (*history.samples, _sample(event, before, history, at - start))
                    sent = _most(Counter(before.sent) + Counter(event.sent))
                    history = History(thinned(samples), sent, demanded=event.demanded)
                    _write(store, history)
                yield event
        ended = Ended(time.time(), "complete")
    except GrokfetchError as error:
        ended = Ended(time.time(), "failed", error.what)
        raise
    except (GeneratorExit, KeyboardInterrupt):
        ended = Ended(time.time(), "interrupted")
        raise
    finally:
        # A fetch that could not start, for example without the lock, keeps the earlier history.
        if before is not None and ended is not None:
            _write(store, dataclasses.replace(history, ended=ended, demanded=()))


def _sample(status: Status, before: History, so_far: History, worked: float) -> Sample:
    """A moment of this fetch, counted on from those before."""
    if before.samples:
        worked += before.samples[-1].worked
    proven = status.proven
    if not proven and status.phase in NOT_COUNTED and so_far.samples:
        proven = so_far.samples[-1].proven
    received = sum(before.sent.values()) + status.received
    return Sample(
        time.time(), worked, proven, received, status.peers, status.rate, str(status.phase)
    )


def _most(sent: Counter[Origin]) -> Counter[Origin]:
    """Those who sent most; the others of each kind together."""
    kept: Counter[Origin] = Counter()
    for place, (origin, count) in enumerate(sent.most_common()):
        kept[origin if place < SENDERS else Origin(origin.kind, "")] += count
    return kept


def thinned(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """At most `LIMIT` samples, the first and the last among them; the densest lose one each."""
    while len(samples) > LIMIT:
        gaps = [b.worked - a.worked for a, b in pairwise(samples)]
        spare = 1 + min(range(len(gaps) - 1), key=lambda at: gaps[at] + gaps[at + 1])
        samples = (*samples[:spare], *samples[spare + 1 :])
    return samples


def rates(samples: Sequence[Sample], cells: int) -> list[float]:
    """Bytes a second in each of at most `cells` equal parts of the time at work.

    They follow from what was received between two samples, so that no thinning falsifies them.
    """
    if len(samples) < 2 or samples[-1].worked <= samples[0].worked:
        return []
    start, length = samples[0].worked, samples[-1].worked - samples[0].worked
    count = min(cells, len(samples) - 1)
    bounds = [_received(samples, start + length * cell / count) for cell in range(count + 1)]
    return [max(0.0, b - a) * count / length for a, b in pairwise(bounds)]


def _received(samples: Sequence[Sample], worked: float) -> float:
    """Bytes received after so many seconds at work, by a straight line between two samples."""
    after = bisect.bisect_left(samples, worked, key=lambda sample: sample.worked)
    if after in (0, len(samples)):
        return float(samples[min(after, len(samples) - 1)].received)
    a, b = samples[after - 1], samples[after]
    share = (worked - a.worked) / (b.worked - a.worked)
    return a.received + share * (b.received - a.received)


def read(store: Store) -> History:
    """The history of a folder; an empty one if there is none to be read."""
    return advisory.read(store.state / FILE, SCHEMA, _decode) or History()


def _write(store: Store, history: History) -> None:
    fields = {
        "samples": [dataclasses.astuple(sample) for sample in history.samples],
        "sent": [(origin.kind, origin.name, count) for origin, count in history.sent.items()],
        "ended": None if history.ended is None else dataclasses.astuple(history.ended),
        "demanded": history.demanded,
    }
    advisory.write(store.state / FILE, SCHEMA, fields)


def _decode(fields: dict[str, Any]) -> History:
    """The history in a file.

    Raises:
        ValueError, TypeError, KeyError, OverflowError: it is damaged.
    """
    samples = (_decode_sample(row) for row in fields["samples"][-LIMIT:])
    sent: Counter[Origin] = Counter()
    for kind, name, count in fields["sent"]:
        sent[Origin("mirror" if kind == "mirror" else "peer", str(name))] += advisory.count(count)
    ended = fields.get("ended")
    return History(
        tuple(sorted(samples, key=lambda it: it.worked)),
        sent,
        None if ended is None else _decode_ended(ended),
        tuple(map(advisory.count, fields.get("demanded", ()))),
    )


def _decode_ended(row: Iterable[Any]) -> Ended:
    when, how, why = row
    return Ended(advisory.number(when), str(how), str(why))


def _decode_sample(row: Iterable[Any]) -> Sample:
    when, worked, proven, received, peers, rate, phase = row
    return Sample(
        advisory.number(when),
        advisory.number(worked),
        advisory.count(proven),
        advisory.count(received),
        advisory.count(peers),
        advisory.number(rate),
        str(phase),
    )
