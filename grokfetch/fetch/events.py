"""What a fetch tells as it goes: what it fetches, how far it is, and how it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from grokfetch.fetch.source import Notice, Origin
from grokfetch.folder.verify import Finding, Proven

__all__ = ["Event", "Metadata", "Outcome", "Phase", "Status"]

Phase = Literal["metadata", "checking", "downloading", "hashing", "done"]


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """How far it is: proven bytes of those asked for, bytes a second, peers, proven pieces of all.

    While the phase is "checking" or "hashing", `done` and `total` are bytes read back; `proven` are
    the proven bytes in every phase. `sent` is who has sent how many payload bytes in this fetch.
    """

    phase: Phase
    done: int = 0
    total: int = 0
    rate: float = 0.0
    peers: int = 0
    pieces_done: int = 0
    pieces_total: int = 0
    proven: int = 0
    sent: Mapping[Origin, int] = dataclasses.field(default_factory=dict)

    @property
    def received(self) -> int:
        """Payload bytes that came in this fetch, right or wrong."""
        return sum(self.sent.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Metadata:
    """What the torrent is: name, info hash, number of files, bytes, number of pieces."""

    name: str
    info_hash: str
    files: int
    bytes: int
    pieces: int


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The last value of a fetch that ended well.

    Args:
        total: bytes of the payload that were asked for, all proven.
        fetched: pieces that the source brought.
        rehashed: pieces found on the disk and read back.
    """

    total: int
    fetched: int
    rehashed: int


Event = Status | Metadata | Proven | Finding | Notice | Outcome
