"""Which pages of mapped weights are in memory: read ahead in parallel, kept, dropped behind.

A step over mapped weights touches 80 GB in an order that is known a little ahead. Where all of it
fits into memory each range is read once and stays. Where it does not, what every token needs is
kept, the experts that are chosen most often beside it, and the others are read for each token and
dropped after it, so that the kernel never has to look for memory.

Reading is `MADV_POPULATE_READ` in several threads: a fault of its own for each page would be
slower by far, and a disk answers one reader no faster than it must. The maps are advised to be of
huge pages: where the file system holds those (XFS, and ext4 since Linux 6.16), mapping what is in
the page cache costs next to nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import mmap
import os
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

from grokfetch.errors import StorageFailed
from loader.checkpoint import Checkpoint, Tensor

__all__ = ["Computed", "Division", "Kept", "Managed", "Paging", "divide"]

READERS = 8
"""Reads in flight: fewer leave an NVMe disk waiting."""

CHUNK = 16 << 20
"""Bytes of one read."""

AHEAD = 2
"""Experts that are read ahead of the one that is computed."""

LARGE = 4 << 20
"""Bytes from which huge pages are worth asking for."""


class Computed(Protocol):
    """A result that may still be on its way, as JAX's arrays are."""

    def block_until_ready(self) -> object:
        """Return when it is there."""


class Paging:
    """What a step says of the pages that it touches. This one leaves them to the system."""

    def layer(self, number: int) -> None:
        """Return when the attention weights of a layer may be touched."""

    def experts(self, number: int, chosen: Sequence[int]) -> None:
        """The router of a layer has spoken: these experts are wanted, in this order."""

    def expert(self, number: int, expert: int) -> None:
        """Return when an expert's weights may be touched."""

    def used(self, number: int, expert: int, result: Computed) -> None:
        """An expert's weights are not needed any more once `result` is there."""

    def table(self) -> None:
        """Return when the embedding may be touched as a whole."""


# --- what stays in memory: decisions -----------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Division:
    """How memory is divided: whether everything stays, what every token needs, how many experts."""

    everything: bool
    base: bool
    experts: int


def divide(distinct: int, base: int, expert: int, budget: int) -> Division:
    """What of a checkpoint stays in a budget of memory; all sizes in bytes.

    Args:
        distinct: of all its files, linked ones once.
        base: of what every token needs.
        expert: of one expert.
        budget: for weights.
    """
    if distinct <= budget:
        return Division(everything=True, base=True, experts=0)
    room = budget - base - (AHEAD + 1) * expert
    return Division(everything=False, base=room >= 0, experts=max(0, room // expert))


class Kept:
    """The experts that stay, at most `capacity`: those that were used most often."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._uses: dict[tuple[int, int], int] = {}
        self._kept: set[tuple[int, int]] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def use(self, key: tuple[int, int]) -> tuple[int, int] | None:
        """Count a use of an expert of a layer.

        Returns:
            Which one is to be dropped now, this one or another; None if none is.
        """
        uses = self._uses[key] = self._uses.get(key, 0) + 1
        if key in self._kept:
            return None
        if len(self._kept) < self._capacity:
            self._kept.add(key)
            return None
        coldest = min(self._kept, key=lambda other: self._uses[other], default=None)
        # What is kept stays unless the other is ahead for good: a change costs a read.
        if coldest is None or uses <= self._uses[coldest] + 1:
            return key
        self._kept.remove(coldest)
        self._kept.add(key)
        return coldest


_Part = tuple[Literal["layer", "expert", "table"], int, int]
"""What is read at once: a layer's attention by its number, an expert by layer and number."""

_TABLE: _Part = ("table", 0, 0)

# --- the pages themselves ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of a tensor's file."""

    tensor: Tensor
    start: int
    length: int

    def pages(self) -> tuple[int, int]:
        """The address of the first page that it touches, and bytes to the end of the last."""
        first = self.start - self.start % mmap.PAGESIZE
        return self.tensor.file.ctypes.data + first, self.start + self.length - first

    def chunks(self) -> list[_Span]:
        stop = self.start + self.length
        return [
            _Span(self.tensor, at, min(CHUNK, stop - at)) for at in range(self.start, stop, CHUNK)
        ]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LINUX = sys.platform == "linux"
WILL_NEED, DO_NOT_NEED, HUGE_PAGE, POPULATE_READ = 3, 4, 14, 22
ON_FAULT = 1


def _advise(span: _Span, advice: int) -> int:
    """Give the kernel advice on the pages of a span; 0 or the number of the error."""
    return ctypes.get_errno() if _libc.madvise(*span.pages(), advice) else 0


def _bring(span: _Span) -> None:
    """Have the pages of a span read and mapped.

    Raises:
        StorageFailed: the file has been cut, or its disk fails.
    """
    failed = _advise(span, POPULATE_READ) if LINUX else errno.EINVAL
    if failed == errno.EINVAL:  # Linux before 5.14, and other systems: the reading begins only.
        failed = _advise(span, WILL_NEED)
    if failed == errno.EFAULT:
        raise StorageFailed(
            "it has become shorter, or its disk fails, while the model is using it",
            path=span.tensor.path,
            hint="restore it, then run: grokfetch verify DIR",
        )
    if failed not in (0, errno.EINVAL, errno.ENOMEM):
        raise StorageFailed(f"cannot be read: {os.strerror(failed)}", path=span.tensor.path)


def _drop(spans: Iterable[_Span]) -> None:
    """Let go of the pages of spans: of our mapping, then of the page cache."""
    for span in spans:
        _advise(span, DO_NOT_NEED)
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), span.tensor.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), span.start, span.length, os.POSIX_FADV_DONTNEED)


