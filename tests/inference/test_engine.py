"""Tokens come one at a time, the same for the same seed, and stop where they should."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import golden

from grokfetch.errors import PromptInvalid
from loader.devices.compile_clock import CompileClock
from loader.inference import engine as engines
from loader.inference.engine import Engine
from loader.inference.heads import within
from loader.inference.sampling import Choice, Sampling, draw
from loader.inference.steps import program
from loader.weights import limits
from loader.weights.partition import MeshShape


def wanted(name):
    return golden.arrays()[f"f32/{name}_tokens"].tolist()


@pytest.fixture(scope="module")
def short():
    """An engine with a context of 30 tokens, whose texts end with token 308."""
    config = dataclasses.replace(golden.CONFIG, sequence_len=30, eos_token=308)
    mesh, params = golden.placed(golden.ONE)
    return Engine(config, params, mesh, "float32")


@pytest.mark.parametrize(
    "mesh",
    [(1, 1), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((2, 4), (2, 2, 2)))],
    ids=str,
)
def test_greedy_tokens_are_the_references(mesh):
    engine = golden.engine(MeshShape(*mesh))
    assert list(engine.generate(golden.prompt("p1"), 32)) == wanted("p1")


def test_tokens_are_made_as_they_are_asked_for():
    stream = golden.engine().generate(golden.prompt("p1"), 10**9)
    assert list(itertools.islice(stream, 3)) == wanted("p1")[:3]


def test_end_of_sequence_ends_the_text_and_is_not_part_of_it(short):
    tokens = wanted("p1")
    assert list(short.generate(golden.prompt("p1"), 20)) == tokens[: tokens.index(308)]


def test_text_ends_where_the_context_is_full(short):
    assert list(short.generate(golden.prompt("p2"), 20)) == wanted("p2")[:7]


def test_full_context_takes_no_further_token(short):
    _, state = short.prefill([[5] * 30])
    with pytest.raises(PromptInvalid, match="context of 30 tokens is full"):
        short.decode(state, np.array([5], np.int32))


def test_no_tokens_asked_for_gives_none(short):
    assert list(short.generate([5], 0)) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([5] * 30, "fills the whole context"),
        ([5] * 31, "31 tokens, and the model's context is 30"),
        ([5, 512], "token 512 is outside the vocabulary of 512"),
        ([-1], "token -1"),
    ],
)
def test_prompt_that_cannot_work_is_refused_before_anything_runs(short, prompt, message):
    with pytest.raises(PromptInvalid, match=message):
        short.generate(prompt, 5)


def test_batch_of_nothing_is_refused(short):
    with pytest.raises(PromptInvalid, match="empty"):
        short.prefill([])


def test_after_a_warm_up_nothing_is_compiled_and_the_tokens_are_the_same():
    mesh, params = golden.placed(golden.ONE)
    engine = Engine(golden.CONFIG, params, mesh, "float32")
    prompt = golden.prompt("p1")
    engine.warm_up(prompt)
    clock = CompileClock()
    clock.start()
    tokens = list(engine.generate(prompt, 6))
    clock.stop()
    assert tokens == wanted("p1")[:6]
    assert clock.seconds == 0


@pytest.mark.slow
def test_logits_of_a_prompt_of_several_steps_come_on_several_devices(monkeypatch):
    # The logits of one step and the layers of the next do not depend on one another.
    monkeypatch.setattr(engines, "LONGEST_STEP", 16)
    prompt = golden.prompt("p2") * 4
    rows = len(prompt)
    found, wanted = (
        np.asarray(golden.engine(shape).full_logits([prompt]))[0, :rows]
        for shape in (MeshShape(2, 4), golden.ONE)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
def test_a_float16_cache_is_nearer_to_float32_than_a_bfloat16_one():
    mesh, params = golden.placed(golden.ONE)

    def said(cache):
        engine = Engine(golden.CONFIG, params, mesh, "float32", cache=cache)
        logits, state = engine.prefill([golden.prompt("p1")])
        told = []
        for token in wanted("p1")[:12]:
            logits, state = engine.decode(state, np.array([token], np.int32))
            told.append(np.asarray(logits[0]))
        return np.array(told)

    exact = said(None)
    errors = {cache: np.abs(said(cache) - exact).mean() for cache in ("float16", "bfloat16")}
    assert 0 < errors["float16"] < errors["bfloat16"] / 4


def test_what_float16_cannot_hold_is_the_largest_that_it_can():
    held = within(jnp.array([1e9, -jnp.inf, 65504.0, 0.1]), jnp.dtype(jnp.float16))
    assert held.tolist() == [65504, -65504, 65504, np.float16(0.1)]


@pytest.mark.slow
def test_cache_grows_without_changing_the_tokens(monkeypatch):
    mesh, params = golden.placed(golden.ONE)
    # Two layers are enough here, because each size of the cache is compiled separately.
    config = dataclasses.replace(golden.CONFIG, num_layers=2)
    params = dataclasses.replace(params, layers=params.layers[:2])
    engine = Engine(config, params, mesh, "float32")
    tokens = list(engine.generate(golden.prompt("p1"), 32))
    monkeypatch.setattr(limits, "SMALLEST_CACHE", 16)
    logits, state = engine.prefill([golden.prompt("p1")])
    assert state.visible.shape == (1, 16)
    for token in tokens:
        assert int(logits[0].argmax()) == token
        logits, state = engine.decode(state, np.array([token], np.int32))
    assert state.visible.shape == (1, 64)
    assert state.cache[0].keys.shape[1] == 64


@pytest.mark.slow
def test_all_layers_take_no_more_compiling_than_one(caplog):
    def compiled(layers):
        mesh, params = golden.placed(golden.ONE)
        config = dataclasses.replace(golden.CONFIG, num_layers=layers)
        params = dataclasses.replace(params, layers=params.layers[:layers])
        caplog.clear()
        program.cache_clear()
        with jax.log_compiles():
            list(Engine(config, params, mesh, "float32").generate(golden.prompt("p1"), 3))
        return sum(it.getMessage().startswith("Compiling ") for it in caplog.records)

    one = compiled(1)
    assert 0 < compiled(golden.CONFIG.num_layers) <= one


@pytest.mark.parametrize("scale", [1, 3])
def test_a_model_that_is_loaded_again_is_compiled_again_only_if_it_is_another(caplog, scale):
    mesh, params = golden.placed(golden.ONE)
    other = dataclasses.replace(
        golden.CONFIG, embedding_multiplier_scale=scale * golden.CONFIG.embedding_multiplier_scale
    )
    prompts = [golden.prompt("p1")]
    Engine(golden.CONFIG, params, mesh, "float32").full_logits(prompts)
    caplog.clear()
    with jax.log_compiles():
        Engine(other, params, mesh, "float32").full_logits(prompts)
    compiled = [it for it in caplog.records if it.getMessage().startswith("Compiling ")]
    assert bool(compiled) == (scale != 1)


QUEUED = """
import dataclasses
from support import golden
from loader.inference.engine import Engine
from loader.inference.sampling import Sampling
from loader.weights.partition import MeshShape

