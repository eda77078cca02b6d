"""How far a step is, from the same events: a bar for people, JSON lines for machines.

The bar goes to stderr, as sparse lines where that is not a terminal, and results go to stdout, so
that output can be piped while a bar is drawn. JSON lines are all that stdout holds. Nothing here is
coloured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Never, Protocol, Self, TextIO

from tqdm import tqdm

from grokfetch.events import Event, Finding, Notice, Progress, Status
from grokfetch.output.json_lines import as_fields
from grokfetch.units import bytes_text

__all__ = ["Bar", "Lines", "Sink", "finding_line"]


LINE_INTERVAL_S = 10.0
"""How often a line is written where there is no terminal to draw on."""

PROGRESS_INTERVAL_S = 1.0
"""How often a machine is told how far a step is; other events are never left out."""


class Sink(Protocol):
    """Where the events of a step go. A context manager, left when the step has ended."""

    def __enter__(self) -> Self:
        """Begin the step."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""

    def take(self, event: Event) -> None:
        """Show an event, or pass it on."""

    def say(self, text: str) -> None:
        """Say something that a person may want to know."""


class Lines:
    """Events as JSON lines, each with its time in seconds since 1970.

    Args:
        write: takes one line, without its end.
        clock: monotonic seconds.
    """

    def __init__(
        self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._phase = ""
        self._due = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to do: each line is whole as it is written."""

    def take(self, event: Event) -> None:
        """Write an event; progress only now and then, at the end of a step and in a new phase."""
        if isinstance(event, Status | Progress):
            now = self._clock()
            whole = 0 < event.total == event.done
            if event.phase == self._phase and now < self._due and not whole:
                return
            self._phase, self._due = event.phase, now + PROGRESS_INTERVAL_S
        for fields in as_fields(event):
            self.put(fields)

    def say(self, text: str) -> None:
        """Write a notice."""
        self.take(Notice(text))

    def put(self, fields: dict[str, Any]) -> None:
        """Write one object as a line."""
        self._write(json.dumps({**fields, "time": round(time.time(), 3)}, ensure_ascii=False))


class Bar:
    """The progress of one step in bytes.

    Args:
        label: the step, one word.
        stream: where to draw; stderr unless a test says otherwise.
        findings: where findings go, one a line; to `stream` by default.
        plain: never draw, as on a terminal that can only append.
    """

    def __init__(
        self,
        label: str,
        stream: TextIO | None = None,
        findings: TextIO | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self._label = label
        self._stream = stream or sys.stderr
        self._findings = findings or self._stream
        self._tqdm: tqdm[Never] | None = None
        self._start = time.monotonic()
        self._next_line = self._start + LINE_INTERVAL_S
        dumb = plain or os.environ.get("TERM") == "dumb"
        self._terminal = self._stream.isatty() and not dumb

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tqdm is not None:
            self._tqdm.close()

    def take(self, event: Event) -> None:
        """Show how far it is; write what was found and noticed above the bar."""
        match event:
            case Status():
                self.show(event.done, event.total, _note(event))
            case Progress():
                self.show(event.done, event.total)
            case Finding():
                self._print(finding_line(event), self._findings)
            case Notice():
                self.say(event.text)
            case _:
                # Results are printed by the command; single pieces are for machines.
                return

    def show(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` bytes are done, with a few words about the rest."""
        if self._terminal:
            self._draw(done, total, note)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_INTERVAL_S
            share = f"{100 * done / total:.1f} %" if total else "waiting"
            text = f"{self._label} {share}, {bytes_text(done)} of {bytes_text(total)}"
            self.say(f"{text}, {note}" if note else text)

    def say(self, text: str) -> None:
        """Write one line above the bar."""
        self._print(text, self._stream)

    def _print(self, text: str, stream: TextIO) -> None:
        if self._tqdm is None:
            print(text, file=stream, flush=True)
        else:
            self._tqdm.write(text, file=stream)

    def _draw(self, done: int, total: int, note: str) -> None:
        bar = self._tqdm
        if bar is None:
            bar = self._tqdm = tqdm(
                desc=self._label,
                total=total or None,
                initial=done,
                unit="B",
                unit_scale=True,
                unit_divisor=1000,
                dynamic_ncols=True,
                file=self._stream,
                leave=False,
            )
        bar.total = total or None
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)


def _note(status: Status) -> str:
    if status.phase == "metadata":
        return f"metadata, {status.peers} peers"
    if status.phase != "downloading":
        return status.phase
    return f"{status.pieces_done}/{status.pieces_total} pieces proven, {status.peers} peers"


def finding_line(finding: Finding) -> str:
    """A finding in one line: what, where, why, and which tensors it concerns."""
    piece = "" if finding.piece is None else f" piece {finding.piece}"
    detail = f": {finding.detail}" if finding.detail else ""
    tensor = f" [{finding.tensor}]" if finding.tensor else ""
    return f"{finding.kind}{piece} {finding.path}{detail}{tensor}"