def _lock(span: _Span) -> int:
    """Keep the pages of a span in memory once they are there; 0 or the number of the error."""
    if not hasattr(_libc, "mlock2"):
        return errno.ENOSYS
    address, length = span.pages()
    failed = _libc.mlock2(ctypes.c_void_p(address), ctypes.c_size_t(length), ON_FAULT)
    return ctypes.get_errno() if failed else 0


class Managed(Paging):
    """Keeps the pages of a checkpoint within a budget of memory.

    Args:
        checkpoint: whose pages; its tensors must stay open.
        budget: bytes that its pages may take.

    Attributes:
        division: what stays in memory.
        unlocked: why what every token needs is not locked there, empty if it is or need not be.
    """

    def __init__(self, checkpoint: Checkpoint, budget: int) -> None:
        self._layers = checkpoint.config.num_layers
        self._spans = _parts(checkpoint)
        base = [
            span for part, spans in self._spans.items() if part[0] != "expert" for span in spans
        ]
        self.division = divide(
            _distinct(checkpoint.values()),
            _bytes(base),
            _bytes(self._spans["expert", 0, 0]),
            budget,
        )
        self._kept = Kept(self.division.experts)
        self._wanted: deque[_Part] = deque()
        self._coming: dict[_Part, list[Future[None]]] = {}
        self._there: set[_Part] = set()
        self._readers = ThreadPoolExecutor(READERS, "read-ahead")
        if LINUX:
            for tensor in checkpoint.values():
                if tensor.file.size >= LARGE:
                    _advise(_Span(tensor, 0, tensor.file.size), HUGE_PAGE)
        keep = self.division.base and not self.division.everything
        failed = next((error for span in base if (error := _lock(span))), 0) if keep else 0
        self.unlocked = os.strerror(failed) if failed else ""

    def layer(self, number: int) -> None:
        """Return when the attention weights of a layer are in memory."""
        self._wait(("layer", number, 0))

    def experts(self, number: int, chosen: Sequence[int]) -> None:
        """Begin to read these experts, and then what comes after them."""
        self._wanted.extend(("expert", number, expert) for expert in chosen)
        if number + 1 < self._layers:
            self._wanted.append(("layer", number + 1, 0))
        else:
            self._wanted.extend((_TABLE, ("layer", 0, 0)))
        self._begin(len(self._wanted) if self.division.everything else AHEAD)

    def expert(self, number: int, expert: int) -> None:
        """Return when an expert's weights are in memory."""
        self._begin(1)
        self._wait(("expert", number, expert))

    def used(self, number: int, expert: int, result: Computed) -> None:
        """Let go of an expert, unless it is one of those that are kept."""
        if self.division.everything:
            return
        out = [self._kept.use((number, expert))]
        parts: list[_Part] = [("expert", *key) for key in out if key is not None]
        if not self.division.base:
            parts.append(("layer", number, 0))
        if parts:
            result.block_until_ready()
            for part in parts:
                _drop(self._spans[part])
                self._there.discard(part)

    def table(self) -> None:
        """Return when the embedding is in memory."""
        self._begin(len(self._wanted))
        self._wait(_TABLE)

    def _begin(self, count: int) -> None:
        """Begin to read what is wanted next."""
        for _ in range(min(count, len(self._wanted))):
            part = self._wanted.popleft()
            if part not in self._there and part not in self._coming:
                chunks = (chunk for span in self._spans[part] for chunk in span.chunks())
                self._coming[part] = [self._readers.submit(_bring, chunk) for chunk in chunks]

    def _wait(self, part: _Part) -> None:
        for span in self._spans[part]:
            span.tensor.check_length()
        if part in self._there:
            return
        if part not in self._coming:
            self._wanted.appendleft(part)
            self._begin(1)
        for future in self._coming.pop(part):
            future.result()
        self._there.add(part)


def _parts(checkpoint: Checkpoint) -> dict[_Part, list[_Span]]:
    """The mapped bytes of a checkpoint by what needs them; norms and routers are copied."""
    parts: dict[_Part, list[_Span]] = {}
    count = checkpoint.config.num_experts
    for tensor in checkpoint.values():
        number, kind = tensor.spec.layer, tensor.spec.axes[0]
        for array in (tensor.array, tensor.scale_span):
            if array is None or (tensor.scale_span is None and kind != "vocab"):
                continue
            if number is None:
                parts.setdefault(_TABLE, []).append(_Span(tensor, array.offset, array.nbytes))
            elif kind != "expert":
                part: _Part = ("layer", number, 0)
                parts.setdefault(part, []).append(_Span(tensor, array.offset, array.nbytes))
            else:
                each = array.nbytes // count
                for expert in range(count):
                    span = _Span(tensor, array.offset + expert * each, each)
                    parts.setdefault(("expert", number, expert), []).append(span)
    return parts


def _bytes(spans: Iterable[_Span]) -> int:
    return sum(span.length for span in spans)


def _distinct(tensors: Iterable[Tensor]) -> int:
    """Bytes of files, those with several names once."""
    files = {}
    for tensor in tensors:
        status = tensor.path.stat()
        files[status.st_dev, status.st_ino] = status.st_size
    return sum(files.values())
