"""The events of a command as machines read them: one JSON object a line. Pure: no I/O here.

docs/events.md is the specification; `SCHEMA` stands in the first event and rises with every change
that a reader could stumble over. New fields and new events are no such change.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from grokfetch.errors import GrokfetchError
from grokfetch.fetch import Metadata, Outcome, Status
from grokfetch.fetch.source import Notice
from grokfetch.folder.verify import Finding, Progress, Proven, Summary

__all__ = [
    "SCHEMA",
    "Ended",
    "Event",
    "Loaded",
    "Seeding",
    "Started",
    "Token",
    "as_fields",
    "error_fields",
]

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
    | Proven
    | Finding
    | Notice
    | Loaded
    | Token
    | Seeding
    | Outcome
    | Summary
    | Ended
)

_NAMES = {
    Started: "started",
    Metadata: "metadata",
    Progress: "progress",
    Finding: "finding",
    Notice: "notice",
    Loaded: "loaded",
    Token: "token",
    Seeding: "seeding",
}


def as_fields(event: Event) -> list[dict[str, Any]]:
    """The objects that stand for an event: several for several pieces, none for what ends a step.

    What a step returns, an `Outcome` or a `Summary`, is told by the command in its last event.
    """
    match event:
        case Proven():
            return [{"event": "piece", "piece": piece, "proven": True} for piece in event.pieces]
        case Status():
            # Who has sent how much is told by `grokfetch status --json`; here it would be long.
            fields = dataclasses.asdict(dataclasses.replace(event, sent={}))
            del fields["sent"]
            return [{"event": "progress", **fields, "received": event.received}]
        case Finding():
            fields = dataclasses.asdict(event) | {"path": str(event.path)}
            return [{"event": "finding", **fields}]
        case Ended():
            return [{"event": "finished", "seconds": round(event.seconds, 3), **event.results}]
        case Outcome() | Summary():
            return []
        case _:
            return [{"event": _NAMES[type(event)], **dataclasses.asdict(event)}]


def error_fields(error: BaseException) -> dict[str, Any]:
    """What ended a command, as an object: class, exit code, what, where, what to do next."""
    if isinstance(error, GrokfetchError):
        return {
            "event": "error",
            "kind": type(error).__name__,
            "exit_code": error.exit_code,
            "what": error.what,
            "path": error.path,
            "hint": error.hint,
        }
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    kind, what = type(error).__name__, str(error)
    return {
        "event": "error",
        "kind": kind,
        "exit_code": code,
        "what": what,
        "path": None,
        "hint": "",
    }
