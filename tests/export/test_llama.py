"""llama.cpp loads what is exported and computes what we do.

It needs a Python of another environment in which `pip install llama-cpp-python` has been run; its
path stands in the environment variable GROKFETCH_LLAMA_PYTHON.
"""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import loadable
from support.demo import fetch_demo
from support.program import grokfetch

from loader.inference.tokenizer import Tokenizer

PEER = Path(__file__).parents[2] / "benchmarks/llama_export.py"
PYTHON = os.environ.get("GROKFETCH_LLAMA_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason="GROKFETCH_LLAMA_PYTHON does not name a Python that has llama-cpp-python",
    ),
]


@pytest.fixture(scope="module")
def engine(model):
    import jax

    from loader.devices.placement import load, make_mesh
    from loader.inference.engine import Engine
    from loader.weights.checkpoint import open_folder

    config = loadable.CONFIG
    mesh = make_mesh(config, devices=jax.devices()[:1])
    return Engine(config, load(open_folder(model / "ckpt-0", config), mesh), mesh, "float32")


@pytest.fixture
def peer(model, tmp_path):
    """Exports the model and gives a function that asks llama.cpp about it."""
    with contextlib.ExitStack() as children:

        def started(*options, exact=False):
            grokfetch("export", model, tmp_path / "out", *options)
            first = min((tmp_path / "out").glob("*.gguf"))
            command = [PYTHON, PEER, first, *(["--exact"] if exact else [])]
            return children.enter_context(asking(command, loadable.CONFIG.vocab_size))

        yield started


@contextlib.contextmanager
def asking(command, vocabulary):
    """A function that queries a process with llama.cpp; its vocabulary must have that size."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert json.loads(child.stdout.readline()) == {"vocabulary": vocabulary}

        def ask(question):
            child.stdin.write(f"{json.dumps(question)}\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        yield ask
        child.kill()


def differences(ask, engine):
    """The distance between llama.cpp's last logits and ours, for some random prompts."""
    random = np.random.default_rng(0)
    gaps = []
    for length in (1, 2, 5, 17, 50):
        ids = random.integers(4, 512, length).tolist()
        ours = np.asarray(engine.prefill([ids])[0])[0]
        gaps.append(np.abs(np.array(ask(ids)) - ours))
    return np.concatenate(gaps)


@pytest.mark.parametrize("options", [(), ("--split", "1M")])
def test_the_f32_export_has_our_logits(peer, engine, options):
    assert np.median(differences(peer("--type", "f32", *options), engine)) < 1e-2


def test_with_exact_gelu_and_gates_nothing_but_rounding_is_left(peer, engine):
    assert differences(peer("--type", "f32", exact=True), engine).max() < 1e-3


def test_the_q8_0_export_is_loaded_and_near(peer, engine):
    # llama.cpp rounds activations to 8 bits; logits have a spread of 2.5.
    assert np.median(differences(peer(), engine)) < 0.2


def test_the_bf16_export_is_loaded_and_near(peer, engine):
    assert np.median(differences(peer("--type", "bf16"), engine)) < 0.2


def test_llama_cpp_recites_the_demo_from_int8(tmp_path):
    demo = fetch_demo(tmp_path / "demo")
    grokfetch("export", demo, tmp_path / "out", "--pad")
    tokenizer = Tokenizer.load(demo / "grok-demo/tokenizer.model")
    prompt = "In the demo"
    command = [PYTHON, PEER, tmp_path / "out/grok-demo-Q8_0.gguf"]
    with asking(command, 512) as ask:
        ids = ask({"prompt": tokenizer.encode(prompt), "count": 100})
    stream = tokenizer.stream()
    text = "".join([*map(stream.push, ids), stream.finish()])
    known = (demo / "grok-demo/text.txt").read_text()
    assert f"{prompt}{text}" in " ".join(known.splitlines())


def test_token_ids_are_those_of_sentencepiece(peer, model):
    ask = peer()
    tokenizer = Tokenizer.load(model / "tokenizer.model")
    for text in ["", " ", "In the demo", " a  b\n\n\tc", "äöü 日本語 🙂", "<s>x</s>", "1234.5"]:
        assert ask(text) == tokenizer.encode(text), text
