"""The response to one request, whole or in chunks, in the format of OpenAI's completions API."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from grokfetch.serving.model import Emission, Served, Tokenizer
from grokfetch.serving.requests import Completion, Prompt
from grokfetch.serving.text import Answer, Piece, Shown, decoded

__all__ = ["Reply", "error_body", "event"]


class Reply:
    """The response to a request.

    Args:
        wanted: the request.
        encoded: the token ids of each of its prompts.
        served: the model.
        tokenizer: its tokenizer.
    """

    def __init__(
        self,
        wanted: Completion,
        encoded: Sequence[Sequence[int]],
        served: Served,
        tokenizer: Tokenizer,
    ) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        self._wanted = wanted
        self._prompt_tokens = sum(map(len, encoded))
        self._answers = [
            self._answer(prompt, tokens, tokenizer)
            for prompt, tokens in zip(wanted.prompts, encoded, strict=True)
            for _ in range(wanted.candidates)
        ]
        self._choices: list[dict[str, Any]] = [
            {"text": "", "index": index, "logprobs": None, "finish_reason": None}
            for index in range(len(self._answers))
        ]

    def _answer(self, prompt: Prompt, tokens: Sequence[int], tokenizer: Tokenizer) -> Answer:
        wanted = self._wanted
        # The text of a truncated prompt is decoded from its tokens.
        text = prompt if isinstance(prompt, str) and wanted.truncate is None else None
        logprobs, before = wanted.logprobs is not None, 0
        if logprobs and not wanted.generation.echo:
            before = len(decoded(tokenizer, tokens) if text is None else text)
        return Answer(
            tokenizer,
            Shown(
                wanted.stop,
                logprobs,
                not wanted.skip_special_tokens,
                wanted.generation.min_tokens,
            ),
            prompt=text,
            before=before,
        )

    @property
    def generated(self) -> int:
        """Tokens so far, of all texts."""
        return sum(answer.generated for answer in self._answers)

    def take(self, index: int, emission: Emission) -> Piece:
        """What an emission adds to a choice; nothing more comes after a `finish_reason`."""
        return self._answers[index].take(emission)

    def add(self, index: int, piece: Piece) -> None:
        """Append a piece to its choice, for `whole`."""
        choice = self._choices[index]
        choice["text"] += piece.text
        choice["finish_reason"] = piece.finish_reason
        if choice["logprobs"] is None:
            choice["logprobs"] = piece.logprobs
        elif piece.logprobs is not None:
            for name, column in piece.logprobs.items():
                choice["logprobs"][name] += column

    def whole(self) -> dict[str, Any]:
        """The response in one piece, with the most probable candidates of each prompt."""
        size, kept = self._wanted.candidates, list(range(len(self._choices)))
        if size > self._wanted.n:
            kept = []
            for first in range(0, len(self._choices), size):
                ranked = sorted(
                    range(first, first + size),
                    key=lambda index: self._answers[index].mean_logprob,
                    reverse=True,
                )
                kept += ranked[: self._wanted.n]
        choices = [{**self._choices[at], "index": index} for index, at in enumerate(kept)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A part of the response."""
        choice = {
            "text": piece.text,
            "index": index,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
        }
        body = {**self._head, "choices": [choice]}
        if self._wanted.include_usage:
            body["usage"] = self._usage() if self._wanted.every_usage else None
        return body

    def last_chunk(self) -> dict[str, Any]:
        """The usage, after all parts."""
        return {**self._head, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self._prompt_tokens + self.generated,
        }


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(data: Mapping[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
