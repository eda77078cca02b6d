"""Formulations of an int8 product on this CPU, and what `loader.devices.tuning` chooses.

Run: python benchmarks/kernels.py. The matrix is one expert's gate projection of Grok-1, 201 MB, in
memory. For each number of tokens it prints the rates of some formulations, of the one in plain JAX
that `loader.devices.tuning` has measured to be the best, of `product.c` if there is a compiler, and
of the naive product, relative to the rate at which all cores read the same memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from grokfetch.cache_folder import cache_folder
from loader.devices import native
from loader.devices.kernels import Rows, Tuning, product
from loader.devices.tuning import measure
from loader.devices.xla_setup import processor

ROWS, COLUMNS = 6144, 32768
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ALWAYS, NEVER = 10**9, 2


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    chosen = options.parse_args()
    start = time.perf_counter()
    plain = measure()
    print(f"tuned in {time.perf_counter() - start:.1f} s: {plain}")
    data = np.random.default_rng(0).integers(-127, 128, ROWS * COLUMNS, np.int8)
    flat = jax.device_put(data)
    limit = read_rate(data, chosen.rounds)
    print(f"limit: {os.cpu_count()} cores read at {limit:.1f} GB/s")
    print(f"{'tokens':>6}  {'formulation':<28}{'ms':>8}{'GB/s':>8}{'of limit':>10}{'GFLOP/s':>9}")
    for tokens in chosen.tokens:
        x = jnp.ones((tokens, ROWS), jnp.float32)
        for name, tuning in formulations(tokens, plain):
            seconds = best(
                lambda flat, x, t=tuning: ours(flat, x, t), flat, x, chosen.rounds, tuning
            )
            row(tokens, name, seconds, limit)
        if tokens in {1, 128}:
            row(tokens, "naive", best(naive, flat, x, 2), limit)


def row(tokens: int, name: str, seconds: float, limit: float) -> None:
    """Print a line of the table."""
    rate = ROWS * COLUMNS / seconds / 1e9
    print(
        f"{tokens:>6}  {name:<28}{seconds * 1e3:8.1f}{rate:8.1f}{rate / limit:10.2f}"
        f"{2 * tokens * rate:9.0f}",
        flush=True,
    )


def formulations(tokens: int, plain: Tuning) -> Iterator[tuple[str, Tuning]]:
    """Names and what they stand for."""
    if tokens == 1:
        for width, rows in ((256, 8), (512, 8), (512, 16), (512, 24)):
            yield f"{rows} rows, {width} bits", Tuning(vector_width=width, wide_rows=rows)
    else:
        yield "accumulated", dataclasses.replace(plain, few_tokens=ALWAYS)
        for rows, columns, halves in ((2048, 512, False), (1024, 1024, True)):
            yield (
                f"{rows} x {columns} {'bf16 halves' if halves else 'float32'}",
                Tuning(plain.vector_width, 16, 32, NEVER - 1, rows, columns, halves),
            )
    yield "plain, as tuned", plain
    if native.built(cache_folder() / processor(), print):
        yield "product.c, float32", dataclasses.replace(plain, native=True)
        yield "product.c, integers", dataclasses.replace(plain, native=True, integers=True)


def ours(flat: jax.Array, x: jax.Array, tuning: Tuning) -> jax.Array:
    """The product of `loader.devices.kernels`."""
    matrix = Rows(flat, jnp.int32(0), jnp.int32(0), ROWS, COLUMNS, COLUMNS)
    return product(x, matrix, 1, lambda _: jnp.ones(COLUMNS), tuning)


def naive(flat: jax.Array, x: jax.Array) -> jax.Array:
    """The product as one would first write it."""
    return x.astype(jnp.bfloat16) @ flat.reshape(ROWS, COLUMNS).astype(jnp.bfloat16)


def best(
    compute: Callable[..., jax.Array],
    flat: jax.Array,
    x: jax.Array,
    rounds: int,
    tuning: Tuning | None = None,
) -> float:
    """Seconds of the fastest of some runs."""
    options = {"xla_cpu_prefer_vector_width": tuning.vector_width} if tuning else None
    run = jax.jit(compute, compiler_options=options).lower(flat, x).compile()
    return fastest(lambda: jax.block_until_ready(run(flat, x)), rounds)


def fastest(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    run()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def read_rate(data: np.ndarray, rounds: int) -> float:
    """GB/s at which all cores together read an array of bytes."""
    cores = os.cpu_count() or 1
    cuts = np.array_split(data.view(np.uint64), cores)
    with ThreadPoolExecutor(cores) as threads:
        seconds = fastest(lambda: list(threads.map(np.bitwise_or.reduce, cuts)), rounds)
    return data.size / seconds / 1e9


if __name__ == "__main__":
    main()
