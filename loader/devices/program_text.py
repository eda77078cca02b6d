"""What a compiled program reads, waits for and exchanges, counted from its text. Pure.

XLA prints its program as HLO text: one computation after another, the entry last. Bytes are counted
when an operand is read from the device's main memory: each operand of a fusion once, and only the
selected part of an operand that is only sliced or gathered inside the fusion. Operands that the
compiler keeps in the fast memory of a TPU core (memory space 1 in their layout) have been counted
when they were copied there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping

__all__ = ["Collective", "Cost", "cost", "remade"]

_BITS: Mapping[str, int] = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_LINE = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_OPERATION = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "opt-barrier",
        "broadcast",
        "copy-done",
        "slice-done",
        "dynamic-slice-done",
        "async-done",
        "async-update",
        "add-dependency",
        "domain",
        "all-reduce-done",
        "all-gather-done",
        "collective-permute-done",
        "send-done",
        "recv-done",
    ]
)
_COLLECTIVES = frozenset(
    [
        "all-reduce",
        "all-reduce-start",
        "all-gather",
        "all-gather-start",
        "reduce-scatter",
        "all-to-all",
        "collective-permute",
        "collective-permute-start",
        "ragged-all-to-all",
    ]
)
_FETCHING: Mapping[str, int] = {"copy-start": 0, "slice-start": 1, "dynamic-slice-start": 1}
"""Asynchronous copies to another memory, and the copy's position in their type."""
_TAKING = frozenset(["slice", "dynamic-slice", "gather"])
_PASSING = frozenset(["bitcast", "reshape", "convert", "copy", "negate", "abs", "transpose"])


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """An exchange between devices: XLA's name for it, bytes of its result, how often it runs."""

    name: str
    nbytes: int
    times: int


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a program costs a device.

    read: bytes from main memory; a loop of unknown length counts with the assumed trips.
    unknown_loops: loops whose trip count is known only at run time. branches: conditionals.
    collectives: the exchanges.
    """

    read: int
    unknown_loops: int = 0
    branches: int = 0
    collectives: tuple[Collective, ...] = ()

    def times(self, count: int) -> Cost:
        """The cost of so many runs, one after another."""
        repeated = (dataclasses.replace(one, times=one.times * count) for one in self.collectives)
        return dataclasses.replace(self, read=self.read * count, collectives=tuple(repeated))

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read + other.read,
            self.unknown_loops + other.unknown_loops,
            self.branches + other.branches,
            self.collectives + other.collectives,
        )

    @property
    def exchanged(self) -> int:
        """Bytes of the results of all exchanges."""
        return sum(one.nbytes * one.times for one in self.collectives)


def cost(text: str, assumed_trips: int = 1) -> Cost:
    """Count a compiled program.

    Args:
        text: HLO, from `compiled.as_text()`.
        assumed_trips: for a loop whose length is known only at run time.
    """
    computations, entry = _parsed(text)

    @functools.cache
    def of(name: str) -> Cost:
        total = Cost(0)
        for one in computations[name].values():
            total += _cost_of(one, computations[name], computations, of, assumed_trips)
        return total

    return of(entry)


def remade(text: str, matrices: Collection[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Weights that a program writes again: copied, transposed, or converted to another type.

    A copy in the fast memory of a TPU core is one as well: it reads no more of the main memory, but
    its product waits for it. What is fetched to there beside other work does not count.

    Args:
        text: HLO, from `compiled.as_text()`, of a program whose only int8 arrays are weights.
        matrices: rows and columns of each weight on a device. A program whose activations have as
            many rows and columns as a weight is not for this function.

    Yields:
        The operation and its type, for each array that is int8, or has rows and columns of a
        weight, in either order, and that is written by an operation outside a fusion.
    """
    computations, entry = _parsed(text)
    sides = {tuple(sorted(matrix)) for matrix in matrices}
    silent = _FREE | set(_FETCHING) | {"while", "conditional", "call", "async-start"}
    for name in _run(entry, computations):
        for one in computations[name].values():
            if one.operation in silent:
                continue
            for dtype, sizes, _ in _ARRAY.findall(one.type):
                shape = [int(size) for size in sizes.split(",") if size not in {"", "1"}]
                if dtype == "s8" or tuple(sorted(shape[-2:])) in sides:
                    yield one.operation, one.type
                    break


# --- reading the text ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


_Computation = dict[str, _Instruction]
_Computations = dict[str, _Computation]


def _parsed(text: str) -> tuple[_Computations, str]:
    """All computations by name, and the name of the entry."""
    computations: _Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    match = _LINE.match(line)
    if match is None:
        return None
    tail = match[3]
    end = _closed(tail, 0) if tail.startswith("(") else _end_of_type(tail)
    operation = _OPERATION.match(tail, end)
    if operation is None:
        return None
    close = _closed(tail, operation.end() - 1)
    inside, attributes = tail[operation.end() : close - 1], tail[close:]
    operands = (
        (inside,) if operation[1] in {"parameter", "constant"} else tuple(_NAME.findall(inside))
    )
    return _Instruction(match[2], tail[:end], operation[1], operands, attributes, bool(match[1]))


def _end_of_type(text: str) -> int:
    match = _ARRAY.match(text)
    return match.end() if match else 0


