"""Which pages of mapped weights are in memory: read ahead in parallel, kept, or dropped after use.

A step over mapped weights touches 80 GB in an order that is known a little ahead. If all of it fits
into memory, each range is read once and stays. If not, what every token needs is kept, as are the
experts chosen most often; the others are read for each token and dropped after it, so that the
kernel never has to reclaim memory.

Reading is `MADV_POPULATE_READ` in several threads: a separate fault for each page would be far
slower, and one reader does not use a disk's full rate. The maps ask for huge pages: if the file
system supports them (XFS, and ext4 since Linux 6.16), mapping what is in the page cache costs
almost nothing.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

from loader.weights.checkpoint import Checkpoint, Tensor
from loader.weights.pages import Pages
from loader.weights.schema import GrokConfig, ParamSpec, parameters

__all__ = ["Computed", "Division", "Kept", "Managed", "Paging", "divide"]

READERS = 8
"""Reads in flight: fewer leave an NVMe disk waiting."""

CHUNK = 16 << 20
"""Bytes of one read."""

AHEAD = 2
"""How many experts to read ahead of the one being computed."""


class Computed(Protocol):
    """A result that may still be in computation, like JAX's arrays."""

    def block_until_ready(self) -> object:
        """Return when it is there."""


class Paging:
    """Told by a step which pages it touches. This one leaves them to the system."""

    @property
    def by_rows(self) -> bool:
        """Whether `rows` must be called."""
        return False

    def rows(self, tokens: Iterable[int]) -> None:
        """Return when the rows of the embedding for these tokens may be touched."""

    def layer(self, number: int) -> None:
        """Return when the attention weights of a layer may be touched."""

    def experts(self, number: int, chosen: Sequence[int]) -> None:
        """The router of a layer has chosen: these experts are wanted, in this order."""

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
    """What stays in memory within a budget; all sizes in bytes.

    Args:
        distinct: of all files of the checkpoint, linked ones once.
        base: of what every token needs.
        expert: of one expert.
        budget: for weights.
    """
    if distinct <= budget:
        return Division(everything=True, base=True, experts=0)
    room = budget - base - (AHEAD + 1) * expert
    return Division(everything=False, base=room >= 0, experts=max(0, room // expert))


class Kept:
    """The experts that stay, at most `capacity`: those used most often."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._uses: dict[tuple[int, int], int] = {}
        self._kept: set[tuple[int, int]] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def use(self, key: tuple[int, int]) -> tuple[int, int] | None:
        """Count a use of an expert of a layer.

        Returns:
            Which expert to drop now, this one or another; None for none.
        """
        uses = self._uses[key] = self._uses.get(key, 0) + 1
        if key in self._kept:
            return None
        if len(self._kept) < self._capacity:
            self._kept.add(key)
            return None
        coldest = min(self._kept, key=lambda other: self._uses[other], default=None)
        # A kept expert stays unless the other is clearly ahead: a change costs a read.
        if coldest is None or uses <= self._uses[coldest] + 1:
            return key
        self._kept.remove(coldest)
        self._kept.add(key)
        return coldest


_Part = tuple[Literal["layer", "expert", "table"], int, int]
"""What is read at once: a layer's attention by its number, an expert by layer and number."""

_TABLE: _Part = ("table", 0, 0)


class Managed(Paging):
    """Keeps the pages of a checkpoint within a budget of memory.

    Args:
        checkpoint: whose pages; its tensors must stay open.
        budget: bytes that its pages may take.
        arriving: whether its files are still on their way; each part is waited for when it is
            wanted.

    Attributes:
        division: what stays in memory.
        unlocked: why what every token needs is not locked in memory, empty if it is or need not be.
    """

    def __init__(self, checkpoint: Checkpoint, budget: int, *, arriving: bool = False) -> None:
        config = checkpoint.config
        self._checkpoint, self._layers = checkpoint, config.num_layers
        self._names: dict[int | None, list[str]] = {}
        for spec in parameters(config):
            self._names.setdefault(spec.layer, []).append(spec.name)
        everything = checkpoint.nbytes if arriving else _distinct(checkpoint.values())
        self.division = divide(everything, *_needed(config), budget)
        self._kept = Kept(self.division.experts)
        self._wanted: deque[_Part] = deque()
        self._coming: dict[_Part, list[Future[None]]] = {}
        self._there: set[_Part] = set()
        self._readers = ThreadPoolExecutor(READERS, "read-ahead")
        self._pages: dict[_Part, list[Pages]] = {}
        self._opening = threading.Lock()
        # Parts that have not come yet are opened and waited for when wanted, in the readers'
        # threads.
        self._expected: set[_Part] = set()
        self.unlocked = ""
        if arriving:
            self._expected.add(_TABLE)
            for layer in range(self._layers):
                self._expected.add(("layer", layer, 0))
                self._expected.update(("expert", layer, n) for n in range(config.num_experts))
        else:
            for number in self._names:
                self._open(number)

    def _open(self, number: int | None) -> None:
        """Find the pages of a layer, or of what is outside the layers."""
        tensors = [self._checkpoint[name] for name in self._names[number]]
        for tensor in tensors:
            tensor.pages(0, tensor.file.size).enlarge()
        parts = _parts(tensors, self._checkpoint.config.num_experts)
        base = [it for part, pages in parts.items() if part[0] != "expert" for it in pages]
        keep = self.division.base and not self.division.everything
        failed = next((error for it in base if (error := it.lock())), 0) if keep else 0
        if failed and not self.unlocked:
            self.unlocked = os.strerror(failed)
        self._pages.update(parts)

    def _pages_of(self, part: _Part) -> list[Pages]:
        if part not in self._pages:
            with self._opening:
                if part not in self._pages:
                    self._open(None if part == _TABLE else part[1])
        return self._pages[part]

    @property
    def by_rows(self) -> bool:
        """Whether not all of the embedding has come yet."""
        return _TABLE in self._expected

    def rows(self, tokens: Iterable[int]) -> None:
        """Return when the rows of the embedding for these tokens have come."""
        table = next(
            tensor
            for tensor in map(self._checkpoint.__getitem__, self._names[None])
            if tensor.spec.axes[0] == "vocab"
        )
        each = table.array.nbytes // table.shape[0]
        pages = [table.pages(table.array.offset + row * each, each) for row in sorted(set(tokens))]
        _require(pages)

    def layer(self, number: int) -> None:
        """Return when the attention weights of a layer are in memory."""
        self._wait(("layer", number, 0))

    def experts(self, number: int, chosen: Sequence[int]) -> None:
        """Start reading these experts, and then what comes after them."""
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
        """Drop an expert, unless it is one of those that are kept."""
        if self.division.everything:
            return
        out = [self._kept.use((number, expert))]
        parts: list[_Part] = [("expert", *key) for key in out if key is not None]
        if not self.division.base:
            parts.append(("layer", number, 0))
        if parts:
            result.block_until_ready()
            for part in parts:
                for pages in self._pages_of(part):
                    pages.drop()
                self._there.discard(part)

    def table(self) -> None:
        """Return when the embedding is in memory."""
        self._begin(len(self._wanted))
        self._wait(_TABLE)

    def _begin(self, count: int) -> None:
        """Start reading what is wanted next."""
        for _ in range(min(count, len(self._wanted))):
            part = self._wanted.popleft()
            if part not in self._there and part not in self._coming:
                self._coming[part] = self._reads(part)

    def _reads(self, part: _Part) -> list[Future[None]]:
        """Start reading a part."""
        if part in self._expected:
            return [self._readers.submit(self._await, part)]
        chunks = (chunk for it in self._pages_of(part) for chunk in it.chunks(CHUNK))
        return [self._readers.submit(chunk.bring) for chunk in chunks]

    def _await(self, part: _Part) -> None:
        """Read a part when its bytes have come; runs in a thread."""
        pages = self._pages_of(part)
        _require(pages)
        for it in pages:
            it.bring()
        self._expected.discard(part)

    def _wait(self, part: _Part) -> None:
        if part not in self._expected:
            for pages in self._pages_of(part):
                pages.check()
        if part in self._there:
            return
        if part not in self._coming:
            self._wanted.appendleft(part)
            self._begin(1)
        for future in self._coming.pop(part):
            future.result()
        self._there.add(part)


def _require(pages: Sequence[Pages]) -> None:
    """Return when all these pages are proven; asks for all before it waits for one."""
    for it in pages:
        it.expect()
    for it in pages:
        it.require()


def _parts(tensors: Iterable[Tensor], count: int) -> dict[_Part, list[Pages]]:
    """The mapped bytes of tensors, by the part that needs them; norms and routers are copied."""
    parts: dict[_Part, list[Pages]] = {}
    for tensor in tensors:
        number, kind = tensor.spec.layer, tensor.spec.axes[0]
        for array in (tensor.array, tensor.scale_span):
            if array is None or not _is_mapped(tensor.spec):
                continue
            if number is None:
                parts.setdefault(_TABLE, []).append(tensor.pages(array.offset, array.nbytes))
            elif kind != "expert":
                part: _Part = ("layer", number, 0)
                parts.setdefault(part, []).append(tensor.pages(array.offset, array.nbytes))
            else:
                each = array.nbytes // count
                for expert in range(count):
                    pages = tensor.pages(array.offset + expert * each, each)
                    parts.setdefault(("expert", number, expert), []).append(pages)
    return parts


def _is_mapped(spec: ParamSpec) -> bool:
    return spec.scale_groups is not None or spec.axes[0] == "vocab"


def _needed(config: GrokConfig) -> tuple[int, int]:
    """Mapped bytes that every token needs, and those of one expert."""
    mapped = [spec for spec in parameters(config) if _is_mapped(spec)]
    base = sum(spec.nbytes for spec in mapped if spec.axes[0] != "expert")
    layer = sum(spec.nbytes for spec in mapped if spec.axes[0] == "expert" and spec.layer == 0)
    return base, layer // config.num_experts


def _distinct(tensors: Iterable[Tensor]) -> int:
    """Bytes of files; those with several names count once."""
    files = {}
    for tensor in tensors:
        status = tensor.path.stat()
        files[status.st_dev, status.st_ino] = status.st_size
    return sum(files.values())
