"""How JAX sees this machine: its processor, its cores as devices, its compiled programs."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import jax

from grokfetch import c_program
from grokfetch.process_limits import cores
from loader.weights.limits import GPU_SHARE
from loader.weights.schema import GrokConfig

__all__ = [
    "SLICES_APART",
    "keep_programs",
    "processor",
    "sums_undivided",
    "use_cores",
    "use_memory",
]

CORES_A_DEVICE = 4
"""Two cores are faster as one device than as two; machines with more have not been measured."""

WORTH_KEEPING_S = 0.2
"""Seconds of compilation from which on a program is kept."""

UNDIVIDED = "xla_gpu_experimental_force_split_k"
"""XLA's option for how a GPU divides the sum of a product; JAX 0.9 has none."""

SLICES_APART: Mapping[str, str | bool] = MappingProxyType(
    {"xla_disable_hlo_passes": "slice-sinker"}
)
"""Options that keep XLA from converting several slices of a matrix as one.

Otherwise, if the slices cover all of a stack, a GPU converts the stack once for all products, and
writes and reads it in the larger type. A version that knows no such pass ignores its name.
"""


def processor() -> str:
    """A name for what programs are compiled and tuned for: model, instructions, cores, jaxlib."""
    text = f"{c_program.processor()}-{cores()}-{version('jaxlib')}"
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text)


def use_memory() -> None:
    """Have JAX take as much memory of each GPU as `plan` assumes; call it before JAX is used.

    By default it takes three quarters. A setting in the environment takes precedence.
    """
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(os.environ):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(GPU_SHARE)


def keep_programs(folder: Path) -> None:
    """Keep compiled programs below `folder`, so that the next run need not compile them.

    A program for one processor may hit an illegal instruction on another, so each has its folder.
    """
    place = folder / processor()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # A home that cannot be written: programs are compiled each time.
        return
    # A full disk costs no more than that: a program that is not kept is compiled again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(place))  # type: ignore[no-untyped-call]
    jax.config.update(  # type: ignore[no-untyped-call]
        "jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING_S
    )


@functools.cache
def sums_undivided() -> dict[str, str | bool]:
    """Options that keep XLA from dividing the sum of a product on a GPU; empty if it has none.

    Otherwise the sums of all parts are written and read again; for few tokens, only the weights are
    more bytes. XLA marks the option as experimental.
    """
    options: dict[str, str | bool] = {UNDIVIDED: "1"}
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def use_cores(config: GrokConfig) -> None:
    """Have jax see the number of CPU devices that uses the cores best; call it before jax is used.

    The loop over a matrix is split over the cores at every step, so with many cores a step is too
    short; devices of at most `CORES_A_DEVICE` cores each run their own loop over their share of the
    columns. A setting in the environment, or an earlier use of jax, takes precedence.
    """
    # XLA heeds affinity itself, but no quota of a cgroup.
    os.environ.setdefault("NPROC", str(cores()))
    devices = max(1, cores() // CORES_A_DEVICE)
    count = next(n for n in range(devices, 0, -1) if config.num_kv_heads % n == 0)
    chosen = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)  # type: ignore[no-untyped-call]
