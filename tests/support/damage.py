"""Damage to folders: bytes inverted, pieces removed from the record, writing refused."""

import errno
from pathlib import Path

from grokfetch.folder.record import Record
from grokfetch.folder.store import Store


def spoil(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 255]))


def forget(root, *pieces):
    """Remove pieces from the record."""
    store = Store(root)
    with store.lock():
        record = store.record()
        store.save_record(Record(record.info_hash, record.pieces - set(pieces), record.files))


def make_read_only(monkeypatch):
    """Make `Path.open` open files for reading only."""
    real = Path.open

    def read_only(path, mode="r", *args, **kwargs):
        if mode != "rb":
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