mesh, params = golden.placed(MeshShape(model=8))
deep = dataclasses.replace(params, layers=params.layers * 6)
engine = Engine(golden.CONFIG, deep, mesh, "float32")
logits, state = engine.prefill([golden.prompt("p1")])
for step in range(20):
    logits, state = engine.decode(state, engine.sample(logits, Sampling(), step))
print(logits.shape, bool((abs(logits) < 1e9).all()))
"""


THREADS = """
import itertools, threading
from support import golden
from loader.devices.placement import make_mesh, share
from loader.inference.batching import Batch, Job
from loader.inference.engine import Engine
from loader.weights.partition import MeshShape

mesh = make_mesh(golden.CONFIG, MeshShape(model=8))
engine = Engine(golden.CONFIG, share(golden.CHECKPOINT, mesh), mesh, "float32")
p0, p1 = golden.prompt("p0"), golden.prompt("p1")
w0, w1 = (golden.arrays()[f"f32/{name}_tokens"].tolist() for name in ("p0", "p1"))
wrong = []

def alike(made, wanted):
    made = list(made)
    if made != wanted[: len(made)]:
        wrong.append(made)

def work():
    for step in range(2):
        one, other = engine.generate(p0, 8), engine.generate(p1, 8)
        first = itertools.islice(one, step)
        alike(first, w0)
        both = list(zip(engine.generate(p0, 4), other))
        alike((made for made, _ in both), w0)
        alike((made for _, made in both), w1)

def served():
    batch = Batch(engine, slots=4, chunk=4)
    for number in range(6):
        batch.add(number, Job(p1, 8))
    made = {}
    while batch.busy:
        for emission in batch.step():
            made.setdefault(emission.number, []).append(emission.token.token)
            if emission.number % 2:
                batch.drop(emission.number)
    for tokens in made.values():
        alike(tokens, w1)

