"""Lists the files of a folder as a torrent has them, and refuses what a torrent cannot hold."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from grokfetch.errors import StorageFailed, storage_failed
from grokfetch.torrent.names import STATE_FOLDER, unsafe_name

__all__ = ["leftovers", "list_files", "torrent_order"]


def leftovers(folder: Path) -> list[PurePosixPath]:
    """Files that other programs left beside the payload: a Mac's Finder, Hugging Face's Hub.

    `.DS_Store` has the view settings of a folder, `._NAME` the attributes of NAME that the file
    system cannot store, and `.cache/huggingface` what the Hub's client knows of its downloads.
    """
    paths = (
        PurePosixPath(Path(place).relative_to(folder), name)
        for place, _, names in os.walk(folder)
        for name in names
    )
    return sorted(path for path in paths if _is_leftover(path))


def _is_leftover(path: PurePosixPath) -> bool:
    if path.name == ".DS_Store" or path.name.startswith("._"):
        return True
    return (".cache", "huggingface") in itertools.pairwise(path.parts[:-1])


def list_files(
    folder: Path, without: Collection[PurePosixPath] = ()
) -> tuple[tuple[PurePosixPath, int], ...]:
    """The files below a folder, path and size in bytes, in the order that a torrent has them.

    Our own state is left out. A link to a file stands for that file.

    Args:
        folder: to be shared.
        without: files that are left out.

    Raises:
        StorageFailed: it cannot be read, has no bytes, or has a name or an entry that a torrent
            cannot hold.
    """

    def failed(error: OSError) -> None:
        raise storage_failed(error, Path(error.filename or folder), reading=True) from error

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
        paths = [PurePosixPath(here.relative_to(folder), name) for name in names]
        files.extend(_entry(folder, path) for path in paths if path not in without)
    if not any(size for _, size in files):
        raise StorageFailed(
            "contains no bytes to share", path=folder, hint="name a folder with files in it"
        )
    if len(files) == 1 and str(files[0][0]) == folder.name:
        raise StorageFailed(
            "contains only a file of its own name, which in a torrent looks like a single file",
            path=folder,
            hint="rename the folder",
        )
    return tuple(sorted(files, key=lambda it: torrent_order(it[0])))


def torrent_order(path: PurePosixPath) -> list[bytes]:
    """The key that sorts paths in the order of a torrent."""
    return [part.encode() for part in path.parts]


def _entry(folder: Path, relative: PurePosixPath) -> tuple[PurePosixPath, int]:
    path = folder / relative
    reason = unsafe_name(str(relative))
    try:
        status = path.stat()
    except FileNotFoundError:
        # It was listed a moment ago, so it is a link.
        reason = f"it is a link to {str(path.readlink())!r:.100}, which does not exist"
    except OSError as error:
        raise storage_failed(error, path, reading=True) from error
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
