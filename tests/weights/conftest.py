"""What the tests of shards and of checkpoints share."""

import shutil
import sys

import pytest
from support.official import QuantizedWeight8bit
from support.synthetic_folder import CONFIG, LenientStore, manifest_of, manifested

from loader.weights.synthetic import write_checkpoint


@pytest.fixture(autouse=True)
def _main_knows_the_class(monkeypatch):
    monkeypatch.setattr(
        sys.modules["__main__"], "QuantizedWeight8bit", QuantizedWeight8bit, raising=False
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    write_checkpoint(root / "ckpt-0", CONFIG)
    return root


@pytest.fixture
def store(written, tmp_path):
    shutil.copytree(written, tmp_path / "DIR")
    return manifested(LenientStore(tmp_path / "DIR"), manifest_of(CONFIG, "ckpt-0"))
