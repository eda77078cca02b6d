"""One way to show how far a long step is: a bar on a terminal, sparse lines elsewhere.

Progress goes to stderr, results to stdout, so that output can be piped while a bar is drawn.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Never, Self, TextIO

from tqdm import tqdm

__all__ = ["Bar", "bytes_text", "seconds_text"]

LINE_INTERVAL_S = 10.0
"""How often a line is written where there is no terminal to draw on."""


class Bar:
    """The progress of one step in bytes.

    Args:
        label: the step, one word.
        stream: where to draw; stderr unless a test says otherwise.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = stream or sys.stderr
        self._tqdm: tqdm[Never] | None = None
        self._start = time.monotonic()
        self._next_line = self._start + LINE_INTERVAL_S
        self._terminal = self._stream.isatty()

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
        if self._tqdm is None:
            print(text, file=self._stream, flush=True)
        else:
            self._tqdm.write(text, file=self._stream)

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


def bytes_text(count: float) -> str:
    """A size for people, in decimal units as disks and networks use them: 318.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    """A duration for people: 0.03 s, 12 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
