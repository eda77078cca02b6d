"""The payload files as targets of writing: links, and the lengths they must have."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from grokfetch.errors import StorageFailed
from grokfetch.pieces import Layout, LayoutFile
from grokfetch.storage import storage_failed
from grokfetch.store import Store

__all__ = ["cut_long_files", "make_empty_files", "refuse_links"]


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
