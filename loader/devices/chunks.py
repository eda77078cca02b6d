"""One pass over a tensor that fills all its blocks: which bytes are read when, and for which.

A tensor is stored row by row, while devices need slices along any axis. Reading block by block
would go over the file once per device, in short runs if columns are split. Instead, a chunk is one
run of the file, and says which part of it goes where in each block. No arrays, no I/O.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from loader.weights.partition import Block

__all__ = ["Chunk", "Part", "chunks"]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The part of one block in a chunk: `source` slices the tensor, `target` the block.

    start: its first byte, counted from the tensor's. nbytes: from there to its last byte; if it is
    `solid`, all of them belong to it.
    """

    block: int
    source: Block
    target: Block
    start: int
    nbytes: int
    solid: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        return tuple(cut.stop - cut.start for cut in self.target)


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """One run of a tensor's bytes; `start` counts from its first, and `parts` are within.

    `used` is the bytes of all parts: fewer than `nbytes` if other hosts hold the rest.
    """

    start: int
    nbytes: int
    used: int
    parts: tuple[Part, ...]


def chunks(
    shape: Sequence[int], itemsize: int, blocks: Sequence[Block], most: int
) -> Iterator[Chunk]:
    """Runs that together hold all blocks once, in file order; what no block needs is left out.

    Args:
        shape: of the tensor, which is in C order.
        itemsize: bytes of an element.
        blocks: disjoint boxes of it.
        most: the most bytes in a run, though never less than an element.
    """
    for box in _boxes(shape, max(1, most // itemsize)):
        parts = tuple(_parts(shape, itemsize, box, blocks))
        if parts:
            first = min(part.start for part in parts)
            end = max(part.start + part.nbytes for part in parts)
            used = sum(math.prod(part.shape) for part in parts) * itemsize
            yield Chunk(first, end - first, used, parts)


def _boxes(shape: Sequence[int], most: int) -> Iterator[Block]:
    """Boxes of at most `most` elements that tile a tensor in order, each one run of it."""
    axis = next(
        (axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) <= most), len(shape)
    )
    if axis == len(shape):
        yield ()
        return
    step = most // max(1, math.prod(shape[axis + 1 :]))
    inner = tuple(slice(0, size) for size in shape[axis + 1 :])
    for outer in itertools.product(*map(range, shape[:axis])):
        before = tuple(slice(index, index + 1) for index in outer)
        for start in range(0, shape[axis], step):
            yield (*before, slice(start, min(start + step, shape[axis])), *inner)


def _parts(
    shape: Sequence[int], itemsize: int, box: Block, blocks: Sequence[Block]
) -> Iterator[Part]:
    for number, block in enumerate(blocks):
        source = tuple(
            slice(max(mine.start, run.start), min(mine.stop, run.stop))
            for mine, run in zip(block, box, strict=True)
        )
        if all(cut.start < cut.stop for cut in source):
            target = tuple(
                slice(cut.start - mine.start, cut.stop - mine.start)
                for cut, mine in zip(source, block, strict=True)
            )
            first = _place(shape, [cut.start for cut in source])
            count = _place(shape, [cut.stop - 1 for cut in source]) + 1 - first
            solid = count == math.prod(cut.stop - cut.start for cut in source)
            yield Part(number, source, target, first * itemsize, count * itemsize, solid)


def _place(shape: Sequence[int], index: Sequence[int]) -> int:
    """How many elements come before the one at an index."""
    place = 0
    for size, at in zip(shape, index, strict=True):
        place = place * size + at
    return place
