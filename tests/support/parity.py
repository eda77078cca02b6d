"""Checks that an engine over the golden checkpoint gives the reference's logits and tokens.

Run as a program, `python -m support.parity E,M ...` in `tests/`, it checks meshes with more devices
than the process of the tests has; `XLA_FLAGS` says how many there are.
"""

from __future__ import annotations

import sys

import numpy as np

from loader.weights.partition import MeshShape
from support import golden

TOLERANCE = 1e-3


def furthest(found, wanted):
    return float(np.abs(np.asarray(found) - wanted).max())


def step_logits(engine, name, steps):
    """Prefill logits, then those of each cached step over the reference's own tokens."""
    logits, state = engine.prefill([golden.prompt(name)])
    found = [np.asarray(logits[0])]
    for token in golden.arrays()[f"f32/{name}_tokens"][: steps - 1]:
        logits, state = engine.decode(state, np.array([token], np.int32))
        found.append(np.asarray(logits[0]))
    return np.stack(found)


def check_parity(engine, names, steps):
    """Check the logits of every position, of prefill and of cached steps, and the greedy tokens."""
    wanted = golden.arrays()
    for name in names:
        tokens = golden.prompt(name)
        full = engine.full_logits([tokens])[0, : len(tokens)]
        assert furthest(full, wanted[f"f32/{name}_full_logits"]) < TOLERANCE, name
        count = steps if name in golden.CONTINUED else 1
        found = step_logits(engine, name, count)
        assert furthest(found[0], wanted[f"f32/{name}_prefill_last_logits"]) < TOLERANCE, name
        assert furthest(found, wanted[f"f32/{name}_step_logits"][:count]) < TOLERANCE, name
        greedy = found.argmax(axis=-1).tolist()
        assert greedy == wanted[f"f32/{name}_tokens"][:count].tolist(), name


def check_bfloat16(engine, names):
    """Check that logits are as close to the reference's float32 as its own bfloat16 logits."""
    wanted = golden.arrays()

    def distance(found, key):
        return np.abs(np.asarray(found) - wanted[f"f32/{key}"]).mean()

    for name in names:
        tokens = golden.prompt(name)
        full = engine.full_logits([tokens])[0, : len(tokens)]
        key = f"{name}_full_logits"
        assert distance(full, key) <= distance(wanted[f"bf16jit/{key}"], key), key
        if name in golden.CONTINUED:
            found = step_logits(engine, name, 32)
            key = f"{name}_step_logits"
            assert distance(found, key) <= distance(wanted[f"bf16jit/{key}"], key), key


if __name__ == "__main__":
    for pair in sys.argv[1:]:
        mesh = MeshShape(*map(int, pair.split(",")))
        check_parity(golden.engine(mesh), ["p1", "p2"], steps=3)
        held = golden.placed(mesh)[1].embedding.addressable_shards
        assert {part.data.shape[0] * mesh.devices for part in held} == {golden.CONFIG.vocab_size}
        sys.stdout.write(f"{mesh}\n")
