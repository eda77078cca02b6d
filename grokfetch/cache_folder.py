"""The user's folder for what can be made again: compiled programs, settings for a processor."""

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
    """That folder, which only the user may read and write; if it cannot be made, it does not exist.

    Programs from it are loaded without further checks, so nobody else may write it. For a user
    without a home, as in a container, it is among the temporary files.
    """
    folder = _of_home() or _temporary()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    return folder


def _of_home() -> Path | None:
    """The usual place for caches of this user, None for a user without a home."""
    if Path(os.environ.get("XDG_CACHE_HOME", "")).is_absolute() or _has_home():
        folder = Path(platformdirs.user_cache_dir(HERE, appauthor=False))
        return folder if folder.is_absolute() else None
    return None


def _has_home() -> bool:
    """Whether "~" is a folder; an empty or relative HOME would be inside the current folder."""
    home = os.environ.get("HOME")
    if home is not None:
        return Path(home).is_absolute()
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _temporary() -> Path:
    """Our own folder among the temporary files; if there is none, a path that cannot exist."""
    nowhere = Path(os.devnull) / HERE
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"{HERE}-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        # Anyone may create files there, so somebody else may have made it before us.
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            return folder
    return nowhere
