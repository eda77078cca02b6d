"""The only place that decides what is proven now. Pure: no I/O here.

All code that reads, reports, fetches or verifies asks `Proven`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePosixPath

from grokfetch.folder.record import Record, Stamp
from grokfetch.manifest.schema import ManifestFile
from grokfetch.torrent.layout import Layout, LayoutFile

__all__ = ["Proven", "of_torrent", "piece_hashes_decide"]


class Proven:
    """Decides whether a piece, a span of a file, or a whole file is proven now.

    Bytes are proven if they were read back from this disk, matched a hash, and have not been
    changed since. The rules:

    - **A changed file** has nothing proven. A proof belongs to the stamp (size, mtime_ns) that the
      file had when it was read; a file with another stamp, without a proof or gone is changed.
    - **A file marked "writing"** was open for writing by ourselves, perhaps when we were killed.
      Our writing changes the stamp, so its pieces stay proven unless the file has shrunk. Its
      sha256 does not count.
    - **A shared piece** is proven only while none of its files is changed, though the bytes of the
      others may be untouched. Its hash covers all of its bytes together and the record cannot hold
      half a piece, so the next fetch or verification must drop the piece: accepting half of it
      until then would give two answers about the same bytes. Padding is not a file.
    - **A piece needs all its bytes**: it is not proven if one of its files ends too early.
    - **Pieces of another torrent**, or with numbers that the torrent does not have, prove nothing
      (`of_torrent`, which `Store.record` applies).
    - **Piece hash or sha256.** The piece hashes prove a file if the manifest names their torrent or
      has no sha256 of the file (`piece_hashes_decide`), and the sizes agree. Otherwise only the
      sha256 tells whether it is the right file.
    - **A sha256 that equals the manifest's** proves the whole file, and with it every span, whether
      or not its pieces are proven.
    - **A file that is too long** has no proven span, whatever its pieces say: a reader of the whole
      file would read more than was proven. A span beyond its end is not proven either.
    - **An empty file** has no pieces; it is proven if it is unchanged and empty.

    Args:
        record: what has been proven, by what, and how the files looked then.
        stamps: how each file of the torrent and of the manifest looks now, None if it is gone.
        layout: the torrent's, its paths those on the disk; None without a torrent.
        named: whether the manifest in force names that torrent.
    """

    def __init__(
        self,
        record: Record,
        stamps: Mapping[PurePosixPath, Stamp | None],
        layout: Layout | None,
        *,
        named: bool = True,
    ) -> None:
        self._record = record
        self._stamps = stamps
        self._layout = layout
        self._named = named
        self._doubts: dict[int, LayoutFile | None] = {}

    # --- files as a whole -------------------------------------------------------------------

    def unchanged(self, path: PurePosixPath) -> bool:
        """Whether the proofs of a file still speak for it."""
        proof, now = self._record.files.get(path), self._stamps[path]
        if proof is None or now is None:
            return False
        return now.size >= proof.stamp.size if proof.writing else now == proof.stamp

    def by_pieces(self, entry: ManifestFile) -> bool:
        """Whether the torrent's piece hashes can prove a file of the manifest."""
        file = None if self._layout is None else self._layout.file(entry.path)
        if file is None or file.size != entry.size:
            return False
        return piece_hashes_decide(entry, named=self._named)

    def whole(self, entry: ManifestFile) -> bool:
        """Whether every byte of a file is proven."""
        return self.doubt(entry, 0, entry.size) is None

    # --- pieces -----------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> frozenset[int]:
        """The proven pieces."""
        if self._layout is None:
            return frozenset()
        return self._record.pieces.difference(*map(self._doubtful, self._layout.payload))

    def _doubtful(self, file: LayoutFile) -> range:
        """The pieces that are not proven because of how a file looks now."""
        assert self._layout is not None
        now = self._stamps[file.path]
        if now is None or not self.unchanged(file.path):
            return self._layout.pieces_over(file)
        return self._layout.pieces_over(file, now.size, file.size - now.size)

    def _piece_doubt(self, piece: int, asked: LayoutFile) -> str | None:
        """Why a piece is not proven, None if it is, for one who asks about one of its files."""
        assert self._layout is not None
        if piece not in self._record.pieces:
            return f"piece {piece} is not verified"
        # Each of many small files in one piece asks about all the others.
        if piece not in self._doubts:
            files = (part.file for part in self._layout.segments(piece) if not part.file.pad)
            self._doubts[piece] = next((it for it in files if piece in self._doubtful(it)), None)
        changed = self._doubts[piece]
        if changed is None:
            return None
        if changed == asked:
            return f"piece {piece} is not all there"
        return f"piece {piece} is shared with {changed.path}, which has changed since"

    # --- spans ------------------------------------------------------------------------------

    def doubt(self, entry: ManifestFile, start: int, stop: int) -> str | None:
        """Why the bytes of a file from `start` up to `stop` are not proven, None if they are."""
        now, proof = self._stamps[entry.path], self._record.files.get(entry.path)
        if now is None:
            return "it is not there"
        if now.size > entry.size or stop > now.size or start < 0:
            return f"it has {now.size:,} bytes instead of {entry.size:,}"
        if not self.unchanged(entry.path):
            return "it has changed since it was verified" if proof else "it has never been verified"
        if self._by_digest(entry):
            return None
        if not self.by_pieces(entry):
            return "its sha256 is not verified"
        return self._span_doubt(entry.path, start, stop)

    def _by_digest(self, entry: ManifestFile) -> bool:
        """Whether the sha256 of an unchanged file is the manifest's."""
        proof = self._record.files[entry.path]
        return entry.sha256 is not None and proof.sha256 == entry.sha256 and not proof.writing

    def _span_doubt(self, path: PurePosixPath, start: int, stop: int) -> str | None:
        assert self._layout is not None
        file = self._layout.file(path)
        assert file is not None
        pieces = self._layout.pieces_over(file, start, stop - start)
        for piece in pieces:
            if piece not in self._record.pieces:
                return f"piece {piece} is not verified"
        # Only the first and the last piece can hold bytes of other files.
        doubts = (self._piece_doubt(piece, file) for piece in (*pieces[:1], *pieces[1:][-1:]))
        return next(filter(None, doubts), None)

    def count(self, entry: ManifestFile, start: int, stop: int) -> tuple[int, int]:
        """How many bytes of a file from `start` up to `stop` are proven.

        Returns:
            Those that the piece hashes prove, and those that only the sha256 does.
        """
        now = self._stamps[entry.path]
        if now is None or now.size > entry.size or not self.unchanged(entry.path):
            return 0, 0
        pieces = self._piece_bytes(entry, start, stop)
        return pieces, stop - start - pieces if self._by_digest(entry) else 0

    def _piece_bytes(self, entry: ManifestFile, start: int, stop: int) -> int:
        if not self.by_pieces(entry):
            return 0
        assert self._layout is not None
        file = self._layout.file(entry.path)
        assert file is not None
        first, last, width = file.start + start, file.start + stop, self._layout.piece_length
        return sum(
            min(last, (piece + 1) * width) - max(first, piece * width)
            for piece in self._layout.pieces_over(file, start, stop - start)
            if piece in self.pieces
        )


def piece_hashes_decide(entry: ManifestFile | None, *, named: bool) -> bool:
    """Whether a torrent's piece hashes prove a file, and not only the manifest's sha256.

    Args:
        entry: the file in the manifest, None if that does not name it.
        named: whether the manifest names the torrent.
    """
    return named or entry is None or entry.sha256 is None


def of_torrent(record: Record, info_hash: str | None, layout: Layout | None) -> Record:
    """What of a record holds for a torrent: pieces of another one do not.

    A record of this torrent that names pieces which there are not is worth nothing.

    Args:
        record: as it stands on the disk.
        info_hash: the torrent's, None without one.
        layout: the torrent's.
    """
    if layout is None or record.info_hash != info_hash:
        return Record(info_hash, files=record.files)
    if any(piece >= layout.piece_count for piece in record.pieces):
        return Record(info_hash)
    return record