begun = engine.generate(p0, 16)
alike(itertools.islice(begun, 3), w0)
ended = lambda: alike(begun, w0[3:])
threads = [threading.Thread(target=it) for it in (*[work] * 12, served, served, ended)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(wrong)
"""


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("script", "said"), [(QUEUED, "(1, 512) True\n"), (THREADS, "[]\n")], ids=["queued", "threads"]
)
def test_steps_in_any_number_come_to_an_end_on_eight_cpu_devices(script, said):
    # XLA ends a process whose devices wait for each other.
    place = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | place,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout == said, done.stderr


def test_prompts_of_any_length_are_read_by_few_programs(short, caplog):
    for name in ("p1", "p0", "p2"):
        list(short.generate(golden.prompt(name), 3))
    with jax.log_compiles():
        for length in (3, 9, 17, 25):
            list(short.generate([5] * length, 3))
    assert not [it for it in caplog.records if it.getMessage().startswith("Compiling ")]


def test_same_seed_same_text_and_another_seed_another(short):
    def text(seed):
        return list(short.generate(golden.prompt("p2"), 7, Sampling(temperature=2.0, seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.slow
def test_seed_means_the_same_on_every_mesh():
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=3)
    one, eight = (
        list(golden.engine(shape).generate(golden.prompt("p1"), 8, sampling))
        for shape in (golden.ONE, MeshShape(2, 4))
    )
    assert one == eight
    assert one != wanted("p1")[:8]


@pytest.mark.parametrize(
    "kind", [tuple, np.array, lambda ids: np.array(ids, np.uint16), jnp.array, np.int32]
)
def test_prompts_may_be_arrays(short, kind):
    ids = golden.prompt("p1")
    prompt = [np.int32(token) for token in ids] if kind is np.int32 else kind(ids)
    assert list(short.generate(prompt, 3)) == wanted("p1")[:3]
    logits, _ = short.prefill([prompt, ids])
    assert logits[0].tolist() == logits[1].tolist()


@pytest.mark.parametrize(
    "prompt", [[[1, 2]], [[1], [2, 3]], [1.0, 2.0], [True], ["a"], 7, None, np.zeros((1, 2), int)]
)
def test_what_is_not_the_ids_of_one_prompt_is_refused(short, prompt):
    with pytest.raises(PromptInvalid, match="not the token ids of one prompt"):
        short.generate(prompt, 3)
    with pytest.raises(PromptInvalid, match="not the token ids of one prompt"):
        short.prefill([prompt])


@pytest.mark.parametrize("prompt", [[], np.zeros(0, np.int32), [2**70], [-1]])
def test_prompts_that_no_model_can_read_are_refused_whatever_their_kind(short, prompt):
    with pytest.raises(PromptInvalid, match=r"empty|vocabulary"):
        short.generate(prompt, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("top_k", 0),
        ("min_p", 2),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Sampling(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("temperature", "1"), ("top_k", 2.5), ("seed", None)])
def test_a_setting_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a"):
        Sampling(**{name: value})


def test_settings_may_be_numbers_of_numpy():
    assert Sampling(np.float32(0.5), np.float64(1), np.int64(3), np.uint32(7)).top_k == 3


DRAWN = jax.jit(draw)


def shares(logits, step=0, **sampling):
    """How often each token is drawn from one row of logits, with 20,000 seeds."""
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (20_000, 1))
    settings = [Sampling(**{"temperature": 1.0, "seed": seed} | sampling) for seed in range(20_000)]
    drawn = DRAWN(rows, Choice.of(settings, [step] * 20_000))
    return np.bincount(drawn, minlength=len(logits)) / len(rows)


PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = np.log(PROBABILITIES)


def test_drawn_tokens_follow_the_softmax():
    np.testing.assert_allclose(shares(LOGITS), PROBABILITIES, atol=0.015)


def test_temperature_sharpens():
    squared = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    np.testing.assert_allclose(shares(LOGITS, temperature=0.5), squared, atol=0.015)


@pytest.mark.parametrize(
    "choice", [{"temperature": 1e-38}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.4}]
)
def test_extremes_leave_only_the_best(choice):
    assert shares(LOGITS, **choice).tolist() == [0, 1, 0, 0]


def test_top_k_keeps_the_k_best():
    np.testing.assert_allclose(shares(LOGITS, top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.015)


def test_nucleus_is_the_smallest_set_that_reaches_the_share():
    np.testing.assert_allclose(shares(LOGITS, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.015)


def test_nucleus_is_taken_from_what_top_k_leaves():
    # Of 4/7 and 3/7, the first alone reaches one half; of all four, two would be needed.
    assert shares(LOGITS, top_k=2, top_p=0.5).tolist() == [0, 1, 0, 0]


def test_a_row_draws_the_same_alone_and_beside_others_that_are_restricted_otherwise():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    rows = [Sampling(), Sampling(1.0, seed=5), Sampling(1.0, 0.8, 7, seed=5)]
    alone = [
        DRAWN(logits[row : row + 1], Choice.of([rows[row]], [step])).item()
        for step in range(20)
        for row in range(3)
    ]
    together = [DRAWN(logits, Choice.of(rows, [step] * 3)).tolist() for step in range(20)]
    assert [token for row in together for token in row] == alone
    assert {row[0] for row in together} == {int(logits[0].argmax())}


def test_steps_of_one_seed_differ():
    first, second = (shares(LOGITS, step=step) for step in (0, 1))
    assert first.tolist() != second.tolist()
