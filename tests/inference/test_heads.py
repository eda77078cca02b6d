"""Attention needs no largest score and divides by its sums last; GPUs have a separate form."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loader.devices.products import in_parts
from loader.inference import heads

CAP = 30.0
ROWS, PLACES, HEADS, GROUP, SIZE = 3, 1024, 2, 3, 8


def weight(scores):
    return jnp.exp(CAP * jnp.tanh(scores / CAP) - CAP)


@functools.cache
def program(_at_once):
    """The form for GPUs, traced anew for each value of what tests patch."""
    return jax.jit(lambda *arrays: heads.one_token(*arrays, weight))


def on_a_gpu(queries, keys, values, allowed, places=PLACES):
    """Attention with all places but the last as the cache, and the last as the token itself."""
    held = [array[:, :places] for array in (keys, values)]
    step = [array[:, places:].astype(np.float32) for array in (keys, values)]
    given = (allowed[:, :, :places], allowed[:, 0, places:])
    return np.asarray(program(heads.AT_ONCE)(queries.astype(np.float32), held, step, given))


def attended(queries, keys, values, allowed):
    """The same by a softmax in float64."""
    scores = CAP * np.tanh(np.einsum("bkgd,bskd->bkgs", queries[:, 0], keys) / CAP)
    scores = np.where(allowed[:, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bkgs,bskd->bkgd", weights, values)[:, None]


@pytest.mark.parametrize("at_once", [1 << 20, 10_000], ids=["whole", "blocks"])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0], ids=["alike", "apart", "at the cap"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_token_on_a_gpu_attends_as_a_softmax_does(monkeypatch, dtype, size, at_once):
    """Scores at plus or minus the cap, even all of them: no small weight is lost."""
    assert in_parts(PLACES, ROWS * HEADS * SIZE) > 1
    monkeypatch.setattr(heads, "AT_ONCE", at_once)
    monkeypatch.setattr(heads, "SHORTEST", 64)
    random = np.random.default_rng(11)
    queries = size * random.standard_normal((ROWS, 1, HEADS, GROUP, SIZE))
    keys, values = random.standard_normal((2, ROWS, PLACES + 1, HEADS, SIZE))
    # All scores of this row are low.
    queries[0], keys[0] = -np.abs(queries[0]), np.abs(keys[0])
    given = [array.astype(dtype) for array in (queries, keys, values)]
    allowed = random.random((ROWS, 1, PLACES + 1)) < 0.5
    found = on_a_gpu(*given, allowed)
    wanted = attended(*(array.astype(np.float64) for array in given), allowed)
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_is_masked_has_no_part_in_the_result_and_a_row_of_nothing_is_zero():
    random = np.random.default_rng(12)
    queries = random.standard_normal((ROWS, 1, HEADS, GROUP, SIZE))
    keys, values = random.standard_normal((2, ROWS, PLACES + 1, HEADS, SIZE))
    # In the last row the token itself is masked, too.
    allowed = np.arange(PLACES + 1) < np.array([0, 1, 700])[:, None, None]
    keys[2, 700:], values[2, 700:] = 100.0, 1e6
    given = [array.astype(np.float32) for array in (queries, keys, values)]
    found = on_a_gpu(*given, allowed)
    assert not found[0].any()
    np.testing.assert_allclose(found[1, 0], np.repeat(values[1, 0, :, None], GROUP, 1), rtol=1e-5)
    last = [array[2:] for array in (queries, keys, values, allowed)]
    np.testing.assert_allclose(found[2:], attended(*last), rtol=1e-4, atol=1e-4)


def test_a_token_that_may_see_nothing_else_sees_itself():
    random = np.random.default_rng(13)
    queries = random.standard_normal((ROWS, 1, HEADS, GROUP, SIZE))
    keys, values = random.standard_normal((2, ROWS, PLACES + 1, HEADS, SIZE))
    allowed = np.broadcast_to(np.arange(PLACES + 1) == PLACES, (ROWS, 1, PLACES + 1))
    given = [array.astype(np.float32) for array in (queries, keys, values)]
    alone = np.repeat(values[:, -1:, :, None], GROUP, 3)
    np.testing.assert_allclose(on_a_gpu(*given, allowed), alone, rtol=1e-5)


PRECISION = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}
"""The relative error that a share may have: its rounding, and that of the sum."""


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("level", [-30, 0, 30])
def test_shares_are_those_of_a_softmax_at_every_level_of_scores(dtype, level):
    draw = np.random.default_rng(13)
    scores = np.clip(level + draw.normal(size=(4, 64)), -30, 30).astype(np.float32)
    allowed = draw.random((4, 64)) < 0.7
    weights, sums = jax.jit(heads.shares, static_argnums=2)(scores, allowed, jnp.dtype(dtype))
    assert weights.dtype == dtype
    found = np.asarray(weights, np.float64) / np.asarray(sums, np.float64)[:, None]
    wanted = np.where(allowed, np.exp(scores.astype(np.float64) - level), 0)
    wanted /= wanted.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=PRECISION[dtype], atol=1e-7)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)


def test_where_nothing_is_allowed_all_shares_are_zero():
    for dtype in map(jnp.dtype, PRECISION):
        weights, sums = heads.shares(jnp.full((1, 8), 30.0), jnp.zeros((1, 8), bool), dtype)
        assert not np.asarray(weights, np.float32).any()
        assert np.asarray(sums).all()
