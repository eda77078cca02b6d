"""The products of `loader.devices.kernels` by a small C program, where this machine has a compiler.

XLA splits a loop over a matrix anew at each of its steps and waits for the slowest core each time;
the program in `product.c` hands out pieces of the matrix to whichever core is free. It is compiled
for the processor at hand where it is first used, kept in a folder of the user, and told to XLA as a
foreign function. Without a compiler everything works as before, only slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
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

_libraries: list[ctypes.CDLL] = []


def built(folder: Path) -> bool:
    """Whether the C program can be used from now on; compiled if `folder` does not hold it yet.

    Args:
        folder: of the user, who alone may write it, and of this processor and version of jaxlib.
    """
    if _libraries:
        return True
    file = _kept(folder) or _compiled(folder)
    if file is None:
        return False
    try:
        library = ctypes.CDLL(str(file))
        function = jax.ffi.pycapsule(library.grokfetch_product)  # type: ignore[no-untyped-call]
    except (OSError, AttributeError):  # A home that moved to another system.
        return False
    jax.ffi.register_ffi_target(NAME, function, platform="cpu")
    _libraries.append(library)
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


def _compiled(folder: Path) -> Path | None:
    """What the compiler makes of the source, in the folder."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "made.so"
            for processor in (*PROCESSOR, ""):
                command = [*compiler.split(), *OPTIONS, processor, f"-I{jax.ffi.include_dir()}"]
                told = [*filter(None, command), str(SOURCE), "-o", str(made)]
                ran = subprocess.run(  # noqa: S603 - the compiler that the user has chosen
                    told, capture_output=True, timeout=PATIENCE_S, check=False
                )
                if ran.returncode == 0:
                    return made.replace(folder / _name(made.read_bytes()))
    except (OSError, subprocess.SubprocessError):
        return None
    return None
