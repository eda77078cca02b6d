"""Finds files in the checkpoint folder that have another layout than the torrent's.

Files may come from Hugging Face without the torrent's top folder, from its cache as links, from its
client as incomplete files named by their digest, or from another client as incomplete files with
an ending. Each stays where it is: the program that put it there can still find it, and a link might
not survive a move. Only an incomplete file is renamed. A file is adopted only if the hash of a
piece matches, so that an unrelated file of the same name and size is never overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from grokfetch.errors import storage_errors
from grokfetch.events import Progress
from grokfetch.folder.payload import behind_link
from grokfetch.folder.store import Store
from grokfetch.manifest.relocation import (
    Digests,
    Places,
    beside,
    finished_name,
    guesses,
    in_hub_cache,
)
from grokfetch.torrent.layout import BLOCK, Layout, LayoutFile
from grokfetch.torrent.names import STATE_FOLDER
from grokfetch.torrent.read_back import Hashers, check_pieces, may_be_on_disk

__all__ = ["adopt"]

DEEPEST = 8
"""Folders below the checkpoint folder that are looked into."""


BLOBS = PurePosixPath("../../blobs")
"""Where the files of a snapshot in Hugging Face's cache are begun."""


def adopt(store: Store, layout: Layout, digests: Digests) -> Iterator[Progress]:
    """Find files that do not lie where the layout has them, and keep in the store where they lie.

    Files that are nowhere get places beside those that were found.

    Args:
        store: the checkpoint folder, locked exclusively.
        layout: where they should lie.
        digests: what files must hold, where that is known, by their names in the torrent.

    Yields:
        Progress in bytes of the files that are looked at.

    Raises:
        StorageFailed: a file that another client has not completed cannot be given its name, or the
            state folder cannot be written.
    """
    absent = [it for it in layout.payload if it.size and store.stamp(it.path) is None]
    if not absent:
        return
    ours = {file.path for file in layout.payload}
    sizes = _files(store, absent)
    places: dict[PurePosixPath, PurePosixPath] = {}
    there = (item for item in sizes.items() if item[0] not in ours)
    for guess in guesses(absent, there, digests):
        taken = {*places, *places.values()}
        left = {n: place for n, place in guess.items() if n not in taken and place not in taken}
        trial = layout.moved({**places, **left})
        for file, right, progress in _examined(store.root, trial, left):
            if right:
                places[file.name] = left[file.name]
            yield progress
    places = _named(store.root, places)
    nowhere = [file.name for file in absent if file.name not in places]
    places.update(_free(store.root, beside(places, nowhere), ours))
    moved = {name: place for name, place in places.items() if name != place}
    if moved:
        store.save_places({**store.places(), **moved})


def _files(store: Store, absent: Iterable[LayoutFile]) -> dict[PurePosixPath, int]:
    """Path and size of every file in the folder.

    Links to folders are not followed, for they may lead anywhere and in circles, but where the end
    of a path that is looked for leads through one.
    """
    sizes: dict[PurePosixPath, int] = {}
    ours = {store.root / STATE_FOLDER, store.state}
    for folder, names, files in os.walk(store.root):
        place = PurePosixPath(os.path.relpath(folder, store.root))
        names[:] = [name for name in names if Path(folder, name) not in ours]
        if len(place.parts) >= DEEPEST:
            names.clear()
        _add(store, sizes, (place / name for name in files))
    tails = (
        PurePosixPath(*file.name.parts[start:])
        for file in absent
        for start in range(1, len(file.name.parts))
    )
    _add(store, sizes, tails)
    if in_hub_cache(store.root.resolve()):
        blobs = store.payload(BLOBS).glob("*.incomplete")
        _add(store, sizes, (BLOBS / path.name for path in blobs))
    return sizes


def _add(store: Store, sizes: dict[PurePosixPath, int], paths: Iterable[PurePosixPath]) -> None:
    for path in paths:
        if path not in sizes and store.payload(path).is_file():
            stamp = store.stamp(path)
            sizes[path] = 0 if stamp is None else stamp.size


def _examined(
    root: Path, layout: Layout, names: Collection[PurePosixPath]
) -> Iterator[tuple[LayoutFile, bool, Progress]]:
    """The files with these names, and whether bytes speak for each where the layout has it."""
    files = [file for file in layout.payload if file.name in names]
    total = sum(file.size for file in files)
    done = 0
    with Hashers[tuple[LayoutFile, bool]]() as hashers:
        for file, right in hashers.run(partial(_speak, root, layout, file) for file in files):
            done += file.size
            yield file, right, Progress(done, total)


def _speak(
    root: Path, layout: Layout, file: LayoutFile, buffer: memoryview
) -> tuple[LayoutFile, bool]:
    """Whether right pieces hold a block of the file, or all of it if it is smaller."""
    left = min(file.size, BLOCK)
    # First the pieces that lie in this file alone.
    pieces = sorted(layout.pieces_over(file), key=lambda it: len([*layout.segments(it)]) > 1)
    for piece in may_be_on_disk(root, layout, pieces):
        [result] = check_pieces(root, layout, [piece], buffer)
        if result.verdict == "good":
            left -= sum(part.length for part in layout.segments(piece) if part.file == file)
        if left <= 0:
            return file, True
    return file, False


def _named(root: Path, places: Places) -> dict[PurePosixPath, PurePosixPath]:
    """The places once files that bear the ending of what is not complete have lost it.

    What was begun under its digest goes beside what bears its name.
    """
    named: dict[PurePosixPath, PurePosixPath] = {}
    by_digest = {name for name, it in places.items() if finished_name(it).name != name.name}
    for name in sorted(places, key=by_digest.__contains__):
        place, proper = places[name], finished_name(places[name])
        if name in by_digest:
            proper = beside(named, [name]).get(name, name)
        if proper != place:
            away = place.parent != proper.parent and behind_link(root, root / proper) is not None
            if away or os.path.lexists(root / proper):
                continue
            with storage_errors(root / place):
                (root / proper).parent.mkdir(parents=True, exist_ok=True)
                (root / place).rename(root / proper)
        named[name] = proper
    return named


def _free(
    root: Path, places: Places, taken: Collection[PurePosixPath]
) -> Iterator[tuple[PurePosixPath, PurePosixPath]]:
    """Those of the places where something can be put and nothing lies."""
    for name, place in places.items():
        path = root / place
        if place not in taken and not os.path.lexists(path) and behind_link(root, path) is None:
            yield name, place
