"""The record follows what is proven, never ahead of the disk, and soon behind a whole file."""

import errno
import os
from concurrent.futures import Executor, Future
from pathlib import Path, PurePosixPath

import pytest
from support.fake_swarm import FakeSwarm
from support.fetched import FILES, PIECE, V1, A, content_of, run, whole
from support.torrents import content, lay_down, v1_torrent

from grokfetch.errors import StorageFailed
from grokfetch.fetch import Limits
from grokfetch.folder.ledger import Proofs, Saver
from grokfetch.folder.payload import flush
from grokfetch.folder.store import Store
from grokfetch.torrent.info_dictionary import parse_info

LARGE = {"a": content(4 * PIECE), "b": content(8 * PIECE)}


@pytest.fixture
def at_work(tmp_path):
    """A store and proofs of two files that are being written, and their clock."""
    torrent = v1_torrent(LARGE, PIECE)
    lay_down(tmp_path, LARGE)
    store = Store(tmp_path)
    with store.lock():
        store.save_torrent(torrent)
        proofs = Proofs(store, parse_info(torrent.info), torrent.info_hash)
        proofs.mark_writing([PurePosixPath("top/a"), PurePosixPath("top/b")])
        yield store, proofs


class AtOnce(Executor):
    """An executor that runs each job before it returns."""

    def submit(self, function, /, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def saved(store):
    return set(Store(store.root).record().pieces)


def test_the_record_claims_no_piece_that_is_not_flushed(at_work):
    store, proofs = at_work
    proofs.add(0)
    assert proofs.begin_flush() == [store.payload(A)]
    proofs.add(1)
    proofs.write()
    assert saved(store) == set()
    proofs.end_flush(well=True)
    proofs.write()
    assert saved(store) == {0}


def test_a_record_is_written_when_it_is_old_or_a_file_has_become_whole(at_work):
    store, proofs = at_work
    now = [0.0]
    with Saver(proofs, 3.0, lambda: now[0], AtOnce()) as saver:

        def turn(at):
            now[0] = at
            saver.turn()
            return saved(store)

        proofs.add(4)
        assert turn(2.9) == set()
        assert turn(3.1) == {4}
        for piece in range(4):
            proofs.add(piece)
        assert turn(3.2) == {4}
        assert turn(3.7) == {0, 1, 2, 3, 4}
        proofs.add(5)
        assert turn(5.0) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("cost_s", "early", "due"), [(0.01, 0.4, 0.6), (0.2, 1.9, 2.1), (9, 2.9, 3)]
)
def test_a_record_that_took_long_is_put_off_for_longer_but_never_beyond_its_time(
    at_work, monkeypatch, cost_s, early, due
):
    store, proofs = at_work
    now = [0.0]
    real = proofs.write

    def slow():
        now[0] += cost_s
        real()

    monkeypatch.setattr(proofs, "write", slow)
    with Saver(proofs, 3.0, lambda: now[0], AtOnce()) as saver:
        now[0] = 3.0
        saver.turn()
        written_at = now[0]
        for piece in range(4):
            proofs.add(piece)
        now[0] = written_at + early
        saver.turn()
        assert saved(store) == set()
        now[0] = written_at + due
        saver.turn()
        assert saved(store) == {0, 1, 2, 3}


def test_of_many_files_each_is_flushed_and_then_their_folders(tmp_path, monkeypatch):
    root = tmp_path / "root"
    files = {f"{number // 50}/{number}": b"x" for number in range(200)}
    lay_down(root, files)
    paths = [root / "top" / name for name in files]
    flushed = []
    real = os.fsync

    def noted(handle):
        real(handle)
        flushed.append(Path(f"/proc/self/fd/{handle}").readlink())

    monkeypatch.setattr(os, "fsync", noted)
    flush(paths, root)
    folders = {root, root / "top", *(path.parent for path in paths)}
    assert set(flushed[: len(paths)]) == set(paths)
    assert len(flushed) == len(paths) + len(folders)
    assert set(flushed[len(paths) :]) == folders


def test_data_that_the_disk_has_lost_is_never_claimed_although_a_second_flush_is_silent(
    tmp_path, monkeypatch
):
    real, lost = os.fsync, []

    def failing(handle):
        if not lost and Path(f"/proc/self/fd/{handle}").readlink().name == "a":
            lost.append(True)
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    swarm = FakeSwarm(V1, dict(FILES))
    with pytest.raises(StorageFailed, match="Input/output error"):
        run(tmp_path, swarm, limits=Limits(save_s=0))
    assert not Store(tmp_path).record().pieces
    assert run(tmp_path, FakeSwarm(V1, dict(FILES)))[-1].rehashed
    assert content_of(tmp_path) == FILES
    assert whole(tmp_path)


def test_a_file_that_is_marked_and_not_there_yet_stays_marked_when_more_are_asked_for(at_work):
    store, proofs = at_work
    store.payload(A).unlink()
    proofs.write()
    proofs.renew([])
    proofs.mark_more([PurePosixPath("top/b")])
    lay_down(store.root, LARGE)
    proofs.add(0)
    proofs.save()
    assert store.record().files[A].writing
    assert store.record().pieces == {0}
