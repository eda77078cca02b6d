"""Products and attention by a small C program, where this machine has a compiler.

XLA splits a loop over a matrix anew at each of its steps and waits for the slowest core each time;
`product.c` hands out pieces of the matrix to whichever core is free. `attention.c` does the same
with the places of the cache, which XLA would convert as a whole. The program is compiled for the
processor at hand where it is first used, kept in a folder of the user, and told to XLA as two
foreign functions. Without a compiler everything works as before, only slower; where there is one
and the program does not build, the caller is told why.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["attention", "built", "product"]

SOURCES = tuple(Path(__file__).with_name(name) for name in ("product.c", "attention.c"))
HEADERS = tuple(
    Path(__file__).with_name(name) for name in ("pool.h", "tiles.h", "integers.h", "matrix_unit.h")
)
OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-Wno-psabi")
PROCESSOR = ("-march=native", "-mcpu=native")
"""How compilers are told to use all that this processor has; the second is that of some for ARM."""

COMPILERS = ("cc", "gcc", "clang")
PATIENCE_S = 60
VERSION = hashlib.sha256(b"".join(file.read_bytes() for file in SOURCES + HEADERS)).hexdigest()[:8]
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
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    try:
        file = _kept(folder) or (_compiled(folder, compiler) if compiler else None)
        if file is None:
            return False
        library = ctypes.CDLL(str(file))
        functions = {
            name: jax.ffi.pycapsule(getattr(library, name))  # type: ignore[no-untyped-call]
            for name in FUNCTIONS
        }
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
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


def _kept(folder: Path) -> Path | None:
    """What was compiled earlier: half a file would end the process, so its name tells its bytes."""
    with contextlib.suppress(OSError):
        for file in folder.glob(f"{NAME}-*.so"):
            if file.name == _name(file.read_bytes()):
                return file
    return None


def _name(content: bytes) -> str:
    return f"{NAME}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _compiled(folder: Path, compiler: str) -> Path:
    """What the compiler makes of the source, in the folder.

    Raises:
        OSError: it refuses the source, does not exist, or the folder cannot be written.
        subprocess.SubprocessError: it takes too long.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / "made.so"
        for processor in (*PROCESSOR, ""):
            command = [*compiler.split(), *OPTIONS, processor, f"-I{jax.ffi.include_dir()}"]
            ran = subprocess.run(  # noqa: S603 - the compiler that the user has chosen
                [*filter(None, command), *map(str, SOURCES), "-o", str(made)],
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                env=os.environ | {"TMPDIR": work},
                check=False,
            )
            if ran.returncode == 0:
                return made.replace(folder / _name(made.read_bytes()))
    raise OSError(f"{compiler}: {_first_error(ran.stderr) or f'exit code {ran.returncode}'}")


def _first_error(text: str) -> str:
    """The first line in which a compiler names an error, or else its last one."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in lines if "error:" in line), lines[-1]).strip()
