"""Penalties and biases change the logits as their formulas say, and the text with them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import golden

from loader.inference.batching import Batch, Job
from loader.inference.penalties import Changes, Penalties, Repeated, changed
from loader.inference.sampling import Choice, Sampling, draw
from loader.weights.partition import MeshShape

P1 = golden.prompt("p1")
WANTED = golden.arrays()["f32/p1_tokens"].tolist()
VOCABULARY = 8
CHANGED = jax.jit(changed)


def expected(logits, penalties, prompt, text):
    """The formulas, applied to one token at a time."""
    made = np.array(logits, np.float64)
    for token in range(len(logits)):
        count = text.count(token)
        if count or token in prompt:
            made[token] *= penalties.repetition if made[token] <= 0 else 1 / penalties.repetition
        made[token] -= penalties.presence * (count > 0) + penalties.frequency * count
        made[token] += penalties.bias.get(token, 0)
    return made


ids = st.integers(0, VOCABULARY - 1)
numbers = st.floats(-2, 2, width=32)


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=VOCABULARY, max_size=VOCABULARY),
    st.builds(Penalties, numbers, numbers, st.floats(0.5, 2), st.dictionaries(ids, numbers)),
    st.lists(ids, max_size=6),
    st.lists(ids, max_size=9),
)
def test_logits_are_changed_by_the_formulas(logits, penalties, prompt, text):
    repeated = Repeated(penalties, prompt)
    for token in text:
        repeated.add(token)
    rows = [repeated.changes(None), {}, repeated.changes(3)]
    changes = Changes.of(rows)
    if changes is None:
        assert expected(logits, penalties, prompt, text).tolist() == logits
        return
    told = np.asarray(CHANGED(np.array([logits] * 3, np.float32), changes))
    wanted = expected(logits, penalties, prompt, text)
    assert told[0] == pytest.approx(wanted, abs=1e-4)
    assert told[1].tolist() == logits
    assert told[2, 3] == -np.inf
    assert np.delete(told[2], 3) == pytest.approx(np.delete(wanted, 3), abs=1e-4)


def test_more_tokens_than_fit_the_smallest_change_are_all_changed():
    rows = [dict.fromkeys(range(100), (1.0, 1.0)), {200: (1.0, 5.0)}]
    told = np.asarray(CHANGED(np.zeros((2, 256), np.float32), Changes.of(rows)))
    assert told[0].tolist() == [1.0] * 100 + [0.0] * 156
    assert np.flatnonzero(told[1]).tolist() == [200]


@pytest.mark.parametrize("min_p", [0.0, 0.3, 0.6, 1.0])
def test_min_p_leaves_the_tokens_of_at_least_that_share_of_the_best(min_p):
    shares = np.array([0.5, 0.25, 0.2, 0.05], np.float32)
    logits = np.tile(np.log(shares), (400, 1))
    samplings = [Sampling(1.0, seed=seed, min_p=min_p) for seed in range(400)]
    drawn = set(np.asarray(draw(logits, Choice.of(samplings, [0] * 400))).tolist())
    assert drawn == set(np.flatnonzero(shares >= min_p * 0.5).tolist())


def finish(batch, jobs):
    for number, job in enumerate(jobs):
        batch.add(number, job)
    told = {number: [] for number in range(len(jobs))}
    while batch.busy:
        for emission in batch.step():
            if emission.token is not None:
                told[emission.number].append(emission.token)
    return [[scored.token for scored in told[number]] for number in told], told


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(2, 2, data=2)])
def test_each_text_of_a_batch_has_its_own_penalties_and_the_models_logprobs(shape):
    batch = Batch(golden.engine(shape), slots=4)
    first = WANTED[0]
    jobs = [
        Job(P1, 6, logprobs=1),
        Job(P1, 6, penalties=Penalties(bias={9: 100.0})),
        Job(P1, 6, penalties=Penalties(bias={first: -100.0}), logprobs=1),
        Job(P1, 12, penalties=Penalties(presence=100.0)),
    ]
    texts, told = finish(batch, jobs)
    assert texts[0] == WANTED[:6]
    assert texts[1] == [9] * 6
    assert texts[2][0] != first
    # Reported are the model's log-probabilities, before penalties.
    assert told[2][0].best[0][0] == first
    assert told[2][0].best[0][1] == pytest.approx(told[0][0].logprob, abs=1e-5)
    assert len(set(texts[3])) == 12


def test_the_end_of_a_sequence_waits_for_min_tokens_or_is_ignored():
    config_eos = golden.CONFIG.eos_token
    toward = Penalties(bias={config_eos: 100.0})
    batch = Batch(golden.engine(), slots=4)
    jobs = [
        Job(P1, 6, penalties=toward),
        Job(P1, 6, penalties=toward, min_tokens=3),
        Job(P1, 6, penalties=toward, ignore_eos=True),
    ]
    texts, _ = finish(batch, jobs)
    assert texts[0] == [config_eos]
    assert texts[1] == [*WANTED[:3], config_eos]
    assert texts[2] == [config_eos] * 6
