"""Power cuts by the thousand: what the next commands make of every state that one may leave.

Run: python benchmarks/faults.py [--states N] [SCENARIO ...]. Needs the test extra, libfuse and
/dev/fuse. Each scenario is a real command, recorded on a file system that notes every write, rename
and flush (`tests/powercut`); after each operation, states are tried in which any part of what was
not flushed is lost. It prints, for each scenario: states, broken promises, and bytes that the next
fetch brought at most.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from powercut.promises import safe_pieces, tried
from powercut.scenarios import NAMES, available, record
from powercut.states import Cut


def campaign(name: str, states: int, seed: int) -> int:
    """Try so many states of one scenario and print a row; the number of broken promises."""
    with tempfile.TemporaryDirectory(prefix="grokfetch-faults-") as work:
        recorded = record(name, Path(work) / name)
    chance, start = random.Random(seed), time.perf_counter()
    broken: list[str] = []
    most = 0
    count = len(recorded.operations)
    for number in range(states):
        cut = Cut(recorded.operations, number % count + 1)
        disk = (cut.worst, cut.best)[number % 2]() if number < 2 * count else cut.some(chance)
        result = tried(recorded, disk, safe_pieces(recorded, cut.past))
        broken += result.broken
        most = max(most, result.fetched)
    print(
        f"{name:10} {count:5} operations {states:7,} states {len(broken):4} broken promises, "
        f"{most:9,} bytes fetched again at most, {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    for promise in list(dict.fromkeys(broken))[:5]:
        print(f"  {promise}")
    return len(broken)


def main() -> None:
    """All scenarios, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=4000, help="of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("scenarios", nargs="*", default=NAMES)
    chosen = parser.parse_args()
    reason = available()
    if reason is not None:
        sys.exit(f"nothing can be recorded here: {reason}")
    broken = sum(campaign(name, chosen.states, chosen.seed) for name in chosen.scenarios)
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
