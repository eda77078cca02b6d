"""What a process says before it ends because pages of its weights are gone.

Mapped pages behind the end of a file that has been truncated, and pages that a disk cannot read,
are met by SIGBUS in the middle of a product, which by itself ends a process without a word. Python
runs its handlers between two of its instructions and never gets there: the fault comes again. So C
calls ours from the signal itself, through ctypes. The faulting instruction is one that reads the
weights, in a thread that either has Python's lock or can wait for it.
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
    """What C calls; it must not be collected."""

    handler: object = None


def explain_lost_pages(
    folder: Path, files: Iterable[Path], tell: Callable[[StorageFailed], object]
) -> None:
    """From now on end the process with an error of ours where pages of the weights are gone.

    Args:
        folder: that they lie in.
        files: the weights; of what has become shorter since this call one is named.
        tell: is called with the error, in whatever thread met it, before the process ends with the
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
