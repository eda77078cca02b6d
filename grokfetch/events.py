"""Every event: what fetching, verifying, loading and running tell as they go. Values, no I/O.

`grokfetch.output.json_lines` says how machines read them, docs/events.md is the specification.
`SCHEMA` stands in the first event and rises with every change that a reader could stumble over. New
fields and new events do not raise it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

__all__ = [
    "SCHEMA",
    "Arrived",
    "Ended",
    "Event",
    "FetchEvent",
    "Finding",
    "Hashed",
    "Kind",
    "LoadEvent",
    "Loaded",
    "Metadata",
    "Notice",
    "Origin",
    "Outcome",
    "Phase",
    "PiecesProven",
    "Progress",
    "Seeding",
    "Started",
    "Status",
    "Summary",
    "Token",
    "Traffic",
    "VerifyEvent",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Who sends bytes: a peer by its address, or a mirror by its address as it is shown.

    An empty name stands for those that are not told apart.
    """

    kind: Literal["peer", "mirror"]
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person may want to know and that ends nothing: a peer banned, say."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Arrived:
    """Pieces that are on the disk now, flushed so that any process reads them."""

    pieces: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """How the source is doing: payload bytes received since the order, bytes a second, peers.

    `mirrors` are the HTTP servers that are asked beside the peers. `sent` is who has sent how many
    payload bytes since the source was made, over all orders.
    """

    received: int
    rate: float
    peers: int
    sent: Mapping[Origin, int] = dataclasses.field(default_factory=dict)
    mirrors: int = 0


Phase = Literal["metadata", "checking", "downloading", "hashing", "done"]


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """How far it is: proven bytes of those asked for, bytes a second, peers, proven pieces of all.

    While the phase is "checking" or "hashing", `done` and `total` are bytes read back; of files
    that only their sha256 proves `done` counts what has come, too. `proven` are the proven bytes in
    every phase. `mirrors` are the HTTP servers that are asked beside the peers.
    `sent` is who has sent how many payload bytes in this fetch. `demanded` are
    pieces that somebody waits for, the first ones, and `waiting` the tensors, or else files, that
    they hold bytes of.
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
    demanded: tuple[int, ...] = ()
    waiting: tuple[str, ...] = ()
    mirrors: int = 0

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


Kind = Literal["missing", "short", "long", "corrupt", "unreadable", "extra", "unproven"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    `tensor` names the tensors concerned, separated by ", ". A piece that spans several files makes
    one finding for each of them. `extra` is not a failure.
    """

    kind: Kind
    path: PurePosixPath
    piece: int | None = None
    tensor: str | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of a step done so far, and to be done in all, or how many of another `unit`.

    The phase is "verifying" where bytes are read back, "loading" where they go to devices, and
    "prompts" where the units are texts.
    """

    done: int
    total: int
    phase: str = "verifying"
    unit: str = "byte"


@dataclasses.dataclass(frozen=True, slots=True)
class PiecesProven:
    """Pieces that were read back right just now."""

    pieces: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """The last value of a verification.

    `total` are the bytes that the manifest names and that are asked for, `by_pieces` and
    `by_sha256` those of them that the torrent `info_hash` and the manifest's sha256 have proven.
    `failures` counts the findings other than extra files, `unreadable` those of them that say only
    that bytes could not be read. `recorded` is False where the folder could not be written.
    """

    total: int
    by_pieces: int
    by_sha256: int
    info_hash: str | None
    failures: int
    recorded: bool
    unreadable: int = 0

    @property
    def proven(self) -> int:
        """Proven bytes, whichever way."""
        return self.by_pieces + self.by_sha256

    @property
    def complete(self) -> bool:
        """Whether everything that is asked for is proven."""
        return not self.failures and self.proven == self.total


@dataclasses.dataclass(frozen=True, slots=True)
class Hashed:
    """Bytes read and hashed so far; the whole is twice the size of the files."""

    done: int


SCHEMA = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """The first event: which command of which version of grokfetch."""

    command: str
    version: str
    schema: int = SCHEMA


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """The weights are there: bytes, number and kind of devices, mapped or sharded, seconds."""

    bytes: int
    devices: int
    platform: str
    placement: str
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `text` is what it adds to the text, None without a tokenizer."""

    id: int
    text: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Seeding:
    """How a seed is doing: its port, pieces and bytes that it shares, and what others have had.

    `uploaded` is payload bytes since it began, `rate` bytes a second.
    """

    port: int
    pieces: int
    bytes: int
    uploaded: int
    rate: float
    peers: int


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """What the command found or did, by name, and the seconds it took."""

    seconds: float
    results: dict[str, Any]


Event = (
    Started
    | Metadata
    | Status
    | Progress
    | PiecesProven
    | Finding
    | Notice
    | Loaded
    | Token
    | Seeding
    | Outcome
    | Summary
    | Ended
)

FetchEvent = Status | Metadata | PiecesProven | Finding | Notice | Outcome
"""What a fetch yields."""

VerifyEvent = Finding | Progress | PiecesProven | Summary
"""What a verification yields."""

LoadEvent = Progress | Notice | Loaded
"""What the loading of a model reports."""
