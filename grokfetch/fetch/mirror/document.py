"""A torrent or a manifest from a web server: small, and checked by whoever reads it."""

from __future__ import annotations

from http import HTTPStatus

from grokfetch import __version__
from grokfetch.errors import OutOfReach, SourceInvalid
from grokfetch.fetch.mirror.addresses import label, unusable
from grokfetch.fetch.mirror.http import (
    CONNECT_TIMEOUT_S,
    MOST_REDIRECTS,
    Faulty,
    proxy_of,
    redirected,
)
from grokfetch.fetch.mirror.state import MirrorSettings

__all__ = ["read_document"]

LARGEST = 64 << 20
"""Bytes; no torrent and no manifest is larger, whatever a server sends."""


def read_document(url: str, settings: MirrorSettings, *, stranger: bool = False) -> bytes:
    """What lies at a web address.

    Args:
        url: http or https.
        settings: patience and proxy.
        stranger: whether it stood in a magnet link, as of `unusable`.

    Raises:
        SourceInvalid: it is not an address that can be used.
        OutOfReach: nothing that could be a torrent or a manifest came from it.
    """
    import httpx

    why = unusable(url, stranger=stranger)
    if why is not None:
        raise SourceInvalid(why, path=f"{url:.200}")
    try:
        return _read(url, settings)
    except (httpx.HTTPError, httpx.InvalidURL, Faulty) as error:
        raise OutOfReach(
            f"cannot be fetched: {error or type(error).__name__}",
            path=label(url),
            hint="download it another way, and name the file",
        ) from None


def _read(url: str, settings: MirrorSettings) -> bytes:
    import httpx

    with httpx.Client(
        proxy=None if settings.proxy is None else proxy_of(*settings.proxy),
        trust_env=settings.proxy is None,
        headers={"User-Agent": f"grokfetch/{__version__}"},
        timeout=httpx.Timeout(
            settings.patience_s, connect=min(settings.patience_s, CONNECT_TIMEOUT_S)
        ),
    ) as client:
        for _ in range(MOST_REDIRECTS + 1):
            with client.stream("GET", url) as response:
                if response.has_redirect_location:
                    url = redirected(response)
                    continue
                if response.status_code != HTTPStatus.OK:
                    raise Faulty(f"the server answers {response.status_code}")
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > LARGEST:
                        raise Faulty(f"it is larger than {LARGEST:,} bytes")
                return bytes(data)
    raise Faulty(f"it redirects more than {MOST_REDIRECTS} times")
