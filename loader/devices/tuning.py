"""Measures which formulations of a product suit this processor: some seconds, once per machine.

What is fastest depends on vector width, registers, caches and matrix instructions, and cannot be
known from a processor's name. The matrices are larger than any cache, like those of the model. The
C program of `loader.devices.native` is measured like any other formulation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from grokfetch.cache_folder import cache_folder
from grokfetch.folder.atomic import put
from loader.devices import native
from loader.devices.kernels import Rows, Tuning, product
from loader.devices.xla_setup import processor

__all__ = ["decode", "encode", "measure", "product_seconds", "suited"]

SCHEMA = 3
ROWS, COLUMNS = 6144, 16384
ROUNDS = 4
SEVERAL, MANY = (4, 8, 16, 32), 64
"""Tokens up to which rows may be accumulated, and for which blocks are multiplied."""

ONE_TOKEN = ((256, 8), (256, 16), (512, 8), (512, 16), (512, 24))
"""Vector width in bits and rows in a step; more rows than registers spill."""

WORTH_TUNING = 1 << 30
"""Bytes of weights from which on some seconds of measuring soon pay off."""

BLOCKS = ((2048, 512, False), (1024, 1024, False), (512, 2048, False), (1024, 1024, True))
"""Rows and columns of a block, and whether it is multiplied in two bfloat16 halves."""


def suited(weights: int, notice: Callable[[str], object]) -> Tuning | None:
    """What suits this processor, measured once and kept; None if a model is too small for that.

    Args:
        weights: bytes of the model's weights.
        notice: called when it takes time, and with why the C program could not be built.
    """
    if weights < WORTH_TUNING:
        return None
    path, name = cache_folder() / "tuning.json", processor()
    report = functools.cache(notice)  # Both attempts to build may fail, for one reason.
    with contextlib.suppress(OSError):
        kept = decode(path.read_bytes(), name)
        if kept is not None and (not kept.native or native.built(cache_folder() / name, report)):
            return kept
    notice("measuring once what suits this processor")
    measured = measure(cache_folder() / name, report)
    with contextlib.suppress(OSError):
        put(path, encode(measured, name))
    return measured


def product_seconds(flat: Array, tokens: int, rows: int, columns: int, tuning: Tuning) -> float:
    """The shortest of some products of so many tokens with a matrix in `flat`."""

    def compute(flat: Array, x: Array) -> Array:
        matrix = Rows(flat, jnp.int32(0), jnp.int32(0), rows, columns, columns)
        return product(x, matrix, 1, lambda _: jnp.ones(columns), tuning)

    options = {"xla_cpu_prefer_vector_width": tuning.vector_width}
    run = jax.jit(compute, compiler_options=options)
    x = jnp.ones((tokens, rows), jnp.float32)
    run(flat, x).block_until_ready()
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run(flat, x).block_until_ready()
        taken.append(time.perf_counter() - start)
    return min(taken)


def measure(
    folder: Path | None = None,
    report: Callable[[str], object] = lambda _reason: None,
    seconds: Callable[[Array, int, int, int, Tuning], float] = product_seconds,
) -> Tuning:
    """The fastest formulations, each in its turn, on the first device of this process.

    Args:
        folder: where `loader.devices.native` keeps what it compiles; None leaves it out.
        report: called with one line that says why it could not be compiled.
        seconds: how long a product takes, called as `product_seconds` is.
    """
    device = jax.local_devices()[0]
    flat = jax.device_put(np.arange(ROWS * COLUMNS, dtype=np.int8), device)
    best = Tuning()

    def fastest(tokens: int, rows: int, columns: int, among: Iterable[Tuning]) -> Tuning:
        return min(among, key=lambda tuning: seconds(flat, tokens, rows, columns, tuning))

    best = fastest(
        1,
        ROWS,
        COLUMNS,
        [
            dataclasses.replace(best, vector_width=width, wide_rows=rows)
            for width, rows in ONE_TOKEN
        ],
    )
    narrow = [dataclasses.replace(best, narrow_rows=rows) for rows in (8, 16, 32)]
    best = fastest(1, COLUMNS, ROWS, narrow)
    # A part of the matrix is enough when products take longer than reading.
    part = ROWS // 3
    if folder is not None and native.built(folder, report):
        plain, ours = best, dataclasses.replace(best, native=True)
        sizes = ((1, ROWS), (MANY, part))
        if all(fastest(*size, COLUMNS, (plain, ours)) is ours for size in sizes):
            exact = dataclasses.replace(ours, integers=True)
            return fastest(MANY, part, COLUMNS, (ours, exact))
    blocks = [
        dataclasses.replace(best, block_rows=rows, block_columns=columns, halves=halves)
        for rows, columns, halves in BLOCKS
    ]
    best = fastest(MANY, part, COLUMNS, blocks)
    for tokens in SEVERAL:
        both = [dataclasses.replace(best, few_tokens=few) for few in (tokens, 2)]
        if fastest(tokens, part, COLUMNS, both).few_tokens < tokens:
            break
        best = both[0]
    return best


def encode(tuning: Tuning, processor: str) -> bytes:
    """The JSON object that keeps what was measured on a processor."""
    fields = {"schema": SCHEMA, "processor": processor, **dataclasses.asdict(tuning)}
    return (json.dumps(fields) + "\n").encode()


def decode(text: bytes, processor: str) -> Tuning | None:
    """What `encode` has kept; None if it is damaged, or from another version or processor."""
    try:
        fields = json.loads(text)
        if (fields.pop("schema"), fields.pop("processor")) != (SCHEMA, processor):
            return None
        tuning = Tuning(**fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    for field in dataclasses.fields(tuning):
        value = getattr(tuning, field.name)
        if type(value) is not type(field.default):
            return None
        if type(value) is int and not 0 < value <= 1 << 16:
            return None
    return tuning
