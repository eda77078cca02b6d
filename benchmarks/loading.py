"""From a warm page cache to 8 CPU devices of one process: our loader, its limit, and its peers.

Run: python benchmarks/loading.py DIR. The first call writes 1 GB into DIR, and copies for the
peers. These are `pip install safetensors orbax-checkpoint`; a missing one is left out.

The limit is the rate at which all cores copy memory into fresh huge pages. Each loader runs in a
separate process, which measures the limit just before. Peers load the same tensors to the same
shardings; `pickle` does it as the official loader does: through /dev/shm, in 32 threads, with whole
arrays on the host. "in flight" is the most anonymous memory in addition to the arrays themselves,
in a round that is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from loader.weights.checkpoint import Checkpoint, open_folder
from loader.weights.schema import GrokConfig, parameters
from loader.weights.synthetic import write_tensor

CONFIG = GrokConfig(
    vocab_size=1024, emb_size=1280, widening_factor=38.4, num_q_heads=8, num_layers=1
)
"""Experts as wide as the official ones, 1 GB a layer."""

TENSORS = tuple(f"transformer/decoder_layer_0/moe/{name}/w" for name in ("linear", "linear_v"))
LAYOUTS = {"experts": 0, "rows": 1, "columns": 2}
"""The axis of `[experts, rows, columns]` that is split over the devices."""

HUGE = "glibc.malloc.hugetlb=1"
"""Gives every peer huge pages too."""

ROUNDS = 6
SIZES = (1, 2, 4, 8)


def main() -> None:
    """Measure and print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--only", choices=("default", "huge", "scaling"))
    options.add_argument("--largest", metavar="GB", type=int, default=max(SIZES))
    options.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.child:
        way, layout, count = chosen.child
        print(json.dumps(CHILDREN[way](chosen.folder, layout, int(count))))
        return
    prepare(chosen.folder)
    for name, tunables in {"default": "", "huge": HUGE}.items():
        if chosen.only in {None, name}:
            compare(chosen.folder, tunables)
    if chosen.only in {None, "scaling"}:
        scale(chosen.folder, [size for size in SIZES if size <= chosen.largest])


def prepare(folder: Path) -> None:
    """Write the checkpoint and the peers' copies that are not there yet."""
    shards = folder / "ckpt-0"
    shards.mkdir(parents=True, exist_ok=True)
    for spec in parameters(CONFIG):
        if not (shards / spec.file).exists():
            write_tensor(shards / spec.file, spec, CONFIG)
    for way in WAYS:
        if way in COPIES and installed(way) and not (folder / way).exists():
            run(folder, f"prepare {way}", "-", 8)


def compare(folder: Path, tunables: str) -> None:
    """Print the rate of every loader for every layout, relative to the limit and to ours."""
    print(f"GLIBC_TUNABLES={tunables}")
    print(f"{'':12}{'layout':<10}{'GB/s':>6}{'limit':>8}{'of it':>7}{'in flight':>12}")
    for layout in LAYOUTS:
        ours = 0.0
        for way in WAYS:
            if not installed(way):
                print(f"{way:<12}not installed")
                continue
            told = run(folder, way, layout, 8, tunables)
            ours = ours or told["rate"]
            share = told["rate"] / told["limit"]
            against = "" if way == "grokfetch" else f"   ours: {ours / told['rate']:.1f} times"
            print(
                f"{way:<12}{layout:<10}{told['rate']:6.2f}{told['limit']:8.2f}{share:7.2f}"
                f"{told['in_flight'] / 2**20:8.0f} MiB{against}",
                flush=True,
            )


def scale(folder: Path, sizes: list[int]) -> None:
    """Print the time of whole checkpoints by size and by number of devices."""
    for count, size in [
        *((8, size) for size in sizes),
        *((n, min(4, sizes[-1])) for n in (1, 2, 4)),
    ]:
        told = run(folder, "whole", str(size), count)
        print(
            f"{told['bytes'] / 1e9:5.2f} GB to {count} devices: {told['seconds']:6.3f} s, "
            f"{told['rate']:5.2f} GB/s, {told['rate'] / told['limit']:.2f} of the limit",
            flush=True,
        )


