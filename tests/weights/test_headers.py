"""A model is recognised by the shapes of its shards and their order."""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokfetch.errors import NoModel
from loader.weights.headers import named, stand_in
from loader.weights.inventory import expected
from loader.weights.schema import GrokConfig, parameters
from loader.weights.shard_values import Shard
from loader.weights.shard_writer import frame_layout

FOLDER = PurePosixPath("top/ckpt-0")


def shards_of(config):
    return {
        FOLDER / spec.file: frame_layout(spec.dtype, spec.shape, spec.scale_shape).shard
        for spec in parameters(config)
    }


configs = st.builds(
    lambda heads, more, size, **others: GrokConfig(
        num_q_heads=heads * more, num_kv_heads=heads, key_size=size, **others
    ),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 6),
    st.sampled_from([8, 64, 128]),
    vocab_size=st.integers(3, 1 << 18),
    emb_size=st.integers(1, 100).map(lambda tens: 8 * tens),
    widening_factor=st.floats(0.5, 16),
    num_layers=st.integers(1, 12),
    num_experts=st.integers(2, 9),
)


@given(configs)
def test_names_and_shapes_of_any_model_follow_from_its_frames(config):
    tensors = named(shards_of(config))
    assert tensors == expected(config, FOLDER)[1]
    assert parameters(stand_in(tensors)) == parameters(config)


SMALL = GrokConfig(
    vocab_size=64, emb_size=16, num_layers=3, num_q_heads=2, num_kv_heads=1, key_size=8
)


def without(shards, number):
    return {path: shard for path, shard in shards.items() if number not in path.name}


def test_shards_that_are_not_a_whole_model_of_this_kind_are_none():
    shards = shards_of(SMALL)
    first = FOLDER / "tensor00002_000"
    flat = dataclasses.replace(shards[first].array, shape=(8, 16 * 88))
    for wrong in (
        {},
        without(shards, "00007"),
        without(shards, "00007") | {FOLDER / "tensor00099_000": shards[FOLDER / "tensor00007_000"]},
        without(shards, "00007") | {FOLDER.parent / "tensor00007_000": shards[first]},
        shards | {first: shards[FOLDER / "tensor00003_000"]},
        shards | {first: Shard(shards[first].array)},
        shards | {first: Shard(flat, shards[first].scales)},
    ):
        with pytest.raises(NoModel, match=r"Grok-1|missing"):
            named(wrong)
