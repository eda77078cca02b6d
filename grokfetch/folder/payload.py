"""The payload files as targets of writing: links, lengths, names, and the way to the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path, PurePosixPath

from grokfetch.errors import StorageFailed, TorrentInvalid, storage_errors, storage_failed
from grokfetch.folder import atomic
from grokfetch.folder.atomic import replacing
from grokfetch.folder.documents import part_name
from grokfetch.folder.store import Store
from grokfetch.torrent.layout import Layout, LayoutFile
from grokfetch.torrent.names import look_alikes

__all__ = [
    "behind_link",
    "cut_long_files",
    "flush",
    "flush_one",
    "make_empty_files",
    "name_asked_files",
    "own",
    "refuse_linked_folders",
    "refuse_look_alikes",
]

CHUNK = 1 << 20
"""Bytes copied at once."""

FLUSHERS = 8
"""Threads that flush where there is more than one run of files: a journal commits once for all who
wait for it, so that 3,000 small files on ext4 take 0.3 s instead of 4."""

RUN = 32
"""Files that one thread flushes one after another."""


def behind_link(root: Path, path: Path) -> Path | None:
    """The first symbolic link among the folders below `root` that lead to a path."""
    above = [place for place in path.parents if place != root and place.is_relative_to(root)]
    return next((place for place in reversed(above) if place.is_symlink()), None)


def refuse_linked_folders(store: Store, path: Path) -> None:
    """Refuse to write below symbolic links: what they lead to is not ours.

    Raises:
        StorageFailed: a folder on the way to a file is one.
    """
    link = behind_link(store.root, path)
    if link is not None:
        raise StorageFailed(
            "a symbolic link to a folder in which files are missing; links are only read",
            path=link,
            hint="replace it with a folder of copies of its files, or of links to each of them, "
            "and run the same command again",
        )


def refuse_look_alikes(root: Path, layout: Layout) -> None:
    """Refuse a torrent in which two paths are one and the same on this file system.

    They differ only in case, or in how accented characters are composed. Whether the file system
    tells them apart is tried, in a folder of its own that is removed again.

    Raises:
        TorrentInvalid: two are the same here.
        StorageFailed: it cannot be tried.
    """
    alike = look_alikes(file.path for file in layout.payload)
    if not alike:
        return
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".grokfetch-", dir=root) as trial:
            for number, group in enumerate(alike):
                _tell_apart(root, Path(trial, str(number)), group)


def _tell_apart(root: Path, trial: Path, paths: Iterable[PurePosixPath]) -> None:
    trial.mkdir()
    tried: dict[str, PurePosixPath] = {}
    for path in paths:
        if path.name in tried:
            # Only the folders above differ, and they stand in a group of their own.
            continue
        try:
            trial.joinpath(path.name).touch(exist_ok=False)
        except FileExistsError:
            other = next(iter(tried.values()))
            raise TorrentInvalid(
                f"the torrent has {str(other)!r:.80} and {str(path)!r:.80}, "
                "which are the same name on this file system",
                path=root,
                hint="choose a folder on a case-sensitive file system: --to DIR",
            ) from None
        tried[path.name] = path


def own(store: Store, files: Iterable[LayoutFile]) -> Iterator[LayoutFile]:
    """Make sure that files can be written, and what symbolic links lead to is not.

    A link to a file is replaced by a copy of what it leads to, or removed if it leads nowhere.

    Yields:
        The files of which that was so; nothing of them is proven any more.

    Raises:
        StorageFailed: a folder on the way to a file is a link, or there is no copying.
    """
    looked_at: set[Path] = set()
    for file in files:
        path = store.payload(file.path)
        if path.parent not in looked_at:
            refuse_linked_folders(store, path)
            looked_at.add(path.parent)
        if path.is_symlink():
            with storage_errors(path):
                _copy_in_place(path, file.size)
            yield file


def _copy_in_place(link: Path, size: int) -> None:
    """Put a copy of the first `size` bytes of a file in the place of the link to it."""
    if not link.is_file():
        link.unlink()
        return
    with link.open("rb") as source, replacing(link) as target:
        shutil.copyfileobj(source, target, CHUNK)
        target.truncate(min(size, target.tell()))


def cut_long_files(store: Store, layout: Layout) -> Iterator[LayoutFile]:
    """Cut files that are longer than the torrent's, and yield each of them.

    Raises:
        StorageFailed: one cannot be truncated.
    """
    for file in layout.payload:
        now = store.stamp(file.path)
        if now is not None and now.size > file.size:
            path = store.payload(file.path)
            if not list(own(store, [file])):
                with storage_errors(path):
                    os.truncate(path, file.size)
            yield file


def name_asked_files(store: Store, layout: Layout) -> dict[PurePosixPath, PurePosixPath]:
    """Give files that are asked for now, and were not before, their own names.

    Where a whole file lay beside the part that we wrote, that part is removed.

    Returns:
        For each that was renamed the path before and the path now.

    Raises:
        StorageFailed: one cannot be renamed or removed.
    """
    renamed = {}
    places, ours = store.places(), store.record().files
    for file in layout.payload:
        before = part_name(file.path)
        asked = file.path == places.get(file.name, file.name)
        if not asked or layout.file(before) is not None or not store.payload(before).is_file():
            continue
        path = store.payload(file.path)
        with storage_errors(path):
            if not path.exists():
                store.payload(before).rename(path)
                renamed[before] = file.path
            elif before in ours:
                store.payload(before).unlink()
    return renamed


def make_empty_files(store: Store, layout: Layout) -> None:
    """Make the files without bytes that are not there: no piece brings them.

    Raises:
        StorageFailed: one cannot be made.
    """
    for file in layout.payload:
        path = store.payload(file.path)
        if file.size == 0 and not path.exists():
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


def flush(paths: Iterable[Path], root: Path) -> None:
    """Force files below `root`, and the folders that name them, to the disk.

    Every folder on the way is flushed, for whoever made it need not
    have done so, and a file whose folder loses its name after a power cut is lost with it.

    Raises:
        StorageFailed: the disk refuses.
    """
    files = list(paths)
    runs = [files[start : start + RUN] for start in range(0, len(files), RUN)]
    with ThreadPoolExecutor(FLUSHERS, "flush") as pool:
        list(pool.map(_flush_each, runs))
    folders: set[Path] = set()
    for folder in {path.parent for path in files}:
        folders.update(takewhile(lambda it: it != root.parent, (folder, *folder.parents)))
    _flush_each(folders)


def _flush_each(paths: Iterable[Path]) -> None:
    for path in paths:
        flush_one(path)


def flush_one(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk; what is gone is passed over.

    Raises:
        StorageFailed: the disk refuses.
    """
    try:
        atomic.flush(path)
    except FileNotFoundError:
        # Its stamp will not be the one that its proofs rest on.
        return
    except OSError as error:
        raise storage_failed(error, path) from error
