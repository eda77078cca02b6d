"""Waits for a condition, with a deadline that only a fault can reach."""

import threading

import pytest

PATIENCE_S = 60


def wait_for(true):
    """Return once `true()` is true."""
    never = threading.Event()
    for _ in range(PATIENCE_S * 100):
        if true():
            return
        never.wait(0.01)
    pytest.fail("it has not become true")
