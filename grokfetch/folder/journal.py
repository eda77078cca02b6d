"""The findings of the latest checks of a folder, and the figures of the last runs of its model.

Kept for `report` and `status`. A convenience, see `advisory`: it proves nothing. Two runs that end
at the same moment may cost one of them its entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from grokfetch.events import Finding
from grokfetch.folder import advisory
from grokfetch.folder.store import Store

__all__ = [
    "Check",
    "Command",
    "Found",
    "Run",
    "add_run",
    "checked",
    "checks",
    "note_more",
    "runs",
    "standing",
]

CHECKS_SCHEMA = 1
CHECKS_FILE = "findings.json"
FINDINGS = 500
"""The most findings of a check that are kept; all are counted."""

RUNS_SCHEMA = 1
RUNS_FILE = "runs.json"
RUNS = 20
"""The most runs that are kept: the last ones."""

Command = Literal["fetch", "verify"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A finding as it was reported: `verify.Finding`, or a tensor that is not what it must be."""

    kind: str
    path: str
    piece: int | None
    tensor: str | None
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """The findings of one fetch or verification, which ended at `time` (seconds since 1970).

    `count` is how many there were; `findings` the first of them.
    """

    time: float
    count: int
    findings: tuple[Found, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One run of the model, which ended at `time` (seconds since 1970); None is not known.

    weights: bytes. loaded_s: until the weights were in place. first_token_s: from the prompt to the
    first token, compiling left out. tokens: generated. tokens_per_s: after the first, compiling
    left out. peak_memory: anonymous bytes, which the system cannot drop as it can the pages of
    files. read: bytes that the disk was asked for, from the start of loading on. experts: for each
    layer how often each expert was chosen. compile_s: spent on compiling; None for a run of an
    earlier version, whose other seconds include it.
    """

    time: float
    placement: str
    platform: str
    devices: int
    weights: int
    loaded_s: float
    prompt: int
    tokens: int
    first_token_s: float
    tokens_per_s: float | None
    peak_memory: int | None
    read: int | None
    experts: tuple[tuple[int, ...], ...] | None
    compile_s: float | None = None


# --- checks --------------------------------------------------------------------------------------


def checks(store: Store) -> Mapping[str, Check]:
    """The latest check by the command that made it, "fetch" or "verify"; none if none is kept."""
    return advisory.read(store.state / CHECKS_FILE, CHECKS_SCHEMA, _decode_checks) or {}


def checked(
    store: Store, command: Command, events: Generator[T, None, None]
) -> Generator[T, None, None]:
    """The events of a check, unchanged; its findings are kept when it has begun, and ends.

    They take the place of those that the same command made before.
    """
    findings: list[Found] = []
    count = 0
    begun = False
    try:
        with contextlib.closing(events):
            for event in events:
                begun = True
                if isinstance(event, Finding):
                    count += 1
                    if len(findings) < FINDINGS:
                        findings.append(_found(event))
                yield event
    finally:
        # A check that could not start, for example without the lock, has checked nothing.
        if begun:
            last = Check(time.time(), count, tuple(findings))
            _write_checks(store, {**checks(store), command: last})


def note_more(store: Store, command: Command, findings: Sequence[Found]) -> None:
    """Add findings to those of the latest check, which they complete."""
    kept = dict(checks(store))
    if findings and command in kept:
        last = kept[command]
        together = (*last.findings, *findings)[:FINDINGS]
        kept[command] = Check(last.time, last.count + len(findings), together)
        _write_checks(store, kept)


def standing(check: Check, mended: Callable[[Found], bool]) -> Check:
    """A check without the findings that have been repaired since.

    Findings that were counted but not kept count as repaired if all kept ones are.

    Args:
        check: the original check.
        mended: whether a finding has been repaired.
    """
    left = tuple(finding for finding in check.findings if not mended(finding))
    unknown = check.count - len(check.findings) if left or not check.findings else 0
    return Check(check.time, len(left) + unknown, left)


def _found(finding: Finding) -> Found:
    return Found(finding.kind, str(finding.path), finding.piece, finding.tensor, finding.detail)


def _write_checks(store: Store, kept: Mapping[str, Check]) -> None:
    fields = {command: dataclasses.asdict(check) for command, check in kept.items()}
    advisory.write(store.state / CHECKS_FILE, CHECKS_SCHEMA, {"checks": fields})


def _decode_checks(fields: dict[str, Any]) -> dict[str, Check]:
    return {
        command: Check(
            advisory.number(check["time"]),
            advisory.count(check["count"]),
            tuple(_decode_found(finding) for finding in check["findings"][:FINDINGS]),
        )
        for command, check in dict(fields["checks"]).items()
    }


def _decode_found(fields: Mapping[str, Any]) -> Found:
    piece, tensor = fields["piece"], fields["tensor"]
    return Found(
        str(fields["kind"]),
        str(fields["path"]),
        None if piece is None else advisory.count(piece),
        None if tensor is None else str(tensor),
        str(fields["detail"]),
    )


# --- runs ----------------------------------------------------------------------------------------


def runs(store: Store) -> tuple[Run, ...]:
    """The last runs, oldest first; none if none is kept."""
    return advisory.read(store.state / RUNS_FILE, RUNS_SCHEMA, _decode_runs) or ()


def add_run(store: Store, run: Run) -> None:
    """Keep a run behind those before, the oldest of which may go."""
    kept = (*runs(store), run)[-RUNS:]
    rows = [dataclasses.asdict(run) for run in kept]
    advisory.write(store.state / RUNS_FILE, RUNS_SCHEMA, {"runs": rows})


def _decode_runs(fields: dict[str, Any]) -> tuple[Run, ...]:
    return tuple(_decode_run(run) for run in fields["runs"][-RUNS:])


def _decode_run(run: Mapping[str, Any]) -> Run:
    speed, memory, read = run["tokens_per_s"], run["peak_memory"], run["read"]
    return Run(
        advisory.number(run["time"]),
        str(run["placement"]),
        str(run["platform"]),
        advisory.count(run["devices"]),
        advisory.count(run["weights"]),
        advisory.number(run["loaded_s"]),
        advisory.count(run["prompt"]),
        advisory.count(run["tokens"]),
        advisory.number(run["first_token_s"]),
        None if speed is None else advisory.number(speed),
        None if memory is None else advisory.count(memory),
        None if read is None else advisory.count(read),
        None if run["experts"] is None else _decode_experts(run["experts"]),
        None if run.get("compile_s") is None else advisory.number(run["compile_s"]),
    )


def _decode_experts(rows: Iterable[Iterable[Any]]) -> tuple[tuple[int, ...], ...]:
    counts = tuple(tuple(advisory.count(chosen) for chosen in row) for row in rows)
    if len({len(row) for row in counts}) > 1:
        raise ValueError("layers differ in their experts")
    return counts
