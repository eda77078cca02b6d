"""Every device gets its share, whole heads at a time, and nothing is replicated by accident."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokfetch.errors import MeshInvalid
from loader.weights.partition import (
    RULES,
    MeshShape,
    Position,
    check_mesh,
    choose_mesh,
    mesh_axes,
    positions,
    scale_block,
    scale_rows,
    scale_shape,
    weight_block,
)
from loader.weights.schema import GrokConfig, ParamSpec, parameters

OFFICIAL = GrokConfig()
LAYER = {
    spec.name.removeprefix("transformer/decoder_layer_0/"): spec
    for spec in parameters(OFFICIAL)
    if spec.name.startswith("transformer/decoder_layer_0/")
}
OUTPUT = LAYER["multi_head_attention/linear/w"]
UP, DOWN = LAYER["moe/linear/w"], LAYER["moe/linear_1/w"]


@pytest.mark.parametrize(
    ("devices", "expert", "model"),
    [(1, 1, 1), (2, 1, 2), (4, 1, 4), (8, 1, 8), (16, 2, 8), (32, 4, 8), (64, 8, 8)],
)
def test_official_model_fills_the_model_axis_first(devices, expert, model):
    assert choose_mesh(OFFICIAL, devices) == MeshShape(expert, model)


@pytest.mark.parametrize(("devices", "works"), [(6, 4), (7, 4), (12, 8), (63, 32), (1000, 64)])
def test_count_that_cannot_work_names_a_dimension_and_one_that_can(devices, works):
    with pytest.raises(MeshInvalid) as caught:
        choose_mesh(OFFICIAL, devices)
    assert f"{devices} devices" in caught.value.what
    assert f"not divisible by {devices}" in caught.value.what
    assert f"works is {works}:" in caught.value.hint


def test_mesh_that_does_not_fit_is_told_which_of_as_many_devices_do():
    with pytest.raises(MeshInvalid) as caught:
        check_mesh(OFFICIAL, MeshShape(1, 16))
    assert caught.value.hint == (
        "with 16 devices this works: --mesh expert=2,model=8 or --mesh expert=4,model=4"
        " or --mesh expert=8,model=2"
    )


def test_no_device_is_no_mesh():
    with pytest.raises(MeshInvalid, match="at least one"):
        choose_mesh(OFFICIAL, 0)


def test_mesh_that_cuts_a_head_is_refused_though_the_width_divides():
    with pytest.raises(MeshInvalid, match=r"kv_heads of .*/key/w counts 8, not divisible by 16"):
        check_mesh(OFFICIAL, MeshShape(1, 16))


def test_mesh_that_cuts_an_expert_is_refused():
    with pytest.raises(MeshInvalid, match=r"expert of .*/moe/linear/w counts 8, .* by 16"):
        check_mesh(OFFICIAL, MeshShape(16, 1))


def test_empty_mesh_is_refused():
    with pytest.raises(MeshInvalid, match="at least 1"):
        check_mesh(OFFICIAL, MeshShape(0, 1))


def test_axis_without_a_rule_is_an_error():
    rules = {axis: mesh for axis, mesh in RULES.items() if axis != "router"}
    with pytest.raises(MeshInvalid, match=r"'router' of .*router/w"):
        mesh_axes(LAYER["router/w"], rules)


def test_mesh_axis_cannot_split_one_tensor_twice():
    with pytest.raises(MeshInvalid, match=r"two dimensions of .*moe/linear/w"):
        mesh_axes(UP, RULES | {"embed": ("model",)})


def test_positions_count_devices_with_the_model_axis_fastest_and_copies_slowest():
    assert [tuple(at) for at in positions(MeshShape(2, 2, data=2))] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("mesh", [(1, 8), (8, 1), (2, 4), (8, 8)], ids=str)
def test_every_device_has_a_part_of_the_vocabulary_of_its_own(mesh):
    shape, table = MeshShape(*mesh), parameters(OFFICIAL)[0]
    rows = [weight_block(table, shape, at)[0] for at in positions(shape)]
    each = OFFICIAL.vocab_size // shape.devices
    assert rows == [slice(start, start + each) for start in range(0, OFFICIAL.vocab_size, each)]


@pytest.mark.parametrize("name", LAYER)
def test_copies_of_the_weights_hold_the_same_blocks(name):
    copied, once = MeshShape(2, 4, data=3), MeshShape(2, 4)
    blocks = [weight_block(LAYER[name], copied, at) for at in positions(copied)]
    assert blocks == 3 * [weight_block(LAYER[name], once, at) for at in positions(once)]


def test_official_blocks_on_sixteen_devices():
    shape, last = MeshShape(2, 8), Position(1, 7)
    assert weight_block(UP, shape, last) == (slice(4, 8), slice(0, 6144), slice(28672, 32768))
    assert scale_block(UP, shape, last) == (slice(4, 8), slice(0, 1), slice(28672, 32768))
    assert weight_block(DOWN, shape, last) == (slice(4, 8), slice(28672, 32768), slice(0, 6144))
    assert scale_block(DOWN, shape, last) == (slice(4, 8), slice(7, 8), slice(0, 6144))
    assert weight_block(LAYER["router/w"], shape, last) == (slice(0, 6144), slice(0, 8))


def source_rows(spec, shape, rows):
    """The scale row of the file that each of the expanded `rows` repeats."""
    expanded = scale_rows(spec, shape)
    return [row * spec.scale_groups // expanded for row in range(*rows.indices(expanded))]


def test_scale_rows_are_repeated_only_where_a_device_holds_part_of_a_group():
    assert scale_shape(OUTPUT, MeshShape(1, 4)) == (8, 6144)
    assert scale_shape(OUTPUT, MeshShape(1, 3)) == (24, 6144)
    # The second of three devices starts a third into the source's third row.
    assert source_rows(OUTPUT, MeshShape(1, 3), slice(8, 16)) == [2, 3, 3, 3, 4, 4, 4, 5]
    assert source_rows(OUTPUT, MeshShape(1, 4), slice(2, 4)) == [2, 3]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 3, 8]))
def test_every_row_meets_its_own_scale_and_blocks_tile_the_tensor(model, expert, times, groups):
    rows = math.lcm(model, groups) * times
    spec = ParamSpec(
        "w", 0, (expert * 2, rows, 5), "int8", ("expert", "ff", "embed"), scale_groups=groups
    )
    shape = MeshShape(expert, model)
    seen = set()
    for position in positions(shape):
        experts, held, columns = weight_block(spec, shape, position)
        scales = scale_block(spec, shape, position)[1]
        sources = source_rows(spec, shape, scales)
        assert columns == slice(0, 5)
        for local, row in enumerate(range(held.start, held.stop)):
            source = sources[local * len(sources) // (held.stop - held.start)]
            assert source == row * groups // rows
            seen |= {(e, row) for e in range(experts.start, experts.stop)}
    assert len(seen) == expert * 2 * rows
    assert scale_rows(spec, shape) % model == 0


@given(st.integers(1, 40))
def test_chosen_mesh_uses_every_device_or_says_why_not(devices):
    config = dataclasses.replace(OFFICIAL, num_experts=6, num_kv_heads=4, num_layers=1)
    try:
        shape = choose_mesh(config, devices)
    except MeshInvalid:
        return
    assert shape.devices == devices
    check_mesh(config, shape)


def test_rules_need_no_array_library():
    code = (
        "import sys, loader.weights.partition; sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
