"""Texts share the decoding step without affecting each other."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from support import golden

from grokfetch.errors import PromptInvalid
from loader.inference.batching import Batch, Job, Scored
from loader.inference.engine import Engine
from loader.inference.sampling import Sampling
from loader.weights.partition import MeshShape


@pytest.fixture(scope="module")
def engine():
    return golden.engine()


@pytest.fixture(scope="module")
def shared(engine):
    """A batch of four slots over the golden model, read 16 tokens at a time."""
    return Batch(engine, slots=4, chunk=16)


@pytest.fixture
def batch(shared):
    yield shared
    shared.reset()


def finish(batch, jobs=()):
    """All emissions of some texts, which are added together, by number."""
    for number, job in enumerate(jobs):
        batch.add(number, job)
    told = {}
    while batch.busy:
        for emission in batch.step():
            told.setdefault(emission.number, []).append(emission)
    return told


def tokens(emissions):
    return [emission.token.token for emission in emissions if emission.token]


def wanted(name):
    return golden.arrays()[f"f32/{name}_tokens"].tolist()


def test_prompts_of_different_lengths_are_continued_as_the_reference_does(batch):
    jobs = [Job(golden.prompt(name), 16) for name in golden.CONTINUED]
    told = finish(batch, jobs)
    for number, name in enumerate(golden.CONTINUED):
        assert tokens(told[number]) == wanted(name)[:16]
        assert [emission.finished for emission in told[number]] == [None] * 15 + ["length"]


@pytest.mark.slow
def test_texts_come_and_go_on_copies_of_the_weights_as_the_reference_has_them():
    batch = Batch(golden.engine(MeshShape(2, 2, data=2)), slots=3)
    assert batch.slots == 4
    # Two begin with one slot on each copy, the third doubles the slots, and the last waits.
    names = ["p1", "p0", "p2", "p0", "p1"]
    jobs = [Job(golden.prompt(name), 20 if number == 0 else 4) for number, name in enumerate(names)]
    told = finish(batch, jobs)
    for number, name in enumerate(names):
        assert tokens(told[number]) == wanted(name)[: jobs[number].max_tokens]


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(batch):
    rng = np.random.default_rng(1)
    jobs = [
        Job(rng.integers(3, 512, length).tolist(), new, Sampling(1.0, top_p, top_k, seed=seed))
        for length, new, top_p, top_k, seed in [
            (5, 9, 1.0, None, 3),
            (40, 4, 0.9, None, 3),
            (17, 12, 1.0, 20, 5),
            (3, 6, 0.8, 50, 6),
            (20, 7, 1.0, None, 7),
        ]
    ]
    together = finish(batch, jobs)
    for number, job in enumerate(jobs):
        (alone,) = finish(batch, [job]).values()
        assert tokens(alone) == tokens(together[number])
        assert len(tokens(alone)) == job.max_tokens


def test_a_text_that_is_dropped_frees_its_slot_at_once_and_disturbs_nobody(batch):
    batch.add(0, Job(golden.prompt("p1"), 12))
    for number in range(1, 6):
        batch.add(number, Job([7] * 50, 70))
    first = tokens(batch.step())
    assert (batch.working, batch.waiting) == (4, 2)
    for number in (5, 4, 1, 2, 3, 99):
        batch.drop(number)
    assert (batch.working, batch.waiting) == (1, 0)
    assert first + tokens(finish(batch)[0]) == wanted("p1")[:12]


def test_after_the_warm_up_short_texts_wait_for_no_compiler(batch, caplog):
    assert batch.warm_up(60) == batch.slots
    assert not batch.busy
    with jax.log_compiles():
        finish(batch, [Job(golden.prompt("p1"), 4)] * batch.slots)
    assert not [it for it in caplog.records if "XLA compilation" in it.getMessage()]


def test_a_warm_up_that_takes_long_stops_at_one_text(batch):
    assert batch.warm_up(0) == 1


def test_a_long_prompt_holds_nobody_up(batch):
    batch.add(0, Job([9, 8, 7], 30))
    batch.step()
    batch.add(1, Job(list(range(3, 103)), 1))
    # Each step reads a chunk of the long prompt, and still generates a token of the short one.
    steps = [[emission.number for emission in batch.step()] for _ in range(7)]
    assert steps == [[0]] * 6 + [[1, 0]]


def test_slots_grow_with_the_texts_and_are_given_up_when_few_are_left(batch):
    for number, new in enumerate([40, 4, 4, 4]):
        batch.add(number, Job(golden.prompt("p1"), new))
    counts, made = [], []
    while batch.busy:
        made += [emission for emission in batch.step() if emission.number == 0]
        counts.append(batch.rows)
    assert tokens(made)[:32] == wanted("p1")
    assert [count for count, _ in itertools.groupby(counts)] == [1, 2, 4, 1, 0]


@pytest.mark.slow
def test_a_free_slot_chooses_no_expert():
    mesh, params = golden.placed(golden.ONE)
    engine = Engine(golden.CONFIG, params, mesh, "float32")
    choices = engine.count_experts()
    batch = Batch(engine, slots=2, chunk=16)
    finish(batch, [Job([5, 6], 3), Job([7, 8], 4)])
    # The model reads every generated token except the last.
    tokens_read = (2 + 2) + (2 + 3)
    chosen = golden.CONFIG.num_selected_experts
    assert (
        choices.counts().sum(axis=-1).tolist() == [tokens_read * chosen] * golden.CONFIG.num_layers
    )


def test_logprobs_are_those_of_the_models_logits(batch, engine):
    prompt = golden.prompt("p2")
    (told,) = finish(batch, [Job(prompt, 3, logprobs=2, echo=True)]).values()
    scored = [*told[0].prompt, *(emission.token for emission in told if emission.token)]
    text = [token.token for token in scored]
    assert text == [*prompt, *wanted("p2")[:3]]
    logits = np.asarray(engine.full_logits([text])[0, : len(text)], np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert scored[0] == Scored(prompt[0])
    for before, token in enumerate(scored[1:]):
        assert token.logprob == pytest.approx(expected[before, token.token], abs=2e-5)
        best = np.argsort(-expected[before])[:2]
        assert [one for one, _ in token.best] == best.tolist()
        assert [score for _, score in token.best] == pytest.approx(expected[before, best], abs=2e-5)


def test_a_prompt_is_scored_without_a_token_being_made(batch):
    (told,) = finish(batch, [Job([5, 6, 7], 0, logprobs=1, echo=True)]).values()
    assert [emission.finished for emission in told] == [None, "length"]
    assert [token.token for token in told[0].prompt] == [5, 6, 7]


def test_the_end_of_a_sequence_is_told_and_ends_the_text(engine):
    config = dataclasses.replace(golden.CONFIG, eos_token=wanted("p1")[4])
    mesh, params = golden.placed(golden.ONE)
    batch = Batch(type(engine)(config, params, mesh, "float32"), slots=1)
    (told,) = finish(batch, [Job(golden.prompt("p1"), 20)]).values()
    assert tokens(told) == wanted("p1")[:5]
    assert told[-1].finished == "stop"


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job([], 1), "empty"),
        (Job([512], 1), "vocabulary"),
        (Job([5] * 100, 29), "100 tokens and 29 more"),
    ],
)
def test_what_cannot_be_continued_is_refused(batch, job, message):
    with pytest.raises(PromptInvalid, match=message):
        batch.add(0, job)
    assert not batch.busy
