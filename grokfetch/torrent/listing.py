"""The files of a folder as a torrent lists them, and what of a folder no torrent can hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from grokfetch.errors import StorageFailed, storage_failed
from grokfetch.torrent.names import STATE_FOLDER, unsafe_name

__all__ = ["list_files"]


def list_files(folder: Path) -> tuple[tuple[PurePosixPath, int], ...]:
    """The files below a folder, path and size in bytes, in the order that a torrent has them.

    Our own state is left out. A link to a file stands for that file.

    Raises:
        StorageFailed: it cannot be read, holds no bytes, or has a name or something in it that no
            torrent can hold.
    """

    def failed(error: OSError) -> None:
        raise storage_failed(error, Path(error.filename or folder)) from error

    reason = unsafe_name(folder.name)
    if reason is not None:
        raise StorageFailed(
            f"cannot be shared under this name: {reason}",
            path=repr(str(folder)),
            hint="rename the folder",
        )
    files: list[tuple[PurePosixPath, int]] = []
    for place, folders, names in os.walk(folder, onerror=failed):
        here = Path(place)
        if here == folder:
            folders[:] = [name for name in folders if name.casefold() != STATE_FOLDER]
        for name in folders:
            if here.joinpath(name).is_symlink():
                raise StorageFailed(
                    "a link to a folder cannot be shared",
                    path=here / name,
                    hint="put a copy in its place, or remove it",
                )
        files.extend(_entry(folder, here / name) for name in names)
    if not any(size for _, size in files):
        raise StorageFailed(
            "it holds no bytes to share", path=folder, hint="name a folder with files in it"
        )
    if len(files) == 1 and str(files[0][0]) == folder.name:
        raise StorageFailed(
            "a folder that holds only a file of its own name looks in a torrent like that file",
            path=folder,
            hint="rename the folder",
        )
    return tuple(sorted(files, key=lambda it: [part.encode() for part in it[0].parts]))


def _entry(folder: Path, path: Path) -> tuple[PurePosixPath, int]:
    relative = PurePosixPath(path.relative_to(folder))
    reason = unsafe_name(str(relative))
    try:
        status = path.stat()
    except FileNotFoundError:
        # It was listed a moment ago.
        reason = f"it is a link to {str(path.readlink())!r:.100}, which is not there"
    except OSError as error:
        raise storage_failed(error, path) from error
    else:
        if reason is None and not stat.S_ISREG(status.st_mode):
            reason = "it is not a regular file"
    if reason is not None:
        raise StorageFailed(
            f"cannot be shared: {reason}",
            path=repr(str(path)),
            hint="rename or replace it, or move it out of the folder",
        )
    return relative, status.st_size
