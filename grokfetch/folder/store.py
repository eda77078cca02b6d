"""One checkpoint directory as the commands see it: its lock, and the only access to its bytes.

The package docstring of `grokfetch.folder` lists the files. `state_files` replaces state files and
handles damaged ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from grokfetch.errors import NotProven
from grokfetch.folder.documents import Documents
from grokfetch.folder.proven import Proven
from grokfetch.folder.record import Stamp
from grokfetch.manifest.relocation import in_hub_cache

__all__ = ["Store"]


class Store(Documents):
    """One checkpoint directory.

    Opening it reads nothing and writes nothing. What is read is kept until the lock is taken.
    """

    def payload(self, path: PurePosixPath) -> Path:
        """Where a payload file lies on this machine."""
        return self.root / path

    def stamp(self, path: PurePosixPath) -> Stamp | None:
        """How a payload file looks now, links followed; None if it is not there."""
        return self.stamp_and_inode(path)[0]

    def stamp_and_inode(
        self, path: PurePosixPath
    ) -> tuple[Stamp, tuple[int, int]] | tuple[None, None]:
        """The same, and what tells the file from another one that has taken its name."""
        try:
            # Thousands are looked at before every record: Path.stat and joining take twice as long.
            status = os.stat(f"{self.root}/{path}")  # noqa: PTH116
        except OSError:
            return None, None
        return Stamp(status.st_size, status.st_mtime_ns), (status.st_dev, status.st_ino)

    # --- the lock ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool = True) -> Iterator[None]:
        """Hold the folder: alone in order to write it, or with other readers.

        A shared lock makes nothing, and is not a lock where that cannot be had: see `folder_lock`.

        Raises:
            StateLocked: another process holds it; names that process where it is known.
            StorageFailed: the folder cannot be written, or its file system has no locks.
        """
        begins = exclusive and not self.state.exists()
        with self._files.lock(exclusive=exclusive):
            if begins and self._beside_payload and in_hub_cache(self.root.absolute()):
                self._files.warn(
                    f"{self.root} lies in Hugging Face's cache, whose tools will count the files "
                    f"in {self.state}; --state DIR keeps them elsewhere"
                )
            self._forget()
            yield

    # --- what is proven -----------------------------------------------------------------------

    def proven(self, fresh: frozenset[int] = frozenset()) -> Proven:
        """What is proven now. Each file is looked at once, when it is first asked about.

        Args:
            fresh: pieces that are proven and do not stand in the record yet.

        Raises:
            StateMissing: there is no manifest.
        """
        record = self.record()
        if fresh:
            record = dataclasses.replace(record, pieces=record.pieces | fresh)
        return Proven(record, _Stamps(self), self.layout(), named=self._named())

    def require(self, path: PurePosixPath, start: int = 0, length: int | None = None) -> None:
        """Return if a span of a payload file, all of it by default, is proven.

        Args:
            path: as in the manifest.
            start: the first byte.
            length: how many bytes.

        Raises:
            NotProven: a byte of it is not, or the file has changed since.
            StateMissing: there is no manifest.
        """
        self._refuse(self.proven(), path, start, length)

    def arrived(self, path: PurePosixPath) -> bool:
        """Whether a payload file is proven, without waiting for it; False where it may yet come.

        Raises:
            NotProven: it is not, and will not come.
            StateMissing: there is no manifest.
        """
        self.require(path)
        return True

    @property
    def news(self) -> int:
        """A number that rises when more may be proven."""
        return 0

    def await_news(self, seen: int) -> None:
        """Return when `news` is beyond what was seen, or nothing will come any more."""

    def expect(
        self, path: PurePosixPath, start: int, length: int, *, at_once: bool = False
    ) -> None:
        """Say that a span of a payload file will be required, `at_once` or some time soon.

        Nothing follows from it here: a folder that is being filled brings such bytes first.
        """

    def require_all(self) -> None:
        """Return if every file that the manifest names is proven.

        Raises:
            NotProven: one is not.
            StateMissing: there is no manifest.
        """
        proven = self.proven()
        for file in self.manifest().files:
            self._refuse(proven, file.path, 0, None)

    def _refuse(self, proven: Proven, path: PurePosixPath, start: int, length: int | None) -> None:
        entry = self._entries.get(path)
        if entry is None:
            reason: str | None = "the manifest in force does not name it"
        else:
            stop = entry.size if length is None else start + length
            reason = proven.doubt(entry, start, stop)
        if reason is not None:
            for name in ("metadata.torrent", "record.json"):
                self._files.refuse_unread(name)
            selection = self.selection()
            rest = f"grokfetch fetch {self.root}"
            if selection is not None:
                rest += f" --all (only this was asked for: {selection})"
            raise NotProven(
                reason,
                path=self.payload(path),
                hint=f"run: grokfetch verify {self.root}, "
                f"and if it finds missing or bad bytes: {rest}",
            )


class _Stamps(dict[PurePosixPath, Stamp | None]):
    """How files look, each at the time when it is first asked about."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def __missing__(self, path: PurePosixPath) -> Stamp | None:
        self[path] = stamp = self._store.stamp(path)
        return stamp
