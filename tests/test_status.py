"""`status`: what is proven and missing, beside a running fetch and after one; takes no lock."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import PurePosixPath

import pytest
from click.testing import CliRunner
from fake_swarm import FakeSwarm
from test_cli import HEAVY, imported_by
from torrents import content, lay_down, manifest_of, v1_torrent

from grokfetch import errors, history
from grokfetch.cli import main
from grokfetch.commands import status
from grokfetch.fetch import Status, fetch
from grokfetch.history import Sample, recorded, thinned
from grokfetch.manifest import Manifest, ManifestTensor
from grokfetch.record import FileProof, Record
from grokfetch.storage import read_owner
from grokfetch.store import Store
from grokfetch.survey import Group, piece_map, survey

PIECE = 32768
FILES = {"a": content(3 * PIECE - 100), "b": content(1000), "c": content(5 * PIECE)}
TORRENT = v1_torrent(FILES, PIECE)
SIZE = sum(map(len, FILES.values()))
PIECES = -(-SIZE // PIECE)


@pytest.fixture
def fetched(tmp_path):
    list(fetch(Store(tmp_path), FakeSwarm(TORRENT, dict(FILES))))
    return tmp_path


def forget(root, *pieces):
    """Take pieces out of the record."""
    store = Store(root)
    with store.lock():
        record = store.record()
        store.save_record(Record(record.info_hash, record.pieces - set(pieces), record.files))


def shown(root, *arguments, code=0):
    result = CliRunner().invoke(main, ["status", str(root), *arguments])
    assert result.exit_code == code, result.output
    return result.output


def machine(root):
    return json.loads(shown(root, "--json"))


def test_all_is_proven_after_a_fetch_and_said_so_by_what(fetched):
    text = shown(fetched)
    assert f"proven   100.0 %, {SIZE:,} of {SIZE:,} bytes, by piece hashes\n" in text
    assert "missing" not in text
    assert "files    3 proven" in text
    assert "at work  nobody" in text
    assert f"{status.SHADES[-1] * PIECES}\n" in text


def test_what_is_missing_is_said_in_bytes_and_pieces_and_seen_in_the_map(fetched):
    forget(fetched, 2, 3, 7)
    found = machine(fetched)
    assert found["schema"] == 1
    assert found["pieces"] == {
        "total": PIECES,
        "proven": PIECES - 3,
        "missing": [[2, 3], [7, 7]],
    }
    assert found["bytes"]["proven"] == SIZE - 3 * PIECE
    assert found["not_proven"] == {"top/a": "begun", "top/b": "begun", "top/c": "begun"}
    none, all_ = status.SHADES[0], status.SHADES[-1]
    row = "".join(none if piece in {2, 3, 7} else all_ for piece in range(PIECES))
    assert f"\n{row}\n" in shown(fetched)
    assert f"missing  {3 * PIECE / 1000:.1f} kB, 3 of {PIECES} pieces" in shown(fetched)


@pytest.mark.parametrize("change", ["touched", "cut", "gone"])
def test_a_file_that_has_changed_counts_as_not_proven(fetched, change):
    path = fetched / "top/c"
    {
        "touched": lambda: os.utime(path, (1, 1)),
        "cut": lambda: os.truncate(path, 10),
        "gone": path.unlink,
    }[change]()
    found = machine(fetched)
    assert found["not_proven"]["top/c"] == ("absent" if change == "gone" else "changed")
    assert found["bytes"]["proven"] <= SIZE - len(FILES["c"])
    if change != "gone":
        assert "1 changed since they were verified: top/c" in shown(fetched)


def test_status_hashes_nothing_writes_nothing_and_takes_no_lock(fetched, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in fetched.rglob("*")}
    monkeypatch.setattr("fcntl.flock", None)
    monkeypatch.setattr("os.preadv", None)
    machine(fetched)
    assert {path: path.stat().st_mtime_ns for path in fetched.rglob("*")} == before


def test_beside_a_running_fetch_status_tells_who_is_at_work_and_how_fast(tmp_path):
    store, seen = Store(tmp_path), 0
    events = recorded(store, fetch(store, FakeSwarm(TORRENT, dict(FILES))), clock=Turns())
    for event in events:
        if isinstance(event, Status) and event.phase == "downloading" and event.peers:
            found = machine(tmp_path)
            assert found["owner"] == {"pid": os.getpid(), "host": socket.gethostname()}
            last = found["history"][-1]
            assert (last["phase"], last["peers"], last["rate"]) == ("downloading", 1, 1.0)
            assert f"process {os.getpid()} on " in shown(tmp_path)
            assert "from 1 peer" in shown(tmp_path)
            seen += 1
    assert seen
    assert machine(tmp_path)["owner"] is None
    assert machine(tmp_path)["history"][-1]["phase"] == "done"
    assert machine(tmp_path)["history"][-1]["proven"] == SIZE


class Turns:
    """A clock on which every look is an hour later."""

    now = 0.0

    def __call__(self):
        self.now += 3600
        return self.now


def test_a_fetch_that_has_no_metadata_yet_is_told_from_a_folder_of_nobody(tmp_path):
    text = shown(tmp_path, code=errors.StateMissing.exit_code)
    assert "nothing here says" in text
    with Store(tmp_path).lock():
        text = shown(tmp_path, code=errors.StateMissing.exit_code)
        assert "has not got the torrent's metadata yet" in text


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


def test_layers_stand_in_numeric_order_and_the_rest_after_them(tmp_path):
    files = {f"t{index}": content(PIECE, index) for index in range(12)}
    torrent = v1_torrent(files, PIECE)
    plain = manifest_of(files, torrent.info_hash)
    names = [f"transformer/decoder_layer_{layer}/moe/w" for layer in (0, 1, 10, 2)]
    names += ["language_model/rms_norm/scale", "something/else"]
    tensors = tuple(
        ManifestTensor(name, PurePosixPath(f"top/t{index}"), "int8", (PIECE,), 0)
        for index, name in enumerate(names)
    )
    manifest = Manifest(plain.name, plain.files, info_hash=plain.info_hash, tensors=tensors)
    list(fetch(Store(tmp_path), FakeSwarm(torrent, files), manifest=manifest))
    forget(tmp_path, 2)
    assert survey(Store(tmp_path)).groups == (
        Group("layer 0", PIECE, PIECE),
        Group("layer 1", PIECE, PIECE),
        Group("layer 2", PIECE, PIECE),
        Group("layer 10", 0, PIECE),
        Group("embedding and final norm", PIECE, PIECE),
        Group("other tensors", PIECE, PIECE),
    )
    assert "layer 10   0.0 %" in shown(tmp_path)


def test_what_a_manifests_sha256_proves_is_told_apart(tmp_path):
    lay_down(tmp_path, FILES)
    manifest = manifest_of(FILES, None, digests=True)
    store = Store(tmp_path)
    with store.lock():
        store.save_manifest(manifest)
        proofs = {f.path: FileProof(store.stamp(f.path), f.sha256) for f in manifest.files[:2]}
        store.save_record(Record(None, frozenset(), proofs))
    found = machine(tmp_path)
    assert found["bytes"]["by_pieces"] == 0
    assert found["bytes"]["by_sha256"] == len(FILES["a"]) + len(FILES["b"])
    assert "bytes, by sha256" in shown(tmp_path)
    os.utime(tmp_path / "top/a", (1, 1))
    assert machine(tmp_path)["bytes"]["by_sha256"] == len(FILES["b"])


@pytest.mark.parametrize("width", [20, 80, 200])
def test_the_map_fits_the_terminal_and_needs_no_colour(fetched, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    found = survey(Store(fetched))
    wide = type(found)(**{**fields(found), "pieces": tuple(i % 3 > 0 for i in range(20_000))})
    rows = list(status.lines(fetched, wide, None, (), width=width, now=0.0))
    rows = rows[rows.index("") + 2 :]
    assert rows
    assert all(len(row) == width for row in rows)
    assert len(rows) <= status.MAP_ROWS
    assert "\x1b" not in "".join(rows)


def fields(value):
    return {name: getattr(value, name) for name in type(value).__dataclass_fields__}


def test_the_map_says_all_and_nothing_only_where_it_is_so():
    assert piece_map([True] * 5, 80) == [1.0] * 5
    assert piece_map([False, True, True, True], 2) == [0.5, 1.0]
    assert status._shade(0.999, "·░▒▓█") == "▓"
    assert status._shade(0.001, "·░▒▓█") == "░"
    assert sum(piece_map([piece % 7 == 0 for piece in range(7000)], 10)) == pytest.approx(10 / 7)


def test_a_terminal_that_knows_ascii_only_gets_ascii(fetched, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    text = "\n".join(status.lines(fetched, survey(Store(fetched)), None, (), width=80, now=0.0))
    assert text.isascii()


def test_a_history_of_days_stays_small_and_keeps_its_ends():
    samples = ()
    for second in range(10_000):
        samples = thinned((*samples, Sample(float(second), second, 1, 1.0, "downloading")))
    assert len(samples) <= history.LIMIT
    assert samples[0].time == 0
    assert samples[-1].time == 9999
    assert history.decode(history.encode(samples)) == samples


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"schema": 9, "samples": []}',
        b'{"schema": 1}',
        b'{"schema": 1, "sam',
        b'{"schema": 1, "samples": [[1]]}',
        b'{"schema": 1, "samples": [["x", 1, 2, 3, 4]]}',
        b'{"schema": 1, "samples": [[1, 1e400, 2, 3, 4]]}',
    ],
)
def test_a_damaged_history_is_ignored(fetched, text):
    (fetched / ".grokfetch/progress.json").write_bytes(text)
    assert machine(fetched)["history"] == []


def test_status_imports_nothing_heavy(fetched):
    call = f"from grokfetch.cli import main\ntry: main(['status', {str(fetched)!r}])"
    assert not imported_by(f"{call}\nexcept SystemExit: pass") & HEAVY
