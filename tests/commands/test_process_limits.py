"""A process may use what affinity, cgroup and `ulimit` leave, not counting the page cache."""

import os
import subprocess
import sys

import pytest

from grokfetch.process_limits import (
    address_space,
    available_memory,
    cgroup_memory,
    cores,
    most_memory,
)

STAT = "anon 300\nactive_file 40\ninactive_file 60\n"


def cgroup(root, place, files):
    folder = root / "sys/fs/cgroup" / place
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def test_nearest_limit_of_version_2_holds_whoever_sets_it(root):
    (root / "proc/self/cgroup").write_text("0::/slice/job\n")
    cgroup(root, "slice", {"memory.max": "1000\n", "memory.current": "500", "memory.stat": STAT})
    cgroup(root, "slice/job", {"memory.max": "max\n", "memory.current": "5", "memory.stat": STAT})
    assert cgroup_memory(root) == 1000 - 500 + 100
    (root / "sys/fs/cgroup/slice/job/memory.max").write_text("200\n")
    assert cgroup_memory(root) == 200 - 5 + 100


def test_limit_of_version_1_counts_the_cgroups_below(root):
    (root / "proc/self/cgroup").write_text("5:cpu:/job\n4:memory:/job\n0::/\n")
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 70\ntotal_inactive_file 30\n"
    files = {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "800", "memory.stat": stat}
    cgroup(root, "memory/job", files)
    assert cgroup_memory(root) == 900 - 800 + 100


def test_no_limit_is_no_limit(root):
    assert cgroup_memory(root) is None
    (root / "proc/self/cgroup").write_text("4:memory:/\n0::/\n")
    files = {"memory.usage_in_bytes": "1", "memory.stat": STAT}
    cgroup(root, "memory", {"memory.limit_in_bytes": str(2**63 - 4096), **files})
    assert cgroup_memory(root) is None


def test_more_than_the_limit_leaves_nothing(root):
    (root / "proc/self/cgroup").write_text("0::/\n")
    cgroup(root, "", {"memory.max": "10", "memory.current": "900", "memory.stat": STAT})
    assert cgroup_memory(root) == 0


def test_memory_that_is_throttled_counts_like_memory_that_is_refused(root):
    (root / "proc/self/cgroup").write_text("0::/\n")
    files = {"memory.max": "max\n", "memory.current": "500", "memory.stat": STAT}
    cgroup(root, "", files | {"memory.high": "900\n"})
    assert cgroup_memory(root) == 900 - 500 + 100
    (root / "sys/fs/cgroup/memory.max").write_text("800\n")
    assert cgroup_memory(root) == 800 - 500 + 100


@pytest.fixture
def many_cores(monkeypatch):
    """A process that may run on 64 cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("whole", "part", "usable"),
    [
        ("max 100000", "max 100000", 64),
        ("max 100000", "400000 100000", 4),
        ("250000 100000", "400000 100000", 3),
        ("10000 100000", "max 100000", 1),
        ("0 0", "nonsense", 64),
    ],
)
def test_a_quota_of_version_2_counts_whoever_sets_it(root, whole, part, usable):
    (root / "proc/self/cgroup").write_text("0::/slice/job\n")
    cgroup(root, "slice", {"cpu.max": whole})
    cgroup(root, "slice/job", {"cpu.max": part})
    assert cores(root) == usable


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(("quota", "usable"), [("-1", 64), ("150000", 2)])
def test_a_quota_of_version_1_counts(root, quota, usable):
    (root / "proc/self/cgroup").write_text("3:cpu,cpuacct:/job\n")
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}
    cgroup(root, "cpu,cpuacct/job", files)
    assert cores(root) == usable


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_hashing_copying_and_devices_heed_the_cores_that_are_left():
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        "from grokfetch.torrent.read_back import Hashers\n"
        "from loader.devices.xla_setup import processor\n"
        "hashers = Hashers()\n"
        "for _ in range(9): hashers.submit(len)\n"
        "import threading\n"
        "names = [thread.name for thread in threading.enumerate()]\n"
        "print(sum('hash' in name for name in names), processor().split('-')[-2])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_the_address_space_is_what_ulimit_says():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
        "from grokfetch.process_limits import address_space; print(*address_space())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit, left = map(int, done.stdout.split())
    assert limit == 10**9
    assert 0 < left < limit
    assert address_space() is None or address_space()[0] > 0


def test_this_process_may_take_some():
    assert 0 < available_memory() <= most_memory()
