"""Before the first byte: what a fetch needs, what is there, and the refusal that names both."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from support.fake_swarm import FakeSwarm, Killed
from support.program import HEAVY, grokfetch, imported_by, invoke
from support.small_disk import small_disk
from support.torrents import content, manifest_of, v1_torrent

from grokfetch.commands.machine import Machine, mapped, shares, verdict
from grokfetch.errors import StorageFailed
from grokfetch.fetch import fetch, preflight
from grokfetch.fetch.preflight import Need, Place, checks, need, probe, refuse
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import encode
from grokfetch.manifest.shipped import grok_1
from grokfetch.open_files import open_files_for
from grokfetch.torrent.metainfo import encode_torrent
from loader.devices.present import Device, devices

PIECE = 32768
FILES = {"a": content(3 * PIECE - 100), "b": content(1000), "c": content(5 * PIECE)}
MANY = 2**20
TORRENT = v1_torrent(FILES, PIECE)
SIZE = sum(map(len, FILES.values()))
ENOUGH = Place(Path("d"), "ext4", 1000, 100, 1000, 1024, sparse=True)
NEED = Need(1000, 100, 1000, PurePosixPath("top/c"))


def under(limit, *arguments):
    """The program in a process with a lower limit: exit code and stderr."""
    lower = f"import resource; resource.setrlimit(resource.{limit[0]}, ({limit[1]}, {limit[1]}))"
    call = f"from grokfetch.cli import main; main({[str(argument) for argument in arguments]!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{lower}; {call}"], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


# --- the decision --------------------------------------------------------------------------------


def test_what_is_just_enough_is_enough():
    assert all(check.ok for check in checks(NEED, ENOUGH))
    refuse(checks(NEED, ENOUGH), Path("d"))


@pytest.mark.parametrize(
    ("need_change", "place_change", "said"),
    [
        ({}, {"free": 999}, "1,000 bytes are still to come, 999 are free"),
        ({}, {"inodes": 99}, "100 files and folders are needed, the disk takes only 99"),
        ({}, {"longest": 999}, "top/c has 1,000 bytes, at most 999 are possible here (ext4)"),
        ({}, {"open_files": 64}, "128 files must be open at once, 64 are allowed"),
        ({}, {"refused": "it is read-only"}, "it is read-only"),
        ({"denied": Path("d/top/a")}, {}, "d/top/a cannot be written"),
    ],
)
def test_whatever_is_short_is_refused_by_name_with_what_to_do(need_change, place_change, said):
    needed = dataclasses.replace(NEED, **need_change)
    place = dataclasses.replace(ENOUGH, **place_change)
    with pytest.raises(StorageFailed) as failed:
        refuse(checks(needed, place), Path("d"))
    assert failed.value.what == said
    assert failed.value.hint


def test_a_file_system_that_counts_no_inodes_refuses_none():
    assert all(check.ok for check in checks(NEED, dataclasses.replace(ENOUGH, inodes=None)))


# --- the look ------------------------------------------------------------------------------------


def test_what_is_on_the_disk_already_counts_and_holes_do_not(tmp_path):
    (tmp_path / "top").mkdir()
    (tmp_path / "top/a").write_bytes(bytes(range(256)) * 256)
    (tmp_path / "top/b").touch()
    os.truncate(tmp_path / "top/b", 65536)
    files = [(PurePosixPath("top", name), 65536) for name in ("a", "b", "x/y")]
    found = need(tmp_path, files)
    assert found.bytes == 2 * 65536
    assert found.inodes == preflight.STATE_INODES + 2
    assert (found.longest, found.denied) == (65536, None)


def test_the_look_leaves_no_trace_and_makes_no_folder(tmp_path):
    place = probe(tmp_path / "not/yet", 10**9)
    assert place.sparse
    assert not place.refused
    assert place.free > 0
    assert place.longest > 10**9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("supported", [True, False], ids=["nameless", "named"])
def test_the_file_of_a_look_that_was_killed_is_gone_after_the_next_one(
    tmp_path, monkeypatch, supported
):
    with monkeypatch.context() as patch:
        patch.delattr(os, "O_TMPFILE")
        patch.setattr(preflight, "flush", killing)
        patch.setattr(Path, "unlink", killing)
        with pytest.raises(Killed):
            probe(tmp_path / "new", 10**6)
    assert len(list(tmp_path.iterdir())) == 1
    if not supported:
        monkeypatch.delattr(os, "O_TMPFILE")
    assert not probe(tmp_path / "new", 10**6).refused
    assert list(tmp_path.iterdir()) == []


def killing(*_args, **_options):
    raise Killed


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "is not a folder" in probe(tmp_path / "file", 1).refused


def test_a_small_disk_is_refused_before_the_first_byte(tmp_path):
    with small_disk(tmp_path / "disk", "size=128k") as disk:
        swarm = FakeSwarm(TORRENT, dict(FILES))
        with pytest.raises(StorageFailed, match="bytes are still to come") as failed:
            list(fetch(Store(disk), swarm))
        assert "--to DIR" in failed.value.hint
        assert swarm.orders == []


def test_a_disk_without_inodes_is_refused_before_the_first_byte(tmp_path):
    with small_disk(tmp_path / "disk", "size=8m,nr_inodes=12") as disk:
        swarm = FakeSwarm(TORRENT, dict(FILES))
        with pytest.raises(StorageFailed, match="files and folders are needed"):
            list(fetch(Store(disk), swarm))
        assert swarm.orders == []


def test_a_read_only_disk_is_refused_by_plan_and_fetch_and_still_shows_its_status(tmp_path):
    with small_disk(tmp_path / "disk", "size=8m") as disk:
        list(fetch(Store(disk), FakeSwarm(TORRENT, dict(FILES))))
        (disk / "top/b").unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(StorageFailed, match="Read-only"):
            list(fetch(Store(disk), FakeSwarm(TORRENT, dict(FILES))))
        for command in (["plan", "--to", disk], ["fetch", disk]):
            assert "Read-only" in grokfetch(*command, code=StorageFailed.exit_code)
        assert "1 absent" in grokfetch("status", disk)


def test_a_file_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "top").mkdir()
    (tmp_path / "top/a").touch()
    monkeypatch.setattr(preflight.os, "access", lambda path, _mode: path.name != "a")
    found = need(tmp_path, [(PurePosixPath("top/a"), 10)])
    assert found.denied == tmp_path / "top/a"


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (("RLIMIT_FSIZE", 100_000), "at most 100,000 are possible"),
        (("RLIMIT_NOFILE", 60), "60 are allowed"),
    ],
)
def test_limits_of_the_process_are_refused_by_plan(tmp_path, limit, said):
    manifest = tmp_path / "m.json"
    manifest.write_bytes(encode(manifest_of(FILES, TORRENT.info_hash)))
    code, text = under(limit, "plan", manifest, "--to", tmp_path)
    assert code == StorageFailed.exit_code
    assert said in text
    assert "ulimit" in text


# --- devices -------------------------------------------------------------------------------------


def test_devices_are_found_by_their_files(tmp_path):
    assert devices(tmp_path) == ()
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    gpu = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 5\n")
    assert devices(tmp_path) == (Device("NVIDIA H200"), Device("NVIDIA GPU"))


def test_a_tpu_is_found_by_its_file(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/accel0").touch()
    assert devices(tmp_path) == (Device("TPU"),)


GB = 10**9


@pytest.mark.parametrize(
    ("count", "there", "fits"),
    [
        (1, (), True),
        (2, (), False),
        (2, (Device("G", 50 * GB),), False),
        (2, (Device("G", 50 * GB),) * 2, True),
        (2, (Device("G", 50 * GB), Device("G", 39 * GB)), False),
        (2, (Device("G"),) * 2, None),
    ],
)
def test_a_count_of_devices_will_do_if_there_are_so_many_with_the_memory(count, there, fits):
    assert verdict(count, 40 * GB, Machine(50 * GB, there, MANY))[0] is fits


def test_mapped_weights_need_memory_for_the_cache_only():
    def verdict_with(memory):
        machine = Machine(memory, (), MANY)
        return mapped(tuple(shares(grok_1(), machine)), machine, 770)

    assert verdict_with(24 * GB).fits
    assert "read from disk for each token" in verdict_with(24 * GB).why
    assert "enough for all weights" in verdict_with(400 * GB).why
    assert not verdict_with(2 * GB).fits
    assert mapped((), Machine(GB, (), MANY), 770) is None


def test_mapped_weights_need_as_many_open_files_as_python_keeps_open():
    needed = open_files_for(770)
    assert needed == (128 if sys.version_info >= (3, 13) else 898)
    for allowed in (needed - 1, needed):
        machine = Machine(24 * GB, (), allowed)
        verdict_here = mapped(tuple(shares(grok_1(), machine)), machine, 770)
        assert verdict_here.fits is (allowed == needed)
    machine = Machine(24 * GB, (), 100)
    why = mapped(tuple(shares(grok_1(), machine)), machine, 770).why
    assert f"needs {needed} open files, 100 are allowed" in why


def test_a_limit_of_the_address_space_is_named_by_plan(tmp_path, monkeypatch):
    machine = Machine(400 * GB, (), MANY, 16 * GB)
    in_files = mapped(tuple(shares(grok_1(), machine)), machine, 770)
    assert (in_files.fits, in_files.why) == (False, "ulimit -v allows 16.0 GB")
    assert verdict(1, 40 * GB, machine) == (False, "ulimit -v allows 16.0 GB")
    assert verdict(1, 10 * GB, machine)[0]
    rich = dataclasses.replace(probe(tmp_path, 0), free=10**12)
    monkeypatch.setattr("grokfetch.commands.plan.probe", lambda *_: rich)
    monkeypatch.setattr("grokfetch.commands.machine.devices", tuple)
    monkeypatch.setattr("grokfetch.commands.machine.address_space", lambda: (16 * GB, 15 * GB))
    assert planned(tmp_path).count("ulimit -v allows 16.0 GB") == 2
    assert json.loads(planned(tmp_path, "--json"))["machine"]["address_space"] == 16 * GB


def test_the_shares_of_grok_1_are_what_the_loader_places():
    found = {share.devices: share for share in shares(grok_1(), Machine(GB, (), MANY))}
    assert [share.mesh for share in found.values()] == [
        "expert=1,model=1",
        "expert=1,model=2",
        "expert=1,model=4",
        "expert=1,model=8",
        "expert=2,model=8",
        "expert=4,model=8",
        "expert=8,model=8",
    ]
    payload = sum(size for tensor in grok_1().tensors for _, size in tensor.spans())
    assert found[1].weights == payload
    assert payload / 8 < found[8].weights < payload / 8 * 1.01
    # Four times the experts and the table, and a copy of the attention's weights for each expert.
    assert payload / 64 < found[64].weights < payload / 64 * 1.2
    assert found[1].cache == 8 * found[8].cache == 64 * 2 * 8192 * 8 * 128 * 2
    assert {count: share.fits for count, share in found.items()} == dict.fromkeys(found, False)


# --- plan ----------------------------------------------------------------------------------------


def planned(folder, *arguments, code=0):
    return invoke("plan", *arguments, "--to", folder, code=code).stdout


def test_plan_prints_tables_that_fit_80_columns(tmp_path, monkeypatch):
    rich = dataclasses.replace(probe(tmp_path, 0), folder=Path("grok-1"), free=10**12)
    monkeypatch.setattr("grokfetch.commands.plan.probe", lambda *_: rich)
    text = planned(tmp_path)
    assert max(map(len, text.splitlines())) <= 80
    assert "318.2 GB" in text
    assert "8 h 50 min" in text
    assert "53 min 2 s" in text
    assert text.count("no GPU or TPU here") in {0, 6}


def test_plan_tells_a_machine_whether_it_can_work(tmp_path, monkeypatch):
    poor = dataclasses.replace(probe(tmp_path, 0), free=10**6)
    monkeypatch.setattr("grokfetch.commands.plan.probe", lambda *_: poor)
    found = json.loads(planned(tmp_path, "--json", code=StorageFailed.exit_code))
    assert found["schema"] == 1
    assert not found["possible"]
    assert [check["name"] for check in found["checks"] if not check["ok"]] == ["free disk"]
    assert found["seconds"]["100 MB/s"] == pytest.approx(found["missing"] / 1e8)
    assert found["seconds"]["100 Mbit/s"] == pytest.approx(found["missing"] * 8 / 1e8)
    assert len(found["modes"]["sharded"]) == 7
    assert found["modes"]["mapped"]["weights"] == found["modes"]["sharded"][0]["weights"]


def test_plan_counts_what_is_proven_in_the_folder(tmp_path):
    list(fetch(Store(tmp_path), FakeSwarm(TORRENT, dict(FILES))))
    assert json.loads(planned(tmp_path, "--json"))["missing"] == 0
    (tmp_path / "top/c").unlink()
    found = json.loads(planned(tmp_path, "--json"))
    assert found["missing"] == len(FILES["c"])
    assert found["modes"] == {"mapped": None, "sharded": []}


def test_plan_takes_a_torrent_file(tmp_path):
    files = {"a": content(40_000), "b": content(5)}
    torrent, other = tmp_path / "x.torrent", tmp_path / "y.torrent"
    torrent.write_bytes(encode_torrent(v1_torrent(files, 32768)))
    found = json.loads(planned(tmp_path / "new", torrent, "--json"))
    assert (found["bytes"], found["missing"]) == (40_005, 40_005)
    other.write_bytes(b"d1:xe")
    assert "y.torrent" in invoke("plan", other, code=11).output


def test_plan_imports_nothing_heavy(tmp_path):
    call = f"from grokfetch.cli import main\ntry: main(['plan', '--to', {str(tmp_path)!r}])"
    assert not imported_by(f"{call}\nexcept SystemExit: pass") & HEAVY
