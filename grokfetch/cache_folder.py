"""The folder of the user for what can be made again: compiled programs, what suits a processor."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import tempfile
from pathlib import Path

import platformdirs

__all__ = ["cache_folder"]

HERE = "grokfetch"


def cache_folder() -> Path:
    """That folder, readable by the user alone; it may not exist where nothing can be written.

    Programs that are loaded from it run as they are, which is why nobody else may write it. A user
    without a home, as a container's, has it among the temporary files.
    """
    folder = _of_home() or _temporary()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    return folder


def _of_home() -> Path | None:
    """Where the user's programs keep such things, None for a user without a home."""
    if Path(os.environ.get("XDG_CACHE_HOME", "")).is_absolute() or _has_home():
        folder = Path(platformdirs.user_cache_dir(HERE, appauthor=False))
        return folder if folder.is_absolute() else None
    return None


def _has_home() -> bool:
    """Whether "~" means a folder: an empty or relative HOME would be one of the current folder."""
    home = os.environ.get("HOME")
    if home is not None:
        return Path(home).is_absolute()
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _temporary() -> Path:
    """A folder among the temporary files that is ours; one that cannot exist where none can be."""
    nowhere = Path(os.devnull) / HERE
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"{HERE}-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        # Everybody may write beside it: somebody may have made it before us.
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            return folder
    return nowhere
