"""The events of a command for programs: one JSON object per line. Pure: no I/O here.

docs/events.md is the specification.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from grokfetch.errors import GrokfetchError, exit_code_of
from grokfetch.events import (
    Ended,
    Event,
    Finding,
    Loaded,
    Metadata,
    Notice,
    Outcome,
    PiecesProven,
    Progress,
    Seeding,
    Started,
    Status,
    Summary,
    Token,
)

__all__ = ["as_fields", "error_fields"]


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
    """The objects for an event: several for several pieces, none for the result of a step.

    What a step returns, an `Outcome` or a `Summary`, is reported by the command in its last event.
    """
    match event:
        case PiecesProven():
            return [{"event": "piece", "piece": piece, "proven": True} for piece in event.pieces]
        case Status():
            # The bytes sent by each peer are in `grokfetch status --json`; here they are too long.
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
    """The object for an error: class, exit code, what happened, where, what to do next."""
    if isinstance(error, GrokfetchError):
        return {
            "event": "error",
            "kind": type(error).__name__,
            "exit_code": error.exit_code,
            "what": error.what,
            "path": error.path,
            "hint": error.hint,
        }
    kind, message = type(error).__name__, str(error)
    return {
        "event": "error",
        "kind": kind,
        "exit_code": exit_code_of(error),
        "what": message,
        "path": None,
        "hint": "",
    }
