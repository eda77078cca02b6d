"""All that is known of a folder without reading its payload, for people and for machines."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from grokfetch.errors import StateMissing
from grokfetch.folder import history, journal
from grokfetch.folder.history import History
from grokfetch.folder.journal import Check, Found, Run
from grokfetch.folder.lock import SEEDER, Owner, read_owner
from grokfetch.folder.store import Store
from grokfetch.folder.survey import Survey, survey

__all__ = ["SCHEMA", "Overview", "as_fields", "missing_runs", "overview"]

SCHEMA = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Overview:
    """What is proven and missing, which processes are active, and past fetches, checks and runs.

    Checks have only the findings that still hold.
    """

    folder: Path
    survey: Survey
    owner: Owner | None
    seeder: Owner | None
    history: History
    checks: Mapping[str, Check]
    runs: tuple[Run, ...]


def overview(store: Store) -> Overview:
    """Look at a folder. Takes no lock: it may run beside a fetch.

    Raises:
        StateMissing: nothing says what it must hold, or a fetch does not know it yet.
    """
    owner = read_owner(store.state)
    if owner is not None and store.manifest_or_none() is None:
        raise StateMissing(
            f"{owner} is at work here and has not received the torrent's metadata yet",
            path=store.root,
            hint="run this command again in a minute",
        )
    surveyed = survey(store)
    return Overview(
        store.root,
        surveyed,
        owner,
        read_owner(store.state, SEEDER),
        history.read(store),
        {
            command: journal.standing(check, partial(_mended, store, surveyed, command, check))
            for command, check in journal.checks(store).items()
        },
        journal.runs(store),
    )


def _mended(store: Store, seen: Survey, command: str, check: Check, finding: Found) -> bool:
    """Whether what a check found is not so any more.

    What a fetch found it may have mended itself. A verification that could write no record speaks
    until a record is written after it: an older one knows nothing of what was found.
    """
    if finding.kind == "wrong":
        return False
    if finding.kind == "extra":
        return store.stamp(PurePosixPath(finding.path)) is None
    if command == "verify" and _recorded_at(store) <= check.time:
        return False
    if finding.piece is not None:
        return finding.piece < len(seen.pieces) and seen.pieces[finding.piece]
    return seen.files.get(PurePosixPath(finding.path)) == "proven"


def _recorded_at(store: Store) -> float:
    """When the record was last written, in seconds since 1970; 0 if there is none."""
    try:
        return (store.state / "record.json").stat().st_mtime
    except OSError:
        return 0.0


def missing_runs(pieces: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First and last piece of each run that is not proven."""
    first = None
    for piece, proven in enumerate(pieces):
        if not proven and first is None:
            first = piece
        elif proven and first is not None:
            yield first, piece - 1
            first = None
    if first is not None:
        yield first, len(pieces) - 1


def as_fields(seen: Overview) -> dict[str, Any]:
    """The JSON object of `grokfetch status --json`; docs/events.md describes it."""
    survey, owner = seen.survey, seen.owner
    return {
        "schema": SCHEMA,
        "folder": str(seen.folder),
        "name": survey.name,
        "info_hash": survey.info_hash,
        "owner": None if owner is None else dataclasses.asdict(owner),
        "seeder": None if seen.seeder is None else dataclasses.asdict(seen.seeder),
        "bytes": {
            "total": survey.total,
            "proven": survey.proven,
            "by_pieces": survey.by_pieces,
            "by_sha256": survey.by_sha256,
        },
        "pieces": {
            "total": len(survey.pieces),
            "proven": sum(survey.pieces),
            "missing": list(missing_runs(survey.pieces)),
        },
        "asked": None if survey.asked is None else dataclasses.asdict(survey.asked),
        "files": Counter(survey.files.values()),
        "not_proven": {str(p): state for p, state in survey.files.items() if state != "proven"},
        "layers": [
            {"name": group.name, "proven": group.proven, "total": group.total}
            for group in survey.groups
        ],
        "demanded": [] if seen.owner is None else list(seen.history.demanded),
        "ended": None if seen.history.ended is None else dataclasses.asdict(seen.history.ended),
        "history": [dataclasses.asdict(sample) for sample in seen.history.samples],
        "sent": [
            {"kind": origin.kind, "name": origin.name, "bytes": count}
            for origin, count in sorted(seen.history.sent.items(), key=lambda both: -both[1])
        ],
        "checks": {command: dataclasses.asdict(check) for command, check in seen.checks.items()},
        "runs": [dataclasses.asdict(run) for run in seen.runs],
    }
