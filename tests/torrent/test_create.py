"""A torrent is made of files that can be read, and of no others."""

import errno
import os
from pathlib import Path

import pytest

from grokfetch.errors import StorageFailed
from grokfetch.torrent.create import make
from grokfetch.torrent.listing import list_files


@pytest.mark.parametrize("v1_only", [False, True])
def test_a_file_that_may_not_be_read_is_named_as_such(tmp_path, monkeypatch, v1_only):
    (tmp_path / "open").write_bytes(b"x" * 20_000)
    (tmp_path / "closed").write_bytes(b"y" * 20_000)
    real = os.open

    def refusing(path, *arguments):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StorageFailed, match=r"closed: cannot be read.*Permission denied"):
        list(make(tmp_path, list_files(tmp_path), 16_384, v1_only=v1_only))
