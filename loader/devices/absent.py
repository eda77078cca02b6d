"""Devices that are not present, for the compilers of GPUs and TPUs, which run without them.

They come with `pip install 'grokfetch[tpu]'` or `'grokfetch[cuda]'`, and need Linux on x86-64.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import jax
from jax.experimental import topologies

from grokfetch.errors import OutOfReach
from loader.weights.accelerators import Accelerator, Graphics

__all__ = ["absent", "prepare", "slice_grid"]

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {0.shared}
  threads_per_core_limit: 2048
  core_count: {0.cores}
  fpus_per_core: {0.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {rate}
  l2_cache_size: {0.cache}
  clock_rate_ghz: {0.clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {0.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
device_description_str: "{name}"
"""


def prepare(kinds: Iterable[Accelerator]) -> None:
    """Prepare jax, before it is first asked for devices, for absent ones of these kinds.

    Programs compiled for them are not cached, because they could not be loaded from the cache.
    """
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        # Any kind works: without it the library complains on stderr, and asks again.
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Nothing runs on a TPU, so another process may use one, or compile at the same time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }.items():
        os.environ.setdefault(variable, value)
    platforms = "cpu,cuda" if any(kind.graphics for kind in kinds) else "cpu"
    jax.config.update("jax_platforms", platforms)  # type: ignore[no-untyped-call]
    jax.config.update("jax_enable_compilation_cache", False)  # type: ignore[no-untyped-call]


def absent(kind: Accelerator, count: int) -> Sequence[jax.Device]:
    """At least `count` devices of a kind, in one slice or one host.

    Raises:
        OutOfReach: the compiler is not installed, or does not support a slice of so many devices.
    """
    try:
        if kind.graphics:
            return _graphics(kind, kind.graphics, count)
        return _tensor(kind, count)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise OutOfReach(
            f"there is no compiler here for {count} devices of {kind.name}: {error}"[:500],
            hint="pip install 'grokfetch[tpu]' or 'grokfetch[cuda]' brings it, on Linux on x86-64",
        ) from error


def _graphics(kind: Accelerator, graphics: Graphics, count: int) -> Sequence[jax.Device]:
    target = _TARGET.format(
        graphics,
        rate=int(kind.rate),
        memory=kind.memory,
        block=graphics.shared - 1024,
        name=f"NVIDIA {kind.name.upper()}",
    )
    devices: Sequence[jax.Device] = topologies.get_topology_desc(
        platform="cuda",
        topology_name=kind.name,
        topology=f"1x1x{count}",
        target_config=target,
    ).devices
    return devices


def _tensor(kind: Accelerator, count: int) -> Sequence[jax.Device]:
    extra = {"chip_config_name": "megacore"} if kind.name == "v4" else {}
    devices: Sequence[jax.Device] = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind.name}:{slice_grid(kind.dimensions, count)}", **extra
    ).devices
    return devices


def slice_grid(dimensions: int, count: int) -> str:
    """The smallest slice of at least `count` devices: `2x4`, or `2x2x2` in three dimensions.

    Hosts have four devices in a square, or eight in two dimensions; a slice grows by doubling its
    shortest side.
    """
    sides, size = [2, 2, *[1] * (dimensions - 2)], 4
    while size < count:
        shortest = min(sides)
        last = len(sides) - 1 - sides[::-1].index(shortest)
        sides[last] *= 2
        size *= 2
    return "x".join(map(str, sides if max(sides) == 2 else sorted(sides)))
