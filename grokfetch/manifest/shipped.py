"""The manifests that come with grokfetch, and a small checkpoint to try it with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from grokfetch.manifest.schema import Manifest, parse

__all__ = ["demo_folder", "grok_1", "shipped"]

# The wheel carries them inside the package; in a checkout they are the folder beside it.
_PACKAGE = Path(__file__).parent.parent
_PLACES = (_PACKAGE / "manifests", _PACKAGE.parent / "manifests")
_DEMO_PLACES = (_PACKAGE / "demo", _PACKAGE.parent / "demo" / "published")


def grok_1() -> Manifest:
    """The official checkpoint of Grok-1."""
    return next(manifest for manifest in shipped() if manifest.name == "grok-1")


def shipped() -> Iterator[Manifest]:
    """Every manifest that comes with this installation."""
    folder = next(place for place in _PLACES if place.is_dir())
    for path in sorted(folder.glob("*.json")):
        yield _read(path)


@functools.cache
def _read(path: Path) -> Manifest:
    return parse(path.read_bytes(), str(path))


def demo_folder() -> Path:
    """The output of `grokfetch publish` for a small Grok-1 that has memorised a text.

    It holds the folder `grok-demo` with the shards, the tokenizer and the text, one sentence a
    line, and beside it `grok-demo.torrent` and the manifest `grok-demo.json`.
    """
    return next(place for place in _DEMO_PLACES if place.is_dir())
