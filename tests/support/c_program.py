"""The C program of products and attention, built once for all workers of a run."""

import fcntl
import os
from pathlib import Path

from loader.devices import native


def build(report):
    """As `native.built` of a user's first run, or of a later one where another worker was first."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "c-program"
    folder.mkdir(exist_ok=True)
    with (folder.parent / "c-program.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return native.built(folder, report)