def run(folder: Path, way: str, layout: str, count: int, tunables: str = "") -> dict[str, float]:
    """Run one loader in a separate process with `devices` devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "GLIBC_TUNABLES": tunables,
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    call = [sys.executable, __file__, str(folder), "--child", way, layout, str(count)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def installed(way: str) -> bool:
    """Whether a peer is here."""
    names = {"safetensors": "safetensors", "orbax": "orbax"}
    return way not in names or importlib.util.find_spec(names[way]) is not None


# --- in a child ----------------------------------------------------------------------------------


@functools.cache
def sharding(axis: int) -> Any:
    """One axis of three over all devices."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((len(jax.devices()),), ("all",))
    return NamedSharding(mesh, PartitionSpec(*("all" if at == axis else None for at in range(3))))


def scale_sharding(axis: int) -> Any:
    """Of the scales `[experts, 1, columns]`, which cannot be split by rows."""
    return sharding(axis if axis != 1 else -1)


def measure(folder: Path, layout: str, load: Callable[[Path, int], Any]) -> dict[str, float]:
    """The best of some rounds of a way, and its memory in another."""
    import jax

    axis = LAYOUTS[layout]
    sharding(axis), scale_sharding(axis)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        arrays = jax.block_until_ready(load(folder, axis))
        times.append(time.perf_counter() - start)
        nbytes = sum(array.nbytes for array in jax.tree.leaves(arrays))
        del arrays
        gc.collect()
    limit = copy_rate()
    before = anonymous()
    with watched() as peak:
        jax.block_until_ready(load(folder, axis))
    return {
        "bytes": nbytes,
        "seconds": min(times),
        "rate": nbytes / min(times) / 1e9,
        "limit": limit,
        "in_flight": peak() - before - nbytes,
    }


def copy_rate(nbytes: int = 2**29) -> float:
    """GB/s at which all cores together copy memory into fresh huge pages; the best of some."""
    from loader.devices.staging import fresh_memory

    source, step = np.ones(nbytes, np.uint8), 2**24
    times = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            target = fresh_memory(nbytes)
            copy = functools.partial(copy_part, target, source, step)
            list(threads.map(copy, range(0, nbytes, step)))
            times.append(time.perf_counter() - start)
            del target, copy
    return nbytes / min(times) / 1e9


def copy_part(target: np.ndarray, source: np.ndarray, step: int, start: int) -> None:
    """Some bytes of an array."""
    np.copyto(target[start : start + step], source[start : start + step])


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], int]]:
    """The most anonymous memory while this is open."""
    done = threading.Event()
    most = [anonymous()]

    def look() -> None:
        while not done.wait(0.002):
            most.append(anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: max(*most, anonymous())
    finally:
        done.set()
        thread.join()


def checkpoint(folder: Path, config: GrokConfig = CONFIG) -> Checkpoint:
    """Freshly opened: nothing is mapped yet."""
    return open_folder(folder / "ckpt-0", config)


def grokfetch(folder: Path, axis: int) -> Any:
    """Ours, with what opening costs."""
    from loader.devices.transfer import transfer

    opened = checkpoint(folder)
    return list(transfer((opened[name], sharding(axis)) for name in TENSORS))


def safetensors(folder: Path, axis: int) -> Any:
    """Each device's slice of each tensor."""
    import jax
    from safetensors import safe_open

    arrays = []
    with safe_open(folder / "safetensors" / "model.safetensors", framework="numpy") as file:
        for name in TENSORS:
            for part, where in (("weight", sharding(axis)), ("scales", scale_sharding(axis))):
                lazy = file.get_slice(f"{name}/{part}")
                shape = tuple(lazy.get_shape())
                arrays.append(jax.make_array_from_callback(shape, where, lazy.__getitem__))
    return arrays


def prepare_safetensors(folder: Path) -> None:
    """Write bfloat16 as 16-bit integers, which every version can read into NumPy."""
    from safetensors.numpy import save_file

    folder.joinpath("safetensors").mkdir()
    tensors = {}
    for name in TENSORS:
        tensor = checkpoint(folder)[name]
        tensors[f"{name}/weight"] = np.array(tensor.weight)
        tensors[f"{name}/scales"] = np.array(tensor.scales).view(np.uint16)
    save_file(tensors, folder / "safetensors" / "model.safetensors")


def orbax(folder: Path, axis: int) -> Any:
    """What was saved with the same sharding, restored to it."""
    import jax
    import orbax.checkpoint as ocp

    wanted = {}
    for index, name in enumerate(TENSORS):
        tensor = checkpoint(folder)[name]
        for part, array, where in (
            ("weight", tensor.weight, sharding(axis)),
            ("scales", tensor.scales, scale_sharding(axis)),
        ):
            wanted[f"{part}{index}"] = jax.ShapeDtypeStruct(
                array.shape, array.dtype, sharding=where
            )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / "orbax" / str(axis)).absolute(), wanted)


