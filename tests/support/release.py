"""Folders as others publish them: payload, torrent and, for a checkpoint, its manifest."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from grokfetch.manifest.schema import Manifest, TokenizerSource, encode
from grokfetch.torrent.metainfo import TorrentFile, parse_torrent
from loader.weights.inventory import expected
from support import golden
from support.program import grokfetch
from support.torrents import lay_down, torrent_of

PIECE = 16 * 1024


def publish(
    root: Path,
    piece_length: int = PIECE,
    notes: str | None = None,
    tokenizer: TokenizerSource | None = None,
) -> tuple[TorrentFile, Manifest]:
    """Write the golden checkpoint as `release/`, `tiny.torrent` and `tiny.json` into a folder.

    Args:
        root: the folder.
        piece_length: of the torrent.
        notes: the text of an extra file, `release/NOTES`, that only the torrent has.
        tokenizer: what the manifest says of it.
    """
    shutil.copytree(golden.TINY / "ckpt-0", root / "release" / "ckpt-0")
    if notes is not None:
        root.joinpath("release/NOTES").write_text(notes)
    data = torrent_of(root / "release", piece_length)
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
        tokenizer=tokenizer,
    )
    root.joinpath("tiny.json").write_bytes(encode(manifest))
    return torrent, manifest


def publish_files(
    root: Path, files: dict[str, bytes], piece_length: int, version: str = "hybrid"
) -> bytes:
    """Write files as `top/` and their torrent as `top.torrent` to a folder; returns the torrent."""
    lay_down(root, files)
    data = torrent_of(root / "top", piece_length, version=version)
    root.joinpath("top.torrent").write_bytes(data)
    return data


def golden_folder(folder: Path) -> Path:
    """Copy the golden checkpoint into a folder and prove it; returns the folder."""
    shutil.copytree(golden.TINY / "ckpt-0", folder / "ckpt-0")
    grokfetch("manifest", folder, "--config", golden.TINY / "config.json")
    return folder
