"""The folder of the user for what can be made again: compiled programs, what suits a processor."""

from __future__ import annotations

import contextlib
from pathlib import Path

import platformdirs

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """That folder, readable by the user alone; it may not exist where a home cannot be written.

    Programs that are loaded from it run as they are, which is why nobody else may write it.
    """
    folder = Path(platformdirs.user_cache_dir("grokfetch", appauthor=False))
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    return folder
