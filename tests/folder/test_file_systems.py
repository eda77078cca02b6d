"""What network disks, FUSE and exFAT do not know is no error; what a disk has lost is one.

Faults are planted at the system call.
"""

import errno
import fcntl
import json
import mmap
import os
from pathlib import Path

import pytest
from support.demo import LOOPBACK, fetch_demo
from support.fake_swarm import FakeSwarm
from support.fetched import FILES, V1, C, content_of, run, whole
from support.program import SIMPLEST, grokfetch, invoke
from support.torrents import lay_down, torrent_of

from grokfetch.errors import StorageFailed
from grokfetch.events import Summary
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.torrent import read_back


def refusing(code, real=None, when=lambda *_: True):
    """A system call that fails with an error code, or the real one if that does not apply."""

    def call(*args, **kwargs):
        if when(*args):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return call


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, fetched: everything is proven."""
    return fetch_demo(tmp_path_factory.mktemp("demo") / "grok")


# --- fsync and chmod -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_is_no_error(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", refusing(code))
    run(tmp_path, FakeSwarm(V1, dict(FILES)))
    assert whole(tmp_path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_to_flush_is_an_error_and_nothing_is_claimed(tmp_path, monkeypatch, code):
    monkeypatch.setattr(
        os, "fsync", refusing(code, os.fsync, lambda handle: name_of(handle) == "c")
    )
    with pytest.raises(StorageFailed):
        run(tmp_path, FakeSwarm(V1, dict(FILES)))
    store = Store(tmp_path)
    over = set(store.layout().pieces_over(store.layout().file(C)))
    assert not store.record().pieces & over


def name_of(handle):
    return Path(f"/proc/self/fd/{handle}").readlink().name


def test_where_modes_cannot_be_set_everything_works(tmp_path, monkeypatch):
    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refusing(errno.EPERM))
    run(tmp_path, FakeSwarm(V1, dict(FILES)))
    assert whole(tmp_path)
    assert content_of(tmp_path) == FILES


# --- locks ---------------------------------------------------------------------------------------


@pytest.fixture
def lockless(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))


def test_without_locks_readers_work_with_a_warning_and_writers_are_told(demo, lockless, tmp_path):
    store = Store(demo)
    with store.lock(exclusive=False):
        for file in store.manifest().files:
            store.require(file.path)
        assert "has no locks" in " ".join(store.warnings)
    with pytest.raises(StorageFailed, match="has no locks") as caught, Store(tmp_path).lock():
        pass
    assert "--state DIR" in caught.value.hint


@pytest.mark.slow
def test_without_locks_a_folder_is_verified_and_run(demo, lockless):
    *_, summary = verify(Store(demo))
    assert isinstance(summary, Summary)
    assert summary.complete
    assert not summary.recorded
    ran = invoke("run", demo, "Every piece is read back", "--max-tokens", 2, "--mesh", "model=1")
    assert "has no locks" in ran.stderr
    assert ran.stdout.startswith(" from")


# --- mapping -------------------------------------------------------------------------------------


@pytest.fixture
def unmappable(monkeypatch):
    """Refuse to map files, but allow anonymous memory."""
    no_mapping = refusing(errno.ENODEV, mmap.mmap, lambda handle, *_: handle != -1)
    monkeypatch.setattr(mmap, "mmap", no_mapping)


@pytest.mark.slow
def test_where_files_cannot_be_mapped_they_are_read(demo, unmappable):
    rows = [json.loads(line) for line in grokfetch("inspect", demo, "--json").splitlines()]
    assert len(rows) == 146
    assert "wrong" not in grokfetch("verify", demo)
    said = grokfetch("run", demo, "Every piece is read back", "--max-tokens", 4, *SIMPLEST)
    assert said.startswith(" from the disk")


def test_where_files_cannot_be_mapped_a_mapped_run_names_the_way_out(demo, unmappable):
    arguments = ("run", demo, "Every", "--max-tokens", 1, "--mesh", "model=1")
    told = invoke(*arguments, "--placement", "mapped", code=StorageFailed.exit_code).stderr
    assert "cannot map files" in told
    assert "--placement sharded" in told


# --- reading -------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_never_called_wrong_and_repair_is_no_advice(demo, monkeypatch):
    shard = "tensor00003_000"
    monkeypatch.setattr(
        read_back.os, "open", refusing(errno.EIO, os.open, lambda path, *_: shard in str(path))
    )
    real = Path.open

    def failing(path, *args, **kwargs):
        if path.name == shard:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    told = invoke("verify", demo, code=20)
    assert f"unreadable piece 5 grok-demo/ckpt-0/{shard}: Input/output error" in told.stdout
    assert "wrong" not in told.stdout
    assert "--repair" not in told.stderr
    assert "check the disk" in told.stderr
    monkeypatch.undo()
    grokfetch("verify", demo)


# --- names ---------------------------------------------------------------------------------------


def test_a_folder_whose_name_is_not_utf_8_is_fetched_verified_and_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    files = {name: data for name, data in FILES.items() if data}
    lay_down(tmp_path / "seed", files)
    torrent = tmp_path / "x.torrent"
    torrent.write_bytes(torrent_of(tmp_path / "seed/top", 32768))
    root = tmp_path / os.fsdecode(b"caf\xe9") / "new"
    with seed(torrent.read_bytes(), tmp_path / "seed", SwarmSettings.loopback()) as peer:
        told = invoke("fetch", torrent, "--to", root, *LOOPBACK, "--peer", f"127.0.0.1:{peer.port}")
    assert b"caf\xe9/new: " in told.stdout_bytes
    for name, data in files.items():
        assert (root / "top" / name).read_bytes() == data
    assert "bytes proven" in grokfetch("verify", root)
    assert b"caf\xe9/new" in invoke("status", root).stdout_bytes
    assert json.loads(grokfetch("status", root, "--json"))["folder"] == str(root)
    with seed(torrent.read_bytes(), root, SwarmSettings.loopback()) as peer:
        grokfetch(
            *("fetch", torrent, "--to", tmp_path / "copy", *LOOPBACK),
            *("--peer", f"127.0.0.1:{peer.port}"),
        )
    assert (tmp_path / "copy/top/c").read_bytes() == files["c"]
