"""From a warm page cache to GPUs or TPUs: how much of the rate of the bus loading reaches.

Run: python benchmarks/transfer.py DIR on a machine with a GPU or TPU; the first call writes 1 GB
into DIR. Each tensor goes whole to the first device (`one`) and, if there are several, divided over
all of them by experts, rows and columns. The limit is a plain `device_put` of memory that is
already pinned and filled, to the same devices at once. If the runtime cannot pin memory, the limit
says so, and is that of memory that the runtime must copy first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from loader.devices.assemble import on_host
from loader.devices.staging import fresh_memory, pinned
from loader.devices.transfer import IN_FLIGHT, transfer
from loader.weights.checkpoint import open_folder
from loader.weights.schema import GrokConfig, parameters
from loader.weights.synthetic import write_tensor
from loader.weights.tensor import Tensor

CONFIG = GrokConfig(
    vocab_size=1024, emb_size=1280, widening_factor=38.4, num_q_heads=8, num_layers=1
)
"""Experts as wide as the official ones, 1 GB a layer."""

ROUNDS = 5
PIECE = 2**28


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--in-flight", type=int, default=IN_FLIGHT // 2**20, help="MiB")
    chosen = options.parse_args()
    devices = jax.local_devices()
    if on_host(devices):
        sys.exit("the devices here are CPUs: benchmarks/loading.py measures those")
    tensors = written(chosen.folder)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    print(f"{len(devices)} x {devices[0].device_kind}, {nbytes / 1e9:.2f} GB a round")
    for label, sharding in shardings(devices):
        targets = devices if label != "one" else devices[:1]
        possible, limit = limit_of(targets)

        def load(sharding: Sharding = sharding) -> None:
            placed = transfer([(it, sharding) for it in tensors], in_flight=chosen.in_flight << 20)
            jax.block_until_ready(list(placed))  # type: ignore[no-untyped-call]

        ours = best(load, nbytes)
        print(
            f"{label:<8} {ours:7.2f} GB/s, {ours / limit:.2f} of {limit:.2f} GB/s"
            f" ({'pinned' if possible else 'not pinned'} memory, already filled)"
        )


def written(folder: Path) -> list[Tensor]:
    """The large tensors of one layer, in files that are in the page cache."""
    folder.mkdir(parents=True, exist_ok=True)
    for spec in parameters(CONFIG):
        if not (folder / spec.file).exists():
            write_tensor(folder / spec.file, spec, CONFIG)
    checkpoint = open_folder(folder, CONFIG)
    large = [it for it in checkpoint.values() if it.spec.axes[0] == "expert"]
    for tensor in large:
        tensor.path.read_bytes()
    return large


def shardings(devices: list[jax.Device]) -> Iterator[tuple[str, Sharding]]:
    """Where the tensors go, `[experts, rows, columns]`."""
    yield "one", SingleDeviceSharding(devices[0])
    mesh = Mesh(np.array(devices), ("all",))
    for axis, label in enumerate(("experts", "rows", "columns")):
        if len(devices) > 1:
            axes = [None] * axis + ["all"]
            yield label, NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]


def limit_of(devices: list[jax.Device]) -> tuple[bool, float]:
    """Whether memory could be pinned, and the GB/s at which it reaches the devices."""
    memory = fresh_memory(PIECE)
    memory[:] = 1
    with pinned(devices[0].client, memory) as possible:

        def put() -> None:
            jax.block_until_ready(  # type: ignore[no-untyped-call]
                [jax.device_put(memory, device) for device in devices]
            )

        return possible, best(put, memory.nbytes * len(devices))


def best(run: Callable[[], None], nbytes: int) -> float:
    """GB/s of the fastest of some rounds, after one that compiles."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return nbytes / min(seconds) / 1e9


if __name__ == "__main__":
    main()
