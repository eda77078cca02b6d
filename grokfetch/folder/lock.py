"""Who may write a checkpoint directory, and who does."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from grokfetch.errors import StateLocked, StorageFailed, storage_errors, storage_failed
from grokfetch.folder.atomic import make_folder

__all__ = ["SEEDER", "Owner", "folder_lock", "read_owner", "seeding"]

SEEDER = "seeder.json"


@contextlib.contextmanager
def folder_lock(
    folder: Path, *, exclusive: bool, warn: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """Hold `folder/lock`, alone or with other readers.

    The kernel drops the lock of a process that dies. NFS passes it on to the server. A shared lock
    is not a lock where there is no folder, where it cannot be written, and, with a warning, where
    the file system has no locks. To write, the folder is made if need be.

    Args:
        folder: of our state files.
        exclusive: alone, in order to write.
        warn: called with what a reader should know.

    Raises:
        StateLocked: another process holds it; names that process where it is known.
        StorageFailed: the folder cannot be written, or its file system has no locks.
    """
    file = _open(folder / "lock", exclusive=exclusive)
    if file is None:
        yield
        return
    with file:
        _acquire(file, folder, warn, exclusive=exclusive)
        try:
            yield
        finally:
            if exclusive:
                # A name that stays behind is that of a dead process, and keeps nobody out.
                with contextlib.suppress(OSError):
                    file.truncate(0)


def _open(path: Path, *, exclusive: bool) -> IO[bytes] | None:
    try:
        if exclusive:
            make_folder(path.parent)
        return path.open("ab+", buffering=0)
    except OSError as error:
        if exclusive:
            raise storage_failed(error, path) from error
    try:
        return path.open("rb", buffering=0)
    except OSError:
        return None


def _acquire(
    file: IO[bytes], folder: Path, warn: Callable[[str], None], *, exclusive: bool
) -> None:
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StateLocked(
            f"{_owner(file)} is using this folder",
            path=folder,
        ) from None
    except OSError as error:
        without = f"this file system has no locks ({error.strerror})"
        if not exclusive:
            warn(f"{folder}: {without}, so another process may change files while they are read")
            return
        raise StorageFailed(
            without, path=folder, hint="keep the state on another file system: --state DIR"
        ) from error
    if exclusive:
        with storage_errors(folder / "lock"):
            file.truncate(0)
            file.write(_named().encode())


def _owner(file: IO[bytes]) -> str:
    file.seek(0)
    owner = _parse_owner(file.read(1000))
    return "another grokfetch" if owner is None else str(owner)


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """The process that writes a folder."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def seeding(folder: Path) -> Iterator[None]:
    """Say in the state folder, while the block runs, that this process shares what is proven.

    A convenience for those who look: it keeps nobody away, and a disk that does not take it ends
    nothing.
    """
    path = folder / SEEDER
    with contextlib.suppress(OSError):
        path.write_text(_named())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _named() -> str:
    """This process, as `Owner` is written."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname()})


def read_owner(folder: Path, name: str = "lock") -> Owner | None:
    """Who writes a folder now, None if nobody does. Takes no lock and waits for nobody.

    With `SEEDER` for the name it is who shares it.

    A name that a dead process has left counts only if it died on another host, where nobody here
    can see that it has.
    """
    try:
        owner = _parse_owner((folder / name).read_bytes())
    except OSError:
        return None
    return owner if owner is not None and _alive(owner) else None


def _parse_owner(text: bytes) -> Owner | None:
    try:
        fields = json.loads(text)
        owner = Owner(int(fields["pid"]), f"{fields['host']!s:.100}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return owner if owner.pid > 0 else None


def _alive(owner: Owner) -> bool:
    if owner.host != socket.gethostname():
        return True
    try:
        import psutil

        return psutil.pid_exists(owner.pid)
    except OverflowError:
        return False
