"""A file system in user space that passes everything on and records, in order, what changes.

`mount` ends when the file system is unmounted; its log is then a sequence of pickled `Operation`s.
Existing files come first, as if they had been written and flushed. Reads are not recorded.
"""

import dataclasses
import errno
import functools
import os
import pickle
import signal
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One change or one flush.

    kind: create, mkdir, write, truncate, rename, link, unlink, rmdir, symlink, times, fsync,
    fsyncdir; begun, before the first recorded one; or struck, at the `Fault`. path:
    relative to the mount, where a name changes or a folder is flushed; `other` is the new name of a
    rename or link, the target of a symbolic link. inode: a number of our own for the file whose
    bytes change or are flushed. mtime_ns: of that file after the operation.
    """

    kind: str
    path: str = ""
    other: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    size: int = 0
    mtime_ns: int = 0


def recordings(log: Path) -> list[Operation]:
    """The operations of a log."""
    found = []
    with log.open("rb") as file:
        while True:
            try:
                found.append(pickle.load(file))
            except EOFError:
                return found


CHANGES = frozenset(
    (
        *("create", "mkdir", "write", "truncate", "rename", "link", "unlink", "rmdir", "symlink"),
        *("utimens", "fsync", "fsyncdir"),
    )
)


PAGE = 4096

AMONG = {"changes": CHANGES, "reads": frozenset({"read"}), "writes": frozenset({"write"})}


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong once, at the operation with the number `at`, counted from 1.

    among: a key of `AMONG`. action: the name of an errno; "kill", which ends the calling process
    with SIGKILL before the operation is done; "short", which does only half of a read or write;
    "sector", which makes one page of what is read unreadable for ever; "truncated", which cuts the
    file off in the middle of what is read; or "flip", which changes one bit in the middle of what
    is read or written, without any error.
    """

    among: str
    at: int
    action: str


def flipped(data: bytes) -> bytes:
    """The same with one bit changed in the middle."""
    middle = len(data) // 2
    return (
        data[:middle] + bytes(byte ^ 1 for byte in data[middle : middle + 1]) + data[middle + 1 :]
    )


