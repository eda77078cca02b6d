"""Decoding with as many full-size layers as the devices hold, against the rate of their memory.

Run: python benchmarks/device_decode.py on a machine with a GPU or TPU. The weights are made on the
devices and have no meaning. A token must read the weights that it needs, and its cache, once. The
limit is the time for that at the rate of a plain sum over bytes in the memory of all devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from loader.devices.assemble import on_host
from loader.devices.placement import Mesh, make_mesh, params_of, sharding
from loader.devices.products import Quantized
from loader.devices.xla_setup import use_memory
from loader.inference.engine import Engine, Sampling
from loader.weights.capacity import Use, need, reads
from loader.weights.partition import MeshShape, scale_shape
from loader.weights.schema import GrokConfig, ParamSpec, parameters

PROMPT = tuple(range(5, 21))
TOKENS = 64
STREAMED = 2**30
ROUNDS = 5


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, help="instead of as many as fit")
    options.add_argument("--rows", type=int, default=1, help="texts at once")
    chosen = options.parse_args()
    use_memory()
    if on_host(jax.devices()):
        sys.exit("the devices here are CPUs: benchmarks/decode.py measures those")
    measure(GrokConfig(), chosen.layers, chosen.rows)


def measure(config: GrokConfig, layers: int | None, rows: int) -> None:
    """Decode with a model of some layers, None for as many as fit, and print the rates."""
    mesh = make_mesh(config)
    layers = fitting(config, mesh, rows) if layers is None else layers
    config = dataclasses.replace(config, num_layers=layers)
    shape = MeshShape(**mesh.shape)
    specs = {spec.name: spec for spec in parameters(config)}
    params = params_of(lambda name: made(specs[name], mesh), layers)
    engine = Engine(config, params, mesh, "bfloat16")
    needed = reads(Use(config, shape, len(PROMPT) + TOKENS), rows).total(layers)
    limit = streamed(mesh)

    logits, state = engine.prefill([PROMPT] * rows)
    times = []
    for step in range(TOKENS):
        token = engine.sample(logits, Sampling(), step)
        # Streaming text means waiting for each token.
        np.asarray(token)
        times.append(time.perf_counter())
        logits, state = engine.decode(state, token)
    # The first decoding step compiles.
    seconds = float(np.median(np.diff(times[1:])))

    rate = needed / seconds
    print(f"{mesh.size} x {jax.devices()[0].device_kind}, {shape}, {layers} layers, {rows} rows")
    print(f"a token of each row takes {seconds * 1e3:.2f} ms, {needed / 1e9:.2f} GB a device")
    print(f"{rate / 1e9:.0f} GB/s, {rate / limit:.2f} of {limit / 1e9:.0f} GB/s")


def fitting(config: GrokConfig, mesh: Mesh, rows: int) -> int:
    """How many layers fit the free memory of a device."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    free = min(it["bytes_limit"] - it["bytes_in_use"] for it in stats if it)
    for layers in range(config.num_layers, 1, -1):
        use = Use(dataclasses.replace(config, num_layers=layers), MeshShape(**mesh.shape), 256)
        held = need(use)
        # Memory is also needed for the sum that measures the limit.
        if held.total + (rows - 1) * held.cache + STREAMED <= free:
            return layers
    return 1


def made(spec: ParamSpec, mesh: Mesh) -> Any:
    """Weights of a tensor's shape on the devices that hold them."""
    where = sharding(spec, mesh)
    scales = scale_shape(spec, MeshShape(**mesh.shape)) if spec.scale_groups else None

    def fill() -> Array:
        spread = lax.broadcasted_iota(jnp.int32, spec.shape, len(spec.shape) - 1) * 7
        for axis in range(len(spec.shape) - 1):
            spread = spread + lax.broadcasted_iota(jnp.int32, spec.shape, axis) * 31
        whole = spread % 251 - 125
        small = whole.astype(jnp.float32) / 125
        return whole.astype(jnp.int8) if scales else small

    weight = jax.jit(fill, out_shardings=where)()
    if scales is None:
        return weight
    value = 1 / (72 * np.sqrt(spec.shape[-2]))
    return Quantized(
        weight, jax.jit(lambda: jnp.full(scales, value, jnp.bfloat16), out_shardings=where)()
    )


def streamed(mesh: Mesh) -> float:
    """Bytes per second that one device reads while all of them read."""
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))  # type: ignore[no-untyped-call]
    size = STREAMED * mesh.size
    memory = jax.jit(lambda: jnp.ones(size, jnp.int8), out_shardings=where)()
    add = jax.jit(lambda memory: jnp.sum(memory.reshape(mesh.size, -1), axis=1, dtype=jnp.int32))
    add(memory).block_until_ready()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        add(memory).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return STREAMED / min(seconds)


if __name__ == "__main__":
    main()
