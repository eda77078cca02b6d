"""Penalties on repetition and bias towards tokens: logits changed before a token is chosen.

A text without penalties costs nothing. The devices get the changes for the few tokens concerned,
not for a row of the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["Changes", "Penalties", "Repeated", "changed"]

SMALLEST = 64
"""The fewest changed tokens in a row; their number is this times a power of four, so that few
programs are compiled."""


@dataclasses.dataclass(frozen=True, slots=True)
class Penalties:
    """How logits are changed before the next token is chosen.

    First the logits of all tokens of the prompt and the text so far are divided by `repetition`
    where they are positive, and multiplied by it elsewhere (Keskar et al. 2019). Then `presence` is
    subtracted for each token in the text, `frequency` for each of its occurrences, and `bias` is
    added (OpenAI's API reference).
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)


class Changes(NamedTuple):
    """Changes of B rows of logits, for up to K tokens each.

    tokens: int32 `[B, K]`; a negative one means none. factor: float32 `[B, K]`, the repetition
    penalty. plus: float32 `[B, K]`, what is added.
    """

    tokens: Any
    factor: Any
    plus: Any

    @classmethod
    def of(cls, rows: Sequence[Mapping[int, tuple[float, float]]]) -> Changes | None:
        """The changes of some rows, each token with its factor and what is added; None for none."""
        most = max(map(len, rows), default=0)
        if not most:
            return None
        width = SMALLEST
        while width < most:
            width *= 4
        made = cls(
            np.full((len(rows), width), -1, np.int32),
            np.ones((len(rows), width), np.float32),
            np.zeros((len(rows), width), np.float32),
        )
        for number, row in enumerate(rows):
            if row:
                made.tokens[number, : len(row)] = list(row)
                made.factor[number, : len(row)], made.plus[number, : len(row)] = np.transpose(
                    list(row.values())
                )
        return made


class Repeated:
    """The tokens of one text so far, as far as its penalties need them.

    Args:
        penalties: of the text.
        prompt: its token ids.
    """

    def __init__(self, penalties: Penalties, prompt: Sequence[int]) -> None:
        self._penalties = penalties
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt) if penalties.repetition != 1 else set()
        self._watches = bool(penalties.presence or penalties.frequency or penalties.repetition != 1)

    def add(self, token: int) -> None:
        """Record the next token."""
        if self._watches:
            self._counts[token] += 1

    def changes(self, banned: int | None) -> dict[int, tuple[float, float]]:
        """Each token whose logit changes, with its repetition factor and what is added.

        Args:
            banned: a token that must not be chosen now; None for none.
        """
        penalties, made = self._penalties, {}
        for token in {*self._seen, *self._counts, *penalties.bias}:
            count = self._counts.get(token, 0)
            repeated = count > 0 or token in self._seen
            plus = penalties.bias.get(token, 0.0) - penalties.frequency * count
            made[token] = (
                penalties.repetition if repeated else 1.0,
                plus - penalties.presence if count else plus,
            )
        if banned is not None:
            made[banned] = (1.0, -np.inf)
        return made


def changed(logits: Array, changes: Changes) -> Array:
    """Float32 logits `[B, V]` with the changes of each row."""
    rows = jnp.arange(logits.shape[0])[:, None]
    # A negative index would count from the end: one beyond it is dropped.
    tokens = jnp.where(changes.tokens < 0, logits.shape[1], changes.tokens)
    now = logits.at[rows, tokens].get(mode="fill", fill_value=0)
    repeated = jnp.where(now > 0, now / changes.factor, now * changes.factor)
    return logits.at[rows, tokens].set(repeated + changes.plus, mode="drop")
