"""One token of a full-size model over mapped weights: each part of a step, and the limit.

Run: python benchmarks/decode.py DIR/ckpt-0, on a checkpoint made by full_size.py (or the real one).
Reads warm pages: every part is run once before it is timed. The limit is the rate at which all
cores together read the same mapped pages; the naive formulation is `x @ w.astype(bfloat16)`.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from loader.checkpoint import open_folder
from loader.generate import Engine
from loader.placement import make_mesh, share
from loader.schema import GrokConfig

LAYER = 5


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--tokens", type=int, default=3, help="whole steps timed at the end")
    chosen = options.parse_args()
    config = GrokConfig()
    jax.devices()
    before, start = anonymous(), time.perf_counter()
    checkpoint = open_folder(chosen.folder, config)
    mesh = make_mesh(config)
    params = share(checkpoint, mesh)
    seconds = time.perf_counter() - start
    print(f"opened {len(checkpoint)} files in {seconds:.2f} s, {anonymous() - before:.0f} MB taken")

    engine = Engine(config, params, mesh)
    _, state = engine.prefill([[5]])
    gate = checkpoint[f"transformer/decoder_layer_{LAYER}/moe/linear/w"]
    limit = read_rate(gate.file, chosen.rounds)
    print(f"limit: {os.cpu_count()} cores read mapped pages at {limit:.1f} GB/s")
    steps, layer = engine._steps, params.layers[LAYER]  # noqa: SLF001 - a part of a step
    x = steps.embed(np.full((1, 1), 5, np.int32))
    ones = np.ones(1, np.int32)
    window, _ = engine._window(state.visible, state.lengths, ones, ones[:, None] > 0, fresh=False)  # noqa: SLF001
    held = [state.cache[LAYER]]

    def attend() -> object:
        _, held[0], routed = steps._attend(layer, held[0], x, window)  # noqa: SLF001
        return routed

    routed = attend()
    total = jnp.zeros((1, config.emb_size), jnp.float32, device=steps.everywhere)

    def expert() -> object:
        pairs = np.zeros(1, np.int32)
        return steps._expert(layer, np.int32(3), routed, pairs, jnp.array(total))  # noqa: SLF001

    width = config.emb_size * config.ff_size
    parts = {
        "attention and router": (attend, size_of(checkpoint, "multi_head_attention")),
        "one expert": (expert, 3 * width),
        "output product": (lambda: steps.logits(x), config.vocab_size * config.emb_size * 4),
    }
    times = {}
    for name, (run, nbytes) in parts.items():
        times[name] = best(run, chosen.rounds)
        rate = nbytes / times[name] / 1e9
        print(
            f"{name:<22}{times[name] * 1e3:8.1f} ms {rate:6.1f} GB/s {rate / limit:5.2f} of limit"
        )
    weight = jnp.asarray(gate.weight[3])
    one = jnp.ones((1, config.emb_size), jnp.bfloat16)
    plain = best(lambda: naive(one, weight), 2)
    print(f"naive product of one gate matrix: {width / plain / 1e9:.2f} GB/s")
    step = config.num_layers * (
        times["attention and router"] + config.num_selected_experts * times["one expert"]
    )
    print(f"a step by its parts: {step + times['output product']:.2f} s")
    last = time.perf_counter()
    for number, _ in enumerate(engine.generate([5], chosen.tokens + 1)):
        now = time.perf_counter()
        print(f"token {number} after {now - last:.2f} s, {anonymous() - before:.0f} MB taken")
        last = now


@jax.jit
def naive(x: jax.Array, weight: jax.Array) -> jax.Array:
    """What one writes first."""
    return x @ weight.astype(jnp.bfloat16)


def best(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    jax.block_until_ready(run())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return min(found)


def read_rate(data: np.ndarray, rounds: int) -> float:
    """GB/s at which all cores together read an array of bytes."""
    words = data[: data.size // 8 * 8].view(np.uint64)
    cores = os.cpu_count() or 1
    cuts = np.array_split(words, cores)
    with ThreadPoolExecutor(cores) as threads:

        def run() -> object:
            return list(threads.map(np.bitwise_or.reduce, cuts))

        return data.size / best(run, rounds) / 1e9


def size_of(checkpoint: object, part: str) -> int:
    """Bytes of the tensors of one layer whose names contain a part."""
    prefix = f"transformer/decoder_layer_{LAYER}/{part}"
    return sum(tensor.nbytes for name, tensor in checkpoint.items() if name.startswith(prefix))


def anonymous() -> float:
    """Megabytes of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1e3


if __name__ == "__main__":
    main()
