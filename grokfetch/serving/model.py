"""The server's interface to a model and a tokenizer; `grokfetch.commands.serve` provides both."""

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

    name: its id. context: most tokens of prompt and text together. vocabulary: number of token ids.
    eos: the id that ends a text. slots: texts generated at once. logprobs: how many of the most
    probable tokens can be returned with each token.
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
    """What a step has added to one text, as `loader.inference.batching.Emission`."""

    @property
    def number(self) -> int:
        """Which text."""

    @property
    def prompt(self) -> Sequence[Scored]:
        """All tokens of the prompt, once, if they are to be echoed."""

    @property
    def token(self) -> Scored | None:
        """The next token; the one that ends the sequence included."""

    @property
    def finished(self) -> Literal["stop", "length"] | None:
        """Why the text has ended; None if it goes on."""


class PrefixCache(Protocol):
    """Results kept for prompts with the same prefix, and how often they were used."""

    hits: int
    """Prompts whose prefix was cached."""

    tokens: int
    """Tokens of these prompts that were not computed again."""

    nbytes: int
    """Memory of the cache in bytes."""


class Model(Protocol):
    """Continues many texts at once; used by one thread."""

    @property
    def busy(self) -> bool:
        """Whether there is anything for a step to do."""

    @property
    def working(self) -> int:
        """Texts that have a slot."""

    @property
    def prefix_cache(self) -> PrefixCache:
        """The cache of prompt prefixes; other threads read its counters."""

    def add(self, number: int, generation: Generation) -> None:
        """Add a text."""

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
        """The name of a token."""

    def special(self, token: int) -> bool:
        """Whether it is a control token, without text."""

    def stream(self) -> TextStream:
        """A decoder of the tokens that continue a text."""
