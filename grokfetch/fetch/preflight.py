"""Whether a fetch can work here, before its first byte: disk, inodes, limits, write permission.

`probe` looks at the folder, `checks` decides. What is on the disk already need not be written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import psutil

from grokfetch.errors import StorageFailed, storage_errors
from grokfetch.folder.atomic import flush
from grokfetch.manifest.schema import Manifest
from grokfetch.manifest.selection import Spans
from grokfetch.open_files import OPEN_FILES, allow_open_files, most_open_files
from grokfetch.torrent.names import STATE_FOLDER

__all__ = [
    "Check",
    "Need",
    "Place",
    "asked_bytes",
    "check",
    "check_early",
    "checks",
    "need",
    "probe",
    "refuse",
]

STATE_INODES = 16
"""Files and folders of our own, including those being replaced."""

FILE_LIMITS = {"vfat": 2**32 - 1, "msdos": 2**32 - 1, "hfs": 2**31 - 1}
"""The longest file, in bytes, on file systems that have no sparse files."""

UNLIMITED = 2**63 - 1

TRIAL = ".grokfetch-trial-"
"""The prefix of the name of a file that is made only to see whether one can be made."""


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """What is still to be written: bytes, new files and folders, the longest file and its bytes.

    `denied` is the first existing file or folder that must be written but may not be.
    """

    bytes: int
    inodes: int
    longest: int
    longest_path: PurePosixPath | None = None
    denied: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """What a folder offers: free bytes and inodes, the longest file in bytes, files open at once.

    `inodes` is None on a file system that does not count them. `refused` says why nothing can be
    written at all, and is empty if something can. `sparse` is whether a file takes only as much
    room as has been written to it.
    """

    folder: Path
    file_system: str
    free: int
    inodes: int | None
    longest: int
    open_files: int
    sparse: bool
    refused: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One requirement: how much is needed, how much is there, and what to do if it is short.

    `needed` and `there` are None where they are not numbers.
    """

    name: str
    ok: bool
    needed: int | None = None
    there: int | None = None
    what: str = ""
    hint: str = ""


def checks(needed: Need, place: Place) -> tuple[Check, ...]:
    """Compare, in the order in which a fetch would fail. Pure."""
    elsewhere = "choose a folder on another disk: --to DIR"
    denied = "" if needed.denied is None else f"{needed.denied} cannot be written"
    refused = place.refused or denied
    longest = f"{needed.longest_path} has {needed.longest:,} bytes"
    inodes = UNLIMITED if place.inodes is None else place.inodes
    return (
        Check("may write", not refused, what=refused, hint="choose a folder that you may write"),
        Check(
            "free disk",
            needed.bytes <= place.free,
            needed.bytes,
            place.free,
            f"{needed.bytes:,} bytes are still to come, {place.free:,} are free",
            f"make room, or {elsewhere}",
        ),
        Check(
            "free inodes",
            needed.inodes <= inodes,
            needed.inodes,
            place.inodes,
            f"{needed.inodes:,} files and folders are needed, the disk takes only {inodes:,}",
            f"remove small files, or {elsewhere}",
        ),
        Check(
            "longest file",
            needed.longest <= place.longest,
            needed.longest,
            place.longest,
            f"{longest}, at most {place.longest:,} are possible here ({place.file_system})",
            f"raise the limit (ulimit -f unlimited), or {elsewhere}",
        ),
        Check(
            "open files",
            place.open_files >= OPEN_FILES,
            OPEN_FILES,
            place.open_files,
            f"{OPEN_FILES} files must be open at once, {place.open_files} are allowed",
            "raise the hard limit, which takes an administrator: ulimit -Hn 1024",
        ),
    )


def check(root: Path, files: Sequence[tuple[PurePosixPath, int]]) -> None:
    """Refuse to fetch files, path below `root` and size in bytes, where that cannot work.

    Raises:
        StorageFailed: what is short, and what to do.
    """
    needed = need(root, files)
    refuse(checks(needed, probe(root, needed.longest)), root)
    allow_open_files(OPEN_FILES)


def check_early(root: Path, files: Sequence[tuple[PurePosixPath, int]]) -> None:
    """The same before the files' places are known: any file in the folder may be one of them.

    Raises:
        StorageFailed: what is short, and what to do.
    """
    sizes = [status.st_blocks * 512 for status in _files_below(root)]
    longest = max(files, key=lambda file: file[1], default=(None, 0))
    needed = Need(
        max(0, sum(size for _, size in files) - sum(sizes)),
        max(0, len(files) - len(sizes)) + STATE_INODES,
        longest[1],
        longest[0],
    )
    refuse(checks(needed, probe(root, needed.longest)), root)


def _files_below(root: Path) -> Iterator[os.stat_result]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name != STATE_FOLDER]
        for name in files:
            with contextlib.suppress(OSError):
                yield os.stat(f"{folder}/{name}")  # noqa: PTH116 - half the time of Path.stat


