"""Requests as OpenAI's completions API describes them, read from JSON. Pure.

Every refusal names the field it means. A field that we do not know, or that asks for something the
model cannot do, is refused rather than ignored.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from grokfetch.serving.model import Generation, Served

__all__ = ["MOST_STOPS", "MOST_TEXTS", "Completion", "Prompt", "Refused", "read_completion"]

DEFAULT_TOKENS = 16
"""What OpenAI generates where `max_tokens` is not given."""

MOST_STOPS = 16
"""OpenAI takes 4; evaluation harnesses send a few more."""

MOST_TEXTS = 128
"""Prompts of a request, times `n`."""

LARGEST = 2**63 - 1

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
"""Fields that change the text, with the values at which they do not: we take only those."""


class Refused(Exception):
    """A request that cannot be served.

    Args:
        message: for the person who wrote the client.
        param: the field that is meant.
        code: a word for programs.
        status: of the HTTP response.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


Prompt = str | tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A request to `/v1/completions`; fields as OpenAI names them.

    max_tokens: None where it was not given. seed: chosen at random where it was not given.
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
    fields = _Fields(body)
    model = fields.text("model")
    if model not in {None, served.name}:
        raise Refused(
            f"the model {model!r:.80} is not served here, {served.name!r} is",
            param="model",
            code="model_not_found",
            status=404,
        )
    fields.text("user")
    fields.neutral()
    seed = fields.whole("seed", -LARGEST, LARGEST)
    stream = fields.flag("stream")
    completion = Completion(
        prompts=_prompts(fields),
        max_tokens=fields.whole("max_tokens", 0, LARGEST),
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        top_k=_top_k(fields),
        seed=secrets.randbits(32) if seed is None else seed,
        stop=_stops(fields),
        n=fields.whole("n", 1, MOST_TEXTS) or 1,
        echo=fields.flag("echo"),
        logprobs=_logprobs(fields, served.logprobs),
        stream=stream,
        include_usage=_include_usage(fields, stream=stream),
    )
    fields.nothing_else()
    if len(completion.prompts) * completion.n > MOST_TEXTS:
        raise Refused(f"prompts times n must be at most {MOST_TEXTS}", param="n")
    return completion


class _Fields:
    """The members of a request, each read once."""

    def __init__(self, body: dict[Any, Any]) -> None:
        self._left = dict(body)

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            _refuse(name, "must be a text")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            _refuse(name, "must be true or false")
        return bool(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if not _is_whole(value) or not least <= value <= most:
            _refuse(name, f"must be a whole number between {least} and {most}")
        return int(value)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            _refuse(name, f"must be a number between {least:g} and {most:g}")
        return float(value)

    def neutral(self) -> None:
        for name, values in NEUTRAL.items():
            value = self.take(name)
            if isinstance(value, bool) or value not in values:
                _refuse(name, "is not supported by this server", "unsupported_parameter")

    def nothing_else(self) -> None:
        for name in self._left:
            raise Refused(
                f"unknown field {name!r:.80}", param=f"{name:.80}", code="unknown_parameter"
            )


def _refuse(name: str, why: str, code: str = "invalid_value") -> NoReturn:
    raise Refused(f"{name} {why}", param=name, code=code)


def _is_text(value: object) -> bool:
    """Whether it is a text that can be written: JSON lets half a surrogate pair pass."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompts(fields: _Fields) -> tuple[Prompt, ...]:
    value = fields.take("prompt")
    if value is None:
        raise Refused("prompt is missing", param="prompt", code="missing_required_parameter")
    if _is_text(value):
        return (value,)
    if _all(value, _is_whole):
        return (tuple(value),)
    if _all(value, _is_text):
        return tuple(value)
    if _all(value, lambda one: _all(one, _is_whole)):
        return tuple(tuple(one) for one in value)
    _refuse("prompt", "must be a text, a list of texts, token ids, or a list of lists of them")


def _all(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(fits(one) for one in value)


def _stops(fields: _Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MOST_STOPS:
        _refuse("stop", f"must be a text, or a list of up to {MOST_STOPS} texts")
    if not all(_is_text(text) and text for text in texts):
        _refuse("stop", "must hold texts that are not empty")
    return tuple(texts)


def _top_k(fields: _Fields) -> int | None:
    # 0 and -1 are what other servers call "all".
    value = fields.whole("top_k", -1, LARGEST)
    return value if value is not None and value > 0 else None


def _logprobs(fields: _Fields, most: int) -> int | None:
    value = fields.take("logprobs")
    if value is None or value is False:
        return None
    if not _is_whole(value) or not 0 <= value <= most:
        _refuse("logprobs", f"must be a whole number between 0 and {most}")
    return int(value)


def _include_usage(fields: _Fields, *, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not stream:
        _refuse("stream_options", "may be given only where stream is true")
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        _refuse("stream_options", "must be an object with the member include_usage")
    return _Fields(value).flag("include_usage")
