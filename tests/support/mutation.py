"""Randomly damaged variants of well-formed input."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

EXTREMES = (0, 1, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
TOKENS = (
    b"null",
    b"-1",
    b"1e999",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"\x00",
    b"\xff",
    b"%",
    b"&",
    b"..",
)
MOST_BYTES = 1 << 16


def mutated(seeds: list[bytes], dice: random.Random, tokens: Sequence[bytes] = ()) -> bytes:
    """One of the seeds after one to six changes; they may insert `tokens` as well as `TOKENS`."""
    data = bytearray(dice.choice(seeds))
    for _ in range(dice.randint(1, 6)):
        _once(data, seeds, dice, (*TOKENS, *tokens))
    return bytes(data[:MOST_BYTES])


def _once(
    data: bytearray, seeds: list[bytes], dice: random.Random, tokens: Sequence[bytes]
) -> None:
    start = dice.randint(0, len(data))
    stop = min(len(data), start + dice.choice([1, 2, 4, 8, dice.randint(1, 200)]))
    match dice.randrange(8):
        case 0:
            data[start:stop] = dice.randbytes(stop - start)
        case 1:
            del data[start:stop]
        case 2:
            data[start:start] = data[start:stop] * dice.choice([1, 1, 2, 50])
        case 3:
            data[start:stop] = dice.choice(tokens)
        case 4:
            width = dice.choice([1, 2, 4, 8])
            value = dice.choice(EXTREMES) % 256**width
            data[start : start + width] = value.to_bytes(width, dice.choice(["little", "big"]))
        case 5:
            other = dice.choice(seeds)
            begin = dice.randint(0, len(other))
            data[start:stop] = other[begin : begin + dice.randint(1, 200)]
        case 6:
            numbers = list(re.finditer(rb"\d+", data))
            if numbers:
                number = dice.choice(numbers)
                data[slice(*number.span())] = str(dice.choice([*EXTREMES, -1])).encode()
        case _:
            del data[start:]
