"""What a terminal can show, and text laid out for it.

`--plain` is for screen readers, and for those who prefer words: no pictures, no colour, one
statement per line.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TextIO
from unicodedata import combining, east_asian_width

import click

__all__ = ["LABEL", "Screen", "be_plain", "plain", "screen"]

KEY = "grokfetch.plain"
"""The key under which this run keeps whether `--plain` was given."""

SHADES = "·░▒▓█"
ASCII_SHADES = ".:-+#"
"""For terminals with ASCII only. The first stands for nothing, the last for all."""

COLOURS = (None, "yellow", "yellow", "yellow", "green")
"""The colours of the shades. They add no information to the shades."""

LABEL = 9
"""Columns of the word at the beginning of a fact."""

NARROWEST = 20


def be_plain(context: click.Context) -> None:
    """Let this run of the program write plain text."""
    context.meta[KEY] = True


def plain() -> bool:
    """Whether this run of the program was asked for plain text."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(KEY))


@dataclasses.dataclass(frozen=True, slots=True)
class Screen:
    """What a terminal or a stream can show.

    width: columns, None to never wrap lines.
    shades: five characters from nothing to all.
    """

    width: int | None = 80
    shades: str = SHADES
    colour: bool = False
    plain: bool = False

    @property
    def columns(self) -> int:
        """The width of pictures, which need one."""
        return self.width or 80

    def shade(self, share: float) -> int:
        """The shade for a share: the first only for nothing, the last only for all."""
        if share >= 1:
            return len(self.shades) - 1
        return 0 if share <= 0 else 1 + int(share * (len(self.shades) - 2))

    def painted(self, shades: Sequence[int]) -> str:
        """A row of shades by their numbers."""
        return "".join(
            self._paint(self.shades[shade] * len(list(run)), COLOURS[shade])
            for shade, run in groupby(shades)
        )

    def bar(self, share: float, length: int) -> str:
        """A row of `length` cells that is filled from the left."""
        full = int(share * length)
        partial = [self.shade(share * length - full)] if full < length else []
        if partial and not partial[0] and not full and share > 0:
            partial = [1]
        return self.painted(([4] * full + partial + [0] * length)[:length])

    def fact(self, label: str, text: str) -> Iterator[str]:
        """A label, followed by a wrapped text."""
        if self.plain:
            yield f"{label}: {text}"
            return
        head = f"{label:<{LABEL}}"
        yield from self.wrapped(head + text, " " * LABEL)

    def table(
        self, titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()
    ) -> Iterator[str]:
        """Aligned columns; those that do not fit go below, indented, on a line of their own.

        In plain text each row is one line that names all columns except the first.

        Args:
            titles: of the columns.
            rows: their cells.
            right: the columns that are aligned to the right.
        """
        if self.plain:
            for row in rows:
                both = zip(titles[1:], row[1:], strict=True)
                named = [f"{title} {cell}".strip() for title, cell in both if cell]
                yield f"{row[0]}: {', '.join(named)}"
            return
        cells = [titles, *rows]
        widths = [max(map(_columns, column)) for column in zip(*cells, strict=True)]
        lines = self._lines(widths)
        for row in cells:
            for place, line in enumerate(lines):
                text = "  ".join(
                    _padded(row[at], widths[at], to_right=at in right) for at in line
                ).rstrip()
                if text:
                    yield from self.wrapped("  " * (place > 0) + text, "    ")

    def _lines(self, widths: Sequence[int]) -> list[list[int]]:
        """The columns of each line of a row."""
        lines: list[list[int]] = [[]]
        taken = 0
        for column, width in enumerate(widths):
            taken += 2 + width
            if lines[-1] and self.width is not None and taken - 2 > self.width:
                lines.append([])
                taken = 4 + width
            lines[-1].append(column)
        return lines

    def wrapped(self, text: str, indent: str = "  ") -> Iterator[str]:
        """A text in lines that fit; all except the first are indented."""
        if self.width is None or _columns(text) <= self.width:
            yield text
            return
        # A name that is longer than a line is broken here: the terminal would lose the indent.
        yield from textwrap.wrap(
            text,
            max(self.width, NARROWEST),
            subsequent_indent=indent,
            break_on_hyphens=False,
            drop_whitespace=True,
        )

    def _paint(self, text: str, colour: str | None) -> str:
        return click.style(text, fg=colour) if self.colour and colour else text


def screen(stream: TextIO | None = None, *, listing: bool = False) -> Screen:
    """What stdout, or another stream, can show, given the environment and the options.

    `NO_COLOR` and `TERM=dumb` are respected.

    Args:
        stream: stdout by default.
        listing: without a terminal, do not wrap lines, for programs that read them.
    """
    stream = stream or sys.stdout
    terminal = stream.isatty()
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    asked_plain = plain()
    whole = asked_plain or (listing and not terminal)
    return Screen(
        None if whole else max(shutil.get_terminal_size().columns, NARROWEST),
        _shades(stream),
        colour and not asked_plain,
        asked_plain,
    )


def _shades(stream: TextIO) -> str:
    try:
        SHADES.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII_SHADES
    return SHADES


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes; wide characters (UAX #11) take two."""
    return sum(0 if combining(it) else 1 + (east_asian_width(it) in "WF") for it in text)


def _padded(text: str, width: int, *, to_right: bool) -> str:
    room = " " * (width - _columns(text))
    return room + text if to_right else text + room
