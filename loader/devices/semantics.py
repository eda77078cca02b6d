"""The JAX settings that this code assumes, whatever the environment or a program sets.

Researchers may forbid type promotion, or set 64 bits or another random number generator, for their
own code. Here such settings would change the text, or end it. A setting that is already right is
not set: jax treats a program compiled under an explicit setting as different from one under the
same default.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax

__all__ = ["as_written"]

P = ParamSpec("P")
R = TypeVar("R")

WRITTEN_FOR: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "jax_enable_x64": (jax.enable_x64, False),
    "jax_numpy_dtype_promotion": (jax.numpy_dtype_promotion, "standard"),
    "jax_numpy_rank_promotion": (jax.numpy_rank_promotion, "allow"),
    "jax_default_prng_impl": (jax.default_prng_impl, "threefry2x32"),
    "jax_threefry_partitionable": (jax.threefry_partitionable, True),
    "jax_default_matmul_precision": (jax.default_matmul_precision, None),
    "jax_debug_nans": (jax.debug_nans, False),
    "jax_debug_infs": (jax.debug_infs, False),
    "jax_disable_jit": (jax.disable_jit, False),
}
"""Each setting, the context manager that sets it, and the value."""


def as_written(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function under these settings; not a generator, as its caller's code runs between."""

    @functools.wraps(function)
    def under_settings(*args: P.args, **kwargs: P.kwargs) -> R:
        with _settings():
            return function(*args, **kwargs)

    return under_settings


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, (setting, value) in WRITTEN_FOR.items():
            if getattr(jax.config, name) != value:
                stack.enter_context(setting(value))
        yield
