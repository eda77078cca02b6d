"""After a power cut nothing wrong is trusted, nothing safe is fetched again, and the fetch
succeeds.

Real commands are recorded on our own file system, and states that a cut may leave are tried.
benchmarks/faults.py tries many thousands of them.
"""

import contextlib
import functools
import itertools
import random

import pytest
from powercut.promises import outlived, safe, tried
from powercut.recorder import Fault
from powercut.scenarios import FILES, NAMES, available, planted, record, strike
from powercut.states import Cut, Disk, Operation

from grokfetch.errors import GrokfetchError
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify

CUTS = 6
SLOW = ("run", "while fetching", "publish from a mirror")
"""Scenarios that take seconds, for jax or many files: for benchmarks/faults.py and the gate."""


@pytest.fixture(scope="module", autouse=True)
def _recorder():
    reason = available()
    if reason is not None:
        pytest.skip(f"no file system can be recorded here: {reason}")


def broken(recorded, cuts, seed=0):
    """The promises broken in states after `count` cuts at even distances."""
    chance = random.Random(seed)
    count = len(recorded.operations) - recorded.begun
    for number in range(cuts):
        cut = Cut(recorded.operations, recorded.begun + count * (number + 1) // cuts)
        kept = safe(recorded, cut.past)
        for disk in (cut.worst(), cut.some(chance)):
            yield from tried(recorded, disk, kept).broken


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A scenario of a name, recorded once."""

    @functools.cache
    def undisturbed(name):
        return record(name, tmp_path_factory.mktemp("recorded") / name)

    return undisturbed


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES],
)
def test_no_cut_makes_a_wrong_byte_trusted_or_a_safe_one_lost(name, recorded):
    assert not list(broken(recorded(name), CUTS))


def test_a_record_written_before_its_data_is_found(tmp_path):
    fault = "import grokfetch.folder.payload as it; it.flush_one = lambda path: None"
    with planted(fault):
        recorded = record("swarm", tmp_path / "swarm")
    # One seed in fourteen leaves the data of every record complete.
    promises = itertools.chain.from_iterable(broken(recorded, 30, seed) for seed in range(8))
    assert any("count as proven and are wrong" in promise for promise in promises)


def test_a_folder_that_is_not_flushed_is_found(tmp_path):
    fault = """
import grokfetch.folder.payload as it
real = it.flush_one
it.flush_one = lambda path: None if path.is_dir() else real(path)
"""
    with planted(fault):
        recorded = record("swarm", tmp_path / "swarm")
    assert any("are fetched again" in promise for promise in broken(recorded, CUTS))


@pytest.mark.parametrize(
    ("name", "code", "promise"),
    [
        ("export", "import loader.export.writing as it", "are kept"),
        ("publish", "import grokfetch.folder.atomic as it", "lost after its command has ended"),
        pytest.param(
            "publish from a mirror",
            "import grokfetch.fetch.hashed_mirror as it",
            "were hashed, flushed and recorded",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["export", "publish", "mirror"],
)
def test_a_folder_that_another_command_does_not_flush_is_found(name, code, promise, tmp_path):
    with planted(f"{code}\nit.flush = lambda *_: None"):
        recorded = record(name, tmp_path / name)
    assert any(promise in it for it in broken(recorded, CUTS))


def test_an_export_recorded_before_its_bytes_are_flushed_is_found(tmp_path):
    fault = "import loader.export.target_file as it; it.TargetFile.flush = lambda self: None"
    with planted(fault):
        recorded = record("export", tmp_path / "export")
    assert any("recorded and are not on the disk" in promise for promise in broken(recorded, 30))


@pytest.mark.parametrize(
    ("name", "among", "at", "action"),
    [
        pytest.param("swarm", "changes", 1, "ENOSPC", marks=pytest.mark.slow),
        ("swarm", "changes", 45, "EIO"),
        ("swarm", "changes", 70, "kill"),
        ("mirror", "writes", 10, "short"),
        pytest.param("repair", "changes", 40, "kill", marks=pytest.mark.slow),
        ("adoption", "reads", 3, "EIO"),
        ("publish", "changes", 14, "ENOSPC"),
        ("manifest", "changes", 6, "kill"),
        ("export", "changes", 30, "EIO"),
        ("export", "writes", 20, "short"),
        ("swarm", "writes", 20, "flip"),
        ("repair", "reads", 5, "flip"),
        ("publish", "writes", 7, "flip"),
        ("export", "writes", 20, "flip"),
        ("manifest", "reads", 1, "short"),
        pytest.param("run", "reads", 20, "sector", marks=pytest.mark.slow),
        pytest.param("run", "reads", 20, "truncated", marks=pytest.mark.slow),
        pytest.param("while fetching", "reads", 30, "sector", marks=pytest.mark.slow),
        pytest.param("while fetching", "reads", 30, "truncated", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_once_or_a_kill_costs_nothing_proven(name, among, at, action, tmp_path):
    struck = strike(name, tmp_path / name, Fault(among, at, action))
    assert struck.reached
    assert not outlived(struck).broken


def test_a_disk_that_fails_as_the_lock_is_given_back_ends_nothing(recorded, tmp_path):
    usual = recorded("manifest")
    assert usual.operations[-1].kind == "truncate"
    last = len(usual.operations) - usual.begun
    struck = strike("manifest", tmp_path / "last", Fault("changes", last, "EIO"))
    assert struck.reached
    assert not outlived(struck).broken


def test_what_a_lying_flush_has_lost_is_found_by_verification(recorded, tmp_path):
    told = recorded("swarm")
    kept = [it for it in told.operations if it.kind != "fsync"]
    chance, found = random.Random(0), 0
    for number in range(12):
        disk = Cut(kept, len(kept)).some(chance)
        (tmp_path / str(number)).mkdir()
        disk.lay_down(tmp_path / str(number))
        right = [disk.content(f"to/top/{path}") == data for path, data in FILES.items()]
        with contextlib.suppress(GrokfetchError):
            *_, summary = verify(Store(tmp_path / str(number) / "to"))
            assert summary.complete == all(right)
            found += not all(right)
    assert found


def test_what_was_flushed_is_safe_and_nothing_else():
    written = [
        Operation("create", "a", inode=1),
        Operation("write", inode=1, data=b"old", mtime_ns=1),
        Operation("fsync", inode=1, mtime_ns=1),
        Operation("fsyncdir", ""),
        Operation("write", inode=1, data=b"new", mtime_ns=2),
        Operation("rename", "a", other="b"),
    ]
    worst, best = Cut(written, 6).worst(), Cut(written, 6).best()
    assert (worst.content("a"), worst.content("b")) == (b"old", None)
    assert (best.content("a"), best.content("b")) == (None, b"new")
    assert Cut(written, 2).worst().names == {"": None}


def test_a_state_is_laid_down_with_its_times(tmp_path):
    disk = Disk()
    disk.apply(Operation("mkdir", "d"))
    disk.apply(Operation("create", "d/f", inode=1))
    disk.apply(Operation("write", inode=1, offset=2, data=b"x", mtime_ns=5_000_000_000))
    disk.lay_down(tmp_path)
    assert (tmp_path / "d/f").read_bytes() == b"\0\0x"
    assert (tmp_path / "d/f").stat().st_mtime_ns == 5_000_000_000
