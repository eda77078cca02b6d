"""The folder of our own state files: each read whole or not at all, and replaced in one step.

Every file of ours except the lock is written beside its target, flushed, renamed over it, and its
folder is flushed. A reader sees the old or the new one, never half of either. One that is damaged,
truncated, foreign or from a later version counts as absent, with a warning; the holder of the
exclusive lock renames it out of the way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from grokfetch.errors import ManifestInvalid, StorageFailed, TorrentInvalid, storage_errors
from grokfetch.folder.atomic import put
from grokfetch.folder.lock import folder_lock
from grokfetch.folder.record import RecordDamaged

__all__ = ["StateFiles"]

T = TypeVar("T")


class StateFiles:
    """The state files of one checkpoint.

    Attributes:
        folder: where they are; need not exist before the lock is taken.
        warnings: what a person should know about files that could not be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self._owner = False
        self._unread: dict[str, OSError] = {}

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:
        """Hold the folder: alone, or with other readers; see `folder_lock`.

        Raises:
            StateLocked, StorageFailed: see there.
        """
        with folder_lock(self.folder, exclusive=exclusive, warn=self.warn):
            self._owner = exclusive
            try:
                yield
            finally:
                self._owner = False

    def read(self, name: str, decode: Callable[[bytes], T]) -> T | None:
        """What `decode` makes of a file; None if there is none, or none that can be used."""
        path = self.folder / name
        try:
            return decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            if not isinstance(error, (IsADirectoryError, NotADirectoryError)):
                self._unread[name] = error
            self.warnings.append(f"{path}: cannot be read ({error.strerror})")
            return None
        except (ManifestInvalid, TorrentInvalid, RecordDamaged) as error:
            self._set_aside(path, error.args[0])
            return None

    def refuse_unread(self, name: str) -> None:
        """Return unless a file is there that the disk has not given: then nothing can be said.

        Raises:
            StorageFailed: it has not.
        """
        if name in self._unread:
            reason = self._unread[name].strerror
            raise StorageFailed(f"cannot be read ({reason})", path=self.folder / name)

    def _set_aside(self, path: Path, why: str) -> None:
        if not self._owner:
            self.warn(f"{path} is ignored: {why}")
            return
        aside = next(
            name
            for number in range(1, 1_000_000)
            if not (name := path.with_name(f"{path.name}.damaged-{number}")).exists()
        )
        path.replace(aside)
        self.warn(f"{path} is set aside as {aside.name}: {why}")

    def warn(self, text: str) -> None:
        """Add a warning that is not there yet."""
        if text not in self.warnings:
            self.warnings.append(text)

    def write(self, name: str, data: bytes) -> None:
        """Put a file in the place of an earlier one, with the exclusive lock held.

        Raises:
            StorageFailed: the folder cannot be written.
        """
        path = self.folder / name
        with storage_errors(path):
            # The lock has made the folder. If it is gone so is the lock, and making it anew would
            # let two processes write.
            put(path, data)
        self._unread.pop(name, None)

    def remove(self, name: str) -> None:
        """Remove a file if it is there, with the exclusive lock held.

        Raises:
            StorageFailed: the folder cannot be written.
        """
        path = self.folder / name
        with storage_errors(path):
            path.unlink(missing_ok=True)
