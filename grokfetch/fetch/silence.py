"""What to say when nobody answers: that BitTorrent may be blocked, and what else works. No I/O."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from grokfetch.events import Notice, Traffic
from grokfetch.manifest.schema import Manifest

__all__ = ["Silence", "other_ways"]

QUIET_S = 20.0
"""Seconds without a peer after which something may be wrong: most swarms answer within a few."""

HUGGING_FACE = re.compile(r"//huggingface\.co/([^/]+/[^/]+)/")


class Silence:
    """Waits for a first peer or byte, and says once what to do if none comes.

    Args:
        ways: what else works, from `other_ways`.
        clock: monotonic seconds.
    """

    def __init__(self, ways: str, clock: Callable[[], float]) -> None:
        self._ways = ways
        self._clock = clock
        self._due: float | None = clock() + QUIET_S

    def after(self, traffic: Traffic) -> Iterator[Notice]:
        """What to say, given how the source is doing."""
        if traffic.peers or traffic.received:
            self._due = None
        elif self._due is not None and self._clock() >= self._due:
            self._due = None
            yield Notice(
                f"no peer within {QUIET_S:.0f} s: BitTorrent may be blocked here, or nobody shares "
                f"this now; the search goes on. What else works: {self._ways}"
            )


def other_ways(root: Path, manifest: Manifest | None, *, metadata: bool) -> str:
    """What to do if no peer is found.

    Args:
        root: the checkpoint folder.
        manifest: what is fetched, if that is known.
        metadata: whether the torrent's metadata is already there.
    """
    ways = ["a peer that you know (--peer HOST:PORT)", "a proxy (--proxy socks5://HOST:PORT)"]
    if not metadata:
        ways.append("the .torrent file, as SOURCE")
    addresses = () if manifest is None else manifest.mirrors
    at_hub = next(filter(None, map(HUGGING_FACE.search, addresses)), None)
    if at_hub is not None:
        ways.append(
            f"the files themselves (hf download {at_hub[1]} --local-dir {root}, then: "
            f"grokfetch manifest {root})"
        )
    return "; ".join(ways)
