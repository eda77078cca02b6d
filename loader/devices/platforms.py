"""Which of two forms of a computation is compiled, by the platform that it is compiled for.

Compilers differ in what they fuse and what they copy, so the same result has forms of its own for
CPUs, GPUs and TPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array, lax

__all__ = ["by_platform", "on_cpus", "on_tpus"]

R = TypeVar("R")

GPUS = ("cuda", "rocm")
"""Platforms whose compiler copies a matrix out of its stack before it multiplies with it."""

TPUS = ("tpu",)

CPUS = ("cpu",)
"""Platforms whose compiler is slow at products of few queries with many keys of several heads, and
writes out the whole cache in float32 for them."""


def by_platform(on_gpus: Callable[..., R], elsewhere: Callable[..., R], *args: Any) -> R:
    """One of two functions with the same result, for GPUs and for all other platforms."""
    return _chosen(GPUS, on_gpus, elsewhere, *args)


def on_tpus(there: Callable[..., Array], elsewhere: Callable[..., Array], *args: Any) -> Array:
    """The same for TPUs."""
    return _chosen(TPUS, there, elsewhere, *args)


def on_cpus(there: Callable[..., Array], elsewhere: Callable[..., Array], *args: Any) -> Array:
    """The same for CPUs."""
    return _chosen(CPUS, there, elsewhere, *args)


def _chosen(
    platforms: tuple[str, ...], there: Callable[..., R], elsewhere: Callable[..., R], *args: Any
) -> R:
    """The result of the first function on the platforms that are named, else of the second.

    Within a mesh only that one is traced, which is half of the time that tracing a layer takes.
    Outside, and with JAX 0.9, whose meshes do not say what they consist of, both are traced, and
    one is taken when the program is compiled.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    here = getattr(device, "platform", None)
    if here is None:
        result: R = lax.platform_dependent(
            *args, default=elsewhere, **dict.fromkeys(platforms, there)
        )
        return result
    # A mesh has one name for the GPUs of all makers.
    names = ("cuda", "rocm") if here == "gpu" else (here,)
    return there(*args) if set(names) & set(platforms) else elsewhere(*args)
