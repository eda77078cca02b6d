"""Products over int8 weights are those of the dequantised matrix, and nothing is widened."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support import golden

from loader.devices import platforms
from loader.devices import products as quantized
from loader.devices.kernels import Tuning
from loader.devices.platforms import by_platform, on_tpus
from loader.devices.products import (
    Quantized,
    cut,
    each_product,
    product,
    select,
    stack_product,
)


def made(rows, columns, groups, seed=0):
    """Random weights, and the matrix that they represent, in float64."""
    random = np.random.default_rng(seed)
    weight = random.integers(-127, 128, (rows, columns), np.int8)
    scales = random.uniform(0.001, 0.1, (groups, columns)).astype(ml_dtypes.bfloat16)
    matrix = weight * np.repeat(scales.astype(np.float64), rows // groups, axis=0)
    return Quantized(weight, scales), matrix


def one_stack(weights):
    """Matrices as one stack."""
    return jax.tree.map(lambda *parts: np.stack(parts), *weights)


def products_of(weights, batches, dtype):
    """Random rows `[*batch, K]` of each shape of a batch, and their products by one program."""
    random = np.random.default_rng(1)
    xs = [
        random.standard_normal((*batch, weights.weight.shape[0]), np.float32) for batch in batches
    ]
    run = jax.jit(lambda xs, weights: [product(x, weights, jnp.dtype(dtype)) for x in xs])
    return zip(xs, run(xs, weights), strict=True)


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", [None, Tuning()], ids=["accelerator", "cpu"])
def test_product_is_that_of_the_dequantised_matrix(groups, dtype, tuning):
    weights, matrix = made(48, 7, groups)
    weights = dataclasses.replace(weights, tuning=tuning)
    for x, found in products_of(weights, [(), (1,), (2, 5)], dtype):
        assert found.dtype == jnp.float32
        assert found.shape == (*x.shape[:-1], 7)
        # In bfloat16 too: with eight bits the error would be 1e-2 or more.
        np.testing.assert_allclose(found, x @ matrix, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("part", [2, 128])
def test_a_gpus_sum_over_rows_is_the_product_of_one_token(monkeypatch, part, groups):
    monkeypatch.setattr(platforms, "GPUS", ("cpu",))
    monkeypatch.setattr(quantized, "PART", part)
    weights, matrix = made(48, 7, groups)
    for x, found in products_of(weights, [(), (1,), (1, 1)], "bfloat16"):
        assert found.shape == (*x.shape[:-1], 7)
        np.testing.assert_allclose(found, x @ matrix, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("gpus", [(), ("cpu",)], ids=["tpu", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 3])
def test_stack_product_multiplies_each_matrix_with_rows_of_its_own(
    monkeypatch, groups, dtype, gpus
):
    """In bfloat16 two halves hold nearly all of a number; a GPU's sums are of parts."""
    monkeypatch.setattr(platforms, "GPUS", gpus)
    monkeypatch.setattr(quantized, "SHORTEST", 4)
    stack = [made(48, 7, groups, seed) for seed in range(3)]
    stacked = one_stack(weights for weights, _ in stack)
    x = np.random.default_rng(1).standard_normal((3, 5, 48), np.float32)
    found = jax.jit(stack_product, static_argnums=2)(x, stacked, jnp.dtype(dtype))
    wanted = np.stack([rows @ matrix for rows, (_, matrix) in zip(x, stack, strict=True)])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=3e-4)
    assert quantized.in_parts(48 // groups, 3 * groups * 7) == (8 if groups == 1 else 4)


@pytest.mark.parametrize("gpus", [(), ("cpu",)], ids=["tpu", "gpu"])
def test_products_of_the_same_tokens_are_divided_alike_on_a_gpu(monkeypatch, gpus):
    """A wide matrix would have fewer parts than a narrow one, and the compiler two kernels."""
    monkeypatch.setattr(platforms, "GPUS", gpus)
    monkeypatch.setattr(quantized, "SHORTEST", 4)
    monkeypatch.setattr(quantized, "BUSY", 100)
    matrices = [made(48, columns, 1) for columns in (30, 7)]
    x = np.random.default_rng(1).standard_normal((5, 48), np.float32)
    run = jax.jit(lambda x: each_product(x, [it for it, _ in matrices], jnp.dtype("bfloat16")))
    for found, (_, matrix) in zip(run(x), matrices, strict=True):
        np.testing.assert_allclose(found, x @ matrix, rtol=1e-4, atol=3e-4)
    if gpus:
        text = run.lower(x).as_text()
        assert re.findall(r"dot_general .*-> tensor<1x(\d+)x5x", text) == ["4", "4"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_of_a_stack_is_multiplied_with_its_own_scales(dtype):
    """Some matrices, the rows of two groups of three, some columns; the least int8 value too."""
    stack = [made(48, 8, 3, seed) for seed in range(4)]
    stacked = one_stack(weights for weights, _ in stack)
    stacked.weight[2, 16] = -128
    box = (slice(1, 3), slice(16, 48), slice(4, 8))
    x = np.random.default_rng(1).standard_normal((5, 32), np.float32)

    def multiplied(x, stacked):
        part = cut(stacked, box)
        return part, stack_product(x, part, jnp.dtype(dtype))

    part, found = jax.jit(multiplied)(x, stacked)
    np.testing.assert_array_equal(part.weight, stacked.weight[box])
    np.testing.assert_array_equal(part.scales, stacked.scales[1:3, 1:3, 4:8])
    scales = np.repeat(np.asarray(part.scales, np.float64), 16, axis=1)
    wanted = x @ (stacked.weight[box].astype(np.float64) * scales)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("halves", [True, False])
def test_a_gpu_sums_the_groups_of_a_large_product_one_after_the_other(monkeypatch, dtype, halves):
    weights, _ = made(48, 7, 3)
    x = np.random.default_rng(1).standard_normal((2, 40, 48), np.float32)

    def found():
        run = jax.jit(lambda x, weights: product(x, weights, jnp.dtype(dtype), halves=halves))
        return np.asarray(run(x, weights)), run.lower(x, weights).as_text()

    wanted, at_once = found()
    monkeypatch.setattr(platforms, "GPUS", ("cpu",))
    monkeypatch.setattr(quantized, "LARGE", 4 * 2 * 40 * 7)
    in_turn, text = found()
    assert (at_once.count("optimization_barrier"), text.count("optimization_barrier")) == (0, 2)
    np.testing.assert_allclose(in_turn, wanted, rtol=1e-5, atol=1e-3)


def test_a_gpus_sum_has_parts_until_it_is_busy_or_they_are_short():
    assert quantized.in_parts(6144, 8 * 4096) == 1
    assert quantized.in_parts(6144, 4096) == 2
    assert quantized.in_parts(6144, 128) == 16
    assert quantized.in_parts(768, 128) == 2
    assert quantized.in_parts(1001, 8) == 1


def test_group_boundaries_are_contiguous_rows():
    weights = Quantized(jnp.ones((4, 1), jnp.int8), jnp.array([[1.0], [100.0]], jnp.bfloat16))
    x = jnp.array([1.0, 2.0, 4.0, 8.0])
    assert product(x, weights, jnp.dtype("float32")).tolist() == [1 + 2 + 400 + 800]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("gpus", [(), ("cpu",)], ids=["tpu", "gpu"])
def test_one_matrix_of_a_stack_is_chosen_at_run_time(monkeypatch, gpus, rows):
    monkeypatch.setattr(platforms, "GPUS", gpus)
    stack = [made(48, 7, 3, seed) for seed in range(3)]
    stacked = one_stack(weights for weights, _ in stack)
    x = np.random.default_rng(1).standard_normal((rows, 48), np.float32)
    run = jax.jit(lambda x, stacked, at: product(x, select(stacked, at), jnp.dtype("bfloat16")))
    for number, (_, matrix) in enumerate(stack):
        np.testing.assert_allclose(run(x, stacked, number), x @ matrix, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("groups", [1, 4])
def test_rows_of_a_chosen_matrix_are_cut_out_of_the_stack_and_the_matrix_is_not(groups):
    """An accelerator's compiler would copy a matrix if several products used rows of it."""
    stack = [made(64, 8, groups, seed) for seed in range(3)]
    stacked = one_stack(weights for weights, _ in stack)
    traced = jax.make_jaxpr(lambda x, at: product(x, select(stacked, at), jnp.dtype("bfloat16")))
    cuts = [
        equation.outvars[0].aval.shape
        for equation in traced(np.zeros((5, 64), np.float32), jnp.int32(1)).eqns
        if equation.primitive.name == "dynamic_slice" and equation.outvars[0].aval.dtype == np.int8
    ]
    assert cuts == groups * [(1, 64 // groups, 8)]


@pytest.mark.parametrize("longest", [2**31, 5])
def test_cpu_multiplies_with_one_of_a_stack_where_it_lies_or_a_copy_if_it_is_too_long(
    monkeypatch, longest
):
    monkeypatch.setattr(quantized, "LONGEST", longest)
    stack = [made(48, 7, 3, seed) for seed in range(3)]
    stacked = one_stack(weights for weights, _ in stack)
    stacked = dataclasses.replace(stacked, tuning=Tuning())
    x = np.random.default_rng(1).standard_normal((5, 48), np.float32)
    run = jax.jit(lambda x, stacked, at: product(x, select(stacked, at), jnp.dtype("bfloat16")))
    np.testing.assert_allclose(run(x, stacked, 2), x @ stack[2][1], rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize(
    ("platform", "forms"),
    [
        *(("cpu", ("elsewhere", "elsewhere")), ("tpu", ("elsewhere", "on TPUs"))),
        *((name, ("on GPUs", "elsewhere")) for name in ("gpu", "cuda", "rocm")),
    ],
)
def test_a_mesh_gets_the_forms_of_its_platform(monkeypatch, platform, forms):
    mesh = SimpleNamespace(abstract_device=SimpleNamespace(platform=platform))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert by_platform(lambda: "on GPUs", lambda: "elsewhere") == forms[0]
    assert on_tpus(lambda: "on TPUs", lambda: "elsewhere") == forms[1]


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="its meshes do not name their platform")
def test_no_form_but_that_of_the_platform_is_traced_within_a_mesh():
    mesh, traced = golden.placed(golden.ONE)[0], []

    def form(name):
        return lambda x: traced.append(name) or x

    def choose(x):
        return by_platform(form("on GPUs"), form("elsewhere"), x)

    everywhere = PartitionSpec()
    jax.eval_shape(jax.shard_map(choose, mesh=mesh, in_specs=everywhere, out_specs=everywhere), 1.0)
    assert traced == ["elsewhere"]
    jax.eval_shape(choose, 1.0)
    assert sorted(traced[1:]) == ["elsewhere", "on GPUs"]
