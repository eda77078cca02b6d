"""What a disk may hold after a power cut, given what was written and flushed before it.

The rules are what POSIX guarantees to an application, which is less than any one file system does:

- Bytes of a file are safe once the file was flushed after they were written. Any later write may be
  lost, completely, in single pages or from some byte on, and so may a truncation. The length of the
  file is one that it had at some time since, and lost pages read as zeros or as they were before.
- A change of names (create, mkdir, rename, link, unlink) is safe once every folder that it changes
  was flushed after it. Any other may be lost; flushing a file does not save its name.
- The time of a file is one that it had since it was flushed, whatever else was lost.
"""

import os
import random
from pathlib import Path, PurePosixPath

from powercut.recorder import Operation

PAGE = 4096
BYTES = ("write", "truncate", "times")


class Cut:
    """A power cut after the first `count` operations of a recording."""

    def __init__(self, operations: list[Operation], count: int) -> None:
        self.past = operations[:count]
        self.flushed: dict[int, int] = {}
        folders: dict[str, int] = {}
        for at, done in enumerate(self.past):
            if done.kind == "fsync":
                self.flushed[done.inode] = at
            elif done.kind == "fsyncdir":
                folders[done.path] = at
        self.unsafe_names = [
            at
            for at, done in enumerate(self.past)
            if any(folders.get(folder, -1) < at for folder in _folders(done))
        ]
        self.unsafe_bytes = [
            at
            for at, done in enumerate(self.past)
            if done.kind in BYTES and self.flushed.get(done.inode, -1) < at
        ]

    def worst(self) -> "Disk":
        """The state in which everything is lost that may be."""
        return self._disk(set(self.unsafe_names) | set(self.unsafe_bytes), None)

    def best(self) -> "Disk":
        """The state in which nothing is lost."""
        return self._disk(set(), None)

    def some(self, chance: random.Random) -> "Disk":
        """A state with random losses."""
        share = chance.choice((0.1, 0.5, 0.9))
        lost = {at for at in self.unsafe_bytes if chance.random() < share}
        match chance.randrange(3):
            case 0:
                names = self.unsafe_names
                lost |= set(names[chance.randint(0, len(names)) :])
            case 1:
                lost |= {at for at in self.unsafe_names if chance.random() < share}
        return self._disk(lost, chance)

    def _disk(self, lost: set[int], chance: random.Random | None) -> "Disk":
        disk = Disk()
        for at, done in enumerate(self.past):
            if at in lost:
                if done.kind == "write" and chance is not None and chance.random() < 0.5:
                    disk.tear(done, chance)
                elif done.kind in BYTES and chance is not None and chance.random() < 0.3:
                    # The new time, and perhaps the new length, without the new bytes.
                    disk.outside(done, length=chance.random() < 0.5)
            else:
                disk.apply(done)
        return disk


def _folders(done: Operation) -> list[str]:
    """The folders in which an operation changes a name."""
    if done.kind in ("create", "mkdir", "unlink", "rmdir", "symlink"):
        return [_parent(done.path)]
    if done.kind == "rename":
        return [_parent(done.path), _parent(done.other)]
    return [_parent(done.other)] if done.kind == "link" else []


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


class Disk:
    """Names and bytes after a power cut."""

    def __init__(self) -> None:
        self.names: dict[str, int | str | None] = {"": None}
        """Path to inode, to the target of a symbolic link, or to None for a folder."""
        self.bytes: dict[int, bytearray] = {}
        self.times: dict[int, int] = {}

    def apply(self, done: Operation) -> None:
        """Apply an operation that was not lost, if what it needs was not lost either."""
        content = self.bytes.setdefault(done.inode, bytearray()) if done.inode else bytearray()
        match done.kind:
            case "write":
                self._put(content, done.offset, done.data)
            case "truncate":
                del content[done.size :]
                content.extend(bytes(done.size - len(content)))
            case "create" | "mkdir" | "symlink":
                self._name(
                    done.path, {"mkdir": None, "symlink": done.other}.get(done.kind, done.inode)
                )
            case "rename":
                self._move(done.path, done.other)
            case "link":
                if done.path in self.names:
                    self._name(done.other, self.names[done.path])
            case "unlink" | "rmdir":
                self.names.pop(done.path, None)
        if done.mtime_ns:
            self.times[done.inode] = done.mtime_ns

    def tear(self, done: Operation, chance: random.Random) -> None:
        """Apply some pages of a write, or its beginning."""
        content = self.bytes.setdefault(done.inode, bytearray())
        if chance.random() < 0.5:
            self._put(content, done.offset, done.data[: chance.randint(0, len(done.data))])
        else:
            start = 0
            while start < len(done.data):
                stop = min(len(done.data), start + PAGE - (done.offset + start) % PAGE)
                if chance.random() < 0.5:
                    self._put(content, done.offset + start, done.data[start:stop])
                start = stop
        self.times[done.inode] = done.mtime_ns

    def outside(self, done: Operation, *, length: bool) -> None:
        """Apply only the length and time of an operation whose bytes were lost."""
        content = self.bytes.setdefault(done.inode, bytearray())
        if length and done.kind == "write":
            content.extend(bytes(max(0, done.offset + len(done.data) - len(content))))
        self.times[done.inode] = done.mtime_ns

    @staticmethod
    def _put(content: bytearray, offset: int, data: bytes) -> None:
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data

    def _name(self, path: str, value: int | str | None) -> None:
        if _parent(path) in self.names:
            self.names[path] = value

    def _move(self, old: str, new: str) -> None:
        if old not in self.names or _parent(new) not in self.names:
            return
        below = [path for path in self.names if path == old or path.startswith(f"{old}/")]
        for path in below:
            self.names[new + path[len(old) :]] = self.names.pop(path)

    def lay_down(self, root: Path) -> None:
        """Write it into an empty folder."""
        for path, value in sorted(self.names.items()):
            parents = [str(it) for it in PurePosixPath(path).parents][:-1]
            if not path or any(it not in self.names for it in parents):
                continue
            target = root / path
            if value is None:
                target.mkdir()
            elif isinstance(value, str):
                target.symlink_to(value)
            else:
                target.write_bytes(self.bytes.get(value, b""))
                if value in self.times:
                    os.utime(target, ns=(self.times[value], self.times[value]))

    def content(self, path: str) -> bytes | None:
        """The bytes of a file, None if there is none of that name."""
        value = self.names.get(path)
        return bytes(self.bytes.get(value, b"")) if isinstance(value, int) else None
