"""Devices are known by name, and what a model needs of them follows from the shapes."""

from __future__ import annotations

import pytest

from grokfetch.errors import MeshInvalid
from loader.weights.accelerators import ACCELERATORS, prospect, slice_of
from loader.weights.capacity import Use, need
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig

OFFICIAL = GrokConfig()


@pytest.mark.parametrize(
    ("name", "kind", "devices"),
    [
        ("h100x8", "h100", 8),
        ("h100", "h100", 1),
        ("H200x4", "h200", 4),
        ("a100x16", "a100", 16),
        # Google counts TensorCores for v4 and v5p, two per device, and chips for the others.
        ("v5p-8", "v5p", 4),
        ("v4-64", "v4", 32),
        ("v5e-32", "v5e", 32),
        ("v5litepod-64", "v5e", 64),
        ("v6e-16", "v6e", 16),
        ("v5px8", "v5p", 8),
    ],
)
def test_devices_are_known_by_their_makers_names_and_by_count(name, kind, devices):
    found = slice_of(name)
    assert (found.name, found.kind.name, found.devices) == (name, kind, devices)


@pytest.mark.parametrize(
    "name", ["", "8", "h100x", "h100x0", "h100-8", "v5p-7", "v5p-0", "z900x8", "h100x8x8", "v5e 8"]
)
def test_other_names_are_none(name):
    assert slice_of(name) is None


@pytest.mark.parametrize(
    ("name", "mesh", "fits"),
    [
        ("v5p-8", (1, 4), True),
        ("v5p-4", (1, 2), False),
        ("v5e-16", (2, 8), False),
        ("v5e-32", (4, 8), True),
        ("v5e-64", (8, 8), True),
        ("v6e-16", (2, 8), True),
        ("a100x4", (1, 4), False),
        ("h100x8", (1, 8), True),
        ("b200x2", (1, 2), True),
    ],
)
def test_grok_1_fits_where_weights_cache_and_work_do(name, mesh, fits):
    found = prospect(OFFICIAL, slice_of(name), 8192)
    assert found.use.shape == MeshShape(*mesh)
    assert found.need == need(Use(OFFICIAL, MeshShape(*mesh), 8192))
    assert found.fits is fits


def test_a_token_takes_as_long_as_its_weights_and_its_cache_take_to_read():
    found = prospect(OFFICIAL, slice_of("h100x8"), 8192)
    expert = 3 * 6144 * 32768 // 8
    attention = (2 * 6144 + 2 * 1024) * 6144 // 8
    at_least = 64 * (2 * expert + attention) + 131072 * 6144 * 4 // 8 + found.need.cache
    assert at_least < found.read < 1.01 * at_least
    assert found.token_s == found.read / ACCELERATORS["h100"].rate


def test_devices_that_cannot_share_the_model_are_told_how_many_can():
    with pytest.raises(MeshInvalid) as caught:
        prospect(OFFICIAL, slice_of("v5p-24"), 8192)
    assert "12 devices" in caught.value.what
    assert "works is 8" in caught.value.hint
