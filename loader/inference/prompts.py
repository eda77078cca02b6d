"""What may be a prompt, and the chunks in which prompts are read. Pure."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from grokfetch.errors import PromptInvalid
from loader.weights.limits import SMALLEST_STEP, rounded
from loader.weights.schema import GrokConfig

__all__ = ["Chunk", "Ids", "check_prompts", "check_room", "chunks", "token_ids"]

Ids = Sequence[int] | Any
"""Token ids: a sequence of integers, or an array `[T]` of NumPy, JAX or PyTorch."""


def token_ids(prompt: Ids) -> list[int]:
    """The ids of a prompt as a list of integers.

    Raises:
        PromptInvalid: it is not one sequence of integers.
    """
    try:
        values = np.asarray(prompt)
    except ValueError:  # Lists of different lengths.
        values = np.empty((0, 0))
    if values.ndim != 1 or values.dtype.kind in "bUS":
        raise _not_ids(prompt)
    try:
        return [operator.index(token) for token in values.tolist()]
    except TypeError:
        raise _not_ids(prompt) from None


def check_prompts(config: GrokConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Make sure that a model can read these prompts, before its weights are loaded.

    Raises:
        PromptInvalid: if there is no prompt, or one is empty, too long, or has unknown ids.
    """
    if not prompts or not all(prompts):
        raise PromptInvalid(
            "the prompt is empty: the model needs a token to start from",
            hint="give it a word, or a token id, to continue",
        )
    longest = max(len(prompt) for prompt in prompts)
    if longest > config.sequence_len:
        raise PromptInvalid(
            f"the prompt has {longest:,} tokens, and the model's context is "
            f"{config.sequence_len:,}",
            hint="shorten it",
        )
    for token in (token for prompt in prompts for token in prompt):
        if not 0 <= token < config.vocab_size:
            raise PromptInvalid(
                f"token {token} is outside the vocabulary of {config.vocab_size:,}",
                hint=f"token ids of this model lie between 0 and {config.vocab_size - 1:,}",
            )


def check_room(config: GrokConfig, prompt: Sequence[int]) -> int:
    """How many tokens may follow a prompt, at least one.

    Raises:
        PromptInvalid: as `check_prompts`, or the prompt leaves no room for a token.
    """
    check_prompts(config, [prompt])
    room = config.sequence_len - len(prompt)
    if room < 1:
        raise PromptInvalid(
            f"the prompt fills the whole context of {config.sequence_len:,} tokens",
            hint="shorten it",
        )
    return room


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one step: the next ones of each prompt.

    tokens: int32 `[B, T]`, followed by pad ids in each row. counts: int32 `[B]`, how many of them
    are the row's. ends: int32 `[B]`, where in the chunk each row ends, negative or beyond it if the
    row ends before or after.
    """

    tokens: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]


def chunks(
    config: GrokConfig, prompts: Sequence[Sequence[int]], rows: int, most: int
) -> Iterator[Chunk]:
    """The tokens of prompts that are read in each step.

    Args:
        config: the hyperparameters.
        prompts: as `check_prompts` requires.
        rows: of each step; rows without a prompt have no token.
        most: the most tokens of a prompt in a step, a power of two.
    """
    lengths = np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    longest = int(lengths.max())
    for start in range(0, longest, most):
        width = rounded(config, min(longest - start, most), SMALLEST_STEP)
        tokens = np.full((rows, width), config.pad_token, np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + most]
            tokens[row, : len(part)] = part
        left = lengths - start
        yield Chunk(
            tokens,
            np.clip(left, 0, most).astype(np.int32),
            np.where(left <= most, left - 1, -1).astype(np.int32),
        )


def _not_ids(prompt: object) -> PromptInvalid:
    return PromptInvalid(
        f"not the token ids of one prompt: {prompt!r:.80}",
        hint="give a list of integers, an array of them, or a text",
    )
