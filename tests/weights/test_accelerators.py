"""The names of slices and hosts stand for as many devices as their makers say."""

from __future__ import annotations

import pytest

from grokfetch.errors import MeshInvalid
from loader.weights.accelerators import ACCELERATORS, named


@pytest.mark.parametrize(
    ("name", "kind", "devices"),
    [
        ("v5p-8", "v5p", 4),
        ("v4-32", "v4", 16),
        ("v5e-8", "v5e", 8),
        ("V6E-16", "v6e", 16),
        ("h100x8", "h100", 8),
        ("b200", "b200", 1),
        ("v5p", "v5p", 1),
    ],
)
def test_name_says_kind_and_number(name, kind, devices):
    assert named(name) == (ACCELERATORS[kind], devices)


@pytest.mark.parametrize("name", ["", "v5p-7", "v5p-0", "h100x0", "h100-8", "v5ex8", "tpu", "x8"])
def test_other_names_are_refused_with_examples(name):
    with pytest.raises(MeshInvalid, match="names no device") as caught:
        named(name)
    assert "h100x8" in caught.value.hint
