"""Our own files reach the disk completely or not at all."""

import os
from pathlib import Path

import pytest
from support.program import grokfetch, invoke

from grokfetch import errors
from grokfetch.folder.atomic import put
from grokfetch.manifest.schema import parse
from grokfetch.torrent.metainfo import parse_torrent


@pytest.fixture
def disk(monkeypatch):
    """Flip a bit of files with `part` in their names when they are flushed to the disk."""

    def begin(part, times):
        real, struck = os.fsync, []

        def flipping(handle):
            path = Path(f"/proc/self/fd/{handle}").readlink()
            real(handle)
            if part in path.name and path.is_file() and len(struck) < times:
                struck.append(path)
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)

        monkeypatch.setattr(os, "fsync", flipping)
        return struck

    return begin


def test_what_reads_back_changed_is_written_again(tmp_path, disk):
    struck = disk("state", times=1)
    put(tmp_path / "state", b"what is meant")
    assert len(struck) == 1
    assert (tmp_path / "state").read_bytes() == b"what is meant"
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]


def test_what_reads_back_changed_twice_does_not_take_the_place_of_what_was_there(tmp_path, disk):
    path = tmp_path / "state"
    put(path, b"old")
    struck = disk("state", times=2)
    with pytest.raises(OSError, match="reads back changed") as caught:
        put(path, b"new")
    assert len(struck) == 2
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["payload.torrent", "payload.json"])
def test_a_bit_of_what_publish_writes_that_changes_on_its_way_is_mended(tmp_path, disk, name):
    folder = tmp_path / "payload"
    folder.mkdir()
    (folder / "file").write_bytes(b"some bytes")
    struck = disk(f".{name}.", times=1)
    magnet = invoke("publish", folder).stdout
    assert len(struck) == 1
    torrent = parse_torrent((tmp_path / "payload.torrent").read_bytes())
    manifest = parse((tmp_path / "payload.json").read_bytes(), "")
    assert f"urn:btih:{torrent.v1}" in magnet
    assert manifest.magnet == magnet.strip()


def test_a_disk_that_changes_a_document_each_time_is_named_by_the_error(tmp_path, disk):
    folder = tmp_path / "payload"
    folder.mkdir()
    (folder / "file").write_bytes(b"some bytes")
    disk(".payload.torrent.", times=2)
    said = grokfetch("publish", folder, code=errors.StorageFailed.exit_code)
    assert f"{tmp_path / 'payload.torrent'}: what was written there reads back changed" in said
    assert not (tmp_path / "payload.torrent").exists()
