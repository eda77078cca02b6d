"""The products of `loader.devices.kernels` by a small C program, where this machine has a compiler.

XLA splits a loop over a matrix anew at each of its steps and waits for the slowest core each time;
the program in `product.c` hands out pieces of the matrix to whichever core is free. It is compiled
for the processor at hand where it is first used, kept in a folder of the user, and told to XLA as a
foreign function. Without a compiler everything works as before, only slower; where there is one
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

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["built", "product"]

SOURCE = Path(__file__).with_name("product.c")
OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-Wno-psabi")
PROCESSOR = ("-march=native", "-mcpu=native")
"""How compilers are told to use all that this processor has; the second is that of some for ARM."""

COMPILERS = ("cc", "gcc", "clang")
PATIENCE_S = 60
NAME = f"grokfetch_product_{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:8]}"
"""What XLA knows the function as; a compiled program that is kept finds no other version of it."""

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
        function = jax.ffi.pycapsule(library.grokfetch_product)  # type: ignore[no-untyped-call]
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        # AttributeError: a home that moved to another system.
        report(f"{SOURCE.name} cannot be built or used, hence slower products: {error}")
        return False
    jax.ffi.register_ffi_target(NAME, function, platform="cpu")
    LOADED.append(library)
    return True


def product(x: Array, flat: Array, place: Array, scales: Array) -> Array:
    """`x @ matrix`, each group of rows scaled by columns; once `built` has said that it can.

    Args:
        x: float32 `[T, K]`.
        flat: int8 `[bytes]`, in which the matrix lies.
        place: int32 `[3]`: where its first row begins, the first column of ours, columns of a row.
        scales: float32 `[groups, N]`; groups divides K.

    Returns:
        float32 `[T, N]`.
    """
    shape = (x.shape[0], scales.shape[1])
    result = jax.ShapeDtypeStruct(shape, jnp.float32)  # type: ignore[no-untyped-call]
    computed: Array = jax.ffi.ffi_call(NAME, result)(x, flat, place, scales)
    return computed


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
                [*filter(None, command), str(SOURCE), "-o", str(made)],
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
