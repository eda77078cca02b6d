"""What may stand for a prompt: token ids in a list or an array, or a text. Pure."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from grokfetch.errors import PromptInvalid
from loader.weights.schema import GrokConfig

__all__ = ["Ids", "check_prompts", "check_room", "token_ids"]

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


def _not_ids(prompt: object) -> PromptInvalid:
    return PromptInvalid(
        f"not the token ids of one prompt: {prompt!r:.80}",
        hint="give a list of integers, an array of them, or a text",
    )
