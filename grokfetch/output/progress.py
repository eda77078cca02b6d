"""The progress of a step, from the same events: a bar for people, JSON lines for programs.

The bar goes to stderr, as a line now and then if that is not a terminal, and results go to stdout,
so that output can be piped while a bar is drawn. With JSON lines, stdout has nothing else. Nothing
here is coloured.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Never, Protocol, Self, TextIO

from grokfetch.events import Event, Finding, Notice, Progress, Status
from grokfetch.output.gauge import Gauge, Speed
from grokfetch.output.json_lines import as_fields
from grokfetch.output.terminal import Screen, screen

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Bar", "Lines", "Sink", "finding_line"]


LINE_INTERVAL_S = 10.0
"""How often a line is written if there is no terminal."""

READS = {"checking", "hashing"}
"""Phases of a fetch whose rate is that of the disk."""

DRAW_INTERVAL_S = 0.1
"""How often a bar is redrawn."""

PROGRESS_INTERVAL_S = 1.0
"""How often progress is written as JSON; other events are never left out."""


class Sink(Protocol):
    """Where the events of a step go. A context manager, left when the step has ended."""

    def __enter__(self) -> Self:
        """Start the step."""

    def __exit__(self, *_: object) -> None:
        """End it."""

    def take(self, event: Event) -> None:
        """Show an event, or pass it on."""

    def say(self, text: str) -> None:
        """Print something that a user may want to know."""

    def hide(self) -> None:
        """Leave the last line to other output until the next event."""


class Lines:
    """Events as JSON lines, each with its time in seconds since 1970.

    Args:
        write: takes one line, without a newline.
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

    def __exit__(self, *_: object) -> None:
        """Nothing to do: each line is complete when it is written."""

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

    def hide(self) -> None:
        """Nothing to do: lines stay where they are."""

    def put(self, fields: dict[str, Any]) -> None:
        """Write one object as a line."""
        self._write(json.dumps({**fields, "time": round(time.time(), 3)}, ensure_ascii=False))


class Bar:
    """The progress of one step in bytes, in the last line of a terminal.

    Args:
        label: the step, one word.
        stream: where to draw; by default stderr.
        findings: where findings go, one per line; by default to `stream`.
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
        self._speed = Speed()
        self._line: tqdm[Never] | None = None
        dumb = plain or os.environ.get("TERM") == "dumb"
        self._terminal = self._stream.isatty() and not dumb
        self._due = -math.inf if self._terminal else time.monotonic() + LINE_INTERVAL_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()

    def take(self, event: Event) -> None:
        """Show progress; write findings and notices above the bar."""
        match event:
            case Status():
                self._show(self._of_fetch(event))
            case Progress():
                self.show(event.done, event.total, event.unit)
            case Finding():
                self._print(finding_line(event), self._findings)
            case Notice():
                self.say(event.text)
            case _:
                # The command prints results; single pieces are only for programs.
                return

    def show(self, done: int, total: int, unit: str = "byte") -> None:
        """Show that `done` of `total` bytes, or of other units, are done."""
        rate = self._speed.of(done, time.monotonic())
        self._show(Gauge(self._label, done, total, rate, unit=unit))

    def _of_fetch(self, status: Status) -> Gauge:
        downloads = status.phase == "downloading"
        measured = self._speed.of(status.done, time.monotonic())
        known = status.total if status.phase != "metadata" else 0
        return Gauge(
            self._label if downloads else status.phase,
            status.done,
            known,
            status.rate if downloads else measured if status.phase in READS else None,
            status.peers if downloads or status.phase == "metadata" else None,
            status.mirrors,
            waiting=_waiting(status.waiting),
        )

    def say(self, text: str) -> None:
        """Write one line above the bar."""
        self._print(text, self._stream)

    def hide(self) -> None:
        """Remove the bar until the next event."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _show(self, gauge: Gauge) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        if self._terminal:
            self._due = now + DRAW_INTERVAL_S
            self._draw(gauge.line(self._view))
        else:
            self._due = now + LINE_INTERVAL_S
            self.say(gauge.sentence())

    @property
    def _view(self) -> Screen:
        # A character in the last column starts a new line on some terminals.
        view = screen(self._stream)
        return dataclasses.replace(view, width=view.columns - 1, colour=False)

    def _print(self, text: str, stream: TextIO) -> None:
        if self._line is None:
            print(text, file=stream, flush=True)
        else:
            self._line.write(text, file=stream)

    def _draw(self, text: str) -> None:
        # A bar of tqdm's own fits no narrow terminal: tqdm keeps the line, `Gauge` says what is in
        # it. Where nothing is drawn, nobody waits for its import.
        if self._line is None:
            from tqdm import tqdm

            self._line = tqdm(desc=text, bar_format="{desc}", leave=False, file=self._stream)
        else:
            self._line.set_description_str(text)


def _waiting(names: Sequence[str]) -> str:
    """What readers wait for: the first tensor, its name shortened, and how many more."""
    if not names:
        return ""
    name = re.sub(r"^transformer/decoder_layer_(\d+)/", r"layer \1 ", names[0])
    first = re.sub(r"/(w|scale|embeddings)$", "", name)
    return first + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def finding_line(finding: Finding) -> str:
    """A finding in one line: what, where, why, and which tensors it affects."""
    piece = "" if finding.piece is None else f" piece {finding.piece}"
    detail = f": {finding.detail}" if finding.detail else ""
    tensor = f" [{finding.tensor}]" if finding.tensor else ""
    return f"{finding.kind}{piece} {finding.path}{detail}{tensor}"
