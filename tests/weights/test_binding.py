"""What files hold is compared with the table of parameters and with the manifest."""

import dataclasses
import os

import ml_dtypes
import numpy as np
import pytest
from support.program import imported_by
from support.synthetic_folder import CONFIG, LINEAR, NORM, SPECS, changed, manifested

from grokfetch.errors import CheckpointInvalid, ManifestInvalid, ShardInvalid, StorageFailed
from grokfetch.manifest.schema import Scales
from loader.weights.binding import faults
from loader.weights.checkpoint import open_checkpoint, open_folder
from loader.weights.shard_reader import read_shard
from loader.weights.shard_writer import write_shard


def test_tensor_missing_from_the_manifest_is_named(store):
    manifest = store.manifest()
    rest = tuple(tensor for tensor in manifest.tensors if tensor.name != NORM)
    manifested(store, dataclasses.replace(manifest, tensors=rest))
    with pytest.raises(CheckpointInvalid, match=NORM):
        open_checkpoint(store)


def test_tensor_that_the_model_lacks_is_named(store):
    deeper = dataclasses.replace(CONFIG, num_layers=1).to_mapping()
    manifested(store, dataclasses.replace(store.manifest(), model=deeper))
    with pytest.raises(CheckpointInvalid, match="decoder_layer_1/moe/linear/w"):
        open_checkpoint(store)


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (NORM, {"dtype": "int8"}, r"must be int8 \(32,\) .* found float32 \(32,\)"),
        (NORM, {"shape": (31,)}, r"must be float32 \(31,\) .* found float32 \(32,\)"),
        (NORM, {"offset": 144}, r"at 144, found .* at 142"),
        (NORM, {"scales": Scales((1,), 1)}, r"with scales \(1,\).*found.*without scales"),
        (LINEAR, {"scales": None}, r"without scales.*found.*with scales \(4, 8, 32\)"),
        (LINEAR, {"scales": Scales((4, 1, 32), 6347)}, r"scales \(4, 1, 32\).*\(4, 8, 32\)"),
        (LINEAR, {"scales": Scales((4, 8, 32), 1)}, r"199 and 1, found.*199 and \d"),
    ],
)
def test_difference_from_the_manifest_names_tensor_expected_and_found(
    store, name, fields, message, proven
):
    changed(store, name, **fields)
    with pytest.raises(CheckpointInvalid, match=message) as caught:
        open_checkpoint(store, proven=proven)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("array", "scales"),
    [
        (np.zeros(33, np.float32), None),
        (np.zeros(32, np.int32), None),
        (np.zeros((32, 1), np.float32), None),
        (np.zeros((32, 1), np.int8), np.ones((1, 1), ml_dtypes.bfloat16)),
    ],
)
def test_file_with_another_tensor_than_the_model_needs_is_refused(store, array, scales):
    path = store.root / "ckpt-0" / SPECS[NORM].file
    layout = write_shard(path, array, scales)
    manifest = store.manifest()
    files = tuple(
        dataclasses.replace(file, size=layout.size) if file.path.name == path.name else file
        for file in manifest.files
    )
    manifested(store, dataclasses.replace(manifest, files=files))
    with pytest.raises(CheckpointInvalid, match=rf"{NORM} must be float32 \(32,\)"):
        open_checkpoint(store)
    with pytest.raises(CheckpointInvalid, match=rf"{NORM} must be float32 \(32,\)"):
        open_folder(path.parent, CONFIG)


def test_array_in_fortran_order_is_refused(store):
    path = store.root / "ckpt-0" / SPECS["transformer/decoder_layer_0/router/w"].file
    # NEWFALSE before the payload means C order, NEWTRUE Fortran order.
    data = bytearray(path.read_bytes())
    data[read_shard(path).array.offset - 6] = 0x88
    path.write_bytes(data)
    with pytest.raises(CheckpointInvalid, match="Fortran"):
        open_checkpoint(store)


@pytest.mark.parametrize("size", [10, -10])
def test_file_of_another_size_is_refused_before_it_is_mapped(store, size):
    path = store.root / "ckpt-0" / SPECS[NORM].file
    os.truncate(path, path.stat().st_size + size)
    with pytest.raises(CheckpointInvalid, match=rf"{NORM} must have \d+ bytes, found \d+"):
        open_checkpoint(store)


def test_missing_file_is_a_typed_error(store):
    (store.root / "ckpt-0" / SPECS[NORM].file).unlink()
    with pytest.raises(StorageFailed, match=SPECS[NORM].file):
        open_checkpoint(store)
    with pytest.raises(StorageFailed, match=SPECS[NORM].file):
        open_folder(store.root / "ckpt-0", CONFIG)


def test_file_that_is_no_shard_is_a_typed_error(store):
    path = store.root / "ckpt-0" / SPECS[NORM].file
    path.write_bytes(b"\x80\x04cos\nsystem\n".ljust(path.stat().st_size))
    with pytest.raises(ShardInvalid, match="GLOBAL"):
        open_checkpoint(store)


def test_faults_names_every_tensor_that_is_wrong_and_goes_on(store):
    assert list(faults(store)) == []
    folder = store.root / "ckpt-0"
    for name in (NORM, LINEAR):
        path = folder / SPECS[name].file
        path.write_bytes(b"\x80\x04cos\nsystem\n".ljust(path.stat().st_size))
    changed(store, "transformer/decoder_layer_0/router/w", offset=1)
    kinds = [type(fault) for fault in faults(store)]
    assert kinds == [ShardInvalid, CheckpointInvalid, ShardInvalid]


def test_faults_leaves_missing_and_cut_files_to_whoever_reads_the_bytes(store):
    (store.root / "ckpt-0" / SPECS[NORM].file).unlink()
    os.truncate(store.root / "ckpt-0" / SPECS[LINEAR].file, 1000)
    assert list(faults(store)) == []


def test_faults_includes_a_manifest_that_is_not_the_models(store):
    manifest = store.manifest()
    manifested(store, dataclasses.replace(manifest, tensors=manifest.tensors[1:]))
    assert [type(fault) for fault in faults(store)] == [CheckpointInvalid]
    manifested(store, dataclasses.replace(manifest, model={"num_layers": 2}))
    assert [type(fault) for fault in faults(store)] == [ManifestInvalid]


def test_files_without_a_model_have_no_faults(store):
    manifested(store, dataclasses.replace(store.manifest(), model=None))
    assert list(faults(store)) == []


def test_faults_are_found_without_an_array_library(store):
    folder = str(store.root)
    code = (
        "from pathlib import Path\n"
        "from grokfetch.folder.store import Store\n"
        "from loader.weights.binding import faults\n"
        f"assert list(faults(Store(Path({folder!r})))) == []"
    )
    assert not imported_by(code) & {"jax", "ml_dtypes", "numpy"}
