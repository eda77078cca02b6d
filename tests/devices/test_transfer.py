"""Devices get the bytes of the file; host memory in flight is bounded; arrays stay as they are."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from support import golden

from grokfetch.errors import CheckpointInvalid
from loader.devices import assemble, staging, transfer
from loader.devices.transfer import division, to_devices
from loader.weights import pages
from loader.weights.pages import Pages
from loader.weights.shard_writer import write_shard

NAMES = (
    "language_model/in_out_embed/embeddings",
    "transformer/decoder_layer_3/moe/linear_1/w",
    "transformer/decoder_layer_3/multi_head_attention/key/w",
    "transformer/decoder_layer_3/rms_norm/scale",
)
MESH = jax.make_mesh((2, 4), ("a", "b"))


def split(*axes):
    return NamedSharding(MESH, PartitionSpec(*axes))


def resident(monkeypatch):
    pass


def staged(monkeypatch):
    """Transfer as to devices with separate memory."""
    monkeypatch.setattr(assemble, "on_host", lambda _: False)


WHOLE = transfer.CHUNK
CASES = [
    *((resident, WHOLE, axes) for axes in ((), ("a",), (None, "b"), ("b", "a"), (("a", "b"),))),
    (resident, 1000, ("b", "a")),
    (staged, WHOLE, ()),
    (staged, 12_000, (None, "a")),
]


@pytest.mark.parametrize(("how", "chunk", "axes"), CASES)
def test_any_sharding_gives_the_bytes_of_the_file(monkeypatch, how, chunk, axes):
    how(monkeypatch)
    monkeypatch.setattr(transfer, "CHUNK", chunk)
    counted = []
    names = NAMES[1:2] if chunk < WHOLE else NAMES[: 3 if len(axes) > 1 else 4]
    tensors = [golden.CHECKPOINT[name] for name in names]
    given = [(tensor, split(*axes)) for tensor in tensors]
    placed = list(transfer.transfer(given, on_bytes=counted.append))
    for tensor, array in zip(tensors, placed, strict=True):
        weight = array if tensor.scales is None else array.weight
        assert weight.sharding == split(*axes)
        assert (np.asarray(weight) == tensor.weight).all()
        if tensor.scales is not None:
            times = array.scales.shape[-2] // tensor.scales.shape[-2]
            assert (np.asarray(array.scales) == np.repeat(tensor.scales, times, axis=-2)).all()
    assert sum(counted) == sum(tensor.nbytes for tensor in tensors)


def test_scale_rows_are_repeated_where_a_device_holds_part_of_one():
    tensor = golden.CHECKPOINT[NAMES[2]]
    assert tensor.scales.shape[-2] == 1
    placed = to_devices(tensor, split("b"))
    assert placed.scales.shape[-2] == 4
    assert {shard.data.shape[0] for shard in placed.scales.addressable_shards} == {1}


def test_cpu_devices_with_the_same_block_share_its_memory():
    tensor = golden.CHECKPOINT[NAMES[1]]
    shards = to_devices(tensor, split(None, "b")).weight.addressable_shards
    assert len({shard.data.unsafe_buffer_pointer() for shard in shards}) == 4


def test_a_donated_array_leaves_the_memory_of_others_alone():
    tensor = golden.CHECKPOINT[NAMES[1]]
    one, other = (shard.data for shard in to_devices(tensor, split()).weight.addressable_shards[:2])
    jax.jit(lambda x: x + 1, donate_argnums=0)(one).block_until_ready()
    assert (np.asarray(other) == tensor.weight).all()


def test_arrays_outlive_everything_that_they_were_made_from(monkeypatch):
    monkeypatch.setattr(staging, "HUGE_PAGE", 4096)
    tensor = golden.CHECKPOINT[NAMES[1]]
    placed = [to_devices(tensor, split("a", "b")).weight for _ in range(20)]
    del placed[::2]
    gc.collect()
    for array in placed:
        assert (np.asarray(array) == tensor.weight).all()


def test_pages_that_are_dropped_are_read_again_and_announced(monkeypatch):
    announced = []
    monkeypatch.setattr(
        Pages, "advise", lambda these, advice: announced.append((advice, these.length))
    )
    tensor = golden.CHECKPOINT[NAMES[1]]
    monkeypatch.setattr(Pages, "is_cached", lambda *_: False)
    list(transfer.transfer([(tensor, split("a"))], drop=True))
    nbytes = tensor.weight.nbytes
    assert announced == [(pages.WILL_NEED, nbytes), (pages.DO_NOT_NEED, nbytes)]
    monkeypatch.undo()
    for _ in range(2):
        (placed,) = transfer.transfer([(tensor, split("a"))], drop=True)
        assert (np.asarray(placed.weight) == tensor.weight).all()


def test_a_file_that_has_shrunk_is_an_error_and_no_signal(tmp_path):
    tensor = golden.CHECKPOINT[NAMES[0]]
    path = tmp_path / "short"
    path.write_bytes(tensor.path.read_bytes())
    tensor = dataclasses.replace(tensor, path=path)
    assert tensor.weight.size
    os.truncate(path, 5000)
    with pytest.raises(CheckpointInvalid, match="has shrunk"):
        to_devices(tensor)


def test_a_failure_in_a_thread_ends_the_transfer():
    class Broken:
        spec, scales = golden.CHECKPOINT[NAMES[0]].spec, None

        @property
        def weight(self):
            return self

        shape, dtype = spec.shape, np.dtype(np.float32)

        def __getitem__(self, index):
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        to_devices(Broken(), split())


@given(st.integers(1, 2**32), st.integers(1, 256))
def test_buffers_and_the_runtimes_copies_of_them_stay_within_the_bound(in_flight, cores):
    size, workers = division(in_flight, cores)
    assert 2 * size * workers <= max(in_flight, 2)
    assert 1 <= workers <= cores


BIG = (4096, 6144)
"""The shape of a tensor of 96 MiB."""

BOUND = 32 * 2**20

CHILD = f"""
import gc, json, os, re, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
from pathlib import Path
import jax
from jax.sharding import NamedSharding, PartitionSpec
from loader.devices import assemble
from loader.weights.checkpoint import Tensor
from loader.weights.schema import ParamSpec
from loader.weights.shard_reader import read_shard
from loader.devices.transfer import transfer

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def load(tensor, seen):
    mesh = jax.make_mesh((4,), ("all",))
    (placed,) = transfer(
        [(tensor, NamedSharding(mesh, PartitionSpec(None, "all")))],
        in_flight={BOUND},
        on_bytes=lambda _: seen.append(anonymous()),
    )
    return jax.block_until_ready(placed).nbytes

path, beyond = Path(sys.argv[1]), []
spec = ParamSpec("big", 0, {BIG}, "float32", ("vocab", "embed"))
tensor = Tensor(spec, path, read_shard(path).array)
for on_host in (True, False):
    assemble.on_host = lambda _: on_host
    seen = []
    load(tensor, seen)  # what is compiled stays
    gc.collect()
    before, seen = anonymous(), []
    nbytes = load(tensor, seen)
    beyond.append(max(seen) - before - nbytes)
print(json.dumps(beyond))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_host_memory_beyond_the_arrays_stays_within_the_bound(tmp_path):
    write_shard(tmp_path / "big", np.ones(BIG, np.float32))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "big"],
        # What CPU devices free, which stand for others here, goes back to the system.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(beyond <= BOUND for beyond in json.loads(done.stdout)), done.stdout
