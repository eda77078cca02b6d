"""Parses torrent files from untrusted bytes. Pure: no I/O here.

Whatever the bytes are, the result is a value or `TorrentInvalid` with what is wrong. The info hash
is computed over the original bytes of the info dictionary, never over a re-encoding.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping

from grokfetch.errors import TorrentInvalid
from grokfetch.torrent import bencode
from grokfetch.torrent.bencode import Value, expect, text

__all__ = [
    "TorrentFile",
    "check_info_hash",
    "encode_torrent",
    "parse_torrent",
    "torrent_file",
]


@dataclasses.dataclass(frozen=True, slots=True)
class TorrentFile:
    """A torrent's metadata: the original bytes of the info dictionary, and the other fields.

    `v1` and `v2` are the info hashes in hexadecimal (40 and 64 digits), None if the torrent does
    not have that version. `piece_layers` maps the root of each v2 file larger than a piece to the
    hashes of its pieces.
    """

    info: bytes = dataclasses.field(repr=False)
    v1: str | None
    v2: str | None
    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    piece_layers: Mapping[bytes, bytes] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def info_hash(self) -> str:
        """The hash that identifies it here: v1 if there is one."""
        return self.v1 or self.v2 or ""

    def known_as(self, info_hash: str | None) -> bool:
        """Whether `info_hash`, 40 or 64 hexadecimal digits, is one of its two."""
        return info_hash is not None and info_hash in (self.v1, self.v2)


SEAL = b"grokfetch info hash"
"""The extra key of a sealed file, beside `info`; other programs ignore it."""


# --- torrent files -----------------------------------------------------------------------------


def parse_torrent(data: bytes) -> TorrentFile:
    """Read a `.torrent` file. Its layout is checked by `parse_info`.

    Raises:
        TorrentInvalid: it is not a torrent, is malformed, or has changed since it was sealed.
    """
    members = bencode.members(data)
    if b"info" not in members:
        raise TorrentInvalid("not a torrent: it has no info dictionary")
    top = {key: value for key, (value, _) in members.items()}
    layers = expect(top.get(b"piece layers", {}), dict, "piece layers")
    v1, v2 = _info_hashes(top[b"info"], members[b"info"][1])
    torrent = TorrentFile(
        members[b"info"][1],
        v1,
        v2,
        tuple(dict.fromkeys(_trackers(top))),
        tuple(dict.fromkeys(_texts(top.get(b"url-list", []), "url-list"))),
        {root: expect(layer, bytes, "a piece layer") for root, layer in layers.items()},
    )
    if top.get(SEAL, torrent.info_hash.encode()) != torrent.info_hash.encode():
        raise TorrentInvalid("it has changed since it was written: its info hash differs")
    return torrent


def torrent_file(
    info: bytes,
    piece_layers: Mapping[bytes, bytes],
    *,
    trackers: Iterable[str] = (),
    web_seeds: Iterable[str] = (),
) -> TorrentFile:
    """The `TorrentFile` of an info dictionary and the other fields.

    Raises:
        TorrentInvalid: the info dictionary is not valid.
    """
    v1, v2 = _info_hashes(bencode.decode(info), info)
    return TorrentFile(
        info,
        v1,
        v2,
        tuple(dict.fromkeys(trackers)),
        tuple(dict.fromkeys(web_seeds)),
        dict(piece_layers),
    )


def encode_torrent(torrent: TorrentFile, *, sealed: bool = False) -> bytes:
    """The `.torrent` file of these values; the info dictionary is kept byte for byte.

    `sealed` stores its own info hash in it, so that a flipped bit is noticed when it is read.
    """
    around: dict[bytes, Value] = {}
    if sealed:
        around[SEAL] = torrent.info_hash.encode()
    if torrent.trackers:
        around[b"announce"] = torrent.trackers[0].encode()
        around[b"announce-list"] = [[tracker.encode()] for tracker in torrent.trackers]
    if torrent.piece_layers:
        around[b"piece layers"] = dict(torrent.piece_layers)
    if torrent.web_seeds:
        around[b"url-list"] = [seed.encode() for seed in torrent.web_seeds]
    members = {key: bencode.encode(value) for key, value in around.items()}
    members[b"info"] = torrent.info
    body = b"".join(bencode.encode(key) + members[key] for key in sorted(members))
    return b"d" + body + b"e"


def check_info_hash(torrent: TorrentFile, info_hash: str) -> None:
    """Refuse metadata of another torrent.

    Raises:
        TorrentInvalid: neither of its hashes is `info_hash`.
    """
    if not torrent.known_as(info_hash):
        raise TorrentInvalid(
            f"the metadata's info hash is {torrent.info_hash} instead of {info_hash}"
        )


def _info_hashes(decoded: Value, info: bytes) -> tuple[str | None, str | None]:
    value = expect(decoded, dict, "info")
    has_v2 = value.get(b"meta version") == 2
    has_v1 = b"pieces" in value or not has_v2
    return (
        hashlib.sha1(info, usedforsecurity=False).hexdigest() if has_v1 else None,
        hashlib.sha256(info).hexdigest() if has_v2 else None,
    )


def _trackers(top: Mapping[bytes, Value]) -> Iterator[str]:
    if b"announce" in top:
        yield from _texts(top[b"announce"], "announce")
    for tier in expect(top.get(b"announce-list", []), list, "announce-list"):
        yield from _texts(tier, "announce-list")


def _texts(value: Value, name: str) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [found for item in items if (found := text(item, name))]
