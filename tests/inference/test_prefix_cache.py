"""A prompt that begins like an earlier one is not read again there, with the same numbers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import c_program, golden

from loader.devices.kernels import Tuning
from loader.devices.placement import share
from loader.inference import engine as engines
from loader.inference.batching import Batch, Job
from loader.inference.engine import Engine
from loader.inference.prefix_cache import keys
from loader.weights import limits
from loader.weights.partition import MeshShape

CHUNK = 16
ROOM = 10**8
TOKENS = np.random.default_rng(1).integers(3, 512, 60).tolist()
# A pad id in the common beginning is not attended to, then or later.
TOKENS[5] = golden.CONFIG.pad_token
OTHER = [*TOKENS[:40], *TOKENS[:15]]


@pytest.fixture(scope="module", autouse=True)
def _small_chunks():
    """Read only a few tokens in a step, with and without a prefix cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "SHARED_STEP", CHUNK)
        patch.setattr(engines, "LONGEST_STEP", CHUNK)
        yield


@pytest.fixture(scope="module")
def tuning():
    """The C program, which writes into the cache in place, if there is a compiler."""
    return Tuning(native=c_program.build(lambda _: None))


def made(room=ROOM, shape=golden.ONE, dtype="float32", tuning=None):
    """An engine over copied weights, or over mapped ones if it has a tuning."""
    mesh, params = golden.placed(shape)
    if tuning is not None:
        params = share(golden.CHECKPOINT, mesh, tuning)
    return Engine(golden.CONFIG, params, mesh, dtype, prefix_cache=room)


def said(engine, prompt):
    """The logits after a prompt, those of one more token, and those of the whole prompt."""
    after, state = engine.prefill([prompt])
    next_after, _ = engine.decode(state, np.array([7], np.int32))
    return jax.device_get((after, next_after, engine.full_logits([prompt])))


def check_alike(plain, caching):
    for prompt in (TOKENS, OTHER, TOKENS):
        for ours, wanted in zip(said(caching, prompt), said(plain, prompt), strict=True):
            np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(
    ("placement", "dtype"),
    [
        ("mapped", "bfloat16"),
        pytest.param("mapped", "float32", marks=pytest.mark.slow),
        pytest.param("sharded", "bfloat16", marks=pytest.mark.slow),
        pytest.param("sharded", "float32", marks=pytest.mark.slow),
    ],
)
def test_logits_are_the_same_bit_for_bit(placement, dtype, tuning):
    plain, caching = (
        made(room, dtype=dtype, tuning=tuning if placement == "mapped" else None)
        for room in (0, ROOM)
    )
    check_alike(plain, caching)
    # Each prompt is read twice: three complete chunks of 60 and of 55 tokens, two of them common.
    assert caching.prefix_cache.hits == 5
    assert caching.prefix_cache.tokens == (3 + 2 + 3 + 3 + 3) * CHUNK


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_where_c_attends_prompts_share_whatever_the_size_of_their_caches(
    monkeypatch, tuning, dtype
):
    if not tuning.native:
        pytest.skip("this machine has no C compiler")
    monkeypatch.setattr(limits, "SMALLEST_CACHE", CHUNK)
    plain, caching = (made(room, dtype=dtype, tuning=tuning) for room in (0, ROOM))
    prompts = [TOKENS[:20], TOKENS, TOKENS[:40] * 2]
    sizes = [caching.places(len(prompt)) for prompt in prompts]
    assert sizes == [32, 64, 128]
    for prompt in prompts:
        for ours, wanted in zip(said(caching, prompt), said(plain, prompt), strict=True):
            np.testing.assert_array_equal(ours, wanted)
    # Each prompt uses it twice, except for what is new.
    assert caching.prefix_cache.tokens == (1 + (1 + 3) + (2 + 5)) * CHUNK


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "placement"),
    [((2, 4), "sharded"), ((2, 2, 2), "sharded"), ((1, 8), "mapped")],
    ids=str,
)
def test_logits_are_the_same_on_eight_devices(mesh, placement, tuning):
    plain, caching = (
        made(room, MeshShape(*mesh), "bfloat16", tuning if placement == "mapped" else None)
        for room in (0, ROOM)
    )
    check_alike(plain, caching)
    assert caching.prefix_cache.hits == 5


@pytest.mark.slow
def test_texts_of_a_batch_are_the_same_with_the_log_probabilities_of_their_prompts():
    jobs = [
        Job(TOKENS, 5, logprobs=3, echo=True),
        Job(OTHER, 5, logprobs=1),
        Job(OTHER, 0, logprobs=5, echo=True),
        Job(TOKENS[:48], 4, echo=True),
    ]

    def told(room):
        batch, emissions = Batch(made(room), slots=2, chunk=CHUNK), {}
        for number, job in enumerate(jobs):
            batch.add(number, job)
        while batch.busy:
            for emission in batch.step():
                emissions.setdefault(emission.number, []).append(emission)
        return emissions, batch.prefix_cache

    plain, none = told(0)
    caching, cache = told(ROOM)
    assert caching == plain
    # The second begins while the first is being read, and uses what has been read by then.
    assert (cache.hits, cache.tokens) == (3, (2 + 3 + 3) * CHUNK)
    assert (none.hits, none.tokens, none.nbytes) == (0, 0, 0)


def test_what_is_kept_is_bounded_and_begins_where_prompts_begin():
    config = golden.CONFIG
    keys_and_values = 2 * config.num_layers * config.num_kv_heads * config.key_size
    chunk = CHUNK * 4 * (keys_and_values + config.emb_size)
    engine = made(2 * chunk)
    cache = engine.prefix_cache
    engine.prefill([TOKENS])
    assert cache.nbytes == 2 * chunk
    engine.prefill([TOKENS])
    assert cache.tokens == 2 * CHUNK
    # Another beginning replaces what was unused for the longest time: the end of the first.
    engine.prefill([TOKENS[30:50]])
    assert cache.nbytes == 2 * chunk
    engine.prefill([TOKENS])
    assert cache.tokens == 3 * CHUNK


@pytest.mark.slow
def test_prompts_of_a_batch_that_is_read_together_are_not_kept():
    engine = made()
    engine.prefill([TOKENS, OTHER])
    assert engine.prefix_cache.nbytes == 0


def test_nothing_is_kept_for_other_weights():
    engine = made()
    engine.prefill([TOKENS])
    assert engine.prefix_cache.nbytes
    engine.hold(engine.params)
    assert engine.prefix_cache.nbytes == 0
    engine.warm_up(TOKENS)
    assert engine.prefix_cache.nbytes == 0


PROMPTS = st.lists(st.integers(0, 2), max_size=12)


@given(PROMPTS, PROMPTS, PROMPTS, st.integers(1, 4))
def test_chunks_have_one_key_as_far_as_prompts_agree(common, first, second, chunk):
    first, second = common + first, common + second
    ours, theirs = keys(first, chunk, 256), keys(second, chunk, 256)
    assert len(ours) == len(first) // chunk
    for at, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        assert (one == other) == (first[: at * chunk] == second[: at * chunk])
    assert not set(ours) & set(keys(first, chunk, 512))
