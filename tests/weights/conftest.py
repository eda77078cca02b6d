"""What the tests of shards share."""

import sys

import pytest
from support.official import QuantizedWeight8bit


@pytest.fixture(autouse=True)
def _main_knows_the_class(monkeypatch):
    monkeypatch.setattr(
        sys.modules["__main__"], "QuantizedWeight8bit", QuantizedWeight8bit, raising=False
    )
