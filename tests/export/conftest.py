"""The model that these tests export, made once, and its export."""

import os

import pytest
from support import loadable
from support.program import grokfetch


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A checkpoint, proven by its manifest; not to be changed."""
    return loadable.make(tmp_path_factory.mktemp("export") / "small model")


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory):
    """The GGUF of an undisturbed export; not to be changed."""
    out = tmp_path_factory.mktemp("exported") / "out"
    grokfetch("export", model, out)
    return out / "small-model-Q8_0.gguf"


@pytest.fixture
def writes(monkeypatch):
    """The offsets of everything that is written by `pwrite` in this process."""
    offsets = []
    pwrite = os.pwrite

    def watched(handle, data, offset):
        offsets.append(offset)
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    return offsets
