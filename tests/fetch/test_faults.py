"""Faults of disks, people and clocks: a clear error, or the fetch continues; nothing is lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import PurePosixPath

import pytest
from support.fake_swarm import FakeSwarm
from support.small_disk import small_disk
from support.torrents import content, lay_down, torrent_of, v1_torrent

from grokfetch.errors import StateLocked, StorageFailed
from grokfetch.events import Finding, Outcome, Status, Summary
from grokfetch.fetch import Limits, fetch, preflight
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.folder import history
from grokfetch.folder import ledger as proofs
from grokfetch.folder.history import read as read_history
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.torrent.metainfo import parse_torrent

PIECE = 32768
FILES = {"a": content(20 * PIECE - 100), "b": content(1000), "c": content(45 * PIECE)}
TORRENT = v1_torrent(FILES, PIECE)
SIZE = sum(map(len, FILES.values()))
PIECES = -(-SIZE // PIECE)
EAGER = Limits(metadata_s=20, stall_s=20, save_s=0)


def whole(root):
    *_, summary = verify(Store(root))
    assert isinstance(summary, Summary)
    there = {name: (root / "top" / name).read_bytes() for name in FILES}
    return summary.complete and there == FILES


def run(root, source, **kwargs):
    return list(fetch(Store(root), source, limits=EAGER, **kwargs))


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A real seed: its torrent, and a function that makes a source of it."""
    folder = tmp_path_factory.mktemp("seed")
    lay_down(folder, FILES)
    data = torrent_of(folder / "top", PIECE)
    with seed(data, folder, SwarmSettings.loopback()) as seeder:
        settings = SwarmSettings.loopback((f"127.0.0.1:{seeder.port}",))
        yield lambda: Swarm(parse_torrent(data), settings)


# --- the disk ------------------------------------------------------------------------------------


def fill(disk, leaving):
    """Another program fills the disk except for `left` bytes."""
    free = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        file.write(bytes(free.f_bavail * free.f_frsize - leaving))


def test_a_disk_that_others_fill_ends_the_fetch_and_loses_nothing(tmp_path, peer, monkeypatch):
    real = preflight.check

    def then_filled(root, files):
        real(root, files)
        fill(root, SIZE // 2)

    monkeypatch.setattr(preflight, "check", then_filled)
    with small_disk(tmp_path / "disk", "size=8m") as disk:
        with pytest.raises(StorageFailed, match="the disk is full") as failed:
            run(disk, peer())
        assert "run the same command again" in failed.value.hint
        (disk / "filler").unlink()
        proven = Store(disk).record().pieces
        monkeypatch.setattr(preflight, "check", real)
        again = run(disk, peer())
        assert again[-1].fetched + again[-1].rehashed >= PIECES - len(proven)
        assert again[-1].fetched <= PIECES - len(proven)
        assert whole(disk)


def test_a_disk_too_full_for_the_record_ends_the_fetch_and_keeps_the_old_record(tmp_path):
    with small_disk(tmp_path / "disk", "size=8m") as disk:
        events = fetch(Store(disk), FakeSwarm(TORRENT, dict(FILES), die_after=None), limits=EAGER)
        for event in events:
            if isinstance(event, Status) and event.pieces_done >= PIECES // 2:
                break
        before = Store(disk).record().pieces
        assert before
        lay_down(disk, FILES)
        fill(disk, 0)
        with pytest.raises(StorageFailed, match="the disk is full"):
            list(events)
        assert Store(disk).record().pieces >= before
        (disk / "filler").unlink()
        assert run(disk, FakeSwarm(TORRENT, dict(FILES)))[-1].fetched <= PIECES - len(before)
        assert whole(disk)


def test_a_file_longer_than_the_process_may_write_is_refused(tmp_path):
    torrent, folder = tmp_path / "t.torrent", tmp_path / "out"
    lay_down(tmp_path / "seed", FILES)
    torrent.write_bytes(torrent_of(tmp_path / "seed/top", PIECE))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from grokfetch.cli import main\n"
        f"main(['fetch', {str(torrent)!r}, '--to', {str(folder)!r}, '--no-discovery', "
        "'--listen', '127.0.0.1:0', '--timeout', '5'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == StorageFailed.exit_code
    assert f"top/c has {len(FILES['c']):,} bytes, at most 200,000 are possible here" in done.stderr


# --- others at work ------------------------------------------------------------------------------


def during(root, source, when, deed):
    """A fetch during which `deed` is done once, after `when` proven pieces."""
    events, done = [], False
    for event in fetch(Store(root), source, limits=EAGER):
        events.append(event)
        if isinstance(event, Status) and event.pieces_done >= when and not done:
            done = True
            deed()
    assert done
    return events


@pytest.mark.parametrize("when", [10, 30, PIECES - 1, PIECES])
@pytest.mark.parametrize("how", ["deleted", "truncated", "emptied", "replaced"])
def test_a_file_that_others_spoil_during_a_fetch_is_fetched_again(tmp_path, how, when):
    path = tmp_path / "top/a"

    def spoil():
        if how == "truncated":
            os.truncate(path, 5000)
            return
        if how == "emptied":
            size = path.stat().st_size
            os.truncate(path, 0)
            os.truncate(path, size)
            return
        path.rename(tmp_path / "away")
        if how == "replaced":
            path.write_bytes(bytes(len(FILES["a"])))

    events = during(tmp_path, FakeSwarm(TORRENT, dict(FILES)), when, spoil)
    assert isinstance(events[-1], Outcome)
    assert [e.path.name for e in events if isinstance(e, Finding)] == ["a"]
    assert whole(tmp_path)


def test_a_cut_file_is_noticed_where_holes_cannot_be_seen(tmp_path, monkeypatch):
    real = os.lseek

    def without_holes(handle, offset, whence):
        if whence == os.SEEK_HOLE:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, offset, whence)

    monkeypatch.setattr(os, "lseek", without_holes)
    cut = [tmp_path / "top/a", 5000]
    during(tmp_path, FakeSwarm(TORRENT, dict(FILES)), 30, lambda: os.truncate(*cut))
    assert whole(tmp_path)


