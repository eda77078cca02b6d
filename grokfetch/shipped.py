"""The manifests that come with grokfetch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grokfetch.manifest import Manifest, parse

__all__ = ["grok_1", "shipped"]

# The wheel carries them inside the package; in a checkout they are the folder beside it.
_PLACES = (Path(__file__).parent / "manifests", Path(__file__).parent.parent / "manifests")


def grok_1() -> Manifest:
    """The official checkpoint of Grok-1."""
    return next(manifest for manifest in shipped() if manifest.name == "grok-1")


def shipped() -> Iterator[Manifest]:
    """Every manifest that comes with this installation."""
    folder = next(place for place in _PLACES if place.is_dir())
    for path in sorted(folder.glob("*.json")):
        yield parse(path.read_bytes(), str(path))
