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

from loader.devices import platforms
from loader.devices.program_text import cost
from loader.inference import experts
from loader.inference.ahead import Load, compiled
from loader.inference.experts import Routed
from loader.weights.partition import MeshShape

CONFIG = golden.CONFIG
CHOSEN, EXPERTS = CONFIG.num_selected_experts, CONFIG.num_experts
TENSOR_PARALLEL, EXPERT_PARALLEL, BOTH = MeshShape(1, 8), MeshShape(8, 1), MeshShape(2, 4)
FEW_EACH = MeshShape(4, 2)


def one_token(shape):
    """Operations of one token's products with a device's part of one expert."""
    return 2 * 3 * CONFIG.emb_size * CONFIG.ff_size // shape.model


@functools.cache
def operations(shape, tokens, dtype="float32"):
    """The operations that XLA counts in a device's program; it counts the body of a loop once."""
    mesh, params = golden.placed(shape)
    # On accelerators each product is one operation; on CPUs it consists of loops.
    weights = golden.for_accelerators(params.layers[3])
    held = jax.tree.map(lambda array: array.sharding.spec, weights)
    routed = Routed(
        jax.ShapeDtypeStruct((tokens, CONFIG.emb_size), jnp.float32),
        jax.ShapeDtypeStruct((tokens, CHOSEN), jnp.int32),
        jax.ShapeDtypeStruct((tokens, CHOSEN), jnp.float32),
    )
    everywhere = PartitionSpec()
    spread = jax.shard_map(
        lambda *given: experts.experts(*given, CONFIG, jnp.dtype(dtype)),
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
    block = experts.block_size(tokens * CHOSEN, EXPERTS) * one_token(shape)
    everything = tokens * EXPERTS // shape.expert * one_token(shape)
    found = operations(shape, tokens)
    # The rest is routing, gates and the activation function; in a block, less than the products.
    assert block <= found < 2 * block
    if shape != EXPERT_PARALLEL or tokens > 1:  # There one token has one expert on a device anyway.
        assert found < everything / 2


def test_a_prompt_in_bfloat16_takes_no_more_operations_than_in_float32():
    """The experts multiply once for a long prompt, and in two halves for few tokens."""
    exact, found = (operations(TENSOR_PARALLEL, 128, it) for it in ("float32", "bfloat16"))
    assert found < 1.1 * exact
    exact, found = (operations(TENSOR_PARALLEL, 16, it) for it in ("float32", "bfloat16"))
    assert found > 1.8 * exact


def mixed(shape, weights, tokens, dtype="float32"):
    """The experts' output for random tokens, the last of which is padding if there are several."""
    mesh, _ = golden.placed(shape)
    random = np.random.default_rng(tokens)
    choices = random.permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1)[:, :CHOSEN]
    routed = Routed(
        random.standard_normal((tokens, CONFIG.emb_size), np.float32),
        choices.astype(np.int32),
        random.uniform(0.1, 0.5, (tokens, CHOSEN)).astype(np.float32),
    )
    real = np.arange(tokens)[None] < max(1, tokens - 1)
    everywhere = PartitionSpec()
    spread = jax.shard_map(
        lambda *given: experts.experts(*given, CONFIG, jnp.dtype(dtype)),
        mesh=mesh,
        in_specs=(jax.tree.map(lambda array: array.sharding.spec, weights), everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    return np.asarray(jax.jit(spread)(weights, routed, real))


@functools.cache
def as_here(shape, tokens):
    """The same in the form for this processor."""
    return mixed(shape, golden.placed(shape)[1].layers[3], tokens)


@pytest.mark.parametrize("gpus", [(), ("cpu",)], ids=["tpu", "gpu"])
@pytest.mark.parametrize(
    "shape",
    [
        *(TENSOR_PARALLEL, BOTH),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in (EXPERT_PARALLEL, FEW_EACH)),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, pytest.param(3, marks=pytest.mark.slow), 16, 40])
def test_every_form_of_the_experts_gives_the_same(monkeypatch, gpus, shape, tokens):
    """By pairs, by experts and by blocks, each as on GPUs and as on other accelerators."""
    weights = golden.placed(shape)[1].layers[3]
    wanted = as_here(shape, tokens)
    monkeypatch.setattr(platforms, "GPUS", gpus)
    found = mixed(shape, golden.for_accelerators(weights), tokens)
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    if tokens > 1:
        assert not found[-1].any()


@pytest.mark.parametrize("shape", [TENSOR_PARALLEL, BOTH, MeshShape(1, 2)], ids=str)
def test_experts_of_a_gpu_in_as_many_pieces_as_can_be_give_the_same(monkeypatch, shape):
    weights = golden.placed(shape)[1].layers[3]
    wanted = as_here(shape, 16)
    monkeypatch.setattr(platforms, "GPUS", ("cpu",))
    monkeypatch.setattr(experts, "TOGETHER", 0)
    found = mixed(shape, golden.for_accelerators(weights), 16)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_a_prompt_on_two_gpus_takes_an_expert_group_by_group_with_the_same_result(monkeypatch):
    shape = MeshShape(1, 2)
    weights = golden.placed(shape)[1].layers[3]
    assert weights.down.scales.shape[1] // shape.model >= experts.MANY_GROUPS
    wanted = as_here(shape, 40)
    monkeypatch.setattr(platforms, "GPUS", ("cpu",))
    found = mixed(shape, golden.for_accelerators(weights), 40)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [(TENSOR_PARALLEL, 1), (TENSOR_PARALLEL, 16), (TENSOR_PARALLEL, 40), (BOTH, 40)],
    ids=str,
)
def test_no_loop_over_experts_has_a_length_that_a_gpu_must_tell_its_host(
    monkeypatch, shape, tokens
):
    monkeypatch.setattr(platforms, "GPUS", ("cpu",))
    assert counted_loops(shape, tokens) == 0


def test_blocks_are_counted_at_run_time_elsewhere():
    assert counted_loops(TENSOR_PARALLEL, 16) == 0
    assert counted_loops(TENSOR_PARALLEL, 40) == 1


def counted_loops(shape, tokens):
    mesh, _ = golden.placed(shape)
    load = Load(1, tokens, 64)
    dtype = jnp.dtype("float32")
    programs = compiled(golden.CONFIG, mesh, load, dtype)
    return next(cost(one.text).unknown_loops for one in programs if one.name == "layer")


@functools.partial(jax.jit, static_argnums=(1, 2))
def trips_for(choices, held, size):
    """How many blocks are run for choices of the experts of a device."""
    return experts.plan(choices, held, size).ends[-1]


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 16, 77, 300]), st.sampled_from([1, 2, 8]), st.integers(0, 2**32 - 1))
def test_blocks_that_are_run_hold_the_chosen_pairs_and_little_more(tokens, hosts, seed):
    """The number of iterations is only known at run time; here for any choices of any tokens."""
    random = np.random.default_rng(seed)
    choices = random.permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1)[:, :CHOSEN]
    size, held = experts.block_size(choices.size, EXPERTS), EXPERTS // hosts
    trips = 0
    for host in range(hosts):
        mine = choices - host * held
        local = np.where((mine < 0) | (mine >= held), held, mine).reshape(-1)
        trips += int(trips_for(local, held, size))
    assert choices.size <= trips * size <= choices.size + min(EXPERTS, choices.size) * (size - 1)
    if tokens == 1:
        assert trips == CHOSEN
