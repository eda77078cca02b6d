"""Requests as OpenAI's completions API describes them, read from JSON. Pure.

Every refusal names the field it means. A field that we do not know, or that asks for something the
model cannot do, is refused rather than ignored.
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from grokfetch.serving.fields import (
    LARGEST,
    Fields,
    Refused,
    all_of,
    as_integer,
    is_text,
    refuse,
)
from grokfetch.serving.model import Generation, Served
from grokfetch.serving.neutral import IGNORED, NEUTRAL

__all__ = ["MOST_STOPS", "MOST_TEXTS", "Completion", "Prompt", "read_completion"]

DEFAULT_TOKENS = 16
"""What OpenAI generates where `max_tokens` is not given."""

MOST_STOPS = 16
"""OpenAI takes 4; evaluation harnesses send a few more."""

MOST_TEXTS = 128
"""Prompts of a request, times `n`."""

Prompt = str | tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A request to `/v1/completions`; fields as OpenAI names them.

    max_tokens: None where it was not given. seed: chosen at random where it was not given.
    include_usage: a stream ends with the usage. every_usage: each of its chunks tells the usage so
    far.
    """

    prompts: tuple[Prompt, ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    stop: tuple[str, ...]
    n: int
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool
    every_usage: bool

    def generations(self, encoded: list[tuple[int, ...]], served: Served) -> list[Generation]:
        """The texts to generate, `n` for each prompt in order, each with a seed of its own.

        Args:
            encoded: the token ids of each of `prompts`.
            served: the model.

        Raises:
            Refused: a prompt is empty, has unknown ids, or is too long.
        """
        return [
            Generation(
                prompt,
                self._room(prompt, served),
                self.temperature,
                self.top_p,
                self.top_k,
                self.seed + index,
                self.logprobs,
                self.echo,
            )
            for prompt in encoded
            for index in range(self.n)
        ]

    def _room(self, prompt: tuple[int, ...], served: Served) -> int:
        """How many tokens a prompt may be continued by."""
        if not prompt:
            raise Refused(
                "the prompt is empty: the model needs a token to start from", param="prompt"
            )
        if not all(0 <= token < served.vocabulary for token in prompt):
            raise Refused(
                f"token ids of this model lie between 0 and {served.vocabulary - 1}", param="prompt"
            )
        room = served.context - len(prompt)
        wanted = min(DEFAULT_TOKENS, max(room, 1)) if self.max_tokens is None else self.max_tokens
        if wanted > room:
            raise Refused(
                f"this model's context is {served.context} tokens, and {len(prompt)} of the prompt "
                f"and {wanted} of the text are asked for",
                param="prompt" if room <= 0 else "max_tokens",
                code="context_length_exceeded",
            )
        return wanted


def read_completion(body: object, served: Served) -> Completion:
    """A request from what its JSON says.

    Raises:
        Refused: it is malformed, or asks for what this server does not do.
    """
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    fields = Fields(body)
    model = fields.string("model")
    if model not in {None, served.name}:
        raise Refused(
            f"the model {model!r:.80} is not served here, {served.name!r} is",
            param="model",
            code="model_not_found",
            status=404,
        )
    fields.string("user")
    fields.neutral(NEUTRAL)
    fields.ignore(*IGNORED)
    seed = fields.integer("seed", -LARGEST)
    stream = fields.flag("stream")
    include_usage, every_usage = _usage_wanted(fields, stream=stream)
    n = fields.integer("n", 1, MOST_TEXTS) or 1
    # So many candidates as choices: nothing is chosen among them.
    fields.neutral({"best_of": (n,)})
    completion = Completion(
        prompts=_prompts(fields),
        max_tokens=fields.integer("max_tokens", 0),
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        top_k=_top_k(fields),
        seed=secrets.randbits(32) if seed is None else seed,
        stop=_stops(fields),
        n=n,
        echo=fields.flag("echo"),
        logprobs=_logprobs(fields, served.logprobs),
        stream=stream,
        include_usage=include_usage,
        every_usage=every_usage,
    )
    fields.nothing_else()
    if len(completion.prompts) * completion.n > MOST_TEXTS:
        raise Refused(f"prompts times n must be at most {MOST_TEXTS}", param="n")
    return completion


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    value = fields.take("prompt")
    if value is None:
        raise Refused("prompt is missing", param="prompt", code="missing_required_parameter")
    if is_text(value):
        return (value,)
    if all_of(value, is_text):
        return tuple(value)
    if all_of(value, lambda one: as_integer(one) is not None):
        return (_ids(value),)
    if all_of(value, lambda one: all_of(one, lambda token: as_integer(token) is not None)):
        return tuple(map(_ids, value))
    texts = [value] if isinstance(value, str) else value
    if all_of(texts, lambda one: isinstance(one, str)):
        refuse("prompt", f"holds half a character, which no text can: {texts!r:.80}")
    return refuse(
        "prompt", "must be a string, a list of strings, token ids, or a list of lists of them"
    )


def _ids(tokens: list[Any]) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(map(is_text, texts)):
        refuse("stop", "must be a string or a list of strings")
    if len(texts) > MOST_STOPS:
        refuse("stop", f"must hold at most {MOST_STOPS} strings")
    # An empty one, which some clients send for none, ends no text.
    return tuple(text for text in texts if text)


def _top_k(fields: Fields) -> int | None:
    # 0 and -1 are what other servers call "all".
    value = fields.integer("top_k", -1)
    return value if value is not None and value > 0 else None


def _logprobs(fields: Fields, most: int) -> int | None:
    value = fields.take("logprobs")
    return None if value is False else Fields({"logprobs": value}).integer("logprobs", 0, most)


def _usage_wanted(fields: Fields, *, stream: bool) -> tuple[bool, bool]:
    """Whether a stream tells the usage at its end, and in each chunk."""
    value = fields.take("stream_options")
    if value is None:
        return False, False
    if not stream:
        refuse("stream_options", "may be given only where stream is true")
    if not isinstance(value, dict):
        refuse("stream_options", "must be an object")
    options = Fields(value)
    include = options.flag("include_usage")
    every = options.flag("continuous_usage_stats")
    # Padding against listeners who count bytes: OpenAI's clients ask for none.
    options.neutral({"include_obfuscation": (False,)})
    options.nothing_else()
    return include, include and every
