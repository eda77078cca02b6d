"""Products and attention by a small C program, where this machine has a compiler.

XLA splits a loop over a matrix anew at each of its steps and waits for the slowest core each time;
`product.c` hands out pieces of the matrix to whichever core is free. `attention.c` does the same
with the places of the cache, which XLA would convert as a whole. The program is compiled for the
processor at hand where it is first used, kept in a folder of the user, and told to XLA as two
foreign functions. Without a compiler everything works as before, only slower; where there is one
and the program does not build, the caller is told why.
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
"""Of the compiled file that is kept, which is found by no other version of the source."""

FUNCTIONS = ("grokfetch_product", "grokfetch_integer_product", "grokfetch_attention")

LOADED: list[ctypes.CDLL] = []
"""The C program once this process uses it: jax takes a function of a name only once."""


def built(folder: Path, report: Callable[[str], object]) -> bool:
    """Whether the C program can be used from now on; compiled if `folder` does not hold it yet.

    Args:
        folder: of the user, who alone may write it, and of this processor and version of jaxlib.
        report: is told in one line if a compiler is there and the program cannot be used.
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
        # AttributeError: a home that moved to another system.
        names = " and ".join(file.name for file in SOURCES)
        report(f"{names} cannot be built or used, hence slower tokens: {error}")
        return False
    for name, function in functions.items():
        jax.ffi.register_ffi_target(_target(name), function, platform="cpu")
    LOADED.append(library)
    return True


def product(x: Array, flat: Array, place: Array, scales: Array, *, integers: bool) -> Array:
    """`x @ matrix`, each group of rows scaled by columns; once `built` has said that it can.

    Args:
        x: float32 `[T, K]`.
        flat: int8 `[bytes]`, in which the matrix lies.
        place: int32 `[3]`: where its first row begins, the first column of ours, columns of a row.
        scales: float32 `[groups, N]`; groups divides K.
        integers: whether the activations of many tokens are rounded to integers of 16 bits, each by
            2^-16 of the largest of 256 at most; products and their sums are exact then.

    Returns:
        float32 `[T, N]`.
    """
    shape = (x.shape[0], scales.shape[1])
    result = jax.ShapeDtypeStruct(shape, jnp.float32)  # type: ignore[no-untyped-call]
    function = "grokfetch_integer_product" if integers else "grokfetch_product"
    computed: Array = jax.ffi.ffi_call(_target(function), result)(x, flat, place, scales)
    return computed


class Step(NamedTuple):
    """What attention is asked for by T tokens of each of B rows.

    queries: float32 `[B, T, Q, d]`; query head h reads key/value head `h // (Q / K)`. keys, values:
    of these tokens, float32 `[B, T, K, d]`. positions: int32 `[B, T]`, their places in the cache;
    those outside it, like -1, are padding tokens, which leave no trace in it. visible: bool
    `[B, S]`, the places that may be attended to. fresh: the cache was empty, so that the step's own
    keys and values, not rounded yet, are all that there is.
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
    """Causal attention over a cache, in which the step's keys and values are written first.

    A token that may see nothing, as in a prompt of pad ids, sees itself. Products and sums are
    float32; the order of the sums depends on a token's position alone.

    Args:
        step: the tokens.
        keys: the cache's, float32, bfloat16 or float16 `[B, S, K, d]`; used up where it is donated.
            What float16 cannot hold becomes the largest that it can.
        values: likewise.
        scale: what a score is multiplied with.
        cap: scores are squeezed into -cap to cap by a hyperbolic tangent; at most 80, so that their
            exponentials are sound without a maximum that is taken off first.

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
    """What XLA knows a function as; a program that it keeps finds no other version of it."""
    return f"{function}_{VERSION}"
