"""One layer of Grok-1 over mapped weights, against the same layer in llama.cpp (Q8_0).

Run: python benchmarks/layer.py DIR/ckpt-0 --llama-python PATH, on a checkpoint made by full_size.py
(or the real one). PATH is a Python, of another environment or of this one, in which `pip install
llama-cpp-python gguf` has been run; that builds llama.cpp from source for this machine. The layer's
file for it (5.2 GB) is written if it does not exist, and kept.

Both engines run a whole model with one layer, and with a vocabulary so small that embedding and
output product do not matter. They run on all cores, over warm pages, alternating: prompts, then
tokens one at a time after contexts of some lengths. Contexts are not computed, which would take an
hour: our cache is filled with random keys and values, and llama.cpp skips the experts of the last
layer for tokens without logits. The weights are random, and so are each token's experts; both
engines get the same tokens. `--known` measures only ours, on a prompt whose first tokens were seen
before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from grokfetch.cache_folder import cache_folder
from loader.devices.placement import make_mesh, share
from loader.devices.tuning import measure
from loader.devices.xla_setup import processor, use_cores
from loader.inference.engine import Engine
from loader.inference.state import State, empty
from loader.weights.checkpoint import Checkpoint, open_folder
from loader.weights.schema import GrokConfig

VOCABULARY = 256
EMBEDDING = "language_model/in_out_embed/embeddings"
SEED = 1
TARGETS = {"prefill": 0.4, "decode": 0.9}
QUESTION = 64
"""Tokens after those that are known."""

Case = tuple[str, int]
"""What is timed: a prefill of so many tokens, or a decode after so many."""


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--llama-python", default=sys.executable, help="default: this one")
    options.add_argument("--layer-file", type=Path, default="llama-layer/grok-layer.gguf")
    options.add_argument("--prompts", type=int, nargs="*", default=[128, 1024], metavar="TOKENS")
    options.add_argument(
        "--contexts", type=int, nargs="*", default=[128, 1024, 8192], metavar="TOKENS"
    )
    options.add_argument(
        "--rounds", type=int, default=5, help="after one that compiles; 0 counts that one"
    )
    options.add_argument("--tokens", type=int, default=8, help="decoded in a round")
    options.add_argument("--known", type=int, metavar="TOKENS", help="a multiple of 512")
    options.add_argument("--cache", choices=["bfloat16", "float16"], help="ours; theirs: float16")
    options.add_argument("--plain", action="store_true", help="ours without the C program")
    chosen = options.parse_args()
    checkpoint = one_layer(chosen.folder)
    config = checkpoint.config
    use_cores(config)
    mesh = make_mesh(config)
    tuning = measure(None if chosen.plain else cache_folder() / processor())
    engine = Engine(config, share(checkpoint, mesh, tuning), mesh, cache=chosen.cache)
    with started(chosen.llama_python, chosen.layer_file, config) as child:
        about = told(child)
        cores = os.cpu_count()
        how = "product.c" if tuning.native else "plain JAX"
        print(
            f"ours:   jax {jax.__version__}, {len(jax.devices())} device(s), {cores} cores, {how}"
        )
        print(f"theirs: llama-cpp-python {about['llama-cpp-python']}, {cores} threads")
        print(f"        {about['system'].strip(' |')}")
        more = chosen.tokens * (chosen.rounds + 1)
        contexts = [min(context, config.sequence_len - more) for context in chosen.contexts]
        engines = (Ours(engine), Theirs(child, more))
        cases = [
            *(("prefill", tokens) for tokens in chosen.prompts),
            *(("decode", context) for context in contexts),
        ]
        report(measured(engines, cases, chosen.rounds, chosen.tokens))
        print(f"anonymous memory, MB: ours {anonymous('self')}, theirs {anonymous(child.pid)}")
        child.stdin.close()
    if chosen.known:
        known(Engine(config, engine.params, mesh, prefix_cache=10**9), chosen.known)


def one_layer(folder: Path) -> Checkpoint:
    """The first layer of a checkpoint of the official size, and the first rows of its embedding."""
    config = dataclasses.replace(GrokConfig(), num_layers=1)
    tensors = dict(open_folder(folder, config))
    table, shape = tensors[EMBEDDING], (VOCABULARY, config.emb_size)
    tensors[EMBEDDING] = dataclasses.replace(
        table,
        spec=dataclasses.replace(table.spec, shape=shape),
        array=dataclasses.replace(table.array, shape=shape, nbytes=4 * shape[0] * shape[1]),
    )
    return Checkpoint(dataclasses.replace(config, vocab_size=VOCABULARY), tensors)


def started(python: str, file: Path, config: GrokConfig) -> subprocess.Popen[str]:
    """The process in which llama.cpp runs."""
    script = Path(__file__).with_name("llama_layer.py")
    described = json.dumps(dataclasses.asdict(config) | {"ff_size": config.ff_size})
    return subprocess.Popen(
        [python, script, file, described],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(child: subprocess.Popen[str], *question: object) -> object:
    """What the process answers."""
    if question:
        child.stdin.write(json.dumps(question) + "\n")
        child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        sys.exit(f"llama_layer.py ended with {child.wait()}")
    return json.loads(line)


class Ours:
    """Our engine, with a state for each context."""

    name = "ours"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.states: dict[int, State] = {}

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds until the logits after a prompt are there."""
        start = time.perf_counter()
        self.engine.prefill([prompt])[0].block_until_ready()
        return time.perf_counter() - start

    def decode(self, context: int, _position: int, token: int) -> float:
        """Seconds of one more token after a context."""
        state = self.states.pop(context, None) or self.filled(context)
        start = time.perf_counter()
        logits, self.states[context] = self.engine.decode(state, np.array([token], np.int32))
        logits.block_until_ready()
        return time.perf_counter() - start

    def filled(self, context: int) -> State:
        """A state whose row of so many tokens nobody has read."""
        engine = self.engine
        shape = 1, engine.places(context)
        state = empty(engine.config, 1, shape, engine.dtype, engine.heads)
        keys = iter(jax.random.split(jax.random.key(SEED), 2))

        def drawn(array: jax.Array) -> jax.Array:
            numbers = jax.random.normal(next(keys), array.shape, array.dtype)
            return jax.device_put(numbers, engine.heads)

        return State(
            jax.tree.map(drawn, state.cache),
            state.visible.at[:, :context].set(True),
            state.lengths + context,
            context,
        )


