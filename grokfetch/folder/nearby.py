"""Finds the folder that a user may have meant, if nothing was begun in the one given."""

from __future__ import annotations

from pathlib import Path

from grokfetch.torrent.names import STATE_FOLDER

__all__ = ["hint_nearby"]

MOST_BELOW = 1000
"""How many entries of a folder are looked at."""


def hint_nearby(root: Path) -> str:
    """A hint at what to name instead; empty if nothing was begun above or just below.

    Args:
        root: a folder or file without state.
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
