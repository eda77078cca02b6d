"""The payload files as targets of writing: links, and the lengths they must have."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from grokfetch.errors import StorageFailed
from grokfetch.pieces import Layout, LayoutFile
from grokfetch.storage import storage_failed
from grokfetch.store import Store, part_name

__all__ = ["cut_long_files", "make_empty_files", "name_asked_files", "refuse_links"]


def refuse_links(store: Store, files: Iterable[LayoutFile]) -> None:
    """Refuse to write through symbolic links: what they point to is not ours.

    Raises:
        StorageFailed: a file, or a folder on the way to it, is one.
    """
    seen: set[Path] = {store.root}
    for file in files:
        path = store.payload(file.path)
        for place in (path, *path.parents):
            if place in seen:
                break
            seen.add(place)
            if place.is_symlink():
                raise StorageFailed(
                    "a symbolic link, and bytes below it must be fetched; links are only read",
                    path=place,
                    hint="replace it by a copy, or remove it, and run the same command again",
                )


def cut_long_files(store: Store, layout: Layout) -> Iterator[LayoutFile]:
    """Cut files that are longer than the torrent's, and yield each of them.

    Raises:
        StorageFailed: one cannot be cut, or is a symbolic link.
    """
    for file in layout.payload:
        now = store.stamp(file.path)
        if now is not None and now.size > file.size:
            refuse_links(store, [file])
            path = store.payload(file.path)
            try:
                os.truncate(path, file.size)
            except OSError as error:
                raise storage_failed(error, path) from error
            yield file


def name_asked_files(store: Store, layout: Layout) -> dict[PurePosixPath, PurePosixPath]:
    """Give files that are asked for now, and were not before, their own names.

    Returns:
        For each of them the path before and the path now.

    Raises:
        StorageFailed: one cannot be renamed.
    """
    renamed = {}
    for file in layout.payload:
        before = part_name(file.name)
        if file.path == file.name and store.payload(before).is_file():
            path = store.payload(file.path)
            if layout.file(before) is None and not path.exists():
                try:
                    store.payload(before).rename(path)
                except OSError as error:
                    raise storage_failed(error, path) from error
                renamed[before] = file.path
    return renamed


def make_empty_files(store: Store, layout: Layout) -> None:
    """Make the files without bytes that are not there: no piece brings them.

    Raises:
        StorageFailed: one cannot be made.
    """
    for file in layout.payload:
        path = store.payload(file.path)
        if file.size == 0 and not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError as error:
                raise storage_failed(error, path) from error
