"""How much memory a process may take is what its cgroup leaves, pages of files not counted."""

import pytest

from loader.devices.memory import available, cgroup_room

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
    assert cgroup_room(root) == 1000 - 500 + 100
    (root / "sys/fs/cgroup/slice/job/memory.max").write_text("200\n")
    assert cgroup_room(root) == 200 - 5 + 100


def test_limit_of_version_1_counts_the_cgroups_below(root):
    (root / "proc/self/cgroup").write_text("5:cpu:/job\n4:memory:/job\n0::/\n")
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 70\ntotal_inactive_file 30\n"
    files = {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "800", "memory.stat": stat}
    cgroup(root, "memory/job", files)
    assert cgroup_room(root) == 900 - 800 + 100


def test_no_limit_is_no_limit(root):
    assert cgroup_room(root) is None
    (root / "proc/self/cgroup").write_text("4:memory:/\n0::/\n")
    files = {"memory.usage_in_bytes": "1", "memory.stat": STAT}
    cgroup(root, "memory", {"memory.limit_in_bytes": str(2**63 - 4096), **files})
    assert cgroup_room(root) is None


def test_more_than_the_limit_leaves_nothing(root):
    (root / "proc/self/cgroup").write_text("0::/\n")
    cgroup(root, "", {"memory.max": "10", "memory.current": "900", "memory.stat": STAT})
    assert cgroup_room(root) == 0


def test_this_process_may_take_some():
    assert available() > 0
