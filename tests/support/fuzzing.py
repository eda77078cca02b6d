"""What every fuzzer does: try the inputs of tests/data/fuzz and variants, few or for some time."""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path

import psutil

from support.mutation import mutated

CORPUS = Path(__file__).parents[1] / "data" / "fuzz"
SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))
FEW = 300
MOST_GROWTH = 128 << 20
"""Bytes of memory that variants may take in addition to what the first hundred took."""


def try_a_few(attempt, name, seeds, few=FEW, tokens=()):
    """Try the inputs that were kept under a name, and variants that are the same in every run."""
    for file in sorted(CORPUS.joinpath(name).glob("*")):
        attempt(file.read_bytes())
    dice = random.Random(name)
    for _ in range(few):
        data = mutated(seeds, dice, tokens)
        try:
            attempt(data)
        except BaseException:
            print(f"keep in {CORPUS / name}: {data!r}")  # noqa: T201
            raise


def try_for_a_while(attempt, name, seeds, folder, tokens=()):
    """Try new variants for `SECONDS`; one that fails is saved in the folder."""
    seed = time.time_ns()
    dice = random.Random(seed)
    deadline, tried = time.monotonic() + SECONDS, 0
    process, most = psutil.Process(), None
    while time.monotonic() < deadline:
        data = mutated(seeds, dice, tokens)
        if tried == 100:
            most = _held(process) + MOST_GROWTH
        try:
            attempt(data)
            assert most is None or tried % 50 or _held(process) <= most
        except BaseException:
            found = folder / f"found-{seed}"
            found.write_bytes(data)
            print(f"after {tried:,} variants, keep in {CORPUS / name}: {found}")  # noqa: T201
            raise
        tried += 1
    print(f"{tried:,} variants of {name} tried, seed {seed}")  # noqa: T201


def _held(process):
    """Bytes of memory in use, after collecting garbage, which many variants may have left."""
    gc.collect()
    return process.memory_info().rss
