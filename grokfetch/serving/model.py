"""What the server asks of a model and of a tokenizer; `grokfetch.commands.serve` provides both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

__all__ = [
    "Emission",
    "Generation",
    "Model",
    "PrefixCache",
    "Scored",
    "Served",
    "TextStream",
    "Tokenizer",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """The model as clients see it.

    name: its id. context: tokens of prompt and text together, at most. vocabulary: token ids. eos:
    the id that ends a text. slots: texts at work at once. logprobs: most probable tokens, at most,
    that are returned beside each token.
    """

    name: str
    context: int
    vocabulary: int
    eos: int
    slots: int
    logprobs: int


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """One prompt to continue.

    `loader.inference.batching.Job` says what the fields mean, `loader.inference.sampling.Sampling`
    and `loader.inference.penalties.Penalties` too.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    logprobs: int | None = None
    echo: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False


class Scored(Protocol):
    """A token, its log-probability, and the most probable: `loader.inference.batching.Scored`."""

    @property
    def token(self) -> int:
        """Its id."""

    @property
    def logprob(self) -> float | None:
        """Natural logarithm; None where it was not asked for."""

    @property
    def best(self) -> Sequence[tuple[int, float]]:
        """The most probable tokens with theirs, best first."""


class Emission(Protocol):
    """What became known of one text, as `loader.inference.batching.Emission`."""

    @property
    def number(self) -> int:
        """Which text."""

    @property
    def prompt(self) -> Sequence[Scored]:
        """All tokens of the prompt, once, where they are to be echoed."""

    @property
    def token(self) -> Scored | None:
        """The next token; the one that ends the sequence included."""

    @property
    def finished(self) -> Literal["stop", "length"] | None:
        """Why this is the last of it."""


class PrefixCache(Protocol):
    """What is kept of prompts for those that begin alike, and what it was good for."""

    hits: int
    """Prompts whose beginning was known."""

    tokens: int
    """Tokens of theirs that were not read again."""

    nbytes: int
    """Memory that it takes."""


class Model(Protocol):
    """Continues many texts at once; used by one thread."""

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""

    @property
    def working(self) -> int:
        """Texts that have a slot."""

    @property
    def prefix_cache(self) -> PrefixCache:
        """What prompts have in common; other threads read its figures."""

    def add(self, number: int, generation: Generation) -> None:
        """Take in a text."""

    def drop(self, number: int) -> None:
        """Forget a text, whatever its state."""

    def reset(self) -> None:
        """Forget all texts, after a step that failed."""

    def step(self) -> Sequence[Emission]:
        """Do one bounded piece of work."""


class TextStream(Protocol):
    """Turns token ids into text as they come."""

    def push(self, token: int) -> str:
        """The text that a token completes."""

    def finish(self) -> str:
        """What is left at the end."""


class Tokenizer(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def piece(self, token: int) -> str:
        """What a token is called."""

    def special(self, token: int) -> bool:
        """Whether it stands for no text."""

    def stream(self) -> TextStream:
        """A decoder of the tokens that continue a text."""
