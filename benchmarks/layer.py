"""One layer of Grok-1 over mapped weights, against the same layer in llama.cpp (Q8_0).

Run: python benchmarks/layer.py DIR/ckpt-0 --llama-python PATH, on a checkpoint made by full_size.py
(or the real one). PATH is a Python, of another environment or of this one, in which
`pip install llama-cpp-python gguf` has been run; built there from its source, llama.cpp is made for
this machine. The layer's file for it (5.2 GB) is written if it is not there, and kept.

Both engines run a whole model of one layer, with a vocabulary so small that embedding and output
product do not count, on all cores, over warm pages, in turn: a prompt, then tokens one at a time.
The weights are random, so each token's experts are too; both engines are given the same tokens.
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
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from loader.devices.cache_folder import cache_folder
from loader.devices.placement import make_mesh, share
from loader.devices.tuning import measure
from loader.devices.xla_setup import processor, use_cores
from loader.inference.engine import Engine
from loader.inference.state import State
from loader.weights.checkpoint import Checkpoint, open_folder
from loader.weights.schema import GrokConfig

VOCABULARY = 256
EMBEDDING = "language_model/in_out_embed/embeddings"
PROMPT = 128
TARGETS = {"prefill": 0.4, "decode": 0.9}

Turn = Callable[[Sequence[int], Sequence[int]], dict[str, list[float]]]


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--llama-python", default=sys.executable, help="default: this one")
    options.add_argument("--layer-file", type=Path, default="llama-layer/grok-layer.gguf")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--tokens", type=int, default=8, help="decoded after each prompt")
    options.add_argument("--plain", action="store_true", help="ours without the C program")
    chosen = options.parse_args()
    checkpoint = one_layer(chosen.folder)
    config = checkpoint.config
    use_cores(config)
    mesh = make_mesh(config)
    tuning = measure(None if chosen.plain else cache_folder() / processor())
    engine = Engine(config, share(checkpoint, mesh, tuning), mesh)
    with started(chosen.llama_python, chosen.layer_file, config) as child:
        about = told(child)
        cores = os.cpu_count()
        how = "product.c" if tuning.native else "plain JAX"
        print(
            f"ours:   jax {jax.__version__}, {len(jax.devices())} device(s), {cores} cores, {how}"
        )
        print(f"theirs: llama-cpp-python {about['llama-cpp-python']}, {cores} threads")
        print(f"        {about['system'].strip(' |')}")
        turns: dict[str, Turn] = {
            "ours": lambda prompt, tokens: ours(engine, prompt, tokens),
            "theirs": lambda prompt, tokens: theirs(child, prompt, tokens),
        }
        report(measured(turns, chosen.rounds, chosen.tokens))
        print(f"anonymous memory, MB: ours {anonymous('self')}, theirs {anonymous(child.pid)}")
        child.stdin.close()


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


def measured(turns: dict[str, Turn], rounds: int, count: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by engine and phase; each has a turn that is not counted, then one a round."""
    rng = np.random.default_rng(1)
    times = {name: {phase: [] for phase in TARGETS} for name in turns}
    for number in range(rounds + 1):
        # Neither the pad id nor the end of a sequence.
        tokens = rng.integers(3, VOCABULARY, PROMPT + count).tolist()
        for name, turn in turns.items():
            found = turn(tokens[:PROMPT], tokens[PROMPT:])
            if number:
                for phase, seconds in found.items():
                    times[name][phase] += seconds
    return times


def ours(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, list[float]]:
    """Seconds of our prefill and of each token."""
    state: State

    def step(run: Callable[[], tuple[jax.Array, State]]) -> float:
        nonlocal state
        start = time.perf_counter()
        logits, state = run()
        logits.block_until_ready()
        return time.perf_counter() - start

    first = step(lambda: engine.prefill([prompt]))
    ids = [np.array([token], np.int32) for token in tokens]
    return {"prefill": [first], "decode": [step(lambda: engine.decode(state, x)) for x in ids]}  # noqa: B023


def theirs(
    child: subprocess.Popen[str], prompt: Sequence[int], tokens: Sequence[int]
) -> dict[str, list[float]]:
    """Seconds of llama.cpp's prefill and of each token."""
    return {
        "prefill": [told(child, 0, prompt)],
        "decode": [told(child, PROMPT + place, [token]) for place, token in enumerate(tokens)],
    }


def report(times: dict[str, dict[str, list[float]]]) -> None:
    """The table: milliseconds of both, and what ours is of theirs."""
    print(f"{'ms':<32}{'ours':>8}{'theirs':>8}{'ratio':>8}{'target':>8}")
    for phase, target in TARGETS.items():
        label = f"prefill of {PROMPT} tokens" if phase == "prefill" else "decode of one token"
        for name, of in (("best", min), ("median", statistics.median)):
            our, their = (of(times[engine][phase]) for engine in ("ours", "theirs"))
            print(
                f"{label + ', ' + name:<32}{our * 1e3:8.1f}{their * 1e3:8.1f}"
                f"{our / their:8.2f}{target:8.1f}"
            )


def anonymous(process: int | str) -> int:
    """Megabytes of a process that no file stands behind."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) // 1000


if __name__ == "__main__":
    main()
