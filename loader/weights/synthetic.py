"""Writes checkpoints of any config in the official format: for the demo, tests and benchmarks.

The weights are random but behave like trained ones: every product keeps the variance of its input,
the sublayers of all layers together add a residual stream of unit size to the embedding, which is
small compared to it (the output uses the same matrix, and a large one would repeat its input for
ever), and the logits have the same spread as those of the golden checkpoint.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from loader.weights.schema import GrokConfig, ParamSpec, parameters
from loader.weights.shard_writer import frame_layout, write_blocks

__all__ = ["write_checkpoint", "write_tensor"]

_BLOCK: Final = 4 * 1024 * 1024
"""Elements made at a time; the content of a file depends on it."""

_INT8_SPREAD: Final = math.sqrt((255**2 - 1) / 12)
"""Standard deviation of integers spread evenly over -127 to 127."""

_LOGIT_SPREAD: Final = 2.5
_ROUTER_SPREAD: Final = 2.0


def write_checkpoint(folder: str | os.PathLike[str], config: GrokConfig, *, seed: int = 0) -> None:
    """Write every shard of a checkpoint of `config` into `folder`, which is made if needed.

    Args:
        folder: where the files go; conventionally named ckpt-0.
        config: the model.
        seed: same seed, same bytes (under one version of NumPy).

    Raises:
        OSError: as writing files does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for spec in parameters(config):
        write_tensor(folder / spec.file, spec, config, seed=seed)


def write_tensor(
    path: str | os.PathLike[str], spec: ParamSpec, config: GrokConfig, *, seed: int = 0
) -> int:
    """Write the shard of one tensor, the same bytes as in a whole checkpoint of that seed.

    It uses about 50 MB of memory whatever the size of the tensor.

    Returns:
        The size of the file in bytes.

    Raises:
        OSError: as writing a file does.
    """
    # A generator of its own for each tensor: no file depends on which were written before.
    random = np.random.default_rng([seed, spec.index])
    layout = frame_layout(spec.dtype, spec.shape, spec.scale_shape)
    payloads = [_int8(spec, random), _scales(spec, random)]
    if spec.scale_shape is None:
        payloads = [_float32(spec, config, random)]
    with Path(path).open("wb") as file:
        write_blocks(file, layout, *payloads)
    return layout.size


def _blocks(shape: tuple[int, ...]) -> Iterator[int]:
    """The number of elements of each block of an array."""
    left = math.prod(shape)
    while left:
        count = min(left, _BLOCK)
        yield count
        left -= count


def _int8(spec: ParamSpec, random: np.random.Generator) -> Iterator[npt.NDArray[np.generic]]:
    for count in _blocks(spec.shape):
        yield random.integers(-127, 128, count, np.int8)


def _scales(spec: ParamSpec, random: np.random.Generator) -> Iterator[npt.NDArray[np.generic]]:
    """Scales that differ between columns and between groups, so that a mix-up shows."""
    assert spec.scale_shape is not None
    unit = 1 / (math.sqrt(spec.shape[-2]) * _INT8_SPREAD)
    for count in _blocks(spec.scale_shape):
        yield random.uniform(0.5 * unit, 1.5 * unit, count).astype(ml_dtypes.bfloat16)


def _float32(
    spec: ParamSpec, config: GrokConfig, random: np.random.Generator
) -> Iterator[npt.NDArray[np.generic]]:
    mean, spread = _distribution(spec, config)
    for count in _blocks(spec.shape):
        values = random.standard_normal(count, np.float32)
        values *= np.float32(spread)
        values += np.float32(mean)
        yield values


def _distribution(spec: ParamSpec, config: GrokConfig) -> tuple[float, float]:
    """Mean and standard deviation of a tensor that is not quantised."""
    width = math.sqrt(config.emb_size)
    if spec.axes == ("vocab", "embed"):
        return 0.0, 1 / (width * config.embedding_multiplier_scale)
    if spec.axes == ("embed", "router"):
        return 0.0, _ROUTER_SPREAD / width
    if spec.layer is None:
        scale = config.embedding_multiplier_scale / config.output_multiplier_scale * _LOGIT_SPREAD
    elif spec.name.endswith(("rms_norm_1/scale", "rms_norm_3/scale")):
        scale = 1 / math.sqrt(2 * config.num_layers)
    else:
        scale = 1.0
    return scale, 0.1 * scale
