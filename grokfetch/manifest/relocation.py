"""Files at other paths than the torrent's, and guesses which is which. Pure: no I/O here.

A file's name is its path in the torrent, its place the path where it lies, both below the
checkpoint folder. Names and sizes only suggest that a file is the torrent's: bytes must prove it.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import PurePath, PurePosixPath

from grokfetch.manifest.fields import parsed
from grokfetch.manifest.schema import common_tail
from grokfetch.torrent.layout import LayoutFile
from grokfetch.torrent.names import unsafe_name

__all__ = [
    "SCHEMA",
    "Digests",
    "Places",
    "beside",
    "decode",
    "encode",
    "finished_name",
    "guesses",
    "in_hub_cache",
]

SCHEMA = 1

Places = Mapping[PurePosixPath, PurePosixPath]
"""The path on disk of each file, by its path in the torrent; a file not in it has that path."""

Digests = Mapping[PurePosixPath, str]
"""From names to the sha256 of the whole file, in hexadecimal."""

UNFINISHED = (
    *(".!qB", ".!ut", ".part", ".bc!", ".xltd", ".td"),
    *(".crdownload", ".opdownload", ".incomplete", ".partial"),
)
"""What programs append to the name of a file that is not complete: qBittorrent, uTorrent,
Transmission and Firefox, BitComet, Xunlei; Chrome, Opera, the Hub's client and others."""

BY_DIGEST = re.compile(r"(?:.*\.)?([0-9a-f]{64})(?:\.\w+)?\.incomplete")
"""How the Hub's client calls what it has begun, by the sha256 of the whole file: in its cache
`blobs/SHA256.incomplete`, in a folder of one's own
`.cache/huggingface/download/NAME.SHA256.incomplete`, where NAME is the file's or a hash of it.
Newer clients put a number behind the digest."""

MOST_GUESSES = 3
"""How many paths are tried for one file."""


def finished_name(path: PurePosixPath) -> PurePosixPath:
    """The path without the ending that programs append while a file is incomplete."""
    ending = next((it for it in UNFINISHED if path.name.endswith(it) and path.name != it), "")
    return path.with_name(path.name.removesuffix(ending))


def guesses(
    files: Iterable[LayoutFile],
    there: Iterable[tuple[PurePosixPath, int]],
    digests: Digests,
) -> Iterator[dict[PurePosixPath, PurePosixPath]]:
    """Where files might lie: from names to places, the likeliest first, each place once.

    Of the files that bear the name, or are begun under the digest, and are no longer than it must
    be, the likelier shares more of the path, then has the right size, then lies where more of the
    checkpoint seems to lie.

    Args:
        files: that do not lie where they should.
        there: path and size in bytes of each file there is.
        digests: the sha256 of files, where it is known.
    """
    elsewhere = list(files)
    by_name: defaultdict[str, list[tuple[PurePosixPath, int]]] = defaultdict(list)
    for path, size in there:
        by_name[finished_name(path).name].append((path, size))
        digested = BY_DIGEST.fullmatch(path.name)
        if digested is not None:
            by_name[digested[1]].append((path, size))
    fitting = {
        file.name: [
            (path, size)
            for path, size in by_name[file.name.name] + by_name[digests.get(file.name, "")]
            if 0 < size <= file.size
        ]
        for file in elsewhere
    }
    in_folder: Counter[PurePosixPath] = Counter()
    for candidates in fitting.values():
        in_folder.update({path.parent: size for path, size in candidates})

    def rank(
        name: PurePosixPath, path: PurePosixPath, *, right: bool
    ) -> tuple[int, bool, int, str]:
        tail = common_tail(finished_name(path), name)
        return -tail, not right, -in_folder[path.parent], str(path)

    likely = {
        file.name: sorted(
            (rank(file.name, path, right=size == file.size), path)
            for path, size in fitting[file.name]
        )
        for file in elsewhere
    }
    for turn in range(MOST_GUESSES):
        guess: dict[PurePosixPath, PurePosixPath] = {}
        taken: set[PurePosixPath] = set()
        for name, ranked in likely.items():
            if turn < len(ranked) and ranked[turn][1] not in taken:
                guess[name] = ranked[turn][1]
                taken.add(ranked[turn][1])
        if guess:
            yield guess


def beside(places: Places, names: Iterable[PurePosixPath]) -> dict[PurePosixPath, PurePosixPath]:
    """Where files that are nowhere yet belong, if those that are there lie elsewhere: beside them.

    Args:
        places: of files that were found.
        names: of files that were not.
    """
    heads = Counter(_heads(name, place) for name, place in places.items())
    if not heads:
        return {}
    [((theirs, ours), _)] = heads.most_common(1)
    return {name: ours / name.relative_to(theirs) for name in names if name.is_relative_to(theirs)}


def _heads(name: PurePosixPath, place: PurePosixPath) -> tuple[PurePosixPath, PurePosixPath]:
    """Both paths without their common end."""
    tail = common_tail(name, place)
    return PurePosixPath(*name.parts[:-tail]), PurePosixPath(*place.parts[:-tail])


def in_hub_cache(root: PurePath) -> bool:
    """Whether an absolute path is inside a snapshot of Hugging Face's cache.

    That is laid out as `models--OWNER--NAME/snapshots/REVISION`.
    """
    return any(
        after == "snapshots" and before.startswith(("models--", "datasets--"))
        for before, after in pairwise(root.parts[:-1])
    )


# --- JSON --------------------------------------------------------------------------------------


def encode(places: Places) -> bytes:
    """The places as JSON, one line per file."""
    rows = ",\n  ".join(
        f"{json.dumps(str(name))}: {json.dumps(str(place))}"
        for name, place in sorted(places.items())
    )
    return f'{{\n "schema": {SCHEMA},\n "places": {{\n  {rows}\n }}\n}}\n'.encode()


def decode(text: bytes) -> dict[PurePosixPath, PurePosixPath]:
    """Read places.

    Raises:
        ManifestInvalid: they are malformed, unsafe, not distinct, or of a later version.
    """
    field = parsed(text, "places", SCHEMA).get("places")
    places: dict[PurePosixPath, PurePosixPath] = {}
    for name in field.members():
        place = field.get(name).string()
        reason = unsafe_name(place) or unsafe_name(name)
        if reason is not None:
            field.get(name).refuse(f"must be a plain relative path: {reason}")
        places[PurePosixPath(name)] = PurePosixPath(place)
    if len(set(places.values())) < len(places):
        field.refuse("must be distinct")
    return places
