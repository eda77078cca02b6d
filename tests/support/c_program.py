"""The C program of products and attention, built once for all workers of a run."""

import fcntl
import os
from pathlib import Path

from loader.devices import native


def build(report):
    """`native.built` as on a user's first run; for all workers but the first, as on a later run."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "c-program"
    folder.mkdir(exist_ok=True)
    with (folder.parent / "c-program.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return native.built(folder, report)
