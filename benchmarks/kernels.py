"""Formulations of an int8 product on this CPU: what the constants of loader/kernels.py come from.

Run: python benchmarks/kernels.py. The matrix is one expert's gate projection of Grok-1, 201 MB, in
memory. For each number of tokens it prints the rate of every formulation, and marks the one that
`loader.kernels` chooses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from loader import kernels
from loader.kernels import Rows

ROWS, COLUMNS = 6144, 32768
ALWAYS, NEVER = 10**9, 2
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    rounds = options.parse_args().rounds
    data = np.random.default_rng(0).integers(-127, 128, ROWS * COLUMNS, np.int8)
    flat = jax.device_put(data)
    chosen = kernels.FEW_TOKENS
    print(f"{'tokens':>6}  {'rows at once':<24}{'ms':>8}{'GB/s':>8}{'GFLOP/s':>9}")
    for tokens in TOKENS:
        x = jnp.ones((tokens, ROWS), jnp.float32)
        for name, few, size in formulations(tokens):
            kernels.FEW_TOKENS = few
            kernels.ROWS_OF_ONE_TOKEN = kernels.ROWS_OF_FEW_TOKENS = size
            kernels.ROWS_OF_MANY_TOKENS = size
            seconds = best(flat, x, rounds)
            rate, work = data.size / seconds / 1e9, 2 * tokens * data.size / seconds / 1e9
            mark = "<- chosen" if (few, size) == choice(tokens, chosen) else ""
            print(f"{tokens:>6}  {name:<24}{seconds * 1e3:8.1f}{rate:8.1f}{work:9.1f}  {mark}")


def formulations(tokens: int) -> Iterator[tuple[str, int, int]]:
    """Name, up to how many tokens rows are accumulated, and rows at once."""
    for size in (2, 4, 8, 16) if tokens <= NEVER else (4, 8):
        yield f"{size} accumulated", ALWAYS, size
    if tokens > NEVER:
        for size in (64, 256, 512, 1024):
            yield f"{size} converted", NEVER, size


def choice(tokens: int, few: int) -> tuple[int, int]:
    """What `loader.kernels` chooses for so many tokens."""
    if tokens <= NEVER:
        return ALWAYS, CHOSEN[0]
    return (ALWAYS, CHOSEN[1]) if tokens <= few else (NEVER, CHOSEN[2])


CHOSEN = (kernels.ROWS_OF_ONE_TOKEN, kernels.ROWS_OF_FEW_TOKENS, kernels.ROWS_OF_MANY_TOKENS)


def best(flat: jax.Array, x: jax.Array, rounds: int) -> float:
    """Seconds of the fastest of some runs."""

    def compute(flat: jax.Array, x: jax.Array) -> jax.Array:
        matrix = Rows(flat, jnp.int32(0), jnp.int32(0), ROWS, COLUMNS, COLUMNS)
        return kernels.product(x, matrix, 1, lambda _: jnp.ones(COLUMNS))

    run = jax.jit(compute).lower(flat, x).compile()
    jax.block_until_ready(run(flat, x))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(flat, x))
        found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    main()
