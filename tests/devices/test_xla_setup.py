"""JAX is set up for this machine before its first use, unless the environment decides otherwise."""

from __future__ import annotations

import os

import jax
import pytest

from loader.devices import xla_setup
from loader.devices.xla_setup import SLICES_APART, sums_undivided, use_memory
from loader.weights.accelerators import ACCELERATORS

VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def test_jax_takes_the_part_of_a_gpu_that_is_planned_with():
    use_memory()
    part = float(os.environ["XLA_CLIENT_MEM_FRACTION"])
    kind = ACCELERATORS["h100"]
    assert kind.usable == int(part * kind.memory)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_part_that_the_environment_names_holds(monkeypatch, variable):
    monkeypatch.setenv(variable, "0.5")
    use_memory()
    assert {os.environ.get(name) for name in VARIABLES} == {"0.5", None}


def test_xla_is_asked_not_to_divide_sums_only_if_it_knows_how_to_be(monkeypatch):
    """A version that has renamed its option compiles as it would without."""
    monkeypatch.setattr(xla_setup, "UNDIVIDED", "xla_cpu_prefer_vector_width")
    assert sums_undivided.__wrapped__() == {"xla_cpu_prefer_vector_width": "1"}
    monkeypatch.setattr(xla_setup, "UNDIVIDED", "xla_gpu_no_such_option")
    assert sums_undivided.__wrapped__() == {}


def test_xla_takes_the_option_that_keeps_slices_apart():
    jax.jit(lambda: 0).lower().compile(compiler_options=dict(SLICES_APART))
