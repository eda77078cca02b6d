"""The attention of one token over a cache of Grok-1's size, compared with reading the same bytes.

Run: python benchmarks/attention.py. For each length of the cache and each implementation it prints
milliseconds per layer (the median of some rounds), and the rate at which the keys and values of all
places are read, relative to the rate at which all cores read the same memory. The caches of the
layers are used in turn. Together they are many times larger than what a core caches, because in the
real model, too, keys and values have left it when the next token comes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from kernels import read_rate

from grokfetch.cache_folder import cache_folder
from loader.devices import native
from loader.devices.xla_setup import processor
from loader.inference.model import KeyValues, Window
from loader.inference.model import _attend as attend
from loader.inference.model import _by_native as by_native
from loader.weights.schema import GrokConfig

CONFIG = GrokConfig()
PLAIN, COMPILED = "plain JAX", "attention.c"


class Case(NamedTuple):
    """An implementation, the type of keys and values, and the number of places in the cache."""

    way: str
    dtype: str
    places: int


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--memory", type=int, default=1 << 30, help="bytes of all caches together")
    options.add_argument("--contexts", type=int, nargs="*", default=[128, 1024, 8192])
    options.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16", "float32"])
    chosen = options.parse_args()
    data = np.ones(chosen.memory, np.int8)
    limit = read_rate(data, chosen.rounds)
    del data
    print(f"limit: {os.cpu_count()} cores read at {limit:.1f} GB/s")
    print(f"{'places':>6}  {'way':<12}{'cache':<10}{'ms':>8}{'GB/s':>8}{'of limit':>10}")
    ways = [COMPILED, PLAIN] if native.built(cache_folder() / processor(), print) else [PLAIN]
    for places in chosen.contexts:
        for way in ways:
            for dtype in chosen.dtypes:
                case = Case(way, dtype, places)
                row(case, milliseconds(case, chosen.memory, chosen.rounds), limit)


def row(case: Case, taken: float, limit: float) -> None:
    """Print a line of the table."""
    rate = bytes_of(case) / taken / 1e6
    print(
        f"{case.places:>6}  {case.way:<12}{case.dtype:<10}"
        f"{taken:8.2f}{rate:8.1f}{rate / limit:10.2f}",
        flush=True,
    )


def bytes_of(case: Case) -> int:
    """Bytes of the keys and values of one layer."""
    wide = CONFIG.num_kv_heads * CONFIG.key_size * jnp.dtype(case.dtype).itemsize
    return 2 * case.places * wide


def milliseconds(case: Case, memory: int, rounds: int) -> float:
    """Milliseconds of attention per layer: the median of some rounds, after one not counted."""
    layers = max(1, min(CONFIG.num_layers, memory // bytes_of(case)))
    shape = (1, case.places, CONFIG.num_kv_heads, CONFIG.key_size)
    drawn = jax.jit(lambda key: jax.random.normal(key, shape, case.dtype))
    keys = jax.random.split(jax.random.key(0), (layers, 2))
    held = [KeyValues(*map(drawn, pair)) for pair in keys]
    queries = jax.random.normal(keys[0, 0], (1, 1, CONFIG.num_q_heads, CONFIG.key_size)) * 3
    run = jax.jit(attention(case), donate_argnums=1)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for layer in range(layers):
            mixed, held[layer] = run(queries, held[layer])
        mixed.block_until_ready()
        times.append(1e3 * (time.perf_counter() - start) / layers)
    return statistics.median(times[1:])


def attention(case: Case) -> Callable[[Array, KeyValues], tuple[Array, KeyValues]]:
    """A token at the last place of a full cache attends to all of it."""
    window = Window(
        jnp.full((1, 1), case.places - 1),
        jnp.ones((1, 1), bool),
        jnp.ones((1, case.places), bool),
        fresh=False,
    )
    step = KeyValues(*(jnp.ones((1, 1, CONFIG.num_kv_heads, CONFIG.key_size)),) * 2)

    def attended(queries: Array, cache: KeyValues) -> tuple[Array, KeyValues]:
        if case.way == COMPILED:
            return by_native(queries, cache, step, window, CONFIG)
        return attend(queries, cache, window, CONFIG), cache

    return attended


if __name__ == "__main__":
    main()
