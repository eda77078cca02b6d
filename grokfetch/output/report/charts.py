"""The coordinates of the shapes in the report's pictures. Pure.

All pictures are drawn in a box of `WIDTH` by `HEIGHT`, y pointing down, and stretched by the page.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from grokfetch.folder.history import Sample

__all__ = ["HEIGHT", "WIDTH", "Cell", "Heat", "Pause", "heat", "pauses", "piece_cells"]
__all__ += ["ceiling", "curve", "steps"]

WIDTH = 1000
HEIGHT = 100

MAP_COLUMNS = 64
MAP_ROWS = 20
FEW = 512
"""Pieces up to which the map has half its columns, so that squares stay large on a small screen."""

PAUSE_S = 60.0
"""Wall clock time beyond the time at work from which on a fetch counts as interrupted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A run of pieces on the map: its column and row, and how much of it is proven."""

    column: int
    row: int
    first: int
    last: int
    proven: int

    @property
    def pieces(self) -> int:
        """How many there are."""
        return self.last - self.first + 1

    @property
    def inset(self) -> float:
        """How far the filled square stays from the cell's edge, in cells: its area is the share."""
        return (1 - math.sqrt(self.proven / self.pieces)) / 2


def piece_cells(pieces: Sequence[bool]) -> list[Cell]:
    """The pieces in at most `MAP_COLUMNS` by `MAP_ROWS` cells, row by row."""
    columns = MAP_COLUMNS if len(pieces) > FEW else MAP_COLUMNS // 2
    count = min(len(pieces), MAP_COLUMNS * MAP_ROWS)
    bounds = [len(pieces) * cell // count for cell in range(count + 1)] if count else []
    return [
        Cell(at % columns, at // columns, first, stop - 1, sum(pieces[first:stop]))
        for at, (first, stop) in enumerate(pairwise(bounds))
    ]


def ceiling(value: float) -> float:
    """The top of an axis: the next of 1, 2, 4, 8 times a power of ten, so that quarters are short.

    1.0 for nothing.
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 4, 8, 10) if value <= power * step * (1 + 1e-9))


def steps(values: Sequence[float], top: float) -> str:
    """The SVG path of the area below values that hold for equal parts of the width."""
    if not values:
        return ""
    parts = [f"M0 {HEIGHT}"]
    for at, value in enumerate(values):
        parts.append(f"V{_y(value / top)}H{_x((at + 1) / len(values))}")
    return "".join([*parts, f"V{HEIGHT}Z"])


def curve(points: Sequence[tuple[float, float]]) -> str:
    """The SVG path through points whose coordinates are shares of the width and the height."""
    return "".join(
        f"{'L' if at else 'M'}{_x(across)} {_y(up)}" for at, (across, up) in enumerate(points)
    )


def _x(share: float) -> str:
    return f"{share * WIDTH:.4g}"


def _y(share: float) -> str:
    return f"{(1 - min(1.0, max(0.0, share))) * HEIGHT:.4g}"


@dataclasses.dataclass(frozen=True, slots=True)
class Pause:
    """A time in which no fetch ran: its place on the axis of time at work, and its seconds."""

    x: str
    seconds: float


def pauses(samples: Sequence[Sample]) -> Iterator[Pause]:
    """The interruptions between samples."""
    length = samples[-1].worked - samples[0].worked if samples else 0.0
    for before, after in pairwise(samples):
        seconds = (after.time - before.time) - (after.worked - before.worked)
        if seconds > PAUSE_S and length > 0:
            yield Pause(_x((before.worked - samples[0].worked) / length), seconds)


@dataclasses.dataclass(frozen=True, slots=True)
class Heat:
    """How often a layer chose an expert, of how many choices, and that share of the largest."""

    layer: int
    expert: int
    count: int
    of: int
    level: float


def heat(experts: Sequence[Sequence[int]]) -> list[Heat]:
    """A cell for each layer and expert."""
    sums = [max(1, sum(row)) for row in experts]
    top = max((max(row) / whole for row, whole in zip(experts, sums, strict=True)), default=0)
    return [
        Heat(layer, expert, count, sum(row), count / sums[layer] / top if top else 0.0)
        for layer, row in enumerate(experts)
        for expert, count in enumerate(row)
    ]
