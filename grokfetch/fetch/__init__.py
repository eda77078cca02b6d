"""From a source of pieces to proven bytes on disk: plan, download, read back, ask again.

A `PieceSource` brings pieces to the disk, and nothing it says is trusted. Its metadata is checked
against the info hash, and every piece is read back and hashed here before the record claims it.
Whatever ends a fetch, what is proven stays proven, and the next fetch asks only for the rest.
"""

from grokfetch.fetch.loop import Limits, fetch
from grokfetch.fetch.prepare import Asked

__all__ = ["Asked", "Limits", "fetch"]
