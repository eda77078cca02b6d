"""Mapped weights are the pages of their files, and give the numbers of resident ones."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from support import golden

from grokfetch.errors import MeshInvalid
from loader.devices import kernels
from loader.devices.kernels import Rows, Tuning
from loader.devices.mapped import Mapped, MatrixPlace
from loader.devices.paging import Paging
from loader.devices.placement import make_mesh, share
from loader.inference import engine as generate
from loader.inference.engine import Engine
from loader.inference.steps import expert_groups, padded
from loader.weights.checkpoint import open_folder
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig
from loader.weights.synthetic import write_checkpoint

DECODE = 6
LONGEST_PROMPT = "p2"


def engine(shape=golden.ONE, dtype="float32", **more):
    mesh = make_mesh(golden.CONFIG, shape)
    return Engine(golden.CONFIG, share(golden.CHECKPOINT, mesh), mesh, dtype, **more)


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_logits_and_tokens_are_the_references(devices):
    mapped, wanted = engine(MeshShape(1, devices)), golden.arrays()
    for name in ("p1", "pz") if devices == 1 else ("p1",):
        tokens = golden.prompt(name)
        full = np.asarray(mapped.full_logits([tokens])[0, : len(tokens)])
        assert np.abs(full - wanted[f"f32/{name}_full_logits"]).max() < 1e-3
        if name in golden.CONTINUED:
            made = list(mapped.generate(tokens, DECODE))
            assert made == wanted[f"f32/{name}_tokens"][:DECODE].tolist()


@pytest.mark.parametrize(
    "placed",
    [pytest.param(engine, marks=pytest.mark.slow), golden.engine],
    ids=["mapped", "sharded"],
)
def test_the_experts_counted_are_those_that_the_reference_chose(placed):
    counted = placed()
    choices = counted.count_experts()
    counted.prefill([golden.prompt("p2")])
    wanted = golden.arrays()["f32/p2_router_idx"]
    assert choices.counts().tolist() == [
        np.bincount(layer.reshape(-1), minlength=golden.CONFIG.num_experts).tolist()
        for layer in wanted
    ]


@pytest.mark.slow
def test_prompt_read_in_chunks_gives_the_same_logits(monkeypatch):
    tokens = golden.prompt(LONGEST_PROMPT)
    monkeypatch.setattr(generate, "LONGEST_STEP", 16)
    assert len(tokens) > 16
    logits, state = engine().prefill([tokens, tokens[:5]])
    wanted = golden.arrays()[f"f32/{LONGEST_PROMPT}_full_logits"]
    assert np.abs(np.asarray(logits[0]) - wanted[len(tokens) - 1]).max() < 1e-3
    assert np.abs(np.asarray(logits[1]) - wanted[4]).max() < 1e-3
    assert state.lengths.tolist() == [len(tokens), 5]


def test_device_reads_the_pages_of_the_file_themselves():
    mesh = make_mesh(golden.CONFIG, MeshShape(1, 2))
    params = share(golden.CHECKPOINT, mesh)
    gate = golden.CHECKPOINT["transformer/decoder_layer_3/moe/linear/w"]
    table = golden.CHECKPOINT["language_model/in_out_embed/embeddings"]
    for array, tensor in ((params.layers[3].gate.file, gate), (params.embedding.words, table)):
        address = tensor.file.ctypes.data
        assert [part.data.unsafe_buffer_pointer() for part in array.addressable_shards] == [
            address,
            address,
        ]


def anonymous():
    """Bytes of anonymous memory of this process."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells memory by kind")
@pytest.mark.slow
def test_sharing_a_checkpoint_takes_no_memory_of_its_size(tmp_path):
    config = GrokConfig(
        vocab_size=4096, emb_size=1024, num_layers=2, num_q_heads=8, num_kv_heads=8,
        widening_factor=6, num_experts=4, sequence_len=64,
    )  # fmt: skip
    write_checkpoint(tmp_path, config, seed=1)
    checkpoint = open_folder(tmp_path, config)
    size = sum(tensor.nbytes for tensor in checkpoint.values())
    assert size > 100_000_000
    mesh = make_mesh(config, golden.ONE)
    before = anonymous()
    params = share(checkpoint, mesh)
    Engine(config, params, mesh).prefill([[5, 6, 7]])
    # Compiled programs and activations take some memory; a copy would take more than all of this.
    assert anonymous() - before < size / 2


def test_experts_that_were_not_chosen_are_not_touched(tmp_path):
    touched = []

    class Told(Paging):
        def experts(self, number, chosen):
            touched.append((number, chosen))

    folder = shutil.copytree(golden.TINY / "ckpt-0", tmp_path / "ckpt-0")
    checkpoint = open_folder(folder, golden.CONFIG)
    mesh = make_mesh(golden.CONFIG, golden.ONE)
    told = Engine(golden.CONFIG, share(checkpoint, mesh), mesh, "float32", paging=Told())
    logits, _ = told.prefill([golden.prompt("p1")])
    chosen = {number: set(experts) for number, experts in touched}
    assert set(chosen) == set(range(golden.CONFIG.num_layers))
    spoilt = 0
    for number, experts in chosen.items():
        for part in ("linear", "linear_v", "linear_1"):
            tensor = checkpoint[f"transformer/decoder_layer_{number}/moe/{part}/w"]
            each = tensor.array.nbytes // golden.CONFIG.num_experts
            with tensor.path.open("r+b") as file:
                for expert in set(range(golden.CONFIG.num_experts)) - experts:
                    file.seek(tensor.array.offset + expert * each)
                    file.write(b"\x7f" * each)
                    spoilt += 1
    assert spoilt
    again, _ = told.prefill([golden.prompt("p1")])
    assert (np.asarray(again) == np.asarray(logits)).all()


