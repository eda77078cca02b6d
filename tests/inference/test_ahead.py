"""Steps compile for described weights as for placed ones, on this machine's devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from support import golden

from loader.devices.absent import slice_grid
from loader.inference.ahead import Load, compiled, described
from loader.weights.partition import MeshShape


@pytest.mark.parametrize("shape", [MeshShape(1, 8), MeshShape(2, 4), MeshShape(8, 1)], ids=str)
def test_described_weights_are_shaped_and_divided_like_placed_ones(shape):
    mesh, params = golden.placed(shape)
    told = described(golden.CONFIG, mesh, golden.CONFIG.num_layers)
    placed = golden.for_accelerators(params)
    assert jax.tree.structure(told) == jax.tree.structure(placed)

    def same(one, other):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(other.sharding, other.ndim)

    jax.tree.map(same, told, placed)


def test_parts_of_a_step_compile_without_a_weight():
    mesh, params = golden.placed(MeshShape(2, 4))
    found = {p.name: p for p in compiled(golden.CONFIG, mesh, Load(2, 1, 16), jnp.dtype("float32"))}
    assert list(found) == ["embed", "layer", "logits"]
    table = params.embedding.addressable_shards[0].data.nbytes
    assert found["logits"].arguments >= table
    assert all(program.text.startswith("HloModule") for program in found.values())


@pytest.mark.parametrize(
    ("dimensions", "count", "grid"),
    [(2, 1, "2x2"), (2, 8, "2x4"), (2, 16, "4x4"), (2, 32, "4x8"), (3, 1, "2x2x1"), (3, 4, "2x2x1"),
     (3, 8, "2x2x2"), (3, 16, "2x2x4"), (3, 64, "4x4x4")],
)  # fmt: skip
def test_slices_are_the_smallest_grids_that_hold_the_devices(dimensions, count, grid):
    assert slice_grid(dimensions, count) == grid
