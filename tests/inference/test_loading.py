"""One call makes a model ready as `run` does, and says what happens meanwhile."""

import pytest
from support import golden

import loader
from grokfetch.errors import OutOfReach
from grokfetch.events import Loaded, Notice, Progress
from loader.devices import arrangement
from loader.devices.mapped import Mapped
from loader.devices.products import Quantized
from loader.weights.capacity import Memory
from loader.weights.limits import WORK

WANTED = golden.arrays()["f32/p1_tokens"].tolist()


@pytest.mark.parametrize(
    ("placement", "kind"), [(None, Mapped), ("mapped", Mapped), ("sharded", Quantized)]
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


def test_what_does_not_stay_in_memory_is_said():
    events = []
    engine = loader.load_model(
        golden.CHECKPOINT, mesh=golden.ONE, memory=WORK, dtype="float32", report=events.append
    )
    assert list(engine.generate(golden.prompt("p1"), 3)) == WANTED[:3]
    assert "no more than 0 of" in next(it.text for it in events if isinstance(it, Notice))


def test_model_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(arrangement, "_free_memory", lambda _: Memory(1000))
    with pytest.raises(OutOfReach, match="are free"):
        loader.load_model(golden.CHECKPOINT, mesh=golden.ONE)


def test_names_that_are_not_there_are_attribute_errors():
    with pytest.raises(AttributeError, match="load_models"):
        _ = loader.load_models
