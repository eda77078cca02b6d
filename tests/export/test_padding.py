"""A small model padded with zeros to a shape that llama.cpp loads."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.demo import fetch_demo
from support.program import grokfetch

from grokfetch.folder.store import Store
from loader.devices.placement import load, make_mesh
from loader.export import gguf
from loader.export.padding import padded_config, write_padded
from loader.inference.engine import Engine
from loader.inference.tokenizer import Tokenizer
from loader.weights.checkpoint import open_checkpoint
from loader.weights.schema import GrokConfig


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return fetch_demo(tmp_path_factory.mktemp("padding"))


def logits(checkpoint, prompt):
    mesh = make_mesh(checkpoint.config, devices=jax.devices()[:1])
    engine = Engine(checkpoint.config, load(checkpoint, mesh), mesh, "float32")
    return np.asarray(engine.prefill([prompt])[0])[0]


@pytest.mark.slow
def test_a_padded_model_computes_the_same(demo, tmp_path):
    with open_checkpoint(Store(demo)) as checkpoint:
        prompt = Tokenizer.load(demo / "grok-demo/tokenizer.model").encode("In the demo")
        plain = logits(checkpoint, prompt)
        padded = logits(write_padded(checkpoint, tmp_path), prompt)
    # The epsilon of norms has four times the effect.
    assert np.abs(padded - plain).max() < 1e-2 * plain.std()
    assert padded.argmax() == plain.argmax()


def test_the_demo_is_exported_in_a_shape_that_llama_cpp_loads(demo, tmp_path):
    grokfetch("export", demo, tmp_path / "out", "--pad")
    held = gguf.read(tmp_path / "out/grok-demo-Q8_0.gguf")
    sizes = [
        held.fields[f"grok.{key}"]
        for key in (
            *("embedding_length", "attention.head_count", "attention.key_length"),
            "feed_forward_length",
        )
    ]
    assert sizes == [256, 16, 16, 256]
    said = grokfetch("verify", held.path, "--against", demo, code=13)
    assert "padded by --pad, so no shards can be rebuilt from it" in said
    assert held.tensors["blk.11.ffn_down_exps.weight"].kind == "Q8_0"
    assert json.loads(held.fields["grokfetch.config"])["num_layers"] == 12


@given(
    st.sampled_from([1, 2, 3, 4, 8, 16, 48]),
    st.sampled_from([2, 4, 8, 24, 128]),
    st.integers(16, 600),
    st.floats(0.5, 8),
)
def test_every_padded_shape_holds_the_model_and_is_made_of_blocks(heads, size, width, widening):
    if heads * size % 8:
        return
    config = GrokConfig(
        num_q_heads=heads,
        num_kv_heads=1,
        key_size=size,
        emb_size=width,
        widening_factor=widening,
    )
    padded = padded_config(config)
    assert padded.num_q_heads * padded.key_size == padded.emb_size >= width
    assert padded.key_size % size == padded.emb_size % 256 == padded.ff_size % 256 == 0
    assert padded.ff_size - config.ff_size in range(256)
    again = padded_config(padded)
    assert dataclasses.replace(again, widening_factor=1) == dataclasses.replace(
        padded, widening_factor=1
    )
    assert math.isclose(again.widening_factor, padded.widening_factor)


def test_a_shape_that_llama_cpp_loads_stays_as_it_is():
    assert padded_config(GrokConfig()) == GrokConfig()


def test_options_that_go_together_or_not(demo, tmp_path):
    grokfetch("export", demo, tmp_path / "out", "--pad", "--format", "safetensors", code=2)
    grokfetch("export", demo, tmp_path / "out", "--pad", "--while-fetching", code=2)
    said = grokfetch("export", demo, tmp_path / "out", code=28)
    assert "or --pad" in said
