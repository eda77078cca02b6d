"""Thousands of power cuts, and a failing disk or SIGKILL at every single operation.

Run: python benchmarks/faults.py [--states N] [--only cuts|strikes] [--fault AMONG:ACTION ...]
[SCENARIO ...]. It needs the test extra, libfuse and /dev/fuse. Each scenario is a real command on a
file system that records every write, rename and flush (`tests/powercut`). Each row runs in a
separate process, as many at a time as there are cores.

cuts: after each operation, states are tried in which any part of what was not flushed is lost.
strikes: the command is run once for each of its operations; that operation fails (EIO, ENOSPC), or
the process gets SIGKILL during it. Reads fail once, fail for ever in one page or return half, or
the file is truncated at that moment; writes write only half; and one bit flips in what is read or
written. Afterwards the next commands run to the end. A row shows how many operations were recorded,
how many states or runs were tried, how many promises were broken (there should be none), and the
most bytes that the next fetch downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from powercut.promises import MADE, Tried, outlived, safe, tried
from powercut.recorder import Fault
from powercut.scenarios import NAMES, Recorded, available, record, strike
from powercut.states import Cut

FAULTS = (
    ("changes", "EIO"),
    ("changes", "ENOSPC"),
    ("changes", "kill"),
    ("reads", "EIO"),
    ("reads", "sector"),
    ("reads", "short"),
    ("reads", "truncated"),
    ("reads", "flip"),
    ("writes", "short"),
    ("writes", "flip"),
)
"""What fails, as `Fault` has it."""

STRIKES = tuple(f"{among}:{action}" for among, action in FAULTS)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was tried in a scenario, and the result.

    operations: those that were recorded, or struck. most: bytes fetched again at most.
    """

    title: str
    operations: int
    tried: int
    broken: tuple[str, ...]
    most: int
    seconds: float


def cut_row(name: str, states: int, seed: int) -> Row:
    """Try some states that a power cut may leave in the middle of a scenario."""
    with tempfile.TemporaryDirectory(prefix="grokfetch-faults-") as work:
        recorded = record(name, Path(work) / name)
    count = len(recorded.operations) - recorded.begun
    return _row(f"{name}, power cut", count, _cuts(recorded, states, random.Random(seed)))


def _cuts(recorded: Recorded, states: int, chance: random.Random) -> Iterator[Tried]:
    count = len(recorded.operations) - recorded.begun
    for number in range(states):
        cut = Cut(recorded.operations, recorded.begun + number % count + 1)
        disk = (cut.worst, cut.best)[number // count]() if number < 2 * count else cut.some(chance)
        yield tried(recorded, disk, safe(recorded, cut.past))


def strike_row(name: str, among: str, action: str) -> Row:
    """Run a scenario once for each of its operations, which then fails."""
    row = _row(f"{name}, {action} in {among}", 0, _strikes(name, among, action))
    return dataclasses.replace(row, operations=row.tried)


def _strikes(name: str, among: str, action: str) -> Iterator[Tried]:
    at = 0
    struck = True
    while struck:
        at += 1
        with tempfile.TemporaryDirectory(prefix="grokfetch-faults-") as work:
            result = strike(name, Path(work) / name, Fault(among, at, action))
            struck = result.reached
            if struck:
                yield outlived(result)


def _row(title: str, operations: int, results: Iterable[Tried]) -> Row:
    start = time.perf_counter()
    broken: list[str] = []
    most = count = 0
    for result in results:
        count += 1
        broken += result.broken
        most = max(most, result.fetched)
    return Row(title, operations, count, tuple(broken), most, time.perf_counter() - start)


def sensible(name: str, action: str) -> bool:
    """Whether there is a promise about this: what is made of a file is made as the file is then."""
    return name not in MADE or action != "truncated" or name == "run"


def show(row: Row) -> None:
    """Print a row, and the first of the promises that were broken."""
    print(
        f"{row.title:32} {row.operations:4} operations {row.tried:6,} tried {len(row.broken):4} "
        f"broken promises {row.most:9,} bytes fetched again at most, {row.seconds:.0f} s",
        flush=True,
    )
    for promise in list(dict.fromkeys(row.broken))[:5]:
        print(f"  {promise}", flush=True)


def main() -> None:
    """All scenarios, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=4000, help="after cuts, of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["cuts", "strikes"])
    parser.add_argument("--fault", action="append", choices=STRIKES, help="all if not given")
    parser.add_argument("scenarios", nargs="*", default=NAMES)
    chosen = parser.parse_args()
    reason = available()
    if reason is not None:
        sys.exit(f"nothing can be recorded here: {reason}")
    cores = len(os.sched_getaffinity(0))
    start = time.perf_counter()
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        running = []
        for name in chosen.scenarios:
            if chosen.only != "strikes":
                running.append(pool.submit(cut_row, name, chosen.states, chosen.seed))
            if chosen.only != "cuts":
                faults = [
                    (among, action)
                    for among, action in FAULTS
                    if sensible(name, action) and f"{among}:{action}" in (chosen.fault or STRIKES)
                ]
                running += [pool.submit(strike_row, name, *fault) for fault in faults]
        rows = []
        for future in running:
            rows.append(future.result())
            show(rows[-1])
    broken = sum(len(row.broken) for row in rows)
    print(
        f"{sum(row.tried for row in rows):,} tried, {broken} broken promises, "
        f"{time.perf_counter() - start:.0f} s on {cores} cores"
    )
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
