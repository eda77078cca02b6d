"""Pads a model with zeros to a shape that llama.cpp loads; what it computes stays the same.

llama.cpp needs the number of heads times the head size to be the width, and Q8_0 needs one scale
for each 32 rows. Grok-1 has both; small models often have neither. Zeros change no sum, and they
are placed so that nothing else changes:

- A head of size d gets size m * d, and dimension i becomes dimension m * i: rotary embedding
  rotates dimension j of d / 2 as fast as dimension m * j of m * d / 2.
- The width grows at its end. That makes the mean of squares smaller, which the weights of the norms
  compensate: they are divided by the square root of the factor. Their epsilon of 1e-5 has more
  effect by the same factor.
- In an expert, each group of rows that share a scale grows at its end.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loader.export.matrices import BLOCK_LENGTH
from loader.weights.checkpoint import Checkpoint, open_folder
from loader.weights.schema import SCALE_GROUPS, Axis, GrokConfig, parameters
from loader.weights.shard_writer import write_shard
from loader.weights.tensor import Tensor

__all__ = ["padded_config", "write_padded"]

ROWS = SCALE_GROUPS * BLOCK_LENGTH
"""A matrix with a multiple of these rows has groups that are whole Q8_0 blocks."""


def padded_config(config: GrokConfig) -> GrokConfig:
    """The smallest shape that llama.cpp loads and that a model fits into, maybe its own."""
    heads = config.num_q_heads * config.key_size
    stretch = math.lcm(heads, ROWS) // heads
    stretch *= -(-config.emb_size // (heads * stretch))
    width, hidden = heads * stretch, config.ff_size + -config.ff_size % ROWS
    return dataclasses.replace(
        config,
        emb_size=width,
        key_size=config.key_size * stretch,
        widening_factor=hidden * 3 / 2 / width,
    )


def write_padded(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Write the shards of a model in its padded shape into a folder, and open them.

    One whole tensor is in memory at a time.

    Raises:
        OSError: the folder cannot be written.
        GrokfetchError: as asking the checkpoint for a tensor raises.
    """
    config = padded_config(checkpoint.config)
    for spec in parameters(config):
        tensor = checkpoint[spec.name]
        weight = np.zeros(spec.shape, tensor.dtype)
        weight[np.ix_(*(_places(checkpoint.config, axis) for axis in spec.axes))] = tensor.weight
        if spec.axes == ("embed",):
            weight /= math.sqrt(config.emb_size / checkpoint.config.emb_size)
        write_shard(
            folder / spec.file, weight, _scales(checkpoint.config, tensor, spec.scale_shape)
        )
    return open_folder(folder, config)


def _scales(
    config: GrokConfig, tensor: Tensor, shape: tuple[int, ...] | None
) -> npt.NDArray[Any] | None:
    """The scales in the padded shape; those of padding are 1."""
    if tensor.scales is None or shape is None:
        return None
    scales = np.ones(shape, tensor.scales.dtype)
    *outer, _, columns = (_places(config, axis) for axis in tensor.spec.axes)
    scales[np.ix_(*outer, np.arange(shape[-2]), columns)] = tensor.scales
    return scales


def _places(config: GrokConfig, axis: Axis) -> npt.NDArray[np.intp]:
    """The index in the padded shape for each index along an axis."""
    match axis:
        case "q_heads" | "kv_heads":
            heads = config.num_q_heads if axis == "q_heads" else config.num_kv_heads
            stretch = padded_config(config).key_size // config.key_size
            return np.arange(heads * config.key_size) * stretch
        case "ff":
            groups = np.arange(padded_config(config).ff_size).reshape(SCALE_GROUPS, -1)
            return groups[:, : config.ff_size // SCALE_GROUPS].reshape(-1)
        case "vocab":
            return np.arange(config.vocab_size)
        case "embed":
            return np.arange(config.emb_size)
        case "expert" | "router":
            return np.arange(config.num_experts)
