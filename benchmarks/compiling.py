"""Seconds to compile and to run a step, by number of layers: one compiled layer, or a scan.

Run: python benchmarks/compiling.py. Models of a small width with 2, 16 and 64 layers are written to
a temporary folder. "calls" is what grokfetch does: one compiled layer (or a few parts of one, if
weights are mapped) is called for each layer. "scan" is the same function in `lax.scan` over the
resident weights of all layers, stacked. Mapped weights cannot be scanned, because the host must see
the choice of each router, and each tensor has its own file. The time to compile is that of a prompt
of 16 tokens and one decode step, without programs kept from before, minus the time of the same two
steps when they are repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from loader.devices.placement import Mesh, Params, load, make_mesh, share
from loader.inference import model
from loader.inference.engine import Engine
from loader.inference.model import KeyValues, Window
from loader.weights.checkpoint import open_folder
from loader.weights.schema import GrokConfig
from loader.weights.synthetic import write_checkpoint

SMALL = GrokConfig(
    vocab_size=512, sequence_len=256, emb_size=256, key_size=32, num_q_heads=8, num_kv_heads=2
)
PLACES = 256

Step = Callable[[int], object]
"""Runs a step of so many tokens, and returns what it makes."""


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, nargs="*", default=(2, 16, 64))
    options.add_argument("--rounds", type=int, default=10)
    chosen = options.parse_args()
    print(f"{'layers':>6}  {'weights':<10}{'way':<8}{'compile s':>10}{'decode ms':>11}{'GB/s':>7}")
    for layers in chosen.layers:
        config = dataclasses.replace(SMALL, num_layers=layers)
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config, seed=1)
            checkpoint, mesh = open_folder(Path(folder), config), mesh_of_one(config)
            mapped, resident = share(checkpoint, mesh), load(checkpoint, mesh)
            measure("mapped", "calls", calls(config, mapped, mesh), config, chosen.rounds)
            measure("resident", "calls", calls(config, resident, mesh), config, chosen.rounds)
            measure("resident", "scan", scan(config, resident, mesh), config, chosen.rounds)


def mesh_of_one(config: GrokConfig) -> Mesh:
    """One device, with the processor's cores."""
    return make_mesh(config, devices=jax.devices()[:1])


def calls(config: GrokConfig, params: Params, mesh: Mesh) -> Step:
    """All layers as the engine calls them, embedding and output left out."""
    steps = Engine(config, params, mesh)._steps  # noqa: SLF001 - the layers alone
    cache = {"held": empty_cache(config)}

    def run(tokens: int) -> object:
        x, cache["held"] = steps.layers(cache["held"], stream(config, tokens), window(tokens))
        return x

    return run


def scan(config: GrokConfig, params: Params, mesh: Mesh) -> Step:
    """All layers as one scanned program over stacked weights."""
    weights, cache = (
        jax.tree.map(lambda *parts: jnp.stack(parts), *each)
        for each in (params.layers, empty_cache(config))
    )

    def all_layers(weights: object, cache: object, x: object, window: Window) -> object:
        def one(x: object, part: tuple[object, object]) -> tuple[object, object]:
            x, kept, _ = model.layer(*part, x, window, config)
            return x, kept

        return jax.lax.scan(one, x, (weights, cache))

    everywhere = PartitionSpec()
    spread = jax.shard_map(
        all_layers, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    options = {"xla_cpu_prefer_vector_width": params.layers[0].gate.tuning.vector_width}
    program = jax.jit(spread, donate_argnums=1, compiler_options=options)
    held = {"cache": cache}

    def run(tokens: int) -> object:
        x, held["cache"] = program(weights, held["cache"], stream(config, tokens), window(tokens))
        return x

    return run


def empty_cache(config: GrokConfig) -> tuple[KeyValues, ...]:
    """A cache of one row in bfloat16."""
    shape = (1, PLACES, config.num_kv_heads, config.key_size)
    return tuple(
        KeyValues(*(jnp.zeros(shape, jnp.bfloat16) for _ in range(2)))
        for _ in range(config.num_layers)
    )


def stream(config: GrokConfig, tokens: int) -> jax.Array:
    """A residual stream as random as an embedding."""
    values = np.random.default_rng(tokens).standard_normal((1, tokens, config.emb_size))
    return jnp.asarray(values, jnp.float32)


def window(tokens: int) -> Window:
    """Tokens at the start of the row, or one that follows 16."""
    first = 16 if tokens == 1 else 0
    places = first + jnp.arange(tokens)
    visible = jnp.arange(PLACES)[None] < first + tokens
    return Window(places[None], jnp.ones((1, tokens), bool), visible, fresh=tokens > 1)


def measure(weights: str, way: str, step: Step, config: GrokConfig, rounds: int) -> None:
    """Print a line of the table."""

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(step(tokens))
        return time.perf_counter() - start

    first, again = (seconds(16) + seconds(1) for _ in range(2))
    decode = min(seconds(1) for _ in range(rounds))
    expert = 3 * config.emb_size * config.ff_size
    heads = 2 * (config.num_q_heads + config.num_kv_heads) * config.key_size * config.emb_size
    touched = config.num_layers * (config.num_selected_experts * expert + heads)
    print(
        f"{config.num_layers:>6}  {weights:<10}{way:<8}{first - again:>10.2f}{decode * 1e3:>11.1f}"
        f"{touched / decode / 1e9:>7.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
