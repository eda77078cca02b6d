"""The golden checkpoint as a stranger publishes it: payload, torrent, manifest with magnet link."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from grokfetch.manifest.schema import Manifest, encode
from grokfetch.torrent.metainfo import TorrentFile, parse_torrent
from loader.weights.inventory import expected
from support import golden
from support.torrents import torrent_of

PIECE = 16 * 1024


def publish(root: Path) -> tuple[TorrentFile, Manifest]:
    """Write `release/`, `tiny.torrent` and `tiny.json` into a folder."""
    shutil.copytree(golden.TINY / "ckpt-0", root / "release" / "ckpt-0")
    data = torrent_of(root / "release", PIECE)
    root.joinpath("tiny.torrent").write_bytes(data)
    torrent = parse_torrent(data)
    files, tensors = expected(golden.CONFIG, PurePosixPath("ckpt-0"))
    manifest = Manifest(
        "tiny",
        files,
        info_hash=torrent.info_hash,
        magnet=f"magnet:?xt=urn:btih:{torrent.info_hash}",
        tensors=tensors,
        model=golden.CONFIG.to_mapping(),
    )
    root.joinpath("tiny.json").write_bytes(encode(manifest))
    return torrent, manifest
