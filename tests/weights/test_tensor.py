"""What a researcher needs from a checkpoint: lazy tensors by name, parts of them, their values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import PurePosixPath

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import basic_indices
from support import golden

import loader
from grokfetch.errors import NotProven, StateLocked
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest
from loader.weights.inventory import expected

DOWN = "transformer/decoder_layer_3/moe/linear_1/w"
ROUTER = "transformer/decoder_layer_3/router/w"
TENSOR = golden.CHECKPOINT[DOWN]
VALUES = TENSOR.weight.astype(np.float32) * np.repeat(
    TENSOR.scales.astype(np.float32), TENSOR.shape[-2] // TENSOR.scales.shape[-2], axis=-2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden checkpoint with its manifest, not proven."""
    root = tmp_path_factory.mktemp("golden")
    (root / "ckpt-0").symlink_to(golden.TINY / "ckpt-0")
    files, tensors = expected(golden.CONFIG, PurePosixPath("ckpt-0"))
    store = Store(root)
    with store.lock():
        store.save_manifest(
            Manifest("tiny", files, tensors=tensors, model=golden.CONFIG.to_mapping())
        )
    return root


def test_a_folder_is_opened_by_its_path_if_it_is_proven(folder):
    with pytest.raises(NotProven):
        loader.open_checkpoint(folder)
    opened = loader.open_checkpoint(str(folder), proven=False)
    assert len(opened) == 146
    assert opened.get_slice(DOWN) is opened[DOWN]
    assert (opened.get_tensor(DOWN) == TENSOR.weight).all()


def test_writers_are_kept_out_while_a_checkpoint_is_entered(folder):
    other = (
        f"import grokfetch.folder.store as s\nwith s.Store(s.Path({str(folder)!r})).lock(): pass"
    )
    with loader.open_checkpoint(folder, proven=False) as opened:
        assert DOWN in opened
        done = subprocess.run(
            [sys.executable, "-c", other], capture_output=True, text=True, check=False
        )
        assert StateLocked.__name__ in done.stderr
    with Store(folder).lock():
        pass


def test_names_are_found_by_glob_in_file_order():
    assert list(golden.CHECKPOINT.keys()) == list(golden.CHECKPOINT)
    layers = golden.CHECKPOINT.keys("*/router/w")
    assert len(layers) == 12
    assert list(layers)[:3] == [f"transformer/decoder_layer_{n}/router/w" for n in (0, 1, 10)]
    assert ROUTER in layers
    assert not golden.CHECKPOINT.keys("*/none")


def test_a_part_is_a_view_of_what_is_stored():
    part = TENSOR[3, :, 8:16]
    assert part.dtype == TENSOR.dtype == np.int8
    assert part.base is not None
    assert not part.flags.writeable
    assert (part == TENSOR.weight[3, :, 8:16]).all()
    assert TENSOR.get_shape() == list(TENSOR.shape)
    assert (TENSOR.get_dtype(), golden.CHECKPOINT[ROUTER].get_dtype()) == ("I8", "F32")


@given(basic_indices(TENSOR.shape))
def test_any_part_is_dequantised_as_the_whole_is(index):
    found = TENSOR.dequantize(index)
    assert found.dtype == np.float32
    assert found.shape == VALUES[index].shape
    assert (found == VALUES[index]).all()


@pytest.mark.parametrize(
    "index",
    [
        [1, 0],
        (slice(None), [3, 5]),
        (0, [[1], [2]], [7, 8]),
        (None, 2),
        VALUES > 0,
        (np.arange(8) % 2 == 0, ..., 3),
        True,
    ],
    ids=["list", "rows", "rows and columns", "new axis", "mask", "mask of experts", "bool"],
)
def test_what_the_tensor_is_indexed_with_dequantize_takes(index):
    values = TENSOR.dequantize(index)
    assert values.dtype == np.float32
    assert values.shape == TENSOR[index].shape
    assert (values == VALUES[index]).all()


@pytest.mark.parametrize("dtype", [np.int8, bool, complex, "S4"], ids=str)
def test_values_are_not_rounded_to_what_is_no_float(dtype):
    for name in (DOWN, ROUTER):
        with pytest.raises(TypeError, match="floating-point"):
            golden.CHECKPOINT[name].dequantize(dtype=dtype)


def test_numpy_takes_a_tensor_for_its_weight():
    array = np.asarray(TENSOR)
    assert array.dtype == np.int8
    assert np.shares_memory(array, TENSOR.weight)
    assert np.asarray(golden.CHECKPOINT[ROUTER], np.float64).dtype == np.float64
    assert not np.shares_memory(np.array(TENSOR), TENSOR.weight)
    assert len(TENSOR) == TENSOR.shape[0]


def test_tensor_is_written_short():
    assert repr(TENSOR) == f"<Tensor {DOWN}: int8 {list(TENSOR.shape)}>"


def test_the_whole_is_dequantised_to_the_dtype_asked_for():
    assert (TENSOR.dequantize() == VALUES).all()
    half = TENSOR.dequantize(dtype=ml_dtypes.bfloat16)
    assert (half == VALUES.astype(ml_dtypes.bfloat16)).all()
    router = golden.CHECKPOINT[ROUTER]
    assert (router.dequantize() == router.weight).all()
    assert (router.dequantize(np.s_[:, 1], np.float64) == router.weight[:, 1]).all()


@pytest.mark.parametrize("index", [8, (0, 0, 0, 0), (..., ..., 0)], ids=str)
def test_an_index_that_does_not_fit_is_an_index_error(index):
    with pytest.raises(IndexError):
        TENSOR.dequantize(index)


def test_a_tensor_goes_to_the_devices_it_is_sent_to():
    placed = TENSOR.to_jax()
    assert placed.weight.devices() == {jax.devices()[0]}
    assert (np.asarray(placed.weight) == TENSOR.weight).all()
    assert (np.asarray(placed.scales) == TENSOR.scales).all()
    where = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    for target in (where, jax.devices()[5]):
        assert golden.CHECKPOINT[ROUTER].to_jax(target).devices() == {jax.devices()[5]}


def test_nothing_is_imported_before_it_is_asked_for(folder):
    code = f"""
import sys, loader
assert not {{"jax", "numpy"}} & set(sys.modules)
tensor = loader.open_checkpoint({str(folder)!r}, proven=False)[{DOWN!r}]
tensor[0], tensor.dequantize(0)
assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
