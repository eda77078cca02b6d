"""A torrent or a manifest from a web server: small, and checked by whoever reads it."""

from __future__ import annotations

import asyncio

from grokfetch.errors import OutOfReach, SourceInvalid
from grokfetch.fetch.mirror.addresses import label, unusable
from grokfetch.fetch.mirror.answers import Failed, Faulty, Refused
from grokfetch.fetch.mirror.state import MirrorSettings

__all__ = ["read_document"]

LARGEST = 64 << 20
"""Bytes; no torrent or manifest is larger, whatever a server sends."""

LONGEST_S = 300.0


def read_document(url: str, settings: MirrorSettings, *, stranger: bool = False) -> bytes:
    """The document at a web address.

    Args:
        url: http or https.
        settings: patience and proxy.
        stranger: whether it came from a magnet link, as for `unusable`.

    Raises:
        SourceInvalid: it is not an address that can be used.
        OutOfReach: nothing that could be a torrent or a manifest came from it.
    """
    why = unusable(url, stranger=stranger)
    if why is not None:
        raise SourceInvalid(why, path=f"{url:.200}")
    try:
        return asyncio.run(_read(url, settings))
    except (Refused, Faulty, Failed) as error:
        raise OutOfReach(
            f"cannot be fetched: {error}",
            path=label(url),
            hint="download it another way, and name the file",
        ) from None


async def _read(url: str, settings: MirrorSettings) -> bytes:
    from grokfetch.fetch.mirror.http import Http

    try:
        async with (
            asyncio.timeout(LONGEST_S),
            Http(1, settings.patience_s, settings.proxy, settings.environment) as http,
        ):
            return await http.document(settings.environment.at_hub(url), LARGEST)
    except TimeoutError:
        raise Failed(f"it did not come within {LONGEST_S:.0f} s") from None
