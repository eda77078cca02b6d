"""A torrent of streamed files: each is read once, in order, and not kept. Pure.

The result is the same, byte for byte, as what `create.make` makes of the same files on a disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from grokfetch.torrent.create import Made, MadeFile, Pieces, hybrid_info
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import BLOCK, PieceHasher, piece_hasher, power_of_two_above
from grokfetch.torrent.metainfo import torrent_file

__all__ = ["FileHasher", "FileHashes", "made_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class FileHashes:
    """A file's sha256 in hexadecimal, and the hashes of its pieces, one after another."""

    sha256: str
    v1: bytes
    v2: bytes


class FileHasher:
    """Hashes one file of a hybrid torrent.

    Args:
        size: of the file, in bytes.
        piece_length: bytes, a power of two from 16 KiB on.
        padded: whether its last piece is padded with zeros in v1, as in a torrent with other files.

    Attributes:
        done: bytes fed so far.
    """

    def __init__(self, size: int, piece_length: int, *, padded: bool) -> None:
        self.done = 0
        self._size = size
        self._piece_length = piece_length
        self._padded = padded
        # The tree of a file that fits into one piece is only as wide as the file.
        self._width = power_of_two_above(-(-min(size, piece_length) // BLOCK))
        self._whole = hashlib.sha256()
        self._hashes: tuple[list[bytes], list[bytes]] = ([], [])
        self._begin()

    def _begin(self) -> None:
        self._left = min(self._piece_length, self._size - self.done)
        self._open: tuple[PieceHasher, PieceHasher] = (
            piece_hasher(1, 0),
            piece_hasher(2, self._width),
        )

    def update(self, data: memoryview) -> None:
        """Hash the next bytes."""
        self._whole.update(data)
        while data:
            part, data = data[: self._left], data[self._left :]
            for hasher in self._open:
                hasher.update(part)
            self.done += len(part)
            self._left -= len(part)
            if not self._left:
                self._end()

    def _end(self) -> None:
        if self._padded:
            self._open[0].update(bytes(-self.done % self._piece_length))
        for hashes, hasher in zip(self._hashes, self._open, strict=True):
            hashes.append(hasher.digest())
        self._begin()

    def result(self) -> FileHashes:
        """The hashes, once the whole file has been fed."""
        v1, v2 = self._hashes
        return FileHashes(self._whole.hexdigest(), b"".join(v1), b"".join(v2))


def made_of(  # noqa: PLR0913  # the files, and what a publisher may choose by name
    name: str,
    files: Sequence[tuple[PurePosixPath, int]],
    piece_length: int,
    hashes: Mapping[PurePosixPath, FileHashes],
    *,
    trackers: Sequence[str] = (),
    web_seeds: Sequence[str] = (),
) -> Made:
    """The hybrid torrent of files that were hashed while they were streamed.

    Args:
        name: of its top folder.
        files: path below that folder and size in bytes, in the torrent's order.
        piece_length: with which they were hashed, in bytes.
        hashes: of each file.
        trackers: URLs of trackers.
        web_seeds: URLs of copies of the files.

    Raises:
        TorrentInvalid: a name is too long, or the torrent is too large.
    """
    pieces = [[Pieces(n, 0, hashes[p].v1, hashes[p].v2, s)] for n, (p, s) in enumerate(files)]
    info, layers = hybrid_info(name, files, piece_length, pieces)
    torrent = torrent_file(info, layers, trackers=trackers, web_seeds=web_seeds)
    parse_info(torrent.info, torrent.piece_layers)
    return Made(
        torrent,
        tuple(
            MadeFile(PurePosixPath(name, path), size, hashes[path].sha256, 0)
            for path, size in files
        ),
    )
