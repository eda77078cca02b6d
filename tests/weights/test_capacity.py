"""What does not fit is refused before it is loaded, with the smallest change that would do."""

from __future__ import annotations

import dataclasses

import jax
from hypothesis import given
from hypothesis import strategies as st
from support import golden

from loader.weights.capacity import Memory, Use, need, shortage
from loader.weights.limits import cache_length
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig, parameters

OFFICIAL = GrokConfig()
EIGHT = Use(OFFICIAL, MeshShape(1, 8), 8192)
GB = 10**9


def test_grok_1_on_eight_devices():
    found = need(EIGHT)
    assert found.weights == 39_796_498_432
    assert found.cache == 64 * 2 * 8192 * 128 * 2
    assert 200e6 < found.work < 1e9
    assert found.total == found.weights + found.cache + found.work


def test_what_is_counted_is_what_is_placed():
    shape = MeshShape(2, 4)
    _, params = golden.placed(shape)
    first = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for array in jax.tree.leaves(params)
        for shard in array.addressable_shards
        if shard.device == first
    )
    assert held == need(Use(golden.CONFIG, shape, 1)).weights


def test_the_cache_that_is_counted_is_the_engines():
    engine = golden.engine(golden.ONE)
    _, state = engine.prefill([golden.prompt("p1")])
    held = sum(array.nbytes for array in jax.tree.leaves(state.cache))
    assert held == need(Use(golden.CONFIG, golden.ONE, 10, itemsize=4)).cache


@given(st.integers(1, 10_000))
def test_cache_is_long_enough_and_less_than_twice_too_long(tokens):
    found = cache_length(OFFICIAL, tokens)
    assert found >= min(tokens, 8192)
    assert found <= max(256, 2 * tokens - 1)


def test_what_fits_lacks_nothing():
    assert shortage(EIGHT, Memory(need(EIGHT).total)) is None


def test_fewer_tokens_are_the_first_help():
    less = need(dataclasses.replace(EIGHT, tokens=1024)).total
    found = shortage(EIGHT, Memory(less))
    assert found.needed == need(EIGHT).total
    assert found.tokens == 1024


def test_more_devices_help_where_fewer_tokens_do_not():
    found = shortage(EIGHT, Memory(32 * GB))
    assert (found.tokens, found.mesh, found.mapped) == (None, MeshShape(2, 8), False)
    assert shortage(EIGHT, Memory(GB)).mesh is None


def test_copies_of_the_weights_take_memory_and_to_do_without_them_helps():
    copied = dataclasses.replace(EIGHT, shape=MeshShape(1, 4, data=2))
    assert need(copied).weights == need(dataclasses.replace(EIGHT, shape=MeshShape(1, 4))).weights
    found = shortage(copied, Memory(need(EIGHT).total))
    assert (found.tokens, found.mesh) == (None, MeshShape(1, 8))
    # Devices of one host share one copy of the weights, but each has its own cache.
    less = Memory(sum(spec.nbytes for spec in parameters(OFFICIAL)) + 8 * need(copied).cache, 8)
    assert shortage(copied, less).needed - less.free == 8 * need(copied).work
    assert not shortage(copied, Memory(GB, 8)).mapped


def test_cpu_devices_share_their_memory_and_can_leave_weights_in_files():
    # All 318 GB are in memory once, though every device counts the small tensors.
    once = sum(spec.nbytes for spec in parameters(OFFICIAL))
    rest = 8 * (need(EIGHT).cache + need(EIGHT).work)
    assert shortage(EIGHT, Memory(once + rest, sharers=8)) is None
    found = shortage(EIGHT, Memory(once + rest - 1, sharers=8))
    assert found.tokens == 4096
    found = shortage(EIGHT, Memory(24 * GB, sharers=8))
    assert (found.tokens, found.mesh, found.mapped) == (None, None, True)
    assert not shortage(dataclasses.replace(EIGHT, shape=MeshShape(8, 1)), Memory(GB, 8)).mapped


@given(st.integers(0, 400 * GB), st.sampled_from([0, 8]), st.integers(1, 8192))
def test_help_that_is_offered_helps(free, sharers, tokens):
    use, memory = dataclasses.replace(EIGHT, tokens=tokens), Memory(free, sharers)
    found = shortage(use, memory)
    if found is None:
        return
    if found.tokens is not None:
        assert found.tokens < tokens
        assert shortage(dataclasses.replace(use, tokens=found.tokens), memory) is None
    if found.mapped:
        assert shortage(dataclasses.replace(use, mapped=True), memory) is None