def _closed(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    return len(text)


def _arrays(kind: str) -> Iterator[tuple[int, bool]]:
    """Bytes of each array of a type, and whether it is in main memory."""
    for dtype, sizes, layout in _ARRAY.findall(kind):
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
        elements = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        yield (elements * bits + 7) // 8, not re.search(r"S\([1-9]\d*\)", layout)


def _nbytes(kind: str) -> int:
    return sum(size for size, main in _arrays(kind) if main)


def _elements(kind: str) -> int:
    return sum(
        math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        for _, sizes, _ in _ARRAY.findall(kind)
    )


# --- counting ------------------------------------------------------------------------------------


def _called(one: _Instruction) -> list[str]:
    names = _CALLED.findall(one.attributes)
    for several, single in _BRANCHES.findall(one.attributes):
        names += _NAME.findall(several) if several else [single]
    return names


def _run(name: str, computations: _Computations) -> Iterator[str]:
    """The computations whose results reach memory: not those inside fusions."""
    yield name
    for one in computations[name].values():
        if one.operation in {"while", "conditional", "call", "async-start"}:
            for called in _called(one):
                yield from _run(called, computations)


def _cost_of(
    one: _Instruction,
    computation: _Computation,
    computations: _Computations,
    of: functools._lru_cache_wrapper[Cost],
    assumed_trips: int,
) -> Cost:
    """One instruction of a computation that runs."""
    if one.operation in _FREE:
        return Cost(0)
    if one.operation == "while":
        trips = _trips(one, computations)
        once = of(_called(one)[0]).times(assumed_trips if trips is None else trips)
        return once + Cost(0, unknown_loops=int(trips is None))
    if one.operation == "conditional":
        branches = [of(name) for name in _called(one)]
        return max(branches, key=lambda branch: branch.read) + Cost(0, branches=1)
    if one.operation in {"call", "async-start"}:
        return sum((of(name) for name in _called(one)), Cost(0))
    if one.operation in _COLLECTIVES:
        # The result of a start includes the operand.
        sizes = [size for size, _ in _arrays(one.type)]
        nbytes = sizes[-1] if one.operation.endswith("start") and sizes else sum(sizes)
        return Cost(0, collectives=(Collective(one.operation, nbytes, 1),))
    return Cost(_read(one, computation, computations))


def _read(one: _Instruction, computation: _Computation, computations: _Computations) -> int:
    """Bytes that an instruction without a computation of its own reads of its operands."""
    if one.operation in _FETCHING:
        copied, _ = list(_arrays(one.type))[_FETCHING[one.operation]]
        return copied if _nbytes(computation[one.operands[0]].type) else 0
    inner = computations[_called(one)[0]] if one.operation == "fusion" else None
    read = 0.0
    for number, name in enumerate(one.operands):
        operand = computation.get(name)
        if operand is None or operand.operation == "constant":
            continue
        if inner is None:
            part = _taken(one, number, _elements(operand.type))
        else:
            part = _part_of_parameter(inner, number, computations)
        read += _nbytes(operand.type) * part
    return round(read)


def _trips(loop: _Instruction, computations: _Computations) -> int | None:
    """How often a loop runs, if that is known at compile time.

    The compiler for TPUs does not say; there the condition compares the counter, starting at zero,
    with a constant.
    """
    match = _TRIPS.search(loop.attributes)
    if match:
        return int(match[1])
    name = _CONDITION.search(loop.attributes)
    condition = computations.get(name[1], {}) if name else {}
    root = next((one for one in condition.values() if one.root), None)
    if root is None or root.operation != "compare" or "direction=LT" not in root.attributes:
        return None
    limit = condition.get(root.operands[-1])
    return int(limit.operands[0]) if limit and limit.operation == "constant" else None


def _part_of_parameter(
    computation: _Computation, number: int, computations: _Computations, of_result: float = 1.0
) -> float:
    """The part of a fusion's operand that it reads, if `of_result` of its result is needed."""
    for one in computation.values():
        if one.operation == "parameter" and one.operands[0] == str(number):
            return _part(one, computation, computations, of_result)
    return 1.0


def _part(
    one: _Instruction, computation: _Computation, computations: _Computations, of_result: float
) -> float:
    """The part of a value inside a fusion that its users need, between 0 and 1."""
    total = of_result if one.root else 0.0
    for user in computation.values():
        for place, name in enumerate(user.operands if user.operation != "parameter" else ()):
            if name != one.name:
                continue
            if user.operation in _PASSING:
                total += _part(user, computation, computations, of_result)
            elif user.operation == "fusion":
                inner = computations[_called(user)[0]]
                wanted = _part(user, computation, computations, of_result)
                total += _part_of_parameter(inner, place, computations, wanted)
            else:
                total += _taken(user, place, _elements(one.type))
    return min(1.0, total)


def _taken(user: _Instruction, place: int, elements: int) -> float:
    """The part of an operand of so many elements that an operation reads."""
    if place == 0 and user.operation in _TAKING:
        return min(1.0, _elements(user.type) / max(1, elements))
    if place == 0 and user.operation in {"dynamic-update-slice", "scatter"}:
        return 0.0
    return 1.0
