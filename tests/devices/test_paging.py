"""Pages of mapped weights: what is read ahead, what is kept within a budget, what is dropped."""

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import golden

from grokfetch.errors import CheckpointInvalid, StorageFailed
from loader.devices.paging import AHEAD, Division, Kept, Managed, divide
from loader.devices.placement import make_mesh, share
from loader.inference.engine import Engine
from loader.weights import pages
from loader.weights.checkpoint import open_folder
from loader.weights.pages import Pages
from loader.weights.schema import GrokConfig
from loader.weights.synthetic import write_checkpoint

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are there")
GB = 10**9
CONFIG = GrokConfig(
    vocab_size=256, emb_size=256, num_layers=2, num_q_heads=8, num_kv_heads=8, key_size=32,
    widening_factor=8, sequence_len=64, attn_output_multiplier=0.2,
)  # fmt: skip
"""Experts of 1 MB, large enough to be measured in pages."""


class Ready:
    def __init__(self):
        self.waited = 0

    def block_until_ready(self):
        self.waited += 1


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "ckpt-0", CONFIG, seed=3)
    return tmp_path / "ckpt-0"


def expert_span(checkpoint, layer, expert, part="linear"):
    """First byte and length of one expert's matrix, reduced to pages that only it uses."""
    tensor = checkpoint[f"transformer/decoder_layer_{layer}/moe/{part}/w"]
    each = tensor.array.nbytes // CONFIG.num_experts
    start = tensor.array.offset + expert * each
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    return tensor, first, (start + each - first) // mmap.PAGESIZE * mmap.PAGESIZE


def mapped(checkpoint, layer, expert):
    """The share of an expert's pages that is in our page table, read from /proc."""
    tensor, first, length = expert_span(checkpoint, layer, expert)
    page = (tensor.file.ctypes.data + first) // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(8 * page)
        words = np.frombuffer(file.read(8 * (length // mmap.PAGESIZE)), np.uint64)
    return float(np.mean(words >> np.uint64(63)))


def evict(folder):
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(checkpoint, layer, expert):
    """The share of an expert's pages that is in the page cache, whoever has mapped it."""
    tensor, first, length = expert_span(checkpoint, layer, expert)
    with tensor.path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        address = np.frombuffer(view, np.uint8).ctypes.data + first
        there = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), there) == 0
    return float(np.mean(np.array(there) & 1))


def test_everything_stays_where_it_fits():
    assert divide(8 * GB, 2 * GB, GB, 8 * GB) == Division(everything=True, base=True, experts=0)


def test_what_every_token_needs_comes_before_experts():
    assert divide(100 * GB, 9 * GB, GB, 20 * GB) == Division(
        everything=False, base=True, experts=20 - 9 - AHEAD - 1
    )
    assert not divide(100 * GB, 9 * GB, GB, 9 * GB).base


@given(
    *(st.integers(0, 1 << 40) for _ in range(2)), st.integers(1, 1 << 32), st.integers(-1, 1 << 42)
)
def test_what_stays_never_exceeds_the_budget(rest, base, expert, budget):
    found = divide(rest + base, base, expert, budget)
    kept = rest + base if found.everything else found.base * base + found.experts * expert
    assert kept <= max(budget, 0)
    assert found.experts >= 0


@given(st.integers(0, 4), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=60))
def test_experts_that_stay_are_counted_and_no_more_than_fit(capacity, uses):
    kept, there = Kept(capacity), set()
    for key in uses:
        there.add(key)
        there.discard(kept.use(key))
        assert len(there) <= capacity
        assert all(other in kept for other in there)


def test_expert_that_is_chosen_more_often_takes_the_place_of_another():
    kept = Kept(1)
    assert kept.use((0, 0)) is None
    assert [kept.use((0, 1)) for _ in range(2)] == [(0, 1), (0, 1)]
    assert kept.use((0, 1)) == (0, 0)
    assert (0, 1) in kept


@LINUX
def test_chosen_experts_are_there_before_they_are_touched_and_no_others(folder):
    evict(folder)
    checkpoint = open_folder(folder, CONFIG)
    managed = Managed(checkpoint, 1 << 40)
    managed.layer(0)
    managed.experts(0, [2, 5])
    for expert in (2, 5):
        managed.expert(0, expert)
        assert mapped(checkpoint, 0, expert) == 1
    assert max(mapped(checkpoint, 0, other) for other in (0, 1, 3, 4, 6, 7)) < 0.5


@LINUX
def test_experts_beyond_the_budget_are_dropped_once_they_are_used(folder):
    evict(folder)
    checkpoint = open_folder(folder, CONFIG)
    managed, ready = Managed(checkpoint, 0), Ready()
    assert managed.division == Division(everything=False, base=False, experts=0)
    managed.experts(0, [2, 5])
    managed.expert(0, 2)
    assert mapped(checkpoint, 0, 2) == 1
    managed.used(0, 2, ready)
    assert ready.waited
    assert mapped(checkpoint, 0, 2) == 0
    # Neighbours may share a large page of the cache with it, but most of it is gone.
    assert cached(checkpoint, 0, 2) < 0.6


