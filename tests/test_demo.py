"""The checkpoint that comes with grokfetch says its text on every mesh, and noise if miswired."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from grokfetch import errors
from grokfetch.cli import main
from grokfetch.shipped import demo_folder
from loader import model
from loader.checkpoint import open_folder
from loader.generate import Engine
from loader.paging import Paging
from loader.placement import load, make_mesh, share
from loader.schema import GrokConfig
from loader.sharding import MeshShape
from loader.tokenizer import Tokenizer

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
    """What each of some sentence beginnings goes on with, greedily, `count` tokens of it."""
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


def share_right(engine, skip=8, width=64):
    """Of the tokens that follow `skip` others, the share that the engine expects."""
    rows = [from_sentence(number)[:width] for number in range(len(SENTENCES))]
    best = np.asarray(engine.full_logits(rows)).argmax(axis=-1)
    hits = [best[i, skip : len(row) - 1] == row[skip + 1 :] for i, row in enumerate(rows)]
    return np.concatenate(hits).mean()


def test_sentences_begin_differently_and_one_line_holds_one():
    assert 15 <= len(SENTENCES) <= 30
    assert len({start(sentence) for sentence in SENTENCES}) == len(SENTENCES)
    assert all(sentence == " ".join(sentence.split()) for sentence in SENTENCES)
    assert all(sentence[-1] == "." for sentence in SENTENCES)


def test_every_sentence_beginning_is_followed_by_its_sentence_and_the_next():
    numbers = range(len(SENTENCES))
    longest = max(len(TOKENIZER.encode(" ".join(pair))) for pair in itertools.pairwise(SENTENCES))
    check_recitation(engine(), numbers, longest)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 2), "float32"),
        ((2, 2), "bfloat16"),
        ((1, 4), "float32"),
        ((1, 8), "float32"),
        ((8, 1), "float32"),
    ],
    ids=str,
)
def test_copied_weights_recite_on_any_mesh(shape, dtype):
    check_recitation(engine(load, MeshShape(*shape), dtype), [3, 12], 24)


@pytest.mark.parametrize("devices", [2, 8])
def test_mapped_weights_recite_on_any_number_of_devices(devices):
    check_recitation(engine(share, MeshShape(1, devices)), [3, 12], 24)


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


def layers_in_file_order(patch, params):
    order = sorted(range(CONFIG.num_layers), key=str)
    return dataclasses.replace(params, layers=tuple(params.layers[i] for i in order))


def scales_of_the_next_group(patch, params):
    def moved(layer):
        down = layer.down
        down = dataclasses.replace(down, scales=jnp.roll(down.scales, 1, axis=-2))
        return dataclasses.replace(layer, down=down)

    return dataclasses.replace(params, layers=tuple(map(moved, params.layers)))


def positions_forgotten(patch, params):
    right = model.rotate
    patch.setattr(model, "rotate", lambda x, at: right(x, 0 * at))
    return params


def second_and_third_expert(patch, params):
    right = model.route

    def route(x, router, chosen):
        choices, gates = right(x, router, chosen + 1)
        return choices[:, 1:], gates[:, 1:]

    patch.setattr(model, "route", route)
    return params


@pytest.mark.parametrize(
    "fault",
    [
        layers_in_file_order,
        scales_of_the_next_group,
        positions_forgotten,
        second_and_third_expert,
    ],
)
def test_model_put_together_wrongly_says_noise(monkeypatch, fault):
    mesh = make_mesh(CONFIG, ONE)
    params = fault(monkeypatch, load(CHECKPOINT, mesh))
    assert share_right(Engine(CONFIG, params, mesh, "float32")) < 0.2


def test_put_together_rightly_it_expects_every_token():
    assert share_right(engine()) == 1


# --- what is shipped -----------------------------------------------------------------------------


def test_it_has_two_megabytes_at_most():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert len(files) == len(MANIFEST["files"]) + 2
    assert sum(path.stat().st_size for path in files) <= 2_000_000


def grokfetch(*args, code=0):
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == code, result.output
    return result.stdout


def test_the_demo_walks_the_whole_road_and_keeps_what_it_is_told_to(tmp_path):
    keep = tmp_path / "kept"
    text = grokfetch("demo", "--keep", keep)
    assert [line.split(".")[0] for line in text.splitlines()[:6]] == list("123456")
    words = " ".join(text.split("prompt  ")[1].replace("text  ", "").split())
    assert " ".join(SENTENCES[-4:]) in words
    assert MANIFEST["info_hash"] in text
    assert MANIFEST["info_hash"] in grokfetch("verify", keep / "fetched")
    said = grokfetch("run", keep / "fetched", start(SENTENCES[-1]), "--placement", "mapped")
    assert f"{start(SENTENCES[-1])}{said}".strip() == SENTENCES[-1]
    grokfetch("demo", "--keep", keep, code=errors.StorageFailed.exit_code)