def mount(place: str, backing: str, log: str, fault: Fault | None = None) -> None:
    """Serve the file system until it is unmounted."""
    import mfusepy

    counted = AMONG[fault.among] if fault else frozenset()

    class Recorder(mfusepy.Operations):
        use_ns = True

        def __init__(self) -> None:
            self.log = Path(log).open("wb", buffering=0)  # noqa: SIM115 - as long as the process
            self.count = 0
            self.done = False
            self.bad: tuple[int, int] | None = None
            for name in counted:
                setattr(self, name, functools.partial(self.struck, getattr(self, name)))
            self.made = 0
            self.numbers: dict[int, int] = {}
            self.note_what_lies_there()
            self.note("begun")

        def note_what_lies_there(self) -> None:
            for folder, folders, files in os.walk(backing):
                within = os.path.relpath(folder, backing).removeprefix(".")
                for name in folders:
                    self.note("mkdir", os.path.join(within, name))
                for name in files:
                    handle = os.open(os.path.join(folder, name), os.O_RDONLY)
                    self.file("create", handle, path=os.path.join(within, name))
                    size = os.fstat(handle).st_size
                    self.file("write", handle, data=os.pread(handle, size, 0))
                    self.file("fsync", handle)
                    os.close(handle)
                self.note("fsyncdir", within)

        def struck(self, act, *args):
            self.count += 1
            # When the kernel itself writes pages back, it calls as process 0, which cannot be
            # killed.
            asks = mfusepy.fuse_get_context()[2]
            if self.count >= fault.at and not self.done and (asks or fault.action != "kill"):
                self.done = True
                self.note("struck")
                return self.strike(act, asks, *args)
            if self.bad is not None:
                self.refuse_what_is_bad(*args)
            return act(*args)

        def strike(self, act, asks: int, *args):
            match fault.action:
                case "kill":
                    os.kill(asks, signal.SIGKILL)
                    raise mfusepy.FuseOSError(errno.EIO)
                case "sector":
                    _, _, _, fh = args
                    self.bad = (os.fstat(fh).st_ino, self.middle(*args) // PAGE * PAGE)
                    self.refuse_what_is_bad(*args)
                case "truncated":
                    path, _, _, _ = args
                    self.truncate(path, self.middle(*args))
                case "short" if fault.among == "writes":
                    path, data, *rest = args
                    return act(path, data[: max(1, len(data) // 2)], *rest)
                case "short":
                    _, _, offset, _ = args
                    return act(*args)[: self.middle(*args) - offset]
                case "flip" if fault.among == "writes":
                    path, data, *rest = args
                    return act(path, flipped(data), *rest)
                case "flip":
                    return flipped(act(*args))
                case name:
                    raise mfusepy.FuseOSError(getattr(errno, name))
            return act(*args)

        def middle(self, _path, size, offset, fh) -> int:
            return (offset + max(offset, min(offset + size, os.fstat(fh).st_size))) // 2

        def refuse_what_is_bad(self, _path, size, offset, fh) -> None:
            inode, start = self.bad
            here = os.fstat(fh).st_ino == inode
            if here and offset < start + PAGE and start < offset + size:
                raise mfusepy.FuseOSError(errno.EIO)

        def note(self, kind, path="", **fields) -> None:
            made = Operation(kind, path.lstrip("/"), **fields)
            self.log.write(pickle.dumps(made))

        def at(self, path: str) -> str:
            return backing + path

        def file(self, kind: str, fh: int, **fields) -> None:
            # The disk below gives a removed file's inode number to the next one; ours are unique.
            status = os.fstat(fh)
            if kind == "create" or status.st_ino not in self.numbers:
                self.made += 1
                self.numbers[status.st_ino] = self.made
            inode = self.numbers[status.st_ino]
            self.note(kind, inode=inode, mtime_ns=status.st_mtime_ns, **fields)

        def getattr(self, path, fh=None):
            status = os.lstat(self.at(path))
            names = ("mode", "nlink", "uid", "gid", "size", "ino", "blocks")
            times = {f"st_{it}time": getattr(status, f"st_{it}time_ns") for it in "acm"}
            return {f"st_{name}": getattr(status, f"st_{name}") for name in names} | times

        def access(self, path, amode):
            if not os.access(self.at(path), amode):
                raise mfusepy.FuseOSError(errno.EACCES)
            return 0

        def readdir(self, path, fh):
            return [".", "..", *os.listdir(self.at(path))]

        def statfs(self, path):
            status = os.statvfs(self.at(path))
            names = [
                "bsize",
                "frsize",
                "blocks",
                "bfree",
                "bavail",
                "files",
                "ffree",
                "favail",
                "flag",
                "namemax",
            ]
            return {f"f_{name}": getattr(status, f"f_{name}") for name in names}

        def readlink(self, path):
            return os.readlink(self.at(path))

        def open(self, path, flags):
            handle = os.open(self.at(path), flags & ~os.O_APPEND)
            if flags & os.O_TRUNC:
                self.file("truncate", handle, size=0)
            return handle

        def create(self, path, mode, fi=None):
            handle = os.open(self.at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            self.file("create", handle, path=path.lstrip("/"))
            return handle

        def file_of(self, path, fh, act):
            handle = os.open(self.at(path), os.O_RDWR) if fh is None else fh
            try:
                act(handle)
            finally:
                if fh is None:
                    os.close(handle)

        def read(self, path, size, offset, fh):
            return os.pread(fh, size, offset)

        def write(self, path, data, offset, fh):
            count = os.pwrite(fh, data, offset)
            self.file("write", fh, offset=offset, data=data[:count])
            return count

        def truncate(self, path, length, fh=None):
            def act(handle):
                os.ftruncate(handle, length)
                self.file("truncate", handle, size=length)

            self.file_of(path, fh, act)
            return 0

        def fallocate(self, path, mode, offset, length, fh):
            raise mfusepy.FuseOSError(errno.EOPNOTSUPP)

        def utimens(self, path, times=None):
            os.utime(self.at(path), ns=times)
            self.file_of(path, None, lambda handle: self.file("times", handle))
            return 0

        def chmod(self, path, mode):
            os.chmod(self.at(path), mode)
            return 0

        def chown(self, path, uid, gid):
            return 0

        def flush(self, path, fh):
            return 0

        def release(self, path, fh):
            os.close(fh)
            return 0

        def fsync(self, path, datasync, fh):
            self.file("fsync", fh)
            return 0

        def fsyncdir(self, path, datasync, fh):
            self.note("fsyncdir", path)
            return 0

        def mkdir(self, path, mode):
            os.mkdir(self.at(path), mode)
            self.note("mkdir", path)
            return 0

        def rmdir(self, path):
            os.rmdir(self.at(path))
            self.note("rmdir", path)
            return 0

        def unlink(self, path):
            os.unlink(self.at(path))
            self.note("unlink", path)
            return 0

        def rename(self, old, new):
            os.rename(self.at(old), self.at(new))
            self.note("rename", old, other=new.lstrip("/"))
            return 0

        def link(self, target, source):
            os.link(self.at(source), self.at(target), follow_symlinks=False)
            self.note("link", source, other=target.lstrip("/"))
            return 0

        def symlink(self, target, source):
            os.symlink(source, self.at(target))
            self.note("symlink", target, other=source)
            return 0

    mfusepy.FUSE(
        Recorder(),
        place,
        foreground=True,
        nothreads=True,
        attr_timeout=0,
        entry_timeout=0,
        fsname="grokfetch-recorder",
    )
