"""Parses magnet links from untrusted, copied text. Pure: no I/O here.

BEP 9 defines the link, BEP 52 `urn:btmh`, BEP 53 `so`. Damage by mail programs, web pages and
people is undone: quotes and spaces around it, `&amp;` for `&`, line breaks in it, names in any
case, and a name with spaces or `#` that was not encoded.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Callable, Iterable
from urllib.parse import quote, unquote_plus, urlsplit

from grokfetch.errors import TorrentInvalid

__all__ = ["Magnet", "link_of_hash", "parse_magnet", "unquoted"]

MOST_PARAMETERS = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Magnet:
    """A magnet link: `info_hash` in hexadecimal (v1 if both are given), peers as HOST:PORT.

    `text` is the link written again with its usable parts. `metadata` are URLs of the torrent file,
    `files` are numbers of the files that are asked for, counted from 0 in the torrent; none means
    all. `unusable` says in words which parts of the link were ignored.
    """

    text: str
    info_hash: str
    name: str | None = None
    trackers: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    files: tuple[int, ...] = ()
    unusable: tuple[str, ...] = ()


def unquoted(text: str) -> str:
    """The text without the spaces, quotes and angle brackets that were copied with it."""
    return text.strip(" \t\r\n\f\v\"'`<>\u2018\u2019\u201c\u201d\u00a0\u200b")


def parse_magnet(text: str) -> Magnet:
    """Read a magnet link.

    Raises:
        TorrentInvalid: it is not a magnet link, or has no info hash.
    """
    link = re.sub(r"[\r\n\t]", "", unquoted(text)).replace("&amp;", "&").replace("&#38;", "&")
    if not re.match(r"magnet:", link, re.IGNORECASE):
        raise TorrentInvalid(f"not a magnet link: {text:.60}")
    pairs = _pairs(link)
    hashes = sorted(dict.fromkeys(filter(None, map(_topic, _all(pairs, "xt")))), key=len)
    if not hashes:
        raise TorrentInvalid(
            "the magnet link has no info hash (xt=urn:btih: or urn:btmh:)",
            hint="copy the whole link, and put it in quotes for the shell",
        )
    trackers, bad_trackers = _sorted_out(_all(pairs, "tr"), _is_tracker, "tracker (tr=)")
    peers, bad_peers = _sorted_out(_all(pairs, "x.pe"), _is_peer, "peer (x.pe=)")
    metadata = [url for key in ("xs", "as") for url in _all(pairs, key) if _is_web(url)]
    files, bad_files = _numbers(_all(pairs, "so"))
    name = next(iter(_all(pairs, "dn")), None)
    web_seeds = tuple(_all(pairs, "ws"))
    return Magnet(
        _written(hashes, name, trackers, peers, web_seeds),
        hashes[0],
        name,
        trackers,
        peers,
        web_seeds,
        tuple(metadata),
        files,
        (*bad_trackers, *bad_peers, *bad_files),
    )


def link_of_hash(text: str) -> str | None:
    """The magnet link of a bare info hash: 40 or 64 hexadecimal digits, or base32; else None."""
    digits = unquoted(text)
    if re.fullmatch(r"[0-9A-Fa-f]{64}", digits):
        return f"magnet:?xt=urn:btmh:1220{digits.lower()}"
    topic = _topic(f"urn:btih:{digits}")
    return None if topic is None else f"magnet:?xt=urn:btih:{topic}"


def _pairs(link: str) -> list[tuple[str, str]]:
    """Names, in lower case, and values; a `#` is part of a value and does not end the link."""
    pairs = []
    for part in link.partition("?")[2].split("&", MOST_PARAMETERS)[:MOST_PARAMETERS]:
        name, _, value = part.partition("=")
        if value:
            pairs.append((unquote_plus(name).strip().lower(), unquote_plus(value).strip()))
    return pairs


def _all(pairs: Iterable[tuple[str, str]], key: str) -> list[str]:
    values = (value for name, value in pairs if re.sub(r"\.\d+$", "", name) == key and value)
    return list(dict.fromkeys(values))


def _topic(topic: str) -> str | None:
    """The info hash of one xt, in hexadecimal; None if it is of another kind."""
    match = re.fullmatch(r"urn:(btih|btmh):([0-9A-Za-z]+)", topic, re.IGNORECASE)
    if match is None:
        return None
    kind, digits = match[1].lower(), match[2].lower()
    if kind == "btmh":
        # The prefix 12 20 stands for a SHA-256 of 32 bytes.
        return digits[4:] if re.fullmatch(r"1220[0-9a-f]{64}", digits) else None
    if re.fullmatch(r"[0-9a-f]{40}", digits):
        return digits
    try:
        return base64.b32decode(digits.upper()).hex() if len(digits) == 32 else None
    except binascii.Error:
        return None


def _sorted_out(
    values: Iterable[str], sound: Callable[[str], bool], what: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The valid values, and a message for each of the others."""
    good, bad = [], []
    for value in values:
        if sound(value):
            good.append(value)
        else:
            bad.append(f"the magnet link's {what} {value!r:.100} is not an address; it is ignored")
    return tuple(good), tuple(bad)


def _is_web(url: str) -> bool:
    return _has_scheme(url, ("http", "https"))


def _is_tracker(url: str) -> bool:
    return _has_scheme(url, ("udp", "http", "https", "ws", "wss"))


def _has_scheme(url: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in schemes and bool(parts.hostname) and not re.search(r"\s", url)


def _is_peer(peer: str) -> bool:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):(\d{1,5})", peer)
    return match is not None and 0 < int(match[2]) < 1 << 16


def _numbers(values: Iterable[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The file numbers of `so`, such as 0,2,4-7 (BEP 53), and what was wrong."""
    numbers: set[int] = set()
    bad = []
    for value in values:
        for part in value.split(","):
            match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
            if match is None:
                bad.append(
                    f"the magnet link's selection (so=) {part!r:.40} is not valid; it is ignored"
                )
            else:
                numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(numbers)), tuple(bad)


def _written(
    hashes: Iterable[str],
    name: str | None,
    trackers: Iterable[str],
    peers: Iterable[str],
    web_seeds: Iterable[str],
) -> str:
    topics = "&".join(
        f"xt=urn:btih:{it}" if len(it) == 40 else f"xt=urn:btmh:1220{it}" for it in hashes
    )
    pairs = [] if name is None else [("dn", name)]
    pairs += [("tr", url) for url in trackers]
    pairs += [("x.pe", peer) for peer in peers]
    pairs += [("ws", url) for url in web_seeds]
    return f"magnet:?{topics}" + "".join(
        f"&{key}={quote(value, safe=':[]' if key == 'x.pe' else '')}" for key, value in pairs
    )
