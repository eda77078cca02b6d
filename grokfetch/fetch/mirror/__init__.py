"""HTTP mirrors: pieces and the tokenizer from web servers, which are never trusted.

`Together` makes one `PieceSource` of a swarm and mirrors; `read_document` gets a torrent or a
manifest. Only this package imports httpx.
"""

from __future__ import annotations

from grokfetch.fetch.mirror.addresses import unusable
from grokfetch.fetch.mirror.document import read_document
from grokfetch.fetch.mirror.environment import environment
from grokfetch.fetch.mirror.passing import (
    Delivery,
    Length,
    Mirrors,
    Receiver,
    Told,
    deliver,
    lengths,
    mirror_name,
    pass_by,
)
from grokfetch.fetch.mirror.pinned import bring_tokenizer
from grokfetch.fetch.mirror.state import MirrorSettings
from grokfetch.fetch.mirror.together import Together

__all__ = [
    "Delivery",
    "Length",
    "MirrorSettings",
    "Mirrors",
    "Receiver",
    "Together",
    "Told",
    "bring_tokenizer",
    "deliver",
    "environment",
    "lengths",
    "mirror_name",
    "pass_by",
    "read_document",
    "unusable",
]