def prepare_orbax(folder: Path) -> None:
    """One copy for each layout."""
    import jax
    import orbax.checkpoint as ocp

    for axis in LAYOUTS.values():
        arrays = {}
        for index, name in enumerate(TENSORS):
            tensor = checkpoint(folder)[name]
            arrays[f"weight{index}"] = jax.device_put(np.array(tensor.weight), sharding(axis))
            arrays[f"scales{index}"] = jax.device_put(np.array(tensor.scales), scale_sharding(axis))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / "orbax" / str(axis)).absolute(), arrays)


class QuantizedWeight8bit:
    """What the official pickles name; they are read here only to compare."""

    weight: np.ndarray
    scales: np.ndarray


def official(folder: Path, axis: int) -> Any:
    """As the official loader does: copy to /dev/shm, unpickle everything, then send it."""
    import jax

    opened = checkpoint(folder)

    def unpickled(name: str) -> QuantizedWeight8bit:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as copy:
            shutil.copyfile(opened[name].path, copy.name)
            with Path(copy.name).open("rb") as file:
                return pickle.load(file)

    with ThreadPoolExecutor(32) as threads:
        weights = list(threads.map(unpickled, TENSORS))
    return [
        jax.device_put(array, where)
        for weight in weights
        for array, where in (
            (weight.weight, sharding(axis)),
            (weight.scales, scale_sharding(axis)),
        )
    ]


def whole(folder: Path, layout: str, _count: int) -> dict[str, float]:
    """Load a checkpoint of some layers, all links to one, onto all devices."""
    import jax

    from loader.devices.placement import load, make_mesh

    config = dataclasses.replace(CONFIG, num_layers=int(layout))
    links = folder / f"layers-{layout}"
    shards = links / "ckpt-0"
    shards.mkdir(parents=True, exist_ok=True)
    files = {spec.name: folder / "ckpt-0" / spec.file for spec in parameters(CONFIG)}
    for spec in parameters(config):
        if not (shards / spec.file).exists():
            one = re.sub(r"decoder_layer_\d+", "decoder_layer_0", spec.name)
            (shards / spec.file).hardlink_to(files[one])
    nbytes, times = sum(spec.nbytes for spec in parameters(config)), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        params = load(checkpoint(links, config), make_mesh(config))
        jax.block_until_ready(params)
        times.append(time.perf_counter() - start)
        del params
        gc.collect()
    best = min(times)
    return {"bytes": nbytes, "seconds": best, "rate": nbytes / best / 1e9, "limit": copy_rate()}


WAYS: dict[str, Callable[[Path, int], Any]] = {
    "grokfetch": grokfetch,
    "safetensors": safetensors,
    "orbax": orbax,
    "pickle": official,
}
COPIES = {"safetensors": prepare_safetensors, "orbax": prepare_orbax}


def way_child(name: str, folder: Path, layout: str, _count: int) -> dict[str, float]:
    """The figures of one way."""
    return measure(folder, layout, WAYS[name])


def prepare_child(name: str, folder: Path, _layout: str, _count: int) -> dict[str, float]:
    """The copy of one peer."""
    COPIES[name](folder)
    return {}


CHILDREN: dict[str, Callable[[Path, str, int], dict[str, float]]] = {
    "whole": whole,
    **{name: functools.partial(way_child, name) for name in WAYS},
    **{f"prepare {name}": functools.partial(prepare_child, name) for name in COPIES},
}

if __name__ == "__main__":
    main()