class Theirs:
    """llama.cpp in its process, which has a context of its own for each length."""

    name = "theirs"

    def __init__(self, child: subprocess.Popen[str], more: int) -> None:
        self.child = child
        self.more = more
        self.filled: set[int] = set()

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds until the logits after each token of a prompt are there."""
        return told(self.child, f"prompt of {len(prompt)}", len(prompt), 0, prompt)

    def decode(self, context: int, position: int, token: int) -> float:
        """Seconds of one more token after a context."""
        cache = f"context of {context}", context + self.more
        if context not in self.filled:
            told(self.child, *cache, 0, [SEED + 2] * context, "fill")
            self.filled.add(context)
        return told(self.child, *cache, position, [token])


def measured(
    engines: Sequence[Ours | Theirs], cases: Sequence[Case], rounds: int, count: int
) -> dict[Case, dict[str, list[float]]]:
    """Seconds by case and engine: one turn that is not counted, then one in each round."""
    rng = np.random.default_rng(SEED)
    times: dict[Case, dict[str, list[float]]] = {
        case: {engine.name: [] for engine in engines} for case in cases
    }
    for number in range(rounds + 1):
        for phase, length in cases:
            # Neither the pad id nor the end of a sequence.
            tokens = rng.integers(3, VOCABULARY, length if phase == "prefill" else count).tolist()
            first = length + number * count
            for engine in engines:
                found = (
                    [engine.prefill(tokens)]
                    if phase == "prefill"
                    else [engine.decode(length, first + n, it) for n, it in enumerate(tokens)]
                )
                if number or not rounds:
                    times[phase, length][engine.name] += found
    return times


def report(times: dict[Case, dict[str, list[float]]]) -> None:
    """The table: milliseconds of both, and the ratio of ours to theirs."""
    print(f"{'ms':<40}{'ours':>9}{'theirs':>9}{'ratio':>7}{'target':>7}")
    for (phase, length), of_case in times.items():
        label = (
            f"prefill of {length:,} tokens" if phase == "prefill" else f"decode after {length:,}"
        )
        for name, of in (("best", min), ("median", statistics.median)):
            our, their = (of(seconds) * 1e3 for seconds in of_case.values())
            print(
                f"{label + ', ' + name:<40}{our:9.1f}{their:9.1f}{our / their:7.2f}"
                f"{TARGETS[phase]:7.1f}"
            )


def known(engine: Engine, count: int) -> None:
    """Print the seconds of prompts that begin with the same tokens, one after another."""
    rng = np.random.default_rng(SEED)

    def drawn(count: int) -> list[int]:
        return rng.integers(3, VOCABULARY, count).tolist()

    ours = Ours(engine)
    ours.prefill(drawn(count + QUESTION))
    common = drawn(count)
    first, *others = (ours.prefill(common + drawn(QUESTION)) for _ in range(6))
    print(
        f"prefill of {count + QUESTION:,} tokens: {first * 1e3:.1f} ms, "
        f"{statistics.median(others) * 1e3:.1f} ms if {count:,} are known (median)"
    )


def anonymous(process: int | str) -> int:
    """Megabytes of anonymous memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) // 1000


if __name__ == "__main__":
    main()
