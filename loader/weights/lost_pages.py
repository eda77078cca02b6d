"""The error message of a process that ends because pages of its weights are gone.

Mapped pages beyond the end of a truncated file, and pages that a disk cannot read, raise SIGBUS in
the middle of a product, which by default ends a process without a message. Python runs its handlers
between two of its instructions, and never gets there: the fault repeats. So C calls our handler
from the signal itself, through ctypes. The faulting instruction reads the weights, in a thread that
either has Python's lock or can wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from grokfetch.errors import StorageFailed

__all__ = ["explain_lost_pages"]

HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


class _Installed:
    """The function that C calls; it must not be garbage-collected."""

    handler: object = None


def explain_lost_pages(
    folder: Path, files: Iterable[Path], tell: Callable[[StorageFailed], object]
) -> None:
    """From now on, end the process with our own error if pages of the weights are gone.

    Args:
        folder: that holds them.
        files: the weights; the error names one that has become shorter since this call.
        tell: called with the error, in the faulting thread, before the process ends with the
            error's exit code.
    """
    sizes = {file: size for file in files if (size := _size(file)) is not None}
    first = threading.Lock()

    def end(_number: int) -> None:
        if not first.acquire(blocking=False):
            threading.Event().wait()  # Another thread ends the process.
        error = _error(folder, sizes)
        with contextlib.suppress(Exception):
            tell(error)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(error.exit_code)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, HANDLER], ctypes.c_void_p
    handler = HANDLER(end)
    libc.signal(int(signal.SIGBUS), handler)
    _Installed.handler = handler


def _error(folder: Path, sizes: dict[Path, int]) -> StorageFailed:
    """Why pages are gone, as far as the files tell."""
    shrunk = [file for file, size in sizes.items() if (_size(file) or 0) < size]
    if shrunk:
        return StorageFailed(
            "it has become shorter while the model was using it",
            path=shrunk[0],
            hint=f"bring it back: grokfetch verify {folder} --repair; then run the same command",
        )
    return StorageFailed(
        "the disk fails: weights that the model was using cannot be read",
        path=folder,
        hint=f"see to the disk, then run: grokfetch verify {folder}",
    )


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
