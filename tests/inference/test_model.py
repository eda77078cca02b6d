"""The model gives the reference's numbers, on every mesh, and would be caught if it did not."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support import golden
from support.parity import TOLERANCE, check_bfloat16, check_parity, furthest
from support.program import with_devices
from support.reference import Reference

from loader.devices import platforms
from loader.devices.placement import load, make_mesh
from loader.inference import heads, model
from loader.inference.engine import Engine
from loader.inference.experts import route
from loader.inference.model import KeyValues, Window
from loader.inference.model import _attend as attend
from loader.inference.model import _attend_once as attend_once
from loader.inference.model import _store as store
from loader.weights.checkpoint import open_folder
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig
from loader.weights.synthetic import write_checkpoint

MESHES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2), (8, 1)]
"""The gate tests all, the usual tests only the first; weights on both axes are tested below."""
COPIES = [(1, 4, 2), (2, 2, 2), (1, 1, 8)]
"""Meshes with copies of the weights: along expert, model, data."""

EVERYWHERE = PartitionSpec()


@pytest.mark.parametrize(
    "mesh",
    [MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:])],
    ids=str,
)
def test_logits_and_tokens_equal_the_reference_on_every_mesh(mesh):
    steps = 32 if mesh in {(1, 1), (2, 4)} else 6
    check_parity(golden.engine(MeshShape(*mesh)), golden.PROMPTS, steps)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_all_tokens_equal_the_reference_on_every_mesh(mesh):
    check_parity(golden.engine(MeshShape(*mesh)), golden.CONTINUED, steps=32)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_up_to_64_devices_give_the_references_numbers():
    meshes = ["2,8", "4,8", "8,8"]
    checked = subprocess.run(
        [sys.executable, "-m", "support.parity", *meshes],
        cwd=Path(__file__).parents[1],
        env=with_devices(64),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr[-2000:]
    assert checked.stdout.split() == [
        "expert=2,model=8",
        "expert=4,model=8",
        "expert=8,model=8",
    ]


@pytest.mark.slow
def test_accelerators_products_equal_the_reference():
    mesh, params = golden.placed(MeshShape(2, 4))
    engine = Engine(golden.CONFIG, golden.for_accelerators(params), mesh, "float32")
    check_parity(engine, ["p1"], steps=4)


def follow(engine, steps):
    """Decode three texts at once as the reference did; returns the final state."""
    wanted = golden.arrays()
    logits, state = engine.prefill([golden.prompt(name) for name in golden.CONTINUED])
    for step in range(steps):
        for row, name in zip(logits, golden.CONTINUED, strict=True):
            assert furthest(row, wanted[f"f32/{name}_step_logits"][step]) < TOLERANCE, (name, step)
            assert int(row.argmax()) == wanted[f"f32/{name}_tokens"][step]
        tokens = [wanted[f"f32/{name}_tokens"][step] for name in golden.CONTINUED]
        logits, state = engine.decode(state, np.array(tokens, np.int32))
    return state


@pytest.mark.parametrize(
    "mesh",
    [
        (2, 4),
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in [(1, 1), (1, 2), (1, 8), (4, 2), (8, 1)]
        ),
    ],
    ids=str,
)
def test_the_forms_for_gpus_and_tpus_equal_the_reference(monkeypatch, mesh):
    """All heads, groups of scales or experts at once; the rows of a step one after another."""
    monkeypatch.setattr(platforms, "GPUS", ("cpu",))
    monkeypatch.setattr(platforms, "TPUS", ("cpu",))
    monkeypatch.setattr(platforms, "CPUS", ())
    monkeypatch.setattr(model, "SCORES", 1)
    devices, params = golden.placed(MeshShape(*mesh))
    follow(Engine(golden.CONFIG, golden.for_accelerators(params), devices, "float32"), steps=4)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_in_blocks_of_places_is_that_of_all_places_at_once(
    monkeypatch, rows, tokens, dtype
):
    """Rows of different lengths, with pad ids; the second row has only pad ids."""
    random, config, places = np.random.default_rng(0), golden.CONFIG, 3 * heads.BLOCK
    shape = rows, places, config.num_kv_heads, config.key_size
    keys, values = (np.array(random.standard_normal(shape, np.float32)) for _ in "kv")
    keys, values = (part.astype(dtype).astype(np.float32) for part in (keys, values))
    starts = np.array([70, 5, 126])[:rows]
    positions = (starts[:, None] + np.arange(tokens)).astype(np.int32)
    visible = random.random((rows, places)) < 0.8
    visible[1:2] = False
    window = Window(positions, np.ones(positions.shape, bool), visible, fresh=False)
    queries = 5 * random.standard_normal((rows, tokens, config.num_q_heads, config.key_size))

    def attended(cpus, keys, values):
        monkeypatch.setattr(platforms, "CPUS", cpus)
        held = KeyValues(jnp.asarray(keys), jnp.asarray(values))
        return jax.jit(lambda: attend(jnp.float32(queries), held, window, config))()

    wanted = attended((), keys, values)
    held = [jnp.asarray(part, dtype) for part in (keys, values)]
    assert furthest(attended(("cpu",), *held), wanted) < 1e-5


def test_a_gpu_attends_before_it_writes_a_token_as_others_do_afterwards():
    """A row of nothing but pads, rows whose token is a pad or the only one, and random rows."""
    random, config, places = np.random.default_rng(0), golden.CONFIG, 192
    positions = np.array([70, 5, 126, 0, 191], np.int32)[:, None]
    rows = len(positions)
    visible = random.random((rows, places)) < 0.8
    np.put_along_axis(visible, positions, [[True], [False], [False], [True], [True]], axis=1)
    visible[1] = False
    window = Window(positions, np.ones(positions.shape, bool), visible, fresh=False)

    def some(length, count):
        array = random.standard_normal((rows, length, count, config.key_size), np.float32)
        return jnp.asarray(array)

    queries = 5 * some(1, config.num_q_heads)
    held = KeyValues(*(some(places, config.num_kv_heads) for _ in "kv"))
    step = KeyValues(*(some(1, config.num_kv_heads) for _ in "kv"))
    found, kept = jax.jit(lambda: attend_once(queries, held, step, window, config))()
    written = store(held, step, window)
    wanted = jax.jit(lambda: attend(queries, written, window, config))()
    assert furthest(found, wanted) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, kept, written)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_on_a_cpu_never_holds_the_cache_in_another_type(dtype):
    """Fully optimised, and with positions known only at run time: in a loop of known length the
    compiler may convert less."""
    config, places = golden.CONFIG, 64 * heads.BLOCK
    shape = 1, places, config.num_kv_heads, config.key_size

    def some(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    window = Window(some((1, 1), "int32"), some((1, 1), "bool"), some((1, places), "bool"), False)
    held = KeyValues(some(shape, dtype), some(shape, dtype))
    queries = some((1, 1, config.num_q_heads, config.key_size), "float32")
    step = jax.jit(functools.partial(attend, config=config)).lower(queries, held, window)
    memory = step.compile({"xla_backend_optimization_level": "3"}).memory_analysis()
    assert memory.temp_size_in_bytes < np.prod(shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "steps"), [((2, 2, 2), 6), *((mesh, 32) for mesh in COPIES)], ids=str
)
def test_rows_dealt_out_to_copies_of_the_weights_equal_the_reference(mesh, steps):
    """Three texts at once; their number is never divisible by that of the copies."""
    engine = golden.engine(MeshShape(*mesh))
    state = follow(engine, steps)
    rows = engine.rows(3) // engine.mesh.shape["data"]
    keys = state.cache[0].keys.addressable_shards
    assert {shard.data.shape[0] for shard in keys} == {rows}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1), (1, 8)], ids=str)
def test_bfloat16_is_no_further_from_float32_than_the_reference_is(mesh):
    check_bfloat16(golden.engine(MeshShape(*mesh), "bfloat16"), golden.PROMPTS)


def test_prompts_on_accelerators_are_no_further_from_float32_than_the_reference_as_written():
    """All prompts together have so many tokens that the experts round what they multiply."""
    mesh, params = golden.placed(golden.ONE)
    engine = Engine(golden.CONFIG, golden.for_accelerators(params), mesh, "bfloat16")
    prompts, wanted = [golden.prompt(name) for name in golden.PROMPTS], golden.arrays()
    found = np.asarray(engine.full_logits(prompts))
    for row, prompt, name in zip(found, prompts, golden.PROMPTS, strict=True):
        exact = wanted[f"f32/{name}_full_logits"]
        reference = np.abs(wanted[f"bf16_eager/{name}_full_logits"] - exact).mean()
        assert 1e-4 < np.abs(row[: len(prompt)] - exact).mean() <= reference, name


@pytest.mark.parametrize("name", [pytest.param("p2", marks=pytest.mark.slow), "pz"])
def test_hidden_states_and_router_equal_the_reference_layer_by_layer(name):
    config, wanted = golden.CONFIG, golden.arrays()
    mesh, params = golden.placed(golden.ONE)
    tokens = np.array([golden.prompt(name)], np.int32)
    window = first_window(tokens, places=tokens.shape[1])

    def traced(weights, entry, x):
        attended, _ = model.attention(
            weights, entry, model.norm(x, weights.before_attention), window, config
        )
        middle = x + model.norm(attended, weights.after_attention)
        routed = route(model.norm(middle, weights.before_experts)[0], weights.router, 2)
        return model.layer(weights, entry, x, window, config)[0], routed

    layer = spread(traced, mesh)
    embed = spread(lambda table, ids: model.embed(table, ids, config, jnp.float32), mesh)
    x = embed(params.embedding, tokens)
    assert furthest(x[0], wanted[f"f32/{name}_emb"]) < 1e-5
    for number, weights in enumerate(params.layers):
        x, (choices, gates) = layer(weights, empty_cache(config, 1, tokens.shape[1])[0], x)
        assert furthest(x[0], wanted[f"f32/{name}_hidden"][number]) < TOLERANCE
        assert (choices == wanted[f"f32/{name}_router_idx"][number]).all()
        assert furthest(gates, wanted[f"f32/{name}_router_gate"][number]) < 1e-4


def spread(function, mesh):
    """The function on a mesh of one device."""
    return jax.jit(
        jax.shard_map(
            function, mesh=mesh, in_specs=EVERYWHERE, out_specs=EVERYWHERE, check_vma=False
        )
    )


def empty_cache(config, batch, places):
    shape = (batch, places, config.num_kv_heads, config.key_size)
    return tuple(KeyValues(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_layers))


def first_window(tokens, places):
    width = tokens.shape[1]
    visible = np.zeros((len(tokens), places), bool)
    visible[:, :width] = tokens != 0
    positions = np.broadcast_to(np.arange(width), tokens.shape)
    return Window(positions, np.ones(tokens.shape, bool), visible, fresh=True)


def whole_model(params, cache, tokens, window, config):
    """All parts of one step, which the engine compiles one by one."""
    dtype = cache[0].keys.dtype
    x = model.embed(params.embedding, tokens, config, dtype)
    filled = []
    for weights, entry in zip(params.layers, cache, strict=True):
        x, kept, _ = model.layer(weights, entry, x, window, config)
        filled.append(kept)
    return model.logits(params.embedding, params.norm, x, config, dtype), tuple(filled)


@pytest.mark.slow
def test_without_padding_and_in_two_parts_the_logits_are_the_same():
    config = golden.CONFIG
    mesh, params = golden.placed(golden.ONE)
    tokens = np.array([golden.prompt("p1")], np.int32)
    # Two layers are enough here; to compile all twelve as one program takes long.
    config = dataclasses.replace(config, num_layers=2)
    params = dataclasses.replace(params, layers=params.layers[:2])
    run = spread(lambda p, c, t, w: whole_model(p, c, t, w, config), mesh)

    whole, _ = run(params, empty_cache(config, 1, 7), tokens, first_window(tokens, 7))
    first, cache = run(
        params, empty_cache(config, 1, 9), tokens[:, :4], first_window(tokens[:, :4], 9)
    )
    rest = Window(np.arange(4, 7)[None], np.ones((1, 3), bool), np.arange(9)[None] < 7, fresh=False)
    second, _ = run(params, cache, tokens[:, 4:], rest)
    assert furthest(jnp.concatenate((first, second), axis=1), np.asarray(whole)) < 1e-4

    padded = Engine(config, params, mesh, "float32").full_logits(tokens.tolist())[:, :7]
    assert furthest(padded, np.asarray(whole)) < 1e-4


def break_rope_offset(patch, config, params):
    right = model.rotate
    # Steps of one token forget how many came before.
    patch.setattr(model, "rotate", lambda x, at: right(x, at * (at.shape[1] > 1)))
    return config, params


def break_soft_cap(patch, config, params):
    patch.setattr(model, "soft_cap", lambda scores: scores)
    return config, params


def break_embedding_multiplier(patch, config, params):
    return dataclasses.replace(config, embedding_multiplier_scale=3.0), params


def break_output_multiplier(patch, config, params):
    return dataclasses.replace(config, output_multiplier_scale=14.0), params


def break_scale_groups(patch, config, params):
    def interleaved(x, weights, dtype):
        rows, groups = weights.weight.shape[0], weights.scales.shape[0]
        scales = weights.scales[jnp.arange(rows) % groups].astype(jnp.float32)
        return jnp.einsum("...k,kn->...n", x, weights.weight * scales)

    patch.setattr(model, "product", interleaved)
    return config, golden.for_accelerators(params)


def break_choice(patch, config, params):
    right = model.route

    def second_and_third(x, router, chosen):
        choices, gates = right(x, router, chosen + 1)
        return choices[:, 1:], gates[:, 1:]

    patch.setattr(model, "route", second_and_third)
    return config, params


def break_number_of_experts(patch, config, params):
    return dataclasses.replace(config, num_selected_experts=1), params


def break_gate_weighting(patch, config, params):
    right = model.route

    # Gates that are only normalised to sum to one would not be noticed: the norm after the experts
    # undoes any common factor. `test_hidden_states_and_router...` compares the gates themselves.
    def equal(x, router, chosen):
        choices, gates = right(x, router, chosen)
        return choices, jnp.full_like(gates, 1 / chosen)

    patch.setattr(model, "route", equal)
    return config, params


FAULTS = [
    break_rope_offset,
    break_soft_cap,
    break_embedding_multiplier,
    break_output_multiplier,
    break_scale_groups,
    break_choice,
    break_number_of_experts,
    break_gate_weighting,
]


@contextlib.contextmanager
def holding(engine, params):
    """A compiled engine with other weights of the same shapes."""
    right = engine.params
    engine.hold(params)
    try:
        yield engine
    finally:
        engine.hold(right)


def test_parity_fails_when_the_layers_are_out_of_order():
    engine = golden.engine()
    order = sorted(range(golden.CONFIG.num_layers), key=str)
    wrong = dataclasses.replace(
        engine.params, layers=tuple(engine.params.layers[number] for number in order)
    )
    with holding(engine, wrong), pytest.raises(AssertionError, match="p1"):
        check_parity(engine, ["p1"], steps=2)


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_fails_when_the_model_is_broken(monkeypatch, fault):
    mesh, params = golden.placed(golden.ONE)
    config, params = fault(monkeypatch, golden.CONFIG, params)
    with pytest.raises(AssertionError, match="p1"):
        check_parity(Engine(config, params, mesh, "float32"), ["p1"], steps=2)


SMALL = GrokConfig(
    vocab_size=96,
    sequence_len=64,
    output_multiplier_scale=0.7,
    embedding_multiplier_scale=9.3,
    emb_size=40,
    widening_factor=1.7,
    key_size=4,
    num_q_heads=8,
    num_kv_heads=2,
    num_layers=3,
    attn_output_multiplier=0.6,
    num_experts=5,
    num_selected_experts=3,
)
CASES = {
    # Grouped queries, a width that is not a power of two, three of five experts.
    "grouped": (SMALL, (1, 1)),
    # Three devices: each scale group of eight is divided, and heads and experts come in threes.
    "thirds": (
        dataclasses.replace(
            SMALL, emb_size=36, widening_factor=2, num_q_heads=6, num_kv_heads=3, num_experts=3,
            num_selected_experts=1,
        ),
        (1, 3),
    ),
    "thirds of experts": (
        dataclasses.replace(SMALL, num_kv_heads=1, num_experts=6, num_selected_experts=6),
        (3, 1),
    ),
    "both axes": (
        dataclasses.replace(
            SMALL, num_q_heads=12, num_kv_heads=4, num_experts=8, num_selected_experts=2
        ),
        (2, 4),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The random checkpoint of each case: its reference and its parameters on its mesh."""

    @functools.cache
    def make(name):
        config, shape = CASES[name]
        folder = tmp_path_factory.mktemp("case")
        write_checkpoint(folder, config, seed=len(name))
        checkpoint = open_folder(folder, config)
        mesh = make_mesh(config, MeshShape(*shape))
        return Reference(config, checkpoint), load(checkpoint, mesh), mesh

    return make


