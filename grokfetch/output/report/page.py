"""The page: everything that `grokfetch status --json` tells, for a browser, in one file.

It loads nothing and runs nothing: no script, no font, no picture from elsewhere, and its content
security policy forbids them. Names come from strangers, and are escaped by the template engine.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from grokfetch import __version__
from grokfetch.events import Origin
from grokfetch.folder.history import History, rates
from grokfetch.folder.journal import Run
from grokfetch.folder.overview import Overview, missing_runs
from grokfetch.output.report import charts
from grokfetch.units import ago_text, bytes_text, seconds_text, share_text, speed_text

__all__ = ["render"]

RATE_CELLS = 240
MOST_ROWS = 200
"""The most rows in a table; the page says how many more there are."""

SENDERS = 20


def render(seen: Overview, *, now: float) -> str:
    """The page as HTML.

    Args:
        seen: what is known of the folder.
        now: seconds since 1970.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("grokfetch.output.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        bytes=bytes_text,
        seconds=seconds_text,
        speed=speed_text,
        time=_time,
        ago=lambda then: ago_text(then, now),
    )
    environment.globals.update(share=share_text)
    names = [group.name for group in seen.survey.groups]
    return environment.get_template("page.html").render(
        seen=seen,
        survey=seen.survey,
        now=now,
        version=__version__,
        width=charts.WIDTH,
        height=charts.HEIGHT,
        most=MOST_ROWS,
        files=Counter(seen.survey.files.values()),
        not_proven=[(str(p), state) for p, state in seen.survey.files.items() if state != "proven"],
        others=[name for name in names if not name.startswith("layer ")],
        pieces=_pieces(seen.survey.pieces),
        fetch=_fetch(seen.history, seen.survey.total),
        senders=_senders(seen.history),
        heat=_heat(seen.runs),
    )


def _time(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def _pieces(pieces: Sequence[bool]) -> dict[str, Any]:
    cells = charts.piece_cells(pieces)
    runs = list(missing_runs(pieces))
    return {
        "cells": cells,
        "columns": max((cell.column + 1 for cell in cells), default=1),
        "rows": cells[-1].row + 1 if cells else 0,
        "each": len(pieces) / len(cells) if cells else 0,
        "proven": sum(pieces),
        "runs": runs[:MOST_ROWS],
        "more": max(0, len(runs) - MOST_ROWS),
    }


def _fetch(history: History, total: int) -> dict[str, Any] | None:
    """The curves of the fetches; None if there is nothing to draw."""
    samples = history.samples
    rates_shown = rates(samples, RATE_CELLS)
    if not rates_shown:
        return None
    top = charts.ceiling(max(rates_shown))
    start, length = samples[0].worked, samples[-1].worked - samples[0].worked
    received = samples[-1].received - samples[0].received
    every = max(1, len(samples) // 24)
    return {
        "rate": charts.steps(rates_shown, top),
        "ticks": [top * quarter / 4 for quarter in (4, 3, 2, 1, 0)],
        "times": [length * quarter / 4 for quarter in range(5)],
        "proven": charts.curve(
            [((it.worked - start) / length, it.proven / total if total else 1) for it in samples]
        ),
        "pauses": list(charts.pauses(samples)),
        "highest": max(rates_shown),
        "mean": received / length,
        "length": length,
        "last": samples[-1],
        "rows": [*islice(samples, 0, len(samples) - 1, every), samples[-1]],
    }


def _senders(history: History) -> dict[str, Any]:
    rows = sorted(history.sent.items(), key=lambda both: -both[1])
    kinds: Counter[str] = Counter()
    for origin, count in rows:
        kinds[origin.kind] += count
    others = sum(count for _, count in rows[SENDERS:])
    return {
        "total": sum(kinds.values()),
        "kinds": kinds,
        "rows": [(origin, _name(origin), count) for origin, count in rows[:SENDERS]],
        "more": max(0, len(rows) - SENDERS),
        "rest": others,
        "top": rows[0][1] if rows else 1,
    }


def _name(origin: Origin) -> str:
    return origin.name or "others, not told apart"


def _heat(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The summed choices of all runs with the same shape as the last one that has choices."""
    counted = [run for run in runs if run.experts]
    if not counted or counted[-1].experts is None:
        return None
    shape = [len(row) for row in counted[-1].experts]
    alike = [run.experts for run in counted if run.experts and [*map(len, run.experts)] == shape]
    table = [
        [sum(column) for column in zip(*rows, strict=True)] for rows in zip(*alike, strict=True)
    ]
    return {
        "runs": len(alike),
        "table": table,
        "cells": charts.heat(table),
        "total": sum(map(sum, table)),
        "experts": shape[0],
        "layers": len(shape),
    }
