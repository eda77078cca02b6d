"""One token of a full-size model over mapped weights: each part of a step, and its limit.

Run: python benchmarks/decode.py DIR/ckpt-0, on a checkpoint made by full_size.py (or the real one).
Parts are timed with warm pages: each is run once before. The limit is the rate at which all cores
together read the same mapped pages; the naive formulation is `x @ w.astype(bfloat16)`. Whole steps
report what they read from the disk. With --cold the page cache is dropped first (as root), and the
limit is the rate at which the disk delivers the same files to parallel direct readers.
"""

from __future__ import annotations

import argparse
import mmap
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from grokfetch.cache_folder import cache_folder
from grokfetch.process_limits import available_memory
from loader.devices.paging import CHUNK, READERS, Managed
from loader.devices.placement import make_mesh, share
from loader.devices.tuning import measure
from loader.devices.xla_setup import processor
from loader.inference.engine import Engine
from loader.inference.model import KeyValues, Window
from loader.inference.model import _attend as attend
from loader.inference.model import _by_native as by_native
from loader.weights.checkpoint import Checkpoint, open_folder
from loader.weights.schema import GrokConfig

LAYER = 5
CONTEXTS = (128, 1024, 8192)


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--tokens", type=int, default=3, help="whole steps timed at the end")
    options.add_argument(
        "--prompt", type=int, default=1, help="tokens of the prompt of those steps"
    )
    options.add_argument("--budget", type=float, default=None, metavar="GB", help="for the pages")
    options.add_argument("--cold", action="store_true", help="whole steps only, from the disk")
    chosen = options.parse_args()
    engine, checkpoint = opened(chosen.folder, chosen.budget)
    if chosen.cold:
        cold(engine, checkpoint, chosen.prompt, chosen.tokens)
        return
    parts_of_a_step(engine, checkpoint, chosen.rounds)
    for places in CONTEXTS:
        seconds = best(lambda p=places: attention(engine, p), chosen.rounds)
        print(f"attention to {places:>5} tokens {seconds * 1e3:6.2f} ms a layer")
    whole_steps(engine, chosen.prompt, chosen.tokens)


def opened(folder: Path, wanted: float | None) -> tuple[Engine, Checkpoint]:
    """The model over its mapped pages, and the time to open it."""
    config = GrokConfig()
    jax.devices()
    before, start = anonymous(), time.perf_counter()
    checkpoint = open_folder(folder, config)
    mesh = make_mesh(config)
    params = share(checkpoint, mesh, measure(cache_folder() / processor()))
    budget = available_memory() - 3e9 if wanted is None else wanted * 1e9
    paging = Managed(checkpoint, int(budget))
    seconds = time.perf_counter() - start
    print(f"opened {len(checkpoint)} files in {seconds:.2f} s, {anonymous() - before:.0f} MB taken")
    print(f"{budget / 1e9:.1f} GB for pages: {paging.division}")
    engine = Engine(config, params, mesh, paging=paging)
    return engine, checkpoint


def parts_of_a_step(engine: Engine, checkpoint: Checkpoint, rounds: int) -> None:
    """Each part of one token's way through a layer, relative to the rate of the memory."""
    config = engine.config
    _, state = engine.prefill([[5]])
    gate = checkpoint[f"transformer/decoder_layer_{LAYER}/moe/linear/w"]
    limit = read_rate(gate.file, rounds)
    print(f"limit: {os.cpu_count()} cores read mapped pages at {limit:.1f} GB/s")
    steps, layer = engine._steps, engine.params.layers[LAYER]  # noqa: SLF001 - a part of a step
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
        times[name] = best(run, rounds)
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


