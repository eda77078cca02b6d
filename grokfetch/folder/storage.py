"""How our own files reach the disk whole, who may write them, and what the disk's errors mean."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from grokfetch.errors import GrokfetchError, StateLocked, StorageFailed

__all__ = ["Owner", "folder_lock", "gone", "read_owner", "replacing", "storage_failed"]


@contextlib.contextmanager
def folder_lock(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold `folder/lock`, alone or with other readers. The folder is made if need be.

    The kernel drops the lock of a process that dies. NFS passes it on to the server. A shared lock
    on a folder that cannot be written is no lock.

    Raises:
        StateLocked: another process holds it; names that process where it is known.
        StorageFailed: the folder cannot be written, or its file system knows no locks.
    """
    file = _open(folder / "lock", exclusive=exclusive)
    if file is None:
        yield
        return
    with file:
        _acquire(file, folder, exclusive=exclusive)
        try:
            yield
        finally:
            if exclusive:
                file.truncate(0)


def _open(path: Path, *, exclusive: bool) -> IO[bytes] | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab+", buffering=0)
    except OSError as error:
        if exclusive:
            raise storage_failed(error, path) from error
    try:
        return path.open("rb", buffering=0)
    except OSError:
        return None


def _acquire(file: IO[bytes], folder: Path, *, exclusive: bool) -> None:
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StateLocked(
            f"{_owner(file)} is using this folder",
            path=folder,
            hint="wait until it has ended, or end it",
        ) from None
    except OSError as error:
        raise StorageFailed(
            f"this file system knows no locks ({error.strerror})",
            path=folder,
            hint="keep the state on another file system: --state DIR",
        ) from error
    if exclusive:
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        try:
            file.truncate(0)
            file.write(owner.encode())
        except OSError as error:
            raise storage_failed(error, folder / "lock") from error


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


def read_owner(folder: Path) -> Owner | None:
    """Who writes a folder now, None if nobody does. Takes no lock and waits for nobody.

    A name that a dead process has left counts only if it died on another host: that cannot be told.
    """
    try:
        owner = _parse_owner((folder / "lock").read_bytes())
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
        os.kill(owner.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and leaves no trace if not.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def storage_failed(error: OSError, path: Path | None = None) -> GrokfetchError:
    """The error of ours that tells a person what an error of the file system means."""
    where = path or error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFailed(
            "the disk is full", path=where, hint="make room and run the same command again"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageFailed(
            f"cannot be written ({error.strerror})",
            path=where,
            hint="choose a folder that you may write, or keep the state elsewhere: --state DIR",
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StorageFailed(
            "a file lies where a folder must be", path=where, hint="choose another folder"
        )
    if error.errno == errno.ENOENT and where is not None:
        return gone(Path(where))
    return StorageFailed(error.strerror or str(error), path=where)


def gone(path: Path) -> StorageFailed:
    """The error that says that something of ours is not there any more."""
    return StorageFailed(
        "it has vanished: somebody has removed or unmounted it",
        path=path,
        hint="bring it back, or run the same command again: what is still there is found",
    )
