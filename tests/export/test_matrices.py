"""Matrices of int8 and scales in the element types of other formats."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokfetch.errors import Inexact
from loader.export.matrices import (
    bfloat16_scales,
    encode,
    encode_quantized,
    float16_scales,
    transposed,
    transposed_back,
)

ROWS, COLUMNS, GROUPS = 128, 24, 2


@pytest.fixture
def weight():
    random = np.random.default_rng(3)
    values = random.integers(-128, 128, (ROWS, COLUMNS), np.int8)
    return values, random.uniform(1e-5, 2e-2, (GROUPS, COLUMNS)).astype(ml_dtypes.bfloat16)


def products(values, scales):
    """The weights that int8 values and scales represent, in float64."""
    return values * np.repeat(scales.astype(np.float64), ROWS // GROUPS, axis=0)


@given(st.integers(1, 1100), st.integers(1, 40), st.integers(0, 7))
def test_a_turned_matrix_is_the_transpose_wherever_it_lies(rows, columns, offset):
    data = np.random.default_rng(rows).integers(-128, 128, offset + rows * columns, np.int8)
    matrix = data[offset:].reshape(rows, columns)
    assert np.array_equal(transposed(matrix), matrix.T)


def test_a_part_of_the_columns_is_turned_as_well():
    matrix = np.arange(-128, 128, dtype=np.int8).reshape(8, 32)
    assert np.array_equal(transposed(matrix[:, 8:24]), matrix.T[8:24])


def test_q8_0_keeps_every_int8_and_every_scale(weight):
    values, scales = weight
    blocks = encode_quantized(values, scales, "Q8_0")
    assert blocks.dtype.itemsize == 34
    assert blocks.shape == (COLUMNS, ROWS // 32)
    said = blocks["values"] * blocks["scale"].astype(np.float64)[:, :, None]
    assert np.array_equal(said.reshape(COLUMNS, ROWS).T, products(values, scales))


def test_q8_0_gives_back_what_it_was_made_of(weight):
    values, scales = weight
    blocks = encode_quantized(values, scales, "Q8_0")
    assert np.array_equal(transposed_back(blocks, slice(0, ROWS)), values)
    assert np.array_equal(transposed_back(blocks, slice(32, 96)), values[32:96])
    assert np.array_equal(bfloat16_scales(blocks, GROUPS), scales)


def test_blocks_of_one_group_with_different_scales_were_not_made_of_shards(weight):
    blocks = encode_quantized(weight[0], weight[1], "Q8_0")
    blocks["scale"][5, 1] *= 2
    with pytest.raises(Inexact, match="different scales"):
        bfloat16_scales(blocks, GROUPS)


def test_a_scale_that_bfloat16_lacks_was_not_in_a_shard(weight):
    blocks = encode_quantized(weight[0], weight[1], "Q8_0")
    blocks["scale"][5] = np.float16(1 + 2**-10)
    with pytest.raises(Inexact, match="bfloat16"):
        bfloat16_scales(blocks, GROUPS)


def test_f32_is_exact(weight):
    values, scales = weight
    assert np.array_equal(
        encode_quantized(values, scales, "F32").T.astype(np.float64),
        products(values, scales),
    )


def test_bf16_is_what_the_reference_computes_with(weight):
    values, scales = weight
    theirs = values.astype(ml_dtypes.bfloat16) * np.repeat(scales, ROWS // GROUPS, axis=0)
    ours = encode_quantized(values, scales, "BF16")
    assert np.array_equal(ours.T.view(np.uint16), theirs.view(np.uint16))


@pytest.mark.parametrize("scale", [7.63e-6, 65280.0, -0.5, 0.0])
def test_scales_within_float16_are_kept(scale):
    scales = np.array([[scale]], ml_dtypes.bfloat16)
    assert float16_scales(scales).astype(np.float64) == scales.astype(np.float64)


@pytest.mark.parametrize("scale", [1.0e-8, 7.0e-8, 65792.0, np.inf, np.nan])
def test_scales_beyond_float16_are_refused(scale):
    scales = np.array([[0.5, scale]], ml_dtypes.bfloat16)
    with pytest.raises(Inexact, match="cannot be represented in float16"):
        float16_scales(scales)


def test_weights_beyond_f16_are_refused():
    with pytest.raises(Inexact, match="65,504"):
        encode(np.array([65520.0], np.float32), "F16")
