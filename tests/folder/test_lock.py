"""One writer or several readers hold a folder, and others are told who."""

import errno
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grokfetch.errors import StateLocked, StorageFailed
from grokfetch.folder.lock import read_owner
from grokfetch.folder.store import Store

HOLD = """
import sys
from pathlib import Path
from grokfetch.folder.store import Store
with Store(Path(sys.argv[1])).lock(exclusive=sys.argv[2] == "alone"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the lock of `tmp_path`."""
    started = []

    def start(how):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path, holder):
    process = holder("alone")
    for exclusive in (True, False):
        with (
            pytest.raises(StateLocked, match=f"process {process.pid} on "),
            Store(tmp_path).lock(exclusive=exclusive),
        ):
            pass


def test_the_lock_of_a_killed_process_does_not_block(tmp_path, holder):
    process = holder("alone")
    process.kill()
    process.wait()
    with Store(tmp_path).lock():
        owner = json.loads((tmp_path / ".grokfetch/lock").read_text())
        assert owner["pid"] == os.getpid()


def test_readers_share_and_keep_writers_out(tmp_path, holder):
    (tmp_path / ".grokfetch").mkdir()
    holder("shared")
    with Store(tmp_path).lock(exclusive=False):
        pass
    with pytest.raises(StateLocked), Store(tmp_path).lock():
        pass


def test_a_lock_that_a_full_disk_does_not_take_is_reported(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, *_args, **_more: Full(path, "w+"))
    with pytest.raises(StorageFailed, match="disk is full"), Store(tmp_path).lock():
        pass


def test_the_name_that_a_dead_process_left_is_not_at_work(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait(60)
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"pid": done.pid, "host": socket.gethostname()}))
    assert read_owner(tmp_path) is None
    lock.write_text(json.dumps({"pid": done.pid, "host": "another"}))
    assert str(read_owner(tmp_path)) == f"process {done.pid} on another"
    lock.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    assert read_owner(tmp_path).pid == os.getpid()
    for noise in (
        "",
        "[]",
        '{"pid": "x", "host": 1}',
        "\xff",
        '{"pid": 1e400, "host": "h"}',
        '{"pid": 0, "host": "h"}',
    ):
        lock.write_text(noise)
        assert read_owner(tmp_path) is None
