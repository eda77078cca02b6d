"""The jobs of an export: which rows of which shard come next, and which bytes they become."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loader.export.layout import Part, is_transposed
from loader.export.matrices import encode, encode_quantized, row_bytes
from loader.weights.checkpoint import Checkpoint
from loader.weights.tensor import Tensor

__all__ = ["Job", "Work", "encoded", "rows_of"]

SLAB: Final = 1 << 22
"""Weights that a thread transposes and encodes at once, in at most 22 MB of memory."""

AHEAD: Final = 4
"""Tensors that a fetch running beside the export is asked to bring before all others."""

LOOK_S: Final = 1.0
"""How often to look for arrived tensors while jobs are running."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """Some rows of a parameter viewed as one matrix: an expert, or a part of a table."""

    part: Part
    rows: range


class Work:
    """The jobs of tensors in order, each available once the shard it is made from has arrived.

    So no job waits for bytes, and an error elsewhere ends all of them at once.

    Attributes:
        absent: the tensors whose shards have not arrived.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Sequence[Part]) -> None:
        self._checkpoint = checkpoint
        self.absent = list(parts)
        self._ready = deque[Job]()
        self._unended: Counter[str] = Counter()
        self._seen = -1

    @property
    def left(self) -> bool:
        """Whether there are jobs still to be taken."""
        return bool(self.absent or self._ready)

    @property
    def patience_s(self) -> float | None:
        """How long to wait for a running job before looking again for arrived tensors."""
        return LOOK_S if self.absent else None

    def take(self, most: int) -> list[Job]:
        """The next jobs whose shards have arrived.

        Raises:
            GrokfetchError: what has ended the fetch that should bring the others.
        """
        news = self._checkpoint.news
        if self.absent and news != self._seen:
            self._seen = news
            self._look()
        return [self._ready.popleft() for _ in range(min(most, len(self._ready)))]

    def _look(self) -> None:
        names = dict.fromkeys(part.spec.name for part in self.absent)
        arrived = {name: self._checkpoint.arrived(name) for name in names}
        self._checkpoint.prefetch([name for name in names if not arrived[name]][:AHEAD])
        for part in self.absent:
            if arrived[part.spec.name]:
                jobs = list(_jobs(part))
                self._unended[part.name] = len(jobs)
                self._ready.extend(jobs)
        self.absent = [part for part in self.absent if not arrived[part.spec.name]]

    def await_more(self) -> None:
        """Return when more may have arrived."""
        self._checkpoint.await_news(self._seen)

    def ends(self, job: Job) -> bool:
        """Count a job as ended; returns whether it was the last of its tensor."""
        self._unended[job.part.name] -= 1
        return not self._unended[job.part.name]


def _jobs(part: Part) -> Iterator[Job]:
    """A parameter divided into jobs: one for each expert, or for each slab of rows of a table."""
    *outer, rows, columns = (1, *part.spec.shape)
    step = rows
    if part.spec.scale_groups is None and not is_transposed(part.spec):
        step = max(1, SLAB // columns)
    total = math.prod(outer) * rows
    first = 0
    if part.expert is not None:
        first, total = part.expert * rows, (part.expert + 1) * rows
    for start in range(first, total, step):
        yield Job(part, range(start, min(start + step, total)))


def rows_of(tensor: Tensor, rows: range) -> npt.NDArray[np.generic]:
    """Rows of the weight viewed as one matrix: mapped and read from the disk, or a copy."""
    columns = tensor.shape[-1]
    width = columns * tensor.dtype.itemsize
    if not tensor.mappable:
        copy = np.empty((len(rows), columns), tensor.dtype)
        tensor.read_into(rows.start * width, copy)
        return copy
    tensor.pages(tensor.array.offset + rows.start * width, len(rows) * width).bring()
    return tensor.weight.reshape(-1, columns)[rows.start : rows.stop]


def encoded(
    job: Job, tensor: Tensor, matrix: npt.NDArray[Any]
) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
    """The bytes of a job in order, with their offsets from the beginning of the tensor."""
    part, scales = job.part, tensor.scales
    length, count = matrix.shape
    if scales is None:
        values = np.ascontiguousarray(matrix.T) if is_transposed(part.spec) else matrix
        yield job.rows.start * row_bytes(part.kind, count), encode(values, part.kind)
        return
    groups = scales.shape[-2]
    expert = job.rows.start // length
    own_scales = scales.reshape(-1, count)[expert * groups : (expert + 1) * groups]
    before = 0 if part.expert is not None else expert * count
    step = max(8, SLAB // length // 8 * 8)
    width = row_bytes(part.kind, length)
    for start in range(0, count, step):
        columns = slice(start, start + step)
        data = encode_quantized(matrix[:, columns], own_scales[:, columns], part.kind)
        yield (before + start) * width, data
