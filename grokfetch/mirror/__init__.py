"""HTTP mirrors: pieces and the tokenizer from web servers that are trusted in nothing.

`Together` makes one `PieceSource` of a swarm and mirrors. Only this package imports httpx.
"""

from __future__ import annotations

from grokfetch.mirror.addresses import unusable
from grokfetch.mirror.pinned import bring_tokenizer
from grokfetch.mirror.state import MirrorSettings
from grokfetch.mirror.together import Together

__all__ = ["MirrorSettings", "Together", "bring_tokenizer", "unusable"]