def check_case(reference, params, mesh):
    """Rows of different lengths are read and continued in a batch, each as if it were alone."""
    config = reference.config
    random = np.random.default_rng(7)
    rows = [random.integers(1, config.vocab_size, length).tolist() for length in (1, 9, 4)]
    rows[2][1] = config.pad_token
    engine = Engine(config, params, mesh, "float32")
    full = np.asarray(engine.full_logits(rows))
    logits, state = engine.prefill(rows)
    masked = [[token == config.pad_token for token in row] for row in rows]
    for step in range(3):
        for index, row in enumerate(rows):
            wanted = reference.forward(row, masked[index])
            assert wanted.narrowest > 1e-4, "a near tie: choose another seed"
            if step == 0:
                assert furthest(full[index, : len(row)], wanted.logits) < 1e-4
            assert furthest(logits[index], wanted.logits[-1]) < 1e-4
        # A generated pad id is a token like any other.
        token = config.pad_token if step == 0 else 5 + step
        rows = [[*row, token] for row in rows]
        masked = [[*row, False] for row in masked]
        logits, state = engine.decode(state, np.full(len(rows), token, np.int32))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_batches_of_random_models_equal_plain_numpy(cases, name):
    check_case(*cases(name))


def test_numpy_reference_fails_when_query_heads_read_the_wrong_keys(cases, monkeypatch):
    def interleaved(queries, kv_heads):
        batch, steps, heads, size = queries.shape
        return queries.reshape(batch, steps, heads // kv_heads, kv_heads, size).swapaxes(2, 3)

    monkeypatch.setattr(model, "group_queries", interleaved)
    with pytest.raises(AssertionError, match="assert"):
        check_case(*cases("grouped"))


def test_numpy_reference_agrees_with_the_official_one():
    wanted = golden.arrays()["f32/p1_full_logits"]
    found = Reference(golden.CONFIG, golden.CHECKPOINT).forward(golden.prompt("p1"))
    assert furthest(found.logits, wanted) < TOLERANCE


@pytest.mark.parametrize("mesh", [(1, 1), pytest.param((2, 4), marks=pytest.mark.slow)], ids=str)
def test_weights_of_experts_that_nobody_chose_are_never_used(mesh):
    shape = MeshShape(*mesh)
    tokens = [*golden.prompt("p0"), int(golden.arrays()["f32/p0_tokens"][0])]
    chosen = Reference(golden.CONFIG, golden.CHECKPOINT).forward(tokens).chosen
    _, params = golden.placed(shape)

    def poisoned(weights, used):
        unused = [expert for expert in range(golden.CONFIG.num_experts) if expert not in used]
        poison = weights.scales.at[np.array(unused)].set(jnp.nan)
        return dataclasses.replace(weights, scales=poison)

    layers = [
        dataclasses.replace(
            layer,
            gate=poisoned(layer.gate, sets[0] | sets[1]),
            up=poisoned(layer.up, sets[0] | sets[1]),
            down=poisoned(layer.down, sets[0] | sets[1]),
        )
        for layer, sets in zip(params.layers, chosen, strict=True)
    ]
    params = dataclasses.replace(params, layers=tuple(layers))
    # The prompt of one token is padded to 16, and padding chooses no expert either.
    with holding(golden.engine(shape), params) as engine:
        check_parity(engine, ["p0"], steps=2)


@pytest.mark.parametrize("prompt", [[0], [0, 0], [0, 0, 5], [5, 0, 0], [0] * 20 + [7, 9]])
def test_where_a_query_may_see_nothing_it_sees_itself_alone_and_beside_a_longer_prompt(prompt):
    engine = golden.engine()
    reference = Reference(golden.CONFIG, golden.CHECKPOINT)
    expected = reference.forward(prompt).logits
    found = np.asarray(engine.full_logits([prompt]))[0, : len(prompt)]
    np.testing.assert_allclose(found, expected, atol=5e-5)
    beside, _ = engine.prefill([prompt, list(range(3, 90))])
    np.testing.assert_allclose(np.asarray(beside)[0], expected[-1], atol=5e-5)
    # A token that is generated sees itself, and never the pad ids before it.
    logits, state = engine.prefill([prompt])
    for token in (7, 0, 11):
        logits, state = engine.decode(state, np.array([token], np.int32))
    masked = [token == 0 for token in prompt] + [False] * 3
    text = [*prompt, 7, 0, 11]
    expected = reference.forward(text, masked).logits[-1]
    np.testing.assert_allclose(np.asarray(logits)[0], expected, atol=1e-4)
