"""Power cuts by the thousand, and a disk that fails, or SIGKILL, at every single operation.

Run: python benchmarks/faults.py [--states N] [--only cuts|strikes] [SCENARIO ...]. Needs the test
extra, libfuse and /dev/fuse. Each scenario is a real command on a file system that notes every
write, rename and flush (`tests/powercut`).

cuts: after each operation, states are tried in which any part of what was not flushed is lost.
strikes: the command is run once for each of its operations, which fails (EIO, ENOSPC) or is the
moment of a SIGKILL; reads fail as well, and writes are done by half. After each, the next commands
run to the end. A row says how many were tried, how many promises were broken (there
should be none), and how many bytes the next fetch brought at most.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from powercut.promises import Tried, outlived, safe, tried
from powercut.recorder import Fault
from powercut.scenarios import NAMES, available, record, strike
from powercut.states import Cut

FAULTS = (
    ("changes", "EIO"),
    ("changes", "ENOSPC"),
    ("changes", "kill"),
    ("reads", "EIO"),
    ("writes", "short"),
)


def cuts(name: str, states: int, seed: int) -> Iterator[Tried]:
    """So many states that a power cut may leave in the middle of a scenario."""
    with tempfile.TemporaryDirectory(prefix="grokfetch-faults-") as work:
        recorded = record(name, Path(work) / name)
    chance = random.Random(seed)
    count = len(recorded.operations) - recorded.begun
    for number in range(states):
        cut = Cut(recorded.operations, recorded.begun + number % count + 1)
        disk = (cut.worst, cut.best)[number % 2]() if number < 2 * count else cut.some(chance)
        yield tried(recorded, disk, safe(recorded, cut.past))


def strikes(name: str, among: str, action: str) -> Iterator[Tried]:
    """A scenario as often as it has operations, each time with another one that fails."""
    at = 0
    struck = True
    while struck:
        at += 1
        with tempfile.TemporaryDirectory(prefix="grokfetch-faults-") as work:
            result = strike(name, Path(work) / name, Fault(among, at, action))
            struck = result.reached
            if struck:
                yield outlived(result)


def row(title: str, results: Iterator[Tried]) -> int:
    """Try all and print a row; the number of broken promises."""
    start = time.perf_counter()
    broken: list[str] = []
    most = count = 0
    for result in results:
        count += 1
        broken += result.broken
        most = max(most, result.fetched)
    print(
        f"{title:26} {count:7,} tried {len(broken):4} broken promises {most:9,} bytes fetched "
        f"again at most, {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    for promise in list(dict.fromkeys(broken))[:5]:
        print(f"  {promise}")
    return len(broken)


def main() -> None:
    """All scenarios, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=4000, help="after cuts, of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["cuts", "strikes"])
    parser.add_argument("scenarios", nargs="*", default=NAMES)
    chosen = parser.parse_args()
    reason = available()
    if reason is not None:
        sys.exit(f"nothing can be recorded here: {reason}")
    broken = 0
    for name in chosen.scenarios:
        if chosen.only != "strikes":
            broken += row(f"{name}, power cut", cuts(name, chosen.states, chosen.seed))
        if chosen.only != "cuts":
            for among, action in FAULTS:
                broken += row(f"{name}, {action} in {among}", strikes(name, among, action))
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