def test_a_disk_that_is_unmounted_under_a_fetch_keeps_its_record(tmp_path):
    root, state, away = tmp_path / "root", tmp_path / "state", tmp_path / "away"
    store = Store(root, state)
    list(fetch(store, FakeSwarm(TORRENT, dict(FILES))))
    with store.lock():
        at_work = proofs.Proofs(store, store.layout(), TORRENT.info_hash)
        at_work.mark_writing([PurePosixPath("top/c")])
        root.rename(away)
        with pytest.raises(StorageFailed, match="disappeared"):
            at_work.save()
    away.rename(root)
    assert len(Store(root, state).record().pieces) == PIECES


def test_a_file_proven_before_and_spoilt_during_a_fetch_of_others_is_fetched_again(tmp_path):
    run(tmp_path, FakeSwarm(TORRENT, dict(FILES)))
    (tmp_path / "top/c").unlink()
    spoil = (tmp_path / "top/a").write_bytes
    events = during(
        tmp_path, FakeSwarm(TORRENT, dict(FILES)), 30, lambda: spoil(bytes(len(FILES["a"])))
    )
    assert isinstance(events[-1], Outcome)
    assert whole(tmp_path)


def test_a_file_that_others_delete_under_a_real_swarm_is_fetched_again(tmp_path, peer):
    events = during(tmp_path, peer(), 25, (tmp_path / "top/a").unlink)
    assert isinstance(events[-1], Outcome)
    assert whole(tmp_path)


def test_a_folder_that_vanishes_ends_the_fetch_and_a_new_one_completes(tmp_path, peer):
    root = tmp_path / "out"
    with pytest.raises(StorageFailed) as failed:
        during(root, peer(), 10, lambda: shutil.rmtree(root))
    assert str(root) in str(failed.value)
    run(root, peer())
    assert whole(root)


def test_a_state_folder_that_vanishes_costs_only_a_rehash(tmp_path):
    state = tmp_path / ".grokfetch"
    with pytest.raises(StorageFailed, match="has disappeared"):
        during(tmp_path, FakeSwarm(TORRENT, dict(FILES)), 30, lambda: shutil.rmtree(state))
    again = run(tmp_path, FakeSwarm(TORRENT, dict(FILES)))
    assert again[-1].rehashed >= 30
    assert again[-1].fetched <= PIECES - 30
    assert whole(tmp_path)


# --- clocks --------------------------------------------------------------------------------------


class Clock:
    """A clock that jumps by the next of `jumps` each time it is read, and then stands still."""

    def __init__(self, *jumps):
        self.now, self.jumps = 1000.0, list(jumps)

    def __call__(self):
        self.now += self.jumps.pop(0) if self.jumps else 0.0
        return self.now


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_wall_clock_that_jumps_changes_nothing_but_what_is_shown(tmp_path, jump, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setattr(history.time, "time", Clock(0, 1, jump, 1))
    limits = dataclasses.replace(EAGER, stall_s=1e6)
    swarm = FakeSwarm(TORRENT, dict(FILES))
    *_, last = fetch(store, swarm, limits=limits, clock=Clock(*[5.0] * 1000))
    assert isinstance(last, Outcome)
    assert len(read_history(store).samples) > 4
    text = subprocess.run(
        [sys.executable, "-m", "grokfetch", "status", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "proven   100.0 %" in text
    assert whole(tmp_path)


def test_a_file_whose_time_a_jumping_clock_put_into_the_future_stays_proven(tmp_path):
    run(tmp_path, FakeSwarm(TORRENT, dict(FILES)))
    os.utime(tmp_path / "top/a", (4e9, 4e9))
    assert run(tmp_path, FakeSwarm(TORRENT, {}))[-1].fetched == 0
    again = run(tmp_path, FakeSwarm(TORRENT, {}))[-1]
    assert (again.fetched, again.rehashed) == (0, 0)


def test_after_a_sleep_of_the_machine_a_fetch_that_still_gets_data_goes_on(tmp_path):
    source = FakeSwarm(TORRENT, dict(FILES))
    events = list(fetch(Store(tmp_path), source, limits=Limits(), clock=Clock(*[0.0] * 20, 400.0)))
    assert isinstance(events[-1], Outcome)
    assert whole(tmp_path)


# --- two at once ---------------------------------------------------------------------------------


def test_a_second_fetch_is_refused_with_the_pid_of_the_first_and_harms_nothing(tmp_path):
    torrent = tmp_path / "t.torrent"
    lay_down(tmp_path / "seed", FILES)
    torrent.write_bytes(torrent_of(tmp_path / "seed/top", PIECE))
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "grokfetch", "fetch", torrent, "--to", folder, "--json"]
    command += ["--no-discovery", "--listen", "127.0.0.1:0", "--peer", "127.0.0.1:1"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert json.loads(first.stdout.readline())["event"] == "started"
        assert json.loads(first.stdout.readline())["event"] == "metadata"
        with pytest.raises(StateLocked, match=f"process {first.pid} on "):
            list(fetch(Store(folder), FakeSwarm(TORRENT, dict(FILES))))
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == StateLocked.exit_code
        assert f"process {first.pid} on " in json.loads(second.stdout.splitlines()[-1])["what"]
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        first.stdout.close()
    source = FakeSwarm(parse_torrent(torrent.read_bytes()), dict(FILES))
    list(fetch(Store(folder), source))
    assert whole(folder)