def test_mesh_that_splits_experts_is_refused():
    with pytest.raises(MeshInvalid, match="expert must be 1, not expert=2,model=1"):
        share(golden.CHECKPOINT, make_mesh(golden.CONFIG, MeshShape(2, 1)))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 3, 8, 65]),
    rows=st.sampled_from([24, 64]),
    groups=st.sampled_from([1, 2, 8]),
    columns=st.sampled_from([16, 24, 1536]),
    ways=st.sampled_from([1, 2, 4]),
    split=st.sampled_from(["rows", "columns"]),
    pad=st.integers(0, 70),
    index=st.integers(0, 2),
    halves=st.booleans(),
)
def test_product_of_any_part_is_that_of_the_dequantised_matrix(
    *, tokens, rows, groups, columns, ways, split, pad, index, halves
):
    random = np.random.default_rng(pad)
    stack = random.integers(-127, 128, (3, rows, columns), np.int8)
    scales = random.uniform(0.001, 0.1, (3, groups, columns)).astype(ml_dtypes.bfloat16)
    gap = random.integers(-127, 128, pad, np.int8)
    parts = [gap, stack.reshape(-1), gap, scales.reshape(-1).view(np.int8), gap]
    place = MatrixPlace(pad, 2 * pad + stack.size, 3, rows, columns, groups, split, ways)
    x = random.standard_normal((tokens, rows), np.float32)
    mesh = Mesh(np.array(jax.devices()[:ways]).reshape(1, ways), ("expert", "model"))
    across, along = PartitionSpec(None, "model"), PartitionSpec()

    def compute(file, x):
        found = Mapped(file, jnp.int32(index), place, Tuning(halves=halves)).product(x)
        return jax.lax.psum(found, "model") if split == "rows" else found

    specs = {"rows": (across, along), "columns": (along, across)}[split]
    spread = jax.shard_map(
        compute, mesh=mesh, in_specs=(along, specs[0]), out_specs=specs[1], check_vma=False
    )
    found = jax.jit(spread)(np.concatenate(parts), x)
    factors = np.repeat(scales[index].astype(np.float64), rows // groups, axis=0)
    np.testing.assert_allclose(found, x @ (stack[index] * factors), rtol=1e-4, atol=2e-3)


@given(
    choices=st.lists(
        st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True), min_size=1, max_size=70
    ),
    data=st.data(),
)
def test_every_real_token_is_in_the_group_of_each_expert_it_chose_and_no_other(choices, data):
    real = data.draw(st.lists(st.booleans(), min_size=len(choices), max_size=len(choices)))
    groups = dict(expert_groups(np.array(choices, np.int32), np.array(real)))
    for expert in range(8):
        wanted = [
            row * 2 + place
            for row, pair in enumerate(choices)
            for place, choice in enumerate(pair)
            if real[row] and choice == expert
        ]
        found = groups.get(expert, np.array([], np.int32))
        assert [pair for pair in found if pair < 2 * len(choices)] == wanted
        assert len(found) == (padded(len(wanted)) if wanted else 0)


def test_padding_is_small_and_of_few_lengths():
    lengths = {padded(count) for count in range(1, 8193)}
    assert len(lengths) < 48
    assert all(count <= padded(count) < 2 * count or count == 1 for count in range(1, 8193))
    assert all(padded(count) <= 1.25 * count for count in range(8, 8193))


@pytest.mark.parametrize("tokens", [1, 8, 128])
def test_no_product_widens_the_matrix(tokens):
    """The largest temporary of the compiled program is far smaller than the matrix."""
    rows, columns = 2048, 4096
    part = (rows, columns, columns)

    def compute(flat, x):
        matrix = Rows(flat, jnp.int32(0), jnp.int32(0), *part)
        return kernels.product(x, matrix, 1, lambda _: jnp.ones(columns), Tuning())

    flat = jax.ShapeDtypeStruct((rows * columns,), jnp.int8)
    x = jax.ShapeDtypeStruct((tokens, rows), jnp.float32)
    memory = jax.jit(compute).lower(flat, x).compile().memory_analysis()
    sums = 4 * tokens * columns
    block = 4 * Tuning().block_rows * Tuning().block_columns if tokens > Tuning().few_tokens else 0
    assert memory.temp_size_in_bytes < 3 * (sums + block)


@pytest.mark.parametrize(("rows", "columns", "most"), [(64, 128, 8), (256, 8192, 32)])
def test_small_matrices_are_added_in_few_rows_a_step_which_compile_sooner(rows, columns, most):
    def compute(flat, x):
        matrix = Rows(flat, jnp.int32(0), jnp.int32(0), rows, columns, columns)
        return kernels.product(x, matrix, 1, lambda _: jnp.ones(columns), Tuning())

    flat = jax.ShapeDtypeStruct((rows * columns,), jnp.int8)
    x = jax.ShapeDtypeStruct((1, rows), jnp.float32)
    text = str(jax.make_jaxpr(compute)(flat, x))
    assert text.count("convert_element_type[new_dtype=float32") == most
