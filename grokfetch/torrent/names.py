"""Which untrusted file names are safe, and names of our own that fit a file system."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

__all__ = ["LONGEST_NAME", "STATE_FOLDER", "look_alikes", "unsafe_name", "with_ending"]

STATE_FOLDER = ".grokfetch"
"""Our own folder beside the payload; no payload may have its name."""

LONGEST_NAME = 255
"""Bytes of a name in UTF-8 that common file systems allow."""


def unsafe_name(path: str) -> str | None:
    """Why a relative path could lead out of its folder or into ours; None if it is safe."""
    parts = path.split("/")
    control = re.search(r"[\x00-\x1f\x7f]", path)
    reasons = (
        (path.startswith("/"), "it is absolute"),
        (any(part in ("", ".", "..") for part in parts), "it has an empty, . or .. part"),
        (control, control and f"it has a control character (U+{ord(control[0]):04X})"),
        ("\\" in path, "it has a backslash, which separates folders on Windows"),
        (re.match(r"[A-Za-z]:", path), "it names a drive"),
        (parts[0].casefold() == STATE_FOLDER, f"{STATE_FOLDER} is grokfetch's own folder"),
        (re.search("[\ud800-\udfff]", path), "it is not UTF-8"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def with_ending(name: str, ending: str) -> str:
    """A file name with an ending of ours.

    If both together are too long for a file system, the name is truncated, and a part of its sha256
    distinguishes it from others with the same beginning.
    """
    if len(name.encode()) + len(ending.encode()) <= LONGEST_NAME:
        return name + ending
    mark = "~" + hashlib.sha256(name.encode()).hexdigest()[:16]
    room = LONGEST_NAME - len(mark) - len(ending.encode())
    return name.encode()[:room].decode(errors="ignore") + mark + ending


def look_alikes(paths: Iterable[PurePosixPath]) -> list[tuple[PurePosixPath, ...]]:
    """Groups of paths, including folders, that are the same on many file systems.

    They differ only in case, or in how accented characters are composed.
    """
    alike: defaultdict[str, set[PurePosixPath]] = defaultdict(set)
    for path in paths:
        for place in (path, *path.parents):
            alike[unicodedata.normalize("NFC", str(place).casefold())].add(place)
    return [tuple(sorted(group)) for group in alike.values() if len(group) > 1]