def attention(engine: Engine, places: int) -> object:
    """One token's attention over a full cache of some length, without the projections."""
    if places not in _ATTENTION:
        config = engine.config
        shape = (1, places, config.num_kv_heads, config.key_size)
        held = [KeyValues(*(jnp.ones(shape, engine.dtype) for _ in "kv"))]
        window = Window(
            jnp.full((1, 1), places - 1), jnp.ones((1, 1), bool), jnp.ones((1, places), bool), False
        )
        step = KeyValues(*(jnp.ones((1, 1, *shape[2:]), jnp.float32),) * 2)
        queries = jnp.ones((1, 1, config.num_q_heads, config.key_size), jnp.float32)
        tuning = engine.params.layers[0].query.tuning

        def attended(queries: Array, cache: KeyValues) -> tuple[Array, KeyValues]:
            if tuning is not None and tuning.native:
                return by_native(queries, cache, step, window, config)
            return attend(queries, cache, window, config), cache

        run = jax.jit(attended, donate_argnums=1)

        def once() -> object:
            mixed, held[0] = run(queries, held[0])
            return mixed

        _ATTENTION[places] = once
    return _ATTENTION[places]()


_ATTENTION: dict[int, Callable[[], object]] = {}


def whole_steps(engine: Engine, prompt: int, tokens: int) -> list[tuple[float, float]]:
    """Generate, and print the seconds of each token and the gigabytes read from the disk."""
    ids = np.random.default_rng(1).integers(3, engine.config.vocab_size, prompt).tolist()
    last, read, steps = time.perf_counter(), from_disk(), []
    for number, _ in enumerate(engine.generate(ids, tokens + 1)):
        steps.append((time.perf_counter() - last, from_disk() - read))
        print(
            f"token {number} after {steps[-1][0]:.2f} s, {steps[-1][1]:.1f} GB from the disk, "
            f"{anonymous():.0f} MB anonymous",
            flush=True,
        )
        last, read = time.perf_counter(), from_disk()
    return steps


def cold(engine: Engine, checkpoint: Checkpoint, prompt: int, tokens: int) -> None:
    """Whole steps from the disk, relative to the rate of parallel reads before and after."""
    limits = [disk_rate(checkpoint, 0)]
    Path("/proc/sys/vm/drop_caches").write_text("3")
    steps = whole_steps(engine, prompt, tokens)
    limits.append(disk_rate(checkpoint, 1))
    limit, given = sum(limits) / 2, " and ".join(f"{rate:.2f}" for rate in limits)
    print(f"limit: the disk gives {given} GB/s to {READERS} direct readers")
    for name, part in (("first token", steps[:1]), ("each further", steps[1:])):
        seconds, read = (sum(numbers) / len(part) for numbers in zip(*part, strict=True))
        rate = read / seconds
        print(
            f"{name}: {read:.1f} GB in {seconds:.1f} s, {rate:.2f} GB/s, "
            f"{rate / limit:.2f} of limit"
        )


def disk_rate(checkpoint: Checkpoint, place: int) -> float:
    """GB/s at which the disk delivers the expert files of a layer to parallel readers."""
    parts = ("linear", "linear_v", "linear_1")
    tensors = [checkpoint[f"transformer/decoder_layer_{place}/moe/{part}/w"] for part in parts]
    Path("/proc/sys/vm/drop_caches").write_text("3")
    buffers = threading.local()

    def read(job: tuple[Path, int]) -> int:
        path, at = job
        if not hasattr(buffers, "data"):
            buffers.data = mmap.mmap(-1, CHUNK)
        # Past the page cache, which would cost lookups and a second copy.
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(file, [buffers.data], at)
        finally:
            os.close(file)

    jobs = [(t.path, at) for t in tensors for at in range(0, t.file.size, CHUNK)]
    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as threads:
        total = sum(threads.map(read, jobs))
    return total / (time.perf_counter() - start) / 1e9


def from_disk() -> float:
    """Gigabytes read from the disk for this process."""
    return int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[1]) / 1e9


@jax.jit
def naive(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product as one would first write it."""
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
    """Megabytes of anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1e3


if __name__ == "__main__":
    main()
