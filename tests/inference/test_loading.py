"""One call makes a model ready as `run` does, and reports what happens meanwhile."""

import shutil

import jax
import jax.numpy as jnp
import pytest
from support import golden
from support.demo import fetch_demo

import loader
from grokfetch.errors import OutOfReach, TokenizerMissing
from grokfetch.events import Loaded, Notice, Progress
from grokfetch.manifest.shipped import demo_folder
from loader.devices import arrangement
from loader.devices.mapped import Mapped
from loader.devices.products import Quantized
from loader.weights.capacity import Memory
from loader.weights.limits import WORK

WANTED = golden.arrays()["f32/p1_tokens"].tolist()


@pytest.mark.parametrize(
    ("placement", "kind"),
    [
        (None, Mapped),
        pytest.param("mapped", Mapped, marks=pytest.mark.slow),
        pytest.param("sharded", Quantized, marks=pytest.mark.slow),
    ],
)
def test_model_generates_what_the_reference_does(placement, kind):
    events = []
    engine = loader.load_model(
        golden.CHECKPOINT,
        placement=placement,
        mesh=golden.ONE,
        dtype="float32",
        report=events.append,
    )
    assert isinstance(engine.params.layers[0].gate, kind)
    assert list(engine.generate(golden.prompt("p1"), 6)) == WANTED[:6]
    *copied, loaded = events
    total = golden.CHECKPOINT.nbytes
    assert (loaded.bytes, loaded.devices, loaded.platform) == (total, 1, "CPU")
    assert loaded.placement == (placement or "mapped")
    assert isinstance(loaded, Loaded)
    counts = [event.done for event in copied if isinstance(event, Progress)]
    assert counts[-1:] == ([total] if placement == "sharded" else [])
    assert len(counts) == len(copied)


@pytest.mark.parametrize("cache", ["float16", "bfloat16"])
def test_the_cache_may_have_a_dtype_of_its_own(cache):
    engine = loader.load_model(golden.CHECKPOINT, mesh=golden.ONE, dtype="float32", cache=cache)
    _, state = engine.prefill([golden.prompt("p1")])
    assert {array.dtype for array in jax.tree.leaves(state.cache)} == {jnp.dtype(cache)}
    assert next(engine.generate(golden.prompt("p1"), 1)) == WANTED[0]


def test_what_does_not_stay_in_memory_is_said():
    events = []
    engine = loader.load_model(
        golden.CHECKPOINT, mesh=golden.ONE, memory=WORK, dtype="float32", report=events.append
    )
    assert list(engine.generate(golden.prompt("p1"), 3)) == WANTED[:3]
    assert "no more than 0 of" in next(it.text for it in events if isinstance(it, Notice))


@pytest.mark.parametrize(
    ("asked", "memory", "kept"),
    [(10**6, None, 10**6), (10**12, None, None), (10**12, 1, 0), (0, None, 0)],
)
def test_prefixes_get_half_of_what_the_model_leaves_at_most(monkeypatch, asked, memory, kept):
    free = 2 * WORK
    monkeypatch.setattr(arrangement, "free_memory", lambda _: Memory(free, sharers=1))
    engine = loader.load_model(
        golden.CHECKPOINT, mesh=golden.ONE, memory=memory, prefix_cache=asked
    )
    room = engine.prefix_cache.most
    assert room == kept if kept is not None else free // 4 < room < free // 2


def test_model_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(arrangement, "free_memory", lambda _: Memory(1000))
    with pytest.raises(OutOfReach, match="are free"):
        loader.load_model(golden.CHECKPOINT, mesh=golden.ONE)


def test_names_that_are_not_there_are_attribute_errors():
    with pytest.raises(AttributeError, match="load_models"):
        _ = loader.load_models


TEXT = "In the demo"
KNOWN = " one process seeds it"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return fetch_demo(tmp_path_factory.mktemp("demo") / "grok")


def test_a_text_is_continued_by_text(demo):
    with loader.open_checkpoint(demo) as checkpoint:
        engine = loader.load_model(checkpoint, mesh=golden.ONE)
        pieces = list(engine.generate(TEXT, 8))
        assert "".join(pieces).startswith(KNOWN)
        assert len(pieces) > 1
        assert all(pieces)
        ids = engine.tokenizer.encode(TEXT)
        tokens = list(engine.generate(ids, 8))
        stream = engine.tokenizer.stream()
        assert "".join(map(stream.push, tokens)) == "".join(pieces)


def test_a_text_needs_the_tokenizer_of_the_model(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "grok")
    tokenizer = tmp_path / "grok/grok-demo/tokenizer.model"
    tokenizer.write_bytes(b"another")
    with loader.open_checkpoint(tmp_path / "grok") as checkpoint:
        engine = loader.load_model(checkpoint, mesh=golden.ONE)
        with pytest.raises(TokenizerMissing, match="not the tokenizer of the model"):
            engine.generate(TEXT, 8)
        tokenizer.unlink()
        with pytest.raises(TokenizerMissing, match="not there"):
            engine.generate(TEXT, 8)
        # A tokenizer that the caller names is used as it is.
        named = loader.load_model(
            checkpoint,
            mesh=golden.ONE,
            tokenizer=demo_folder() / "grok-demo/tokenizer.model",
        )
        assert "".join(named.generate(TEXT, 8)).startswith(KNOWN)
        with pytest.raises(TokenizerMissing, match="no tokenizer"):
            loader.load_model(checkpoint, mesh=golden.ONE, tokenizer=tokenizer)


def test_without_a_folder_of_ours_a_text_is_refused_with_what_to_do():
    with pytest.raises(TokenizerMissing, match="tokenizer=FILE"):
        golden.engine().generate(TEXT, 8)
