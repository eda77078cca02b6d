"""Which folder somebody may have meant by one in which nothing was begun."""

from __future__ import annotations

from pathlib import Path

from grokfetch.torrent.names import STATE_FOLDER

__all__ = ["hint_nearby"]

MOST_BELOW = 1000
"""Folders in a folder that are looked at."""


def hint_nearby(root: Path) -> str:
    """What to name instead of a folder or file; nothing if nothing was begun above or just below.

    Args:
        root: where no state is.
    """
    if root.is_file():
        return f"a folder is wanted; of a torrent or a manifest: grokfetch fetch {root} --to DIR"
    for folder in root.absolute().parents:
        if _begun(folder):
            return f"the folder above it was begun by grokfetch: name {folder} instead"
    try:
        below = sorted(root.iterdir())[:MOST_BELOW]
    except OSError:
        return ""
    begun = next(filter(_begun, below), None)
    return "" if begun is None else f"a folder in it was begun by grokfetch: name {begun} instead"


def _begun(folder: Path) -> bool:
    try:
        return (folder / STATE_FOLDER / "manifest.json").is_file()
    except OSError:
        return False
