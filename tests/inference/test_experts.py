"""A step multiplies with the experts that its tokens chose: operations of the compiled program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from support import golden

from loader.inference import model
from loader.inference.model import Routed
from loader.weights.partition import MeshShape

CONFIG = golden.CONFIG
CHOSEN, EXPERTS = CONFIG.num_selected_experts, CONFIG.num_experts
TENSOR_PARALLEL, EXPERT_PARALLEL, BOTH = MeshShape(1, 8), MeshShape(8, 1), MeshShape(2, 4)


def one_token(shape):
    """Operations of one token's products with a device's part of one expert."""
    return 2 * 3 * CONFIG.emb_size * CONFIG.ff_size // shape.model


@functools.cache
def operations(shape, tokens):
    """What XLA counts in a device's program for the experts; it counts a loop's body once."""
    mesh, params = golden.placed(shape)
    # On accelerators each product is one operation; on CPUs it is loops of its own.
    weights = golden.for_accelerators(params.layers[3])
    held = jax.tree.map(lambda array: array.sharding.spec, weights)
    routed = Routed(
        jax.ShapeDtypeStruct((tokens, CONFIG.emb_size), jnp.float32),
        jax.ShapeDtypeStruct((tokens, CHOSEN), jnp.int32),
        jax.ShapeDtypeStruct((tokens, CHOSEN), jnp.float32),
    )
    everywhere = PartitionSpec()
    spread = jax.shard_map(
        lambda *given: model.experts(*given, CONFIG, jnp.dtype("float32")),
        mesh=mesh,
        in_specs=(held, everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    real = jax.ShapeDtypeStruct((1, tokens), jnp.bool_)
    return jax.jit(spread).lower(weights, routed, real).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("tokens", [1, 128], ids=["decode", "prefill"])
@pytest.mark.parametrize("shape", [TENSOR_PARALLEL, EXPERT_PARALLEL, BOTH], ids=str)
def test_the_loop_over_blocks_multiplies_one_block_with_one_expert(shape, tokens):
    block = model._block_size(tokens * CHOSEN, EXPERTS) * one_token(shape)
    everything = tokens * EXPERTS // shape.expert * one_token(shape)
    found = operations(shape, tokens)
    # Routing, gates and the activation function are the rest; of a block, less than its products.
    assert block <= found < 2 * block
    if shape != EXPERT_PARALLEL or tokens > 1:  # There one token has one expert on a device anyway.
        assert found < everything / 2


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 16, 77, 300]), st.sampled_from([1, 2, 8]), st.integers(0, 2**32 - 1))
def test_blocks_that_are_run_hold_the_chosen_pairs_and_little_more(tokens, hosts, seed):
    """The number of trips is known at run time alone: here for any choices of any tokens."""
    random = np.random.default_rng(seed)
    choices = random.permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1)[:, :CHOSEN]
    size, held = model._block_size(choices.size, EXPERTS), EXPERTS // hosts
    trips = 0
    for host in range(hosts):
        mine = choices - host * held
        local = np.where((mine < 0) | (mine >= held), held, mine).reshape(-1)
        trips += int(model._plan(jnp.asarray(local), held, size).ends[-1])
    assert choices.size <= trips * size <= choices.size + min(EXPERTS, choices.size) * (size - 1)
    if tokens == 1:
        assert trips == CHOSEN