def asked_bytes(manifest: Manifest, asked: Spans | None) -> list[tuple[PurePosixPath, int]]:
    """The files in which something is asked for (None: everything), with its bytes. Pure."""
    if asked is None:
        return [(file.path, file.size) for file in manifest.files]
    return [
        (path, sum(stop - start for start, stop in spans)) for path, spans in asked.items() if spans
    ]


def refuse(checks: Sequence[Check], folder: Path) -> None:
    """Refuse to start what cannot finish.

    Raises:
        StorageFailed: for the first failed check: what is short, and what to do.
    """
    for check in checks:
        if not check.ok:
            raise StorageFailed(check.what, path=folder, hint=check.hint)


def need(root: Path, files: Iterable[tuple[PurePosixPath, int]]) -> Need:
    """What files (path below `root`, size in bytes) still need; looks at existing ones."""
    wanted = list(files)
    missing = 0
    new: set[Path] = set()
    # One folder may hold thousands of files.
    absent, denied_at = cache(_absent), cache(_denied)
    denied: Path | None = None
    for path, size in wanted:
        target = root / path
        place = target.parent
        try:
            status = target.lstat()
        except OSError:
            missing += size
            new.add(target)
            new.update(absent(place))
        else:
            # A link's target is never written; a copy replaces the link.
            link = stat.S_ISLNK(status.st_mode)
            missing += max(0, size - (0 if link else status.st_blocks * 512))
            place = place if link else target
        denied = denied or denied_at(place)
    longest = max(wanted, key=lambda file: file[1], default=(None, 0))
    return Need(missing, len(new) + STATE_INODES, longest[1], longest[0], denied)


def _absent(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist."""
    return [it for it in (folder, *folder.parents) if not it.exists()]


def _denied(path: Path) -> Path | None:
    place = nearest(path)
    return None if os.access(place, os.W_OK) else place


def nearest(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))


def probe(folder: Path, longest: int) -> Place:
    """Look at the place of a folder that need not exist yet.

    Leaves no trace, and removes the trace of an earlier look cut short by a power cut or SIGKILL.

    Args:
        folder: the checkpoint folder.
        longest: bytes of the longest file that it will hold.

    Raises:
        StorageFailed: the folder cannot even be examined.
    """
    place = nearest(folder)
    with storage_errors(place):
        room = os.statvfs(place)
    system = _file_system(place)
    limit = min(FILE_LIMITS.get(system, UNLIMITED), _soft(resource.RLIMIT_FSIZE))
    refused, sparse = "", True
    if not stat.S_ISDIR(place.stat().st_mode):
        refused = f"{place} is not a folder"
    else:
        try:
            sparse, fits = _try_file(place, min(longest, limit))
            limit = limit if fits else min(limit, longest - 1)
        except OSError as error:
            refused = f"nothing can be written to {place} ({error.strerror})"
    return Place(
        folder,
        system,
        room.f_bavail * room.f_frsize,
        room.f_favail if room.f_files else None,
        limit,
        most_open_files(),
        sparse,
        refused,
    )


def _soft(kind: int) -> int:
    soft, _ = resource.getrlimit(kind)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _try_file(folder: Path, longest: int) -> tuple[bool, bool]:
    """Whether files may be sparse here, and whether one of `longest` bytes can exist.

    The second is tried only if files are sparse; otherwise the file would be written in full.

    Raises:
        OSError: no file can be made.
    """
    hole = min(longest, 2**20)
    handle = _nameless(folder)
    try:
        os.truncate(handle, hole)
        sparse = os.fstat(handle).st_blocks * 512 <= hole // 2
        try:
            os.truncate(handle, longest if sparse else hole)
        except OSError:
            return sparse, False
        return sparse, True
    finally:
        os.close(handle)


def _nameless(folder: Path) -> int:
    """An open file that has no name, so that nobody has to remove it.

    Where a file system has no unnamed files, the file is unlinked at once; a power cut or SIGKILL
    between the two leaves it behind, and the next look removes it.

    Raises:
        OSError: no file can be made.
    """
    for left in folder.glob(f"{TRIAL}*"):
        # In a shared folder it may belong to somebody else.
        with contextlib.suppress(OSError):
            left.unlink()
    if hasattr(os, "O_TMPFILE"):
        with contextlib.suppress(OSError):
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    handle, name = tempfile.mkstemp(prefix=TRIAL, dir=folder)
    try:
        Path(name).unlink(missing_ok=True)
        # Before anything else is made here: the next look may be at another folder.
        flush(folder)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _file_system(place: Path) -> str:
    """The type of the file system that holds a path, as the system names it, or "unknown"."""
    absolute = place.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[at] for at in (absolute, *absolute.parents) if at in mounts), "unknown")