@pytest.mark.slow
def test_tokens_are_the_same_within_any_budget(folder):
    mesh = make_mesh(CONFIG, golden.ONE)
    made = []
    for budget in (1 << 40, 6_000_000):
        checkpoint = open_folder(folder, CONFIG)
        paged = Managed(checkpoint, budget)
        engine = Engine(CONFIG, share(checkpoint, mesh), mesh, "float32", paged)
        made.append(list(engine.generate([5, 6, 7], 6)))
    assert made[0] == made[1]


@LINUX
def test_file_that_is_cut_while_it_is_used_gets_a_message(folder):
    checkpoint = open_folder(folder, CONFIG)
    managed = Managed(checkpoint, 0)
    managed.experts(0, [1])
    managed.expert(0, 1)
    tensor = checkpoint["transformer/decoder_layer_0/moe/linear/w"]
    os.truncate(tensor.path, 4096)
    with pytest.raises(CheckpointInvalid, match="shrunk on disk") as caught:
        managed.expert(0, 3)
    assert caught.value.path == str(tensor.path)


@LINUX
def test_page_that_no_disk_gives_is_an_error_and_no_signal(folder, monkeypatch):
    checkpoint = open_folder(folder, CONFIG)
    managed = Managed(checkpoint, 0)
    monkeypatch.setattr(Pages, "check", lambda _: None)
    os.truncate(checkpoint["transformer/decoder_layer_0/moe/linear/w"].path, 4096)
    with pytest.raises(StorageFailed, match="become shorter"):
        managed.expert(0, 7)


def test_system_without_such_advice_is_told_that_pages_will_be_needed(folder, monkeypatch):
    asked = []

    def advise(_, advice):
        asked.append(advice)
        return errno.EINVAL if advice == pages.POPULATE_READ else 0

    monkeypatch.setattr(Pages, "advise", advise)
    managed = Managed(open_folder(folder, CONFIG), 1 << 40)
    managed.expert(0, 0)
    assert pages.WILL_NEED in asked


CHILD = """
import os, resource, sys
from pathlib import Path
from loader.weights.checkpoint import open_folder
from loader.devices.paging import Managed
from loader.weights.schema import GrokConfig
{prepare}
checkpoint = open_folder(Path(sys.argv[1]), {config})
managed = Managed(checkpoint, {budget})
{act}
"""


def run_child(folder, **parts):
    code = CHILD.format(
        **{"prepare": "", "act": "", "budget": 12_000_000, "config": CONFIG} | parts
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        check=False,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@LINUX
def test_small_limit_on_locked_memory_is_told_and_ends_nothing(folder):
    # Only a process without the privilege to lock unlimited memory reaches the limit.
    prepare = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
libc.prctl(24, 14, 0, 0, 0)
import struct
header = struct.pack("Ii", 0x20080522, 0)
libc.capset(header, struct.pack("6I", 0, 0, 0, 0, 0, 0))
"""
    act = "print(managed.division.base, managed.unlocked); managed.expert(0, 0); print('went on')"
    first, second = run_child(folder, prepare=prepare, act=act).splitlines()
    assert first.startswith("True ")
    assert first != "True "
    assert second == "went on"


def cgroup():
    """A folder of cgroups in which we may make one that limits memory, None without one."""
    for mount, name in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        place = Path(mount) / f"grokfetch-test-{os.getpid()}"
        try:
            place.mkdir()
        except OSError:
            continue
        if (place / name).exists():
            return place, place / name
        place.rmdir()
    return None


@pytest.mark.slow
@LINUX
def test_generation_goes_on_in_a_cgroup_smaller_than_the_checkpoint(tmp_path):
    made = cgroup()
    if made is None:
        pytest.skip("no cgroup that limits memory can be made here")
    place, limit = made
    config = GrokConfig(
        vocab_size=256, emb_size=2048, num_layers=6, num_q_heads=16, num_kv_heads=8, key_size=128,
        widening_factor=5, sequence_len=64,
    )  # fmt: skip
    write_checkpoint(tmp_path / "ckpt-0", config, seed=3)
    evict(tmp_path / "ckpt-0")
    size = sum(path.stat().st_size for path in (tmp_path / "ckpt-0").iterdir())
    room = 480 << 20
    assert size > 1.5 * room
    code = f"""
import os, sys
from pathlib import Path
Path({str(place / "cgroup.procs")!r}).write_text(str(os.getpid()))
from grokfetch.process_limits import available_memory
from loader.weights.checkpoint import open_folder
from loader.inference.engine import Engine
from loader.devices.paging import Managed
from loader.devices.placement import make_mesh, share
from loader.weights.schema import GrokConfig
config = {config!r}
assert available_memory() <= {room}
checkpoint = open_folder(Path({str(tmp_path / "ckpt-0")!r}), config)
mesh = make_mesh(config)
managed = Managed(checkpoint, available_memory() - (300 << 20))
assert not managed.division.everything
engine = Engine(config, share(checkpoint, mesh), mesh, "float32", managed)
print(len(list(engine.generate([5, 6, 7], 12))))
"""
    try:
        limit.write_text(str(room))
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            env=env,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "12"
    finally:
        shutil.rmtree(tmp_path)
        place.rmdir()
