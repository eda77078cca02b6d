"""Which names of files a stranger may give us."""

from __future__ import annotations

import re

__all__ = ["STATE_FOLDER", "unsafe_name"]

STATE_FOLDER = ".grokfetch"
"""Our own folder beside the payload; no payload may bear its name."""


def unsafe_name(path: str) -> str | None:
    """Why a relative path could lead out of its folder or into ours; None when it is harmless."""
    parts = path.split("/")
    if path.startswith("/"):
        return "it is absolute"
    if any(part in ("", ".", "..") for part in parts):
        return "it has an empty, . or .. part"
    if any(character < " " or character in "\\\x7f" for character in path):
        return "it has a control character or a backslash"
    if re.match(r"[A-Za-z]:", path):
        return "it names a drive"
    if parts[0].casefold() == STATE_FOLDER:
        return f"{STATE_FOLDER} is grokfetch's own folder"
    return None
