"""Each device is given its own block and no more, in the checkpoint's own dtypes."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from support import golden

from grokfetch.errors import MeshInvalid
from loader.devices.placement import load, make_mesh
from loader.devices.products import Quantized
from loader.weights.partition import MeshShape, Position, positions, scale_block, weight_block
from loader.weights.schema import parameters

LAYER_3 = "transformer/decoder_layer_3/"


class Watched:
    """An array that remembers the largest part that was taken from it."""

    def __init__(self, array):
        self._array = array
        self.nbytes, self.shape, self.dtype = array.nbytes, array.shape, array.dtype
        self.largest = 0

    def __getitem__(self, index):
        part = self._array[index]
        self.largest = max(self.largest, part.nbytes)
        return part


class WatchedTensor:
    def __init__(self, tensor):
        self.spec = tensor.spec
        self.weight = Watched(tensor.weight)
        self.scales = tensor.scales


class WatchedCheckpoint:
    config = golden.CONFIG

    def __init__(self):
        self.tensors = {name: WatchedTensor(t) for name, t in golden.CHECKPOINT.items()}

    def __getitem__(self, name):
        return self.tensors[name]


@pytest.mark.parametrize("mesh", [(1, 1), (1, 8), (2, 4), (8, 1), (2, 2, 2)], ids=str)
def test_device_holds_the_block_that_the_rules_give_it(mesh):
    shape = MeshShape(*mesh)
    _, params = golden.placed(shape)
    layer = params.layers[3]
    placed = {
        "language_model/in_out_embed/embeddings": params.embedding,
        LAYER_3 + "multi_head_attention/linear/w": layer.output,
        LAYER_3 + "multi_head_attention/key/w": layer.key,
        LAYER_3 + "moe/linear_v/w": layer.up,
        LAYER_3 + "moe/linear_1/w": layer.down,
        LAYER_3 + "rms_norm_2/scale": layer.before_experts,
        LAYER_3 + "router/w": layer.router,
    }
    for name, array in placed.items():
        tensor = golden.CHECKPOINT[name]
        weight = array.weight if isinstance(array, Quantized) else array
        assert weight.dtype == tensor.weight.dtype
        check_blocks(weight, tensor.weight, weight_block, tensor.spec, shape)
        if isinstance(array, Quantized):
            assert array.scales.dtype == tensor.scales.dtype
            check_blocks(array.scales, tensor.scales, scale_block, tensor.spec, shape)


def check_blocks(array, source, block_of, spec, shape):
    assert len(array.addressable_shards) == shape.devices
    for shard in array.addressable_shards:
        position = list(positions(shape))[shard.device.id]
        block = block_of(spec, shape, position)
        assert (np.asarray(shard.data) == source[block]).all(), (spec.name, position)


def test_no_tensor_that_is_split_is_ever_read_whole():
    checkpoint, shape = WatchedCheckpoint(), MeshShape(2, 4)
    load(checkpoint, make_mesh(golden.CONFIG, shape))
    for spec in parameters(golden.CONFIG):
        block = weight_block(spec, shape, Position(0, 0))
        share = math.prod(part.stop - part.start for part in block)
        whole = math.prod(spec.shape)
        watched = checkpoint[spec.name].weight
        assert watched.largest * whole == watched.nbytes * share, spec.name


def test_progress_adds_up_to_the_checkpoint():
    counted = []
    load(golden.CHECKPOINT, make_mesh(golden.CONFIG, MeshShape()), on_bytes=counted.append)
    specs = parameters(golden.CONFIG)
    assert len(counted) >= len(specs)
    wanted = sum(
        math.prod(spec.shape) * (1 if spec.dtype == "int8" else 4)
        + 2 * (math.prod(spec.scale_shape) if spec.scale_shape else 0)
        for spec in specs
    )
    assert sum(counted) == wanted


def test_mesh_takes_the_first_devices():
    mesh = make_mesh(golden.CONFIG, MeshShape(2, 2))
    assert mesh.axis_names == ("data", "expert", "model")
    assert mesh.devices.ravel().tolist() == jax.devices()[:4]


def test_mesh_defaults_to_all_devices():
    assert dict(make_mesh(golden.CONFIG).shape) == {"data": 1, "expert": 1, "model": 8}


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(MeshInvalid, match="needs 16 devices, and there are 8") as caught:
        make_mesh(golden.CONFIG, MeshShape(2, 8))
    assert "--mesh expert=2,model=4" in caught.value.hint


def test_shape_that_does_not_divide_is_an_error_before_any_load():
    with pytest.raises(MeshInvalid, match="does not fit: vocab"):
        make_mesh(golden.CONFIG, MeshShape(1, 3))
