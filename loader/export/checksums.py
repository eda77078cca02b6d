"""Checksums of what an export writes, computed in memory before the bytes go to the disk.

What is hashed for the manifest is read back from the disk. A bit that flipped on the way there
would be certified with the rest; these checksums find it.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from grokfetch.errors import StorageFailed
from grokfetch.events import Finding, Progress
from grokfetch.folder.record import FileProof, Record
from grokfetch.folder.store import Store
from grokfetch.folder.verify import hash_files
from grokfetch.manifest.schema import Manifest

__all__ = ["Written", "read_back"]


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A span of a file as it was written: its first byte, its length in bytes, and its CRC-32."""

    start: int
    length: int
    crc32: int

    @classmethod
    def of(cls, data: bytes, start: int = 0) -> Written:
        """The span of `data`, written at `start`."""
        return cls(start, len(data), zlib.crc32(data))

    @property
    def stop(self) -> int:
        """The byte after the last one."""
        return self.start + self.length

    @property
    def fields(self) -> list[Any]:
        """The same as a JSON list."""
        return [self.start, self.length, self.crc32]

    @classmethod
    def from_fields(cls, fields: Iterable[Any]) -> Written:
        """The span that such a JSON list describes.

        Raises:
            ValueError, TypeError: it is not such a list.
        """
        start, length, crc32 = map(int, fields)
        return cls(start, length, crc32)


class _Comparison:
    """Compares a file, read from beginning to end, with what was written.

    Args:
        written: spans that do not overlap, in any order; bytes between them are not compared.
    """

    def __init__(self, written: Iterable[Written]) -> None:
        spans = (span for span in written if span.length)
        self._left = deque(sorted(spans, key=lambda span: span.start))
        self._at = 0
        self._crc32 = 0
        self._changed: list[Written] = []

    def take(self, data: memoryview) -> None:
        """The next bytes of the file."""
        begin, end = self._at, self._at + len(data)
        while self._left and self._left[0].start < end:
            span = self._left[0]
            part = data[max(0, span.start - begin) : span.stop - begin]
            self._crc32 = zlib.crc32(part, self._crc32)
            if span.stop > end:
                break
            self._left.popleft()
            if self._crc32 != span.crc32:
                self._changed.append(span)
            self._crc32 = 0
        self._at = end

    @property
    def changed(self) -> list[Written]:
        """The spans that differ, and those that lie beyond the end of the file."""
        return [*self._changed, *self._left]


def read_back(
    store: Store,
    described: Manifest,
    written: Mapping[PurePosixPath, Mapping[Written, str | None]],
) -> Iterator[Progress | Finding]:
    """Hash files as they are on the disk, and make their folder known to `verify`.

    Args:
        store: the folder, its exclusive lock held.
        described: its manifest, the files without sha256.
        written: for each file the spans that were written, each with its tensor; None for a span
            outside all tensors.

    Yields:
        Progress, and a finding for each span that is not as it was written. After a finding no
        manifest and no record is written, so the folder proves nothing.

    Raises:
        StorageFailed: a file cannot be read, or the state folder cannot be written.
    """
    digests, proofs, done, changed = {}, {}, 0, False
    compared = {path: _Comparison(spans) for path, spans in written.items()}
    beside = {path: it.take for path, it in compared.items()}
    for file, stamp, result in hash_files(store, described.files, keep=False, beside=beside):
        if result.sha256 is None or stamp is None or stamp != store.stamp(file.path):
            raise StorageFailed(
                f"cannot be read back: {result.detail}", path=store.payload(file.path)
            )
        for span in compared[file.path].changed if file.path in compared else ():
            changed = True
            yield Finding(
                "corrupt",
                file.path,
                tensor=written[file.path][span],
                detail=f"bytes {span.start:,} to {span.stop:,} do not read back as they were "
                "written",
            )
        digests[file.path] = result.sha256
        proofs[file.path] = FileProof(stamp, result.sha256)
        done += file.size
        yield Progress(done, described.size, "hashing")
    if changed:
        return
    files = (dataclasses.replace(it, sha256=digests[it.path]) for it in described.files)
    store.save_manifest(dataclasses.replace(described, files=tuple(files)))
    store.save_record(Record(files=proofs))
