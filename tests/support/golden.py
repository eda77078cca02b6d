"""The reference's checkpoint and outputs in tests/data/tiny, and engines for tests to share."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np

from loader.devices.placement import load, make_mesh
from loader.devices.products import Quantized
from loader.inference.engine import Engine
from loader.weights.checkpoint import open_folder
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig

TINY = Path(__file__).parents[1] / "data" / "tiny"
CONFIG = GrokConfig.from_mapping(json.loads((TINY / "config.json").read_text()))
CHECKPOINT = open_folder(TINY / "ckpt-0", CONFIG)
ONE = MeshShape()
PROMPTS = ("p0", "p1", "p2", "pz")
CONTINUED = ("p0", "p1", "p2")
"""The prompts whose continuation we match: for pz, the reference forgets what is padding."""


@functools.cache
def arrays():
    with np.load(TINY / "golden.npz") as file:
        return dict(file)


def prompt(name):
    return arrays()[f"{name}_prompt"].tolist()


@functools.cache
def placed(shape):
    """Mesh and parameters of the golden checkpoint."""
    mesh = make_mesh(CONFIG, shape)
    return mesh, load(CHECKPOINT, mesh)


def for_accelerators(params):
    """The same weights, multiplied as accelerators do, whatever the processor."""

    def one(weights):
        quantized = isinstance(weights, Quantized)
        return dataclasses.replace(weights, tuning=None) if quantized else weights

    return jax.tree.map(one, params, is_leaf=lambda it: isinstance(it, Quantized))


@functools.cache
def engine(shape=ONE, dtype="float32"):
    mesh, params = placed(shape)
    return Engine(CONFIG, params, mesh, dtype)
