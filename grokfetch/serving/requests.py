"""Requests as OpenAI's completions API describes them, read from JSON. Pure.

Besides OpenAI's fields, those of vLLM's clients are supported. Every refusal names its field. A
field that is unknown, or that asks for something the model cannot do, is refused rather than
ignored.
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
"""What OpenAI generates if `max_tokens` is not given."""

MOST_STOPS = 16
"""OpenAI takes 4; evaluation harnesses send a few more."""

MOST_TEXTS = 128
"""Prompts of a request, times `n` or `best_of`."""

MOST_BIASES = 1024
"""Tokens in `logit_bias`; OpenAI takes 300."""

MOST_DIGITS = 20
"""Digits of a token id in `logit_bias`; Python refuses to parse thousands of digits."""

Prompt = str | tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A request to `/v1/completions`; fields as OpenAI and vLLM name them.

    max_tokens: None if it was not given. generation: the settings common to all its texts; the seed
    is random if it was not given. logprobs: as requested. candidates: texts generated for each
    prompt, of which the `n` best are returned. truncate: None, or how many tokens at the end of a
    prompt are kept; -1 for as many as leave room for the text. include_usage: a stream ends with
    the usage. every_usage: each of its chunks has the usage so far.
    """

    prompts: tuple[Prompt, ...]
    max_tokens: int | None
    generation: Generation
    logprobs: int | None
    stop: tuple[str, ...]
    n: int
    candidates: int
    truncate: int | None
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    every_usage: bool

    def truncated(self, prompt: tuple[int, ...], served: Served) -> tuple[int, ...]:
        """The prompt, truncated to its end as requested."""
        if self.truncate is None:
            return prompt
        room = DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens
        kept = max(served.context - room, 1) if self.truncate < 0 else self.truncate
        return prompt[-kept:]

    def generations(self, encoded: list[tuple[int, ...]], served: Served) -> list[Generation]:
        """The texts to generate, `candidates` for each prompt in order, each with its own seed.

        Args:
            encoded: the token ids of each of `prompts`, from `truncated`.
            served: the model.

        Raises:
            Refused: a prompt is empty, has unknown ids, or is too long.
        """
        return [
            dataclasses.replace(
                self.generation,
                prompt=prompt,
                max_tokens=self._room(prompt, served),
                seed=self.generation.seed + index,
            )
            for prompt in encoded
            for index in range(self.candidates)
        ]

    def _room(self, prompt: tuple[int, ...], served: Served) -> int:
        """How many tokens may follow a prompt."""
        if not prompt:
            raise Refused(
                "the prompt is empty: the model needs a token to start from", param="prompt"
            )
        if not all(0 <= token < served.vocabulary for token in prompt):
            raise Refused(
                f"token ids of this model are from 0 to {served.vocabulary - 1:,}",
                param="prompt",
            )
        room = served.context - len(prompt)
        count = min(DEFAULT_TOKENS, max(room, 1)) if self.max_tokens is None else self.max_tokens
        if count > room:
            raise Refused(
                f"this model's context is {served.context:,} tokens: the prompt has "
                f"{len(prompt):,}, and {count:,} more are asked for",
                param="prompt" if room <= 0 else "max_tokens",
                code="context_length_exceeded",
            )
        return count


def read_completion(body: object, served: Served) -> Completion:
    """A request from its JSON.

    Raises:
        Refused: it is malformed, or asks for something that this server cannot do.
    """
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    fields = Fields(body)
    _check_model(fields, served)
    fields.neutral(NEUTRAL)
    fields.ignore(*IGNORED)
    stream = fields.flag("stream")
    include_usage, every_usage = _usage_wanted(fields, stream=stream)
    n, candidates = _counts(fields, stream=stream)
    max_tokens = _max_tokens(fields)
    logprobs = _logprobs(fields, served.logprobs)
    scored = 0 if logprobs is None and candidates > n else logprobs
    completion = Completion(
        prompts=_prompts(fields),
        max_tokens=max_tokens,
        generation=_generation(fields, served, scored),
        logprobs=logprobs,
        stop=_stops(fields),
        n=n,
        candidates=candidates,
        truncate=_truncate(fields),
        skip_special_tokens=fields.flag("skip_special_tokens", default=True),
        stream=stream,
        include_usage=include_usage,
        every_usage=every_usage,
    )
    fields.nothing_else()
    if len(completion.prompts) * candidates > MOST_TEXTS:
        raise Refused(f"a request may ask for at most {MOST_TEXTS} texts", param="n")
    most = DEFAULT_TOKENS if max_tokens is None else max_tokens
    if completion.generation.min_tokens > most:
        refuse("min_tokens", f"must not be more than max_tokens, which is {most:,}")
    return completion


def _check_model(fields: Fields, served: Served) -> None:
    model = fields.string("model")
    if model not in {None, served.name}:
        raise Refused(
            f"the model {model!r:.80} is not served here, only {served.name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )
    fields.string("user")


def _generation(fields: Fields, served: Served, scored: int | None) -> Generation:
    """The settings common to all texts of a request."""
    seed = fields.integer("seed", -LARGEST)
    return Generation(
        prompt=(),
        max_tokens=0,
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        top_k=_top_k(fields),
        seed=secrets.randbits(32) if seed is None else seed,
        logprobs=scored,
        echo=fields.flag("echo"),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
        logit_bias=_biases(fields, served),
        min_tokens=fields.integer("min_tokens", 0) or 0,
        ignore_eos=fields.flag("ignore_eos"),
    )


def _counts(fields: Fields, *, stream: bool) -> tuple[int, int]:
    """How many texts a prompt is answered with, and of how many they are the best."""
    n = fields.integer("n", 1, MOST_TEXTS)
    best_of = fields.integer("best_of", 1, MOST_TEXTS)
    chosen = n or 1
    candidates = best_of or chosen
    if candidates < chosen:
        refuse("best_of", f"must not be less than n, which is {chosen}")
    if stream and candidates > chosen:
        refuse("best_of", "must equal n where stream is true: the best is known only in the end")
    return chosen, candidates


def _max_tokens(fields: Fields) -> int | None:
    asked_for = fields.integer("max_tokens", 0)
    newer = fields.integer("max_completion_tokens", 0)
    if asked_for is not None and newer is not None and asked_for != newer:
        refuse("max_completion_tokens", f"says {newer:,}, and max_tokens {asked_for:,}")
    return asked_for if newer is None else newer


def _truncate(fields: Fields) -> int | None:
    kept = fields.integer("truncate_prompt_tokens", -1)
    if kept == 0:
        refuse("truncate_prompt_tokens", "must be -1, or at least 1")
    return kept


def _biases(fields: Fields, served: Served) -> dict[int, float]:
    value = fields.take("logit_bias")
    if value in (None, []):
        return {}
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        refuse("logit_bias", f"must be an object of at most {MOST_BIASES:,} members")
    biases = Fields(value)
    by_token = {}
    for name in value:
        digits = name.isascii() and name.isdigit() and len(name) <= MOST_DIGITS
        if not digits or int(name) >= served.vocabulary:
            refuse("logit_bias", f"names {name!r:.40}, which is not a token id of this model")
        by_token[int(name)] = biases.number(name, 0.0, -100.0, 100.0)
    return by_token


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
        refuse("prompt", f"contains half a character (a lone surrogate): {texts!r:.80}")
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
