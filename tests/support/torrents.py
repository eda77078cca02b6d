"""Torrents made in plain Python, without libtorrent and, except hybrids, without our own code."""

import hashlib
import os
import random
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from grokfetch.manifest.schema import Manifest, ManifestFile, ManifestTensor
from grokfetch.torrent.bencode import encode
from grokfetch.torrent.create import make
from grokfetch.torrent.listing import list_files
from grokfetch.torrent.metainfo import TorrentFile, encode_torrent, parse_torrent

BLOCK = 16384


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(f"{size} {seed}").randbytes(size)


def v1_info(files: dict[str, bytes], piece_length: int, name: str = "top") -> bytes:
    stream = b"".join(files.values())
    hashes = b"".join(
        hashlib.sha1(stream[start : start + piece_length]).digest()
        for start in range(0, len(stream), piece_length)
    )
    return encode(
        {
            b"name": name.encode(),
            b"piece length": piece_length,
            b"pieces": hashes,
            b"files": [
                {b"length": len(data), b"path": [part.encode() for part in path.split("/")]}
                for path, data in files.items()
            ],
        }
    )


def tree_root(leaves: list[bytes], width: int, padding: bytes) -> bytes:
    """The root of a SHA-256 tree, computed by halves, unlike in the code under test."""
    if width == 1:
        return leaves[0] if leaves else padding
    half = width // 2
    left = tree_root(leaves[:half], half, padding)
    right = tree_root(leaves[half:], half, padding)
    return hashlib.sha256(left + right).digest()


def v2_torrent(files: dict[str, bytes], piece_length: int, name: str = "top") -> bytes:
    tree: dict = {}
    layers: dict[bytes, bytes] = {}
    for path, data in files.items():
        node = tree
        for part in path.encode().split(b"/"):
            node = node.setdefault(part, {})
        node[b""] = {b"length": len(data)}
        if data:
            node[b""][b"pieces root"] = _root(data, piece_length, layers)
    info = {
        b"name": name.encode(),
        b"piece length": piece_length,
        b"meta version": 2,
        b"file tree": tree,
    }
    return encode({b"info": info, b"piece layers": layers})


def _root(data: bytes, piece_length: int, layers: dict[bytes, bytes]) -> bytes:
    blocks = [
        hashlib.sha256(data[start : start + BLOCK]).digest() for start in range(0, len(data), BLOCK)
    ]
    width = 1
    while width < len(blocks):
        width *= 2
    root = tree_root(blocks, width, bytes(32))
    per_piece = piece_length // BLOCK
    if len(data) > piece_length:
        layers[root] = b"".join(
            tree_root(blocks[start : start + per_piece], per_piece, bytes(32))
            for start in range(0, len(blocks), per_piece)
        )
    return root


def v1_torrent(files: dict[str, bytes], piece_length: int, name: str = "top") -> TorrentFile:
    return parse_torrent(b"d4:info" + v1_info(files, piece_length, name) + b"e")


def torrent_of(
    folder: Path, piece_length: int, version: str = "hybrid", trackers: Sequence[str] = ()
) -> bytes:
    """The `.torrent` of a folder; only a hybrid one can have trackers."""
    if version == "hybrid":
        *_, made = make(folder, list_files(folder), piece_length, trackers=trackers)
        return encode_torrent(made.torrent)
    files = {str(path): (folder / path).read_bytes() for path, _ in list_files(folder)}
    if version == "v2":
        return v2_torrent(files, piece_length, folder.name)
    return encode_torrent(v1_torrent(files, piece_length, folder.name))


def lay_down(root: Path, files: dict[str, bytes], name: str = "top") -> None:
    for path, data in files.items():
        target = root / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def manifest_of(
    files: dict[str, bytes], info_hash: str | None, *, digests: bool = False, name: str = "top"
) -> Manifest:
    """A manifest in which every file is one int8 tensor named after it."""
    return Manifest(
        name,
        tuple(
            ManifestFile(
                PurePosixPath(name, path),
                len(data),
                hashlib.sha256(data).hexdigest() if digests else None,
            )
            for path, data in files.items()
        ),
        info_hash=info_hash,
        tensors=tuple(
            ManifestTensor(f"tensor of {path}", PurePosixPath(name, path), "int8", (len(data),), 0)
            for path, data in files.items()
            if data
        ),
    )


def watch_fsync(monkeypatch) -> list[str]:
    """Collects the paths that are flushed from now on, in order."""
    synced = []
    real = os.fsync

    def watching(handle):
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr(os, "fsync", watching)
    return synced
