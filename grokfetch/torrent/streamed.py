"""A torrent of files that pass by once: each is fed in order, and no byte of it is kept. Pure.

What comes out is to the byte what `create.make` makes of the same files on a disk.
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
        padded: whether zeros fill its last piece in v1: the torrent has other files.

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
        """The hashes, once the whole file was fed."""
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
    """The hybrid torrent of files that were hashed as they passed by.

    Args:
        name: of its top folder.
        files: path below that folder and size in bytes, in the order of a torrent.
        piece_length: with which they were hashed.
        hashes: of each.
        trackers: where peers can be asked for.
        web_seeds: where the files lie.

    Raises:
        TorrentInvalid: a name is too long, or it is too large.
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
