"""Parses the info dictionary of a torrent, from untrusted bytes: its files and pieces. Pure.

Whatever the bytes are, the result is a value or `TorrentInvalid` with what is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import PurePosixPath

from grokfetch.errors import TorrentInvalid
from grokfetch.torrent import bencode
from grokfetch.torrent.bencode import Value, expect, text
from grokfetch.torrent.layout import BLOCK, Layout, LayoutFile, merkle_root, power_of_two_above
from grokfetch.torrent.names import LONGEST_NAME, unsafe_name

__all__ = ["PieceLayerInvalid", "parse_info", "right_layers"]

LARGEST_PIECE = 1 << 30
MOST_PIECES = 2_097_152
"""libtorrent refuses more."""
MOST_FILES = 1_000_000
LARGEST_TORRENT = 1 << 60
"""Bytes of payload; no disk holds more, and sums stay exact everywhere."""


class PieceLayerInvalid(TorrentInvalid):
    """Hashes of v2 pieces, which are outside of the info dictionary, are wrong."""


def parse_info(info: bytes, piece_layers: Mapping[bytes, bytes] | None = None) -> Layout:
    """The layout that an info dictionary describes.

    Args:
        info: its bytes.
        piece_layers: of a v2 torrent, hashes of the pieces by the root of their file. Those of a
            file may be missing: nothing of it can be proven until they arrive.

    Raises:
        TorrentInvalid: it is malformed, unsafe to write to a disk, absurdly large, or a piece
            layer does not match its root in the info dictionary.
    """
    return _parsed(info, tuple(sorted((piece_layers or {}).items())))


# A fetch calls this several times, and with thousands of files it takes a tenth of a second.
@lru_cache(maxsize=1)
def _parsed(info: bytes, piece_layers: tuple[tuple[bytes, bytes], ...]) -> Layout:
    value = expect(bencode.decode(info), dict, "info")
    name = _name(value)
    length = expect(value.get(b"piece length"), int, "piece length")
    if not 0 < length <= LARGEST_PIECE:
        raise TorrentInvalid(f"piece length is {length:,}, but must be 1 to {LARGEST_PIECE:,}")
    if b"pieces" in value or value.get(b"meta version") != 2:
        layout = _v1(value, name, length)
    else:
        layout = _v2(value, name, length, dict(piece_layers))
    _check_names(layout)
    return layout


def right_layers(info: bytes, piece_layers: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The piece layers that match their roots in the info dictionary.

    If `parse_info` would refuse the info dictionary, there are none.
    """
    right: dict[bytes, bytes] = {}
    try:
        value = expect(bencode.decode(info), dict, "info")
        length = expect(value.get(b"piece length"), int, "piece length")
        files = _v2(value, _name(value), length, {}).files
    except TorrentInvalid:
        return right
    entries = _v2_files(expect(value[b"file tree"], dict, "file tree"), [])
    for file, (_, entry) in zip(files, entries, strict=True):
        root = entry.get(b"pieces root")
        if file.size > length and isinstance(root, bytes) and root in piece_layers:
            with contextlib.suppress(PieceLayerInvalid):
                _layer(entry, file.path, -(-file.size // length), length, piece_layers)
                right[root] = piece_layers[root]
    return right


def _name(value: Mapping[bytes, Value]) -> str:
    name = text(value.get(b"name.utf-8", value.get(b"name")), "name")
    reason = "it has more than one part" if "/" in name else unsafe_name(name)
    if reason is not None:
        raise TorrentInvalid(f"name {name!r:.80} is unsafe: {reason}")
    _check_length(name, [name])
    return name


def _v1(value: Mapping[bytes, Value], name: str, piece_length: int) -> Layout:
    files: list[LayoutFile] = []
    start = 0
    for path, size, pad in _v1_files(value, name):
        files.append(LayoutFile(path, size, start, pad))
        start += size
        _check_extent(len(files), start, piece_length)
    hashes = expect(value.get(b"pieces"), bytes, "pieces")
    count = -(-start // piece_length)
    if len(hashes) != 20 * count:
        raise TorrentInvalid(
            f"pieces has {len(hashes):,} bytes instead of {count:,} hashes of 20 bytes"
        )
    return Layout(name, 1, piece_length, tuple(files), hashes)


def _v1_files(value: Mapping[bytes, Value], name: str) -> Iterator[tuple[PurePosixPath, int, bool]]:
    if b"files" not in value:
        pad = _is_pad(value, name)
        yield PurePosixPath(name), _size(value, name), pad
        return
    for entry in expect(value[b"files"], list, "files"):
        file = expect(entry, dict, "a file")
        parts = [
            text(part, "a path")
            for part in expect(file.get(b"path.utf-8", file.get(b"path")), list, "path")
        ]
        pad = _is_pad(file, "/".join(parts))
        path = _path(name, parts)
        yield path, _size(file, str(path)), pad


def _v2(
    value: Mapping[bytes, Value], name: str, piece_length: int, layers: Mapping[bytes, bytes]
) -> Layout:
    if piece_length < BLOCK or piece_length & (piece_length - 1):
        raise TorrentInvalid(
            f"piece length is {piece_length:,}; in v2 it must be a power of two from {BLOCK:,} up"
        )
    tree = expect(value.get(b"file tree"), dict, "file tree")
    files: list[LayoutFile] = []
    hashes: list[bytes] = []
    start = 0
    for parts, entry in _v2_files(tree, []):
        # A single file's tree holds the torrent's own name and nothing else.
        single = parts == [name] and len(tree) == 1
        path = PurePosixPath(name) if single else _path(name, parts)
        pad = _is_pad(entry, str(path))
        size = _size(entry, str(path))
        if pad:
            raise TorrentInvalid(f"{path} is a pad file, which a v2 file tree must not have")
        files.append(LayoutFile(path, size, start))
        count = -(-size // piece_length)
        start += count * piece_length
        _check_extent(len(files), start, piece_length)
        if size:
            hashes.append(_layer(entry, path, count, piece_length, layers))
    return Layout(name, 2, piece_length, tuple(files), b"".join(hashes))


def _v2_files(
    tree: Mapping[bytes, Value], parts: list[str]
) -> Iterator[tuple[list[str], Mapping[bytes, Value]]]:
    # The order of the stream is that of the raw names, in which canonical bencoding sorts them.
    for key in sorted(tree):
        node = expect(tree[key], dict, "a node of the file tree")
        if key:
            yield from _v2_files(node, [*parts, text(key, "a path")])
        elif not parts or len(tree) > 1:
            raise TorrentInvalid(f"{'/'.join(parts)!r:.80} is both a file and a folder")
        else:
            yield parts, node


def _layer(
    entry: Mapping[bytes, Value],
    path: PurePosixPath,
    count: int,
    piece_length: int,
    layers: Mapping[bytes, bytes],
) -> bytes:
    root = expect(entry.get(b"pieces root"), bytes, f"pieces root of {path}")
    if len(root) != 32:
        raise TorrentInvalid(f"pieces root of {path} has {len(root)} bytes instead of 32")
    if count == 1:
        return root
    layer = layers.get(root)
    if layer is None:
        return bytes(32 * count)
    if len(layer) != 32 * count:
        raise PieceLayerInvalid(
            f"the piece layer of {path} has {len(layer):,} bytes instead of {32 * count:,}"
        )
    leaves = (layer[index : index + 32] for index in range(0, len(layer), 32))
    padding = merkle_root((), piece_length // BLOCK)
    if merkle_root(leaves, power_of_two_above(count), padding) != root:
        raise PieceLayerInvalid(f"the piece layer of {path} does not match its root")
    return layer


def _is_pad(entry: Mapping[bytes, Value], path: str) -> bool:
    attributes = expect(entry.get(b"attr", b""), bytes, f"attr of {path}")
    if b"l" in attributes or b"symlink path" in entry:
        raise TorrentInvalid(
            f"{path!r:.80} is a symbolic link in the torrent; grokfetch does not create links, "
            "because they may lead out of the folder"
        )
    return b"p" in attributes


def _size(entry: Mapping[bytes, Value], path: str) -> int:
    size = expect(entry.get(b"length"), int, f"length of {path:.80}")
    if not 0 <= size <= LARGEST_TORRENT:
        raise TorrentInvalid(f"length of {path:.80} is {size:,}")
    return size


def _path(name: str, parts: list[str]) -> PurePosixPath:
    path = "/".join((name, *parts))
    slash = any("/" in part for part in parts)
    reason = "a part holds a slash" if slash else unsafe_name(path)
    if reason is not None or not parts:
        raise TorrentInvalid(f"path {path!r:.80} is unsafe: {reason or 'it is empty'}")
    _check_length(path, parts)
    return PurePosixPath(path)


def _check_length(path: str, parts: Iterable[str]) -> None:
    longest = max(len(part.encode()) for part in parts)
    if longest > LONGEST_NAME:
        raise TorrentInvalid(
            f"path {path!r:.80} is unsafe: a part has {longest:,} bytes, and file systems allow "
            f"at most {LONGEST_NAME}"
        )


def _check_extent(files: int, size: int, piece_length: int) -> None:
    if files > MOST_FILES:
        raise TorrentInvalid(f"it has more than {MOST_FILES:,} files")
    if size > LARGEST_TORRENT:
        raise TorrentInvalid(f"it has {size:,} bytes, more than any disk")
    if -(-size // piece_length) > MOST_PIECES:
        raise TorrentInvalid(f"it has more than {MOST_PIECES:,} pieces")


def _check_names(layout: Layout) -> None:
    if not layout.files:
        raise TorrentInvalid("it has no files")
    files: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    for file in layout.files:
        if file.pad:
            continue
        if file.path in files:
            raise TorrentInvalid(f"{str(file.path)!r:.80} appears twice")
        files.add(file.path)
        folders.update(file.path.parents)
    both = sorted(files & folders)
    if both:
        raise TorrentInvalid(f"{str(both[0])!r:.80} is both a file and a folder")
