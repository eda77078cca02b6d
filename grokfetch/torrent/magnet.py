"""Magnet links, read from text that strangers sent. Pure: no I/O here."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, urlsplit

from grokfetch.errors import TorrentInvalid

__all__ = ["Magnet", "parse_magnet"]


@dataclasses.dataclass(frozen=True, slots=True)
class Magnet:
    """A magnet link: `info_hash` in hexadecimal (v1 where both are given), peers as HOST:PORT."""

    text: str
    info_hash: str
    name: str | None = None
    trackers: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()


def parse_magnet(text: str) -> Magnet:
    """Read a magnet link.

    Raises:
        TorrentInvalid: it is none, or names no info hash.
    """
    try:
        link = urlsplit(text.strip())
        pairs = parse_qsl(link.query, max_num_fields=1000)
    except ValueError as error:
        raise TorrentInvalid(f"not a magnet link: {error}") from None
    if link.scheme != "magnet":
        raise TorrentInvalid(f"not a magnet link: {text:.60}")
    hashes = sorted(filter(None, map(_topic, _all(pairs, "xt"))), key=len)
    if not hashes:
        raise TorrentInvalid("the magnet link names no info hash (xt=urn:btih: or urn:btmh:)")
    return Magnet(
        text.strip(),
        hashes[0],
        name=next(iter(_all(pairs, "dn")), None),
        trackers=tuple(_all(pairs, "tr")),
        peers=tuple(_all(pairs, "x.pe")),
        web_seeds=tuple(_all(pairs, "ws")),
    )


def _all(pairs: Iterable[tuple[str, str]], key: str) -> list[str]:
    return list(dict.fromkeys(value for name, value in pairs if re.sub(r"\.\d+$", "", name) == key))


def _topic(topic: str) -> str | None:
    """The info hash of one xt, in hexadecimal; None where it is of another kind."""
    found = re.fullmatch(r"urn:(btih|btmh):([0-9A-Za-z]+)", topic)
    if found is None:
        return None
    kind, digits = found[1], found[2].lower()
    if kind == "btmh":
        # 12 20 says: a SHA-256 of 32 bytes.
        return digits[4:] if re.fullmatch(r"1220[0-9a-f]{64}", digits) else None
    if re.fullmatch(r"[0-9a-f]{40}", digits):
        return digits
    try:
        return base64.b32decode(digits.upper()).hex() if len(digits) == 32 else None
    except binascii.Error:
        return None
