"""The demo's checkpoint recites its text on every mesh, and gives noise if miswired."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from support.program import SIMPLEST, grokfetch, with_devices

from grokfetch import errors
from grokfetch.manifest.shipped import demo_folder
from loader.devices.paging import Paging
from loader.devices.placement import load, make_mesh, share
from loader.inference import model
from loader.inference.engine import Engine
from loader.inference.tokenizer import Tokenizer
from loader.weights.checkpoint import open_folder
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig

FOLDER = demo_folder()
HOME = FOLDER / "grok-demo"
MANIFEST = json.loads(FOLDER.joinpath("grok-demo.json").read_text())
CONFIG = GrokConfig.from_mapping(MANIFEST["model"])
CHECKPOINT = open_folder(HOME / "ckpt-0", CONFIG)
TOKENIZER = Tokenizer.load(HOME / "tokenizer.model")
SENTENCES = HOME.joinpath("text.txt").read_text().splitlines()
ONE = MeshShape()


def start(sentence):
    return " ".join(sentence.split()[:3])


def from_sentence(number):
    """The tokens of the text from a sentence to its end, where the model ends too."""
    ids = [TOKENIZER.encode(sentence) for sentence in SENTENCES[number:]]
    return [*itertools.chain(*ids), CONFIG.eos_token]


@functools.cache
def engine(hold=load, shape=ONE, dtype="float32"):
    mesh = make_mesh(CONFIG, shape)
    return Engine(CONFIG, hold(CHECKPOINT, mesh), mesh, dtype)


def recite(engine, numbers, count):
    """The `count` tokens that continue each of some sentence beginnings, decoded greedily."""
    prompts = [TOKENIZER.encode(start(SENTENCES[number])) for number in numbers]
    logits, state = engine.prefill(prompts)
    said = [list(prompt) for prompt in prompts]
    for _ in range(count):
        best = np.asarray(logits).argmax(axis=-1)
        for row, token in zip(said, best, strict=True):
            row.append(int(token))
        logits, state = engine.decode(state, jnp.asarray(best, jnp.int32))
    return said


def check_recitation(engine, numbers, count):
    for number, said in zip(numbers, recite(engine, numbers, count), strict=True):
        wanted = from_sentence(number)[: len(said)]
        assert said[: len(wanted)] == wanted, SENTENCES[number]


def hits(engine, skip=8, width=64):
    """For each sentence, whether the engine predicts each token of its text after `skip` others."""
    rows = [from_sentence(number)[:width] for number in range(len(SENTENCES))]
    best = np.asarray(engine.full_logits(rows)).argmax(axis=-1)
    return [best[i, skip : len(row) - 1] == row[skip + 1 :] for i, row in enumerate(rows)]


def test_sentences_begin_differently_and_one_line_holds_one():
    assert 15 <= len(SENTENCES) <= 30
    assert len({start(sentence) for sentence in SENTENCES}) == len(SENTENCES)
    assert all(sentence == " ".join(sentence.split()) for sentence in SENTENCES)
    assert all(sentence[-1] == "." for sentence in SENTENCES)


@pytest.mark.slow
def test_every_sentence_beginning_is_followed_by_its_sentence_and_the_next():
    numbers = range(len(SENTENCES))
    longest = max(len(TOKENIZER.encode(" ".join(pair))) for pair in itertools.pairwise(SENTENCES))
    said = recite(engine(), numbers, longest)
    for number in numbers:
        pair = [*itertools.chain(*map(TOKENIZER.encode, SENTENCES[number : number + 2]))]
        wanted = from_sentence(number)[: max(len(pair), 90)]
        assert said[number][: len(wanted)] == wanted, SENTENCES[number]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((2, 2), "bfloat16", marks=pytest.mark.slow),
        pytest.param((8, 1), "float32", marks=pytest.mark.slow),
        pytest.param((1, 8), "float32", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_copied_weights_recite_on_any_mesh(shape, dtype):
    check_recitation(engine(load, MeshShape(*shape), dtype), [3, 12], 24)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_mapped_weights_recite_on_any_number_of_devices(devices):
    check_recitation(engine(share, MeshShape(1, devices)), [3, 12], 24)


@pytest.mark.slow
def test_mapped_weights_recite_and_every_expert_is_chosen():
    used = set()

    class Told(Paging):
        def experts(self, number, chosen):
            used.update((number, expert) for expert in chosen)

    mesh = make_mesh(CONFIG, ONE)
    told = Engine(CONFIG, share(CHECKPOINT, mesh), mesh, "float32", paging=Told())
    check_recitation(told, range(len(SENTENCES)), 24)
    assert used == set(itertools.product(range(CONFIG.num_layers), range(CONFIG.num_experts)))


# --- a fault turns it to noise -------------------------------------------------------------------


def check_noise(engine, most=0.2):
    """Check that nothing is recited, and few tokens are right even after the right ones."""
    found = hits(engine)
    assert not any(row.all() for row in found)
    assert np.concatenate(found).mean() < most


def reordered(params, order):
    return dataclasses.replace(params, layers=tuple(params.layers[i] for i in order))


def with_scales_moved(params, name, axis):
    """The scales of one matrix are, in every layer, those of the group or the column before."""

    def moved(layer):
        matrix = getattr(layer, name)
        scales = jnp.roll(matrix.scales, 1, axis={"groups": -2, "columns": -1}[axis])
        return dataclasses.replace(layer, **{name: dataclasses.replace(matrix, scales=scales)})

    return dataclasses.replace(params, layers=tuple(map(moved, params.layers)))


def not_multiplied(params):
    # All logits are smaller by the same factor, which does not change which one is the largest.
    table = params.embedding / CONFIG.embedding_multiplier_scale
    return dataclasses.replace(params, embedding=table)


FILE_ORDER = sorted(range(CONFIG.num_layers), key=str)
SWAPS = [
    [*range(first), first + 1, first, *range(first + 2, CONFIG.num_layers)]
    for first in range(CONFIG.num_layers - 1)
]
MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
WRONG_WEIGHTS = {
    "layers in the order of their files": lambda params: reordered(params, FILE_ORDER),
    "embedding not multiplied": not_multiplied,
    **{
        f"layers {order[first + 1]} and {order[first]} swapped": functools.partial(
            reordered, order=order
        )
        for first, order in enumerate(SWAPS)
    },
    **{
        f"scales of {name} moved over {axis}": functools.partial(
            with_scales_moved, name=name, axis=axis
        )
        for axis, names in {"columns": MATRICES, "groups": ("output", "down")}.items()
        for name in names
    },
}


@pytest.fixture(scope="module")
def miswired():
    """A separate engine, because its weights will be replaced, and the right weights."""
    mesh = make_mesh(CONFIG, ONE)
    params = load(CHECKPOINT, mesh)
    return Engine(CONFIG, params, mesh, "float32"), params


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG_WEIGHTS)
def test_weights_in_wrong_places_say_noise(miswired, fault):
    engine, params = miswired
    engine.hold(WRONG_WEIGHTS[fault](params))
    check_noise(engine)


def positions_forgotten(patch):
    right = model.rotate
    patch.setattr(model, "rotate", lambda x, at: right(x, 0 * at))


def queries_one_position_ahead(patch):
    right = model.rotate
    patch.setattr(model, "rotate", lambda x, at: right(x, at + (x.shape[2] == CONFIG.num_q_heads)))


def experts_chosen(patch, first, count, weigh=lambda gates: gates):
    """Send each token to its experts of rank `first` to `first + count`."""
    right = model.route

    def route(x, router, _chosen):
        choices, gates = right(x, router, first + count)
        return choices[:, first:], weigh(gates[:, first:])

    patch.setattr(model, "route", route)


def second_and_third_expert(patch):
    experts_chosen(patch, 1, 2)


def second_expert_does_nothing(patch):
    experts_chosen(patch, 0, 2, lambda gates: gates.at[:, 1].set(0))


def equal_gates(patch):
    experts_chosen(patch, 0, 2, jnp.ones_like)


def scores_without_cap(patch):
    patch.setattr(model, "soft_cap", lambda scores: scores)


# The golden model is broken in these ways in the ordinary suite: tests/inference/test_model.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "most"),
    [
        (positions_forgotten, 0.2),
        (queries_one_position_ahead, 0.2),
        (second_and_third_expert, 0.2),
        (second_expert_does_nothing, 0.35),
        (equal_gates, 0.2),
        (scores_without_cap, 0.5),
    ],
)
def test_model_put_together_wrongly_says_noise(monkeypatch, miswired, fault, most):
    fault(monkeypatch)
    right, params = miswired
    check_noise(Engine(CONFIG, params, right.mesh, "float32"), most)


def test_put_together_rightly_it_expects_every_token():
    assert all(row.all() for row in hits(engine()))


# --- what is shipped -----------------------------------------------------------------------------


def test_it_has_two_megabytes_at_most():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert len(files) == len(MANIFEST["files"]) + 2
    assert sum(path.stat().st_size for path in files) <= 2_000_000


@pytest.mark.slow
def test_the_demo_walks_the_whole_road_and_keeps_what_it_is_told_to(tmp_path):
    keep = tmp_path / "kept"
    # Use one of the test's devices, which compiles in a fraction of the time.
    command = [sys.executable, "-m", "grokfetch", "demo", "--keep", keep]
    text = subprocess.run(
        command, env=with_devices(1), capture_output=True, text=True, check=True
    ).stdout
    assert [line.split(".")[0] for line in text.splitlines()[:6]] == list("123456")
    words = " ".join(text.split("prompt  ")[1].replace("text  ", "").split())
    assert " ".join(SENTENCES[-4:]) in words
    assert MANIFEST["info_hash"] in text
    assert "grokfetch export DIR/fetched OUT --pad" in text
    grokfetch("export", keep / "fetched", tmp_path / "gguf", "--pad")
    assert MANIFEST["info_hash"] in grokfetch("verify", keep / "fetched")
    said = grokfetch("run", keep / "fetched", start(SENTENCES[-1]), *SIMPLEST)
    assert f"{start(SENTENCES[-1])}{said}".strip() == SENTENCES[-1]
    grokfetch("demo", "--keep", keep, code=errors.StorageFailed.exit_code)
