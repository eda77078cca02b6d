"""What a text shall not repeat, and which tokens it shall prefer: logits changed before the choice.

A text that asks for nothing costs nothing. What is changed is sent to the devices as the few tokens
that it concerns, not as a row of the vocabulary.
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
"""Tokens a row that are changed at least; their number is a power of four times this, so that few
programs are compiled."""


@dataclasses.dataclass(frozen=True, slots=True)
class Penalties:
    """How logits are changed before the next token is chosen.

    First the logits of all tokens of the prompt and the text so far are divided by `repetition`
    where they are positive, and multiplied by it elsewhere (Keskar et al. 2019). Then `presence` is
    taken off for each token that the text holds, `frequency` for each time that it does, and `bias`
    is added (OpenAI's API reference).
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)


class Changes(NamedTuple):
    """Changes of B rows of logits, for up to K tokens each.

    tokens: int32 `[B, K]`; a negative one means none. factor: float32 `[B, K]`, the penalty of
    repetition. plus: float32 `[B, K]`, what is added.
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
    """The tokens of one text so far, as far as its penalties want to know them.

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
        """Learn of the next token."""
        if self._watches:
            self._counts[token] += 1

    def changes(self, banned: int | None) -> dict[int, tuple[float, float]]:
        """Each token whose logit changes, with the factor of repetition and what is added.

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
