"""Every event that fetching, verifying, loading and running report. Values, no I/O.

`grokfetch.output.json_lines` turns them into JSON; docs/events.md is the specification. The first
event has `SCHEMA`, which rises with every incompatible change. New fields and new events do not
raise it.
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
    """Who sends bytes: a peer by its address, or a mirror by its URL as it is shown.

    An empty name stands for all those that are not listed separately.
    """

    kind: Literal["peer", "mirror"]
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Notice:
    """Something that a user may want to know and that is not an error, such as a banned peer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Arrived:
    """Pieces that are on the disk now, flushed so that any process can read them."""

    pieces: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """The state of a source: payload bytes received since the order, bytes per second, peers.

    `mirrors` is the number of HTTP servers in use. `sent` is how many payload bytes each of them
    and each peer has sent since the source was made, over all orders.
    """

    received: int
    rate: float
    peers: int
    sent: Mapping[Origin, int] = dataclasses.field(default_factory=dict)
    mirrors: int = 0


Phase = Literal["metadata", "checking", "downloading", "hashing", "done"]


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """The progress of a fetch: proven bytes, bytes per second, peers, proven pieces.

    While the phase is "checking" or "hashing", `done` and `total` are bytes read back; for files
    that only a sha256 proves, `done` also counts what has arrived. `proven` is the number of proven
    bytes in every phase. `mirrors` is the number of HTTP servers in use. `sent` is how many payload
    bytes each peer and mirror has sent in this fetch. `demanded` are the first pieces that readers
    wait for, and `waiting` the tensors, or else files, to which they belong.
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
        """Payload bytes received in this fetch, right or wrong."""
        return sum(self.sent.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Metadata:
    """The torrent: name, info hash, number of files, bytes, number of pieces."""

    name: str
    info_hash: str
    files: int
    bytes: int
    pieces: int


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The last value of a fetch that succeeded.

    Args:
        total: bytes of the payload that were asked for, all proven.
        fetched: pieces that were downloaded.
        rehashed: pieces found on the disk and read back.
    """

    total: int
    fetched: int
    rehashed: int


Kind = Literal["missing", "short", "long", "corrupt", "unreadable", "extra", "unproven"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something that verification found wrong.

    `tensor` names the affected tensors, separated by ", ". A piece that spans several files gives
    one finding for each of them. `extra` is not a failure.
    """

    kind: Kind
    path: PurePosixPath
    piece: int | None = None
    tensor: str | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of a step done so far, and in total, or a count of another `unit`.

    The phase is "verifying" while bytes are read back, "loading" while they go to devices, and
    "prompts" if the units are texts.
    """

    done: int
    total: int
    phase: str = "verifying"
    unit: str = "byte"


@dataclasses.dataclass(frozen=True, slots=True)
class PiecesProven:
    """Pieces that were just read back and proven."""

    pieces: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """The last value of a verification.

    `total` is the number of bytes in the manifest that are asked for; `by_pieces` and `by_sha256`
    are how many of them the torrent `info_hash` and the manifest's sha256 have proven. `failures`
    counts the findings other than extra files, `unreadable` those of them that only say that bytes
    could not be read. `recorded` is False if the folder could not be written.
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
        """Bytes proven either way."""
        return self.by_pieces + self.by_sha256

    @property
    def complete(self) -> bool:
        """Whether everything that is asked for is proven."""
        return not self.failures and self.proven == self.total


@dataclasses.dataclass(frozen=True, slots=True)
class Hashed:
    """Bytes read and hashed so far; the total is twice the size of the files."""

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
    """The weights are loaded: bytes, number and kind of devices, mapped or sharded, seconds."""

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
    """The state of a seed: its port, the pieces and bytes that it shares, and its uploads.

    `uploaded` is payload bytes since it started, `rate` bytes per second.
    """

    port: int
    pieces: int
    bytes: int
    uploaded: int
    rate: float
    peers: int


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """The results of a command by name, and the seconds it took."""

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
