"""Products and attention by a small C program, if this machine has a compiler.

XLA splits a loop over a matrix again at each of its steps and waits for the slowest core each time;
`product.c` hands out pieces of the matrix to whichever core is free. `attention.c` does the same
with the places of the cache, which XLA would convert as a whole. The program is compiled for this
processor when it is first used, kept in a folder of the user, and registered with XLA as foreign
functions. Without a compiler everything still works, only slower; if there is one and the program
does not build, the caller learns why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from grokfetch.c_program import OPTIONS, PROCESSOR, CProgram, digest_of

__all__ = ["attention", "built", "product"]

SOURCES = tuple(Path(__file__).with_name(name) for name in ("product.c", "attention.c"))
HEADERS = tuple(
    Path(__file__).with_name(name) for name in ("pool.h", "tiles.h", "integers.h", "matrix_unit.h")
)
VERSION = digest_of(SOURCES + HEADERS)
NAME = f"grokfetch_native_{VERSION}"
"""Name of the compiled file that is kept; other versions of the source have another name."""

FUNCTIONS = ("grokfetch_product", "grokfetch_integer_product", "grokfetch_attention")

LOADED: list[ctypes.CDLL] = []
"""The C program once this process uses it: jax registers a function name only once."""


def built(folder: Path, report: Callable[[str], object]) -> bool:
    """Whether the C program can be used from now on; compiles it if `folder` lacks it.

    Args:
        folder: for this user, who alone may write it, this processor and this version of jaxlib.
        report: called with one line if there is a compiler and the program cannot be used.
    """
    if LOADED:
        return True
    options = (*OPTIONS, f"-I{jax.ffi.include_dir()}")
    program = CProgram(NAME, SOURCES, options, PROCESSOR)
    try:
        file = program.kept(folder) or program.compiled(folder)
        if file is None:
            return False
        library = ctypes.CDLL(str(file))
        functions = {
            name: jax.ffi.pycapsule(getattr(library, name))  # type: ignore[no-untyped-call]
            for name in FUNCTIONS
        }
    except (OSError, AttributeError) as error:
        # AttributeError: the home folder moved to another system.
        names = " and ".join(file.name for file in SOURCES)
        report(f"{names} cannot be built or used, hence slower tokens: {error}")
        return False
    for name, function in functions.items():
        jax.ffi.register_ffi_target(_target(name), function, platform="cpu")
    LOADED.append(library)
    return True


def product(x: Array, flat: Array, place: Array, scales: Array, *, integers: bool) -> Array:
    """`x @ matrix`, each group of rows scaled by columns; only after `built` returned True.

    Args:
        x: float32 `[T, K]`.
        flat: int8 `[bytes]`, which contains the matrix.
        place: int32 `[3]`: where its first row begins, our first column, columns of a row.
        scales: float32 `[groups, N]`; groups divides K.
        integers: whether the activations of many tokens are rounded to 16-bit integers, each by at
            most 2^-16 of the largest of 256; then products and their sums are exact.

    Returns:
        float32 `[T, N]`.
    """
    shape = (x.shape[0], scales.shape[1])
    result = jax.ShapeDtypeStruct(shape, jnp.float32)  # type: ignore[no-untyped-call]
    function = "grokfetch_integer_product" if integers else "grokfetch_product"
    computed: Array = jax.ffi.ffi_call(_target(function), result)(x, flat, place, scales)
    return computed


class Step(NamedTuple):
    """The inputs of attention for T tokens of each of B rows.

    queries: float32 `[B, T, Q, d]`; query head h reads key/value head `h // (Q / K)`. keys, values:
    of these tokens, float32 `[B, T, K, d]`. positions: int32 `[B, T]`, their places in the cache;
    those outside it, like -1, are padding tokens, which leave no trace in it. visible: bool
    `[B, S]`, the places that may be attended to. fresh: the cache was empty, so the step's own keys
    and values, not rounded yet, are the only ones.
    """

    queries: Array
    keys: Array
    values: Array
    positions: Array
    visible: Array
    fresh: bool


def attention(
    step: Step, keys: Array, values: Array, scale: float, cap: float
) -> tuple[Array, Array, Array]:
    """Causal attention over a cache, into which the step's keys and values are written first.

    A token that may attend to nothing, as in a prompt of pad ids, attends to itself. Products and
    sums are float32; the order of the sums depends only on a token's position.

    Args:
        step: the tokens.
        keys: the cache's, float32, bfloat16 or float16 `[B, S, K, d]`; used up if donated. Numbers
            too large for float16 become its largest.
        values: likewise.
        scale: the factor of a score.
        cap: scores are squeezed into -cap to cap by a hyperbolic tangent; at most 80, so that their
            exponentials do not overflow without a maximum subtracted first.

    Returns:
        float32 `[B, T, Q, d]`, zeros for padding tokens, and the cache's keys and values.
    """
    results = [
        jax.ShapeDtypeStruct(array.shape, array.dtype)  # type: ignore[no-untyped-call]
        for array in (step.queries, keys, values)
    ]
    call = jax.ffi.ffi_call(
        _target("grokfetch_attention"), results, input_output_aliases={3: 1, 4: 2}
    )
    numbers = jnp.array([scale, cap, step.fresh], jnp.float32)
    mixed, keys, values = call(
        step.queries, step.keys, step.values, keys, values, step.positions, step.visible, numbers
    )
    return mixed, keys, values


def _target(function: str) -> str:
    """The name of a function in XLA; a cached program never finds another version of it."""
    return f"{function}_{VERSION}"
